//! The control plane: store, certificates, gRPC services.
//!
//! The shell around `scheduler-core`: it holds the file, the sockets, the clock and the tasks, and decides
//! nothing about jobs, pods or nodes. One thread (`writer`) owns the state and makes each revision durable
//! before anybody sees it; everything else reads snapshots.
#![forbid(unsafe_code)]

mod access;
mod ahead;
mod audit;
mod auth;
pub mod backup;
mod claim;
mod clock;
mod compaction;
pub mod convert;
mod election;
pub mod etcd;
mod follower;
pub mod founding;
mod front;
mod happenings;
mod history;
mod hub;
mod identity;
mod lease_stream;
mod logs;
mod mutex;
mod net;
pub mod pki;
mod put_back;
mod questions;
mod read_only;
mod remains;
mod rotation;
pub mod server;
mod service;
mod session;
mod several;
mod shown;
mod sorry;
pub mod store;
mod term;
mod timers;
mod tls;
mod vouched;
mod writer;

#[cfg(test)]
#[path = "../tests/support/etcd.rs"]
mod etcd_process;
