//! Generates the messages and services from `proto/`, without a protoc binary.

use std::{env, fs, path::PathBuf};

use prost::Message as _;

const FILES: [&str; 6] = [
    "proto/hextet/v1/types.proto",
    "proto/hextet/v1/cluster.proto",
    "proto/hextet/v1/deploy.proto",
    "proto/hextet/v1/history.proto",
    "proto/hextet/v1/node.proto",
    "proto/hextet/v1/endpoints.proto",
];

fn main() {
    println!("cargo::rerun-if-changed=proto");
    let descriptors = protox::compile(FILES, ["proto"]).expect("the contract compiles");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec()).expect("OUT_DIR is writable");
    tonic_prost_build::configure()
        .btree_map(".")
        .compile_fds(descriptors)
        .expect("code is generated from the contract");
}
