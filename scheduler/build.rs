//! Generates the client of etcd from `proto/`, without a protoc binary.

fn main() {
    println!("cargo::rerun-if-changed=proto");
    let descriptors = protox::compile(["proto/etcd.proto"], ["proto"]).expect("etcd's API compiles");
    tonic_prost_build::configure()
        .build_server(false)
        .compile_fds(descriptors)
        .expect("code is generated from etcd's API");
}
