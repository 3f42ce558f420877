//! The protobuf contract of the control plane, the code generated from it, and a client that speaks it.
//!
//! This crate alone is what the author of a load balancer needs. It deliberately holds no policy: what a
//! message means to the cluster is decided in `scheduler-core`.
//!
//! # Example
//! Follows the pod addresses of one group. The token comes from `netctl token --for lb --select hello/web`.
//! ```no_run
//! use hextet_api::{connect, endpoints, v1::endpoints_client::EndpointsClient};
//!
//! # async fn follow() -> Result<(), Box<dyn std::error::Error>> {
//! let token = "hx1-...".parse()?;
//! let key = connect::Key::generate()?;
//! let credentials = connect::enroll(&token, &key, connect::Wish::default()).await?.credentials;
//! credentials.save("/var/lib/my-balancer/credentials.json".as_ref())?; // A token is good only once.
//!
//! let mut set = endpoints::EndpointSet::default();
//! let (answers, requests) = tokio::sync::mpsc::channel(16);
//! answers.send(set.subscribe("hello", "web", "my-balancer")).await?;
//! let requests = tokio_stream::wrappers::ReceiverStream::new(requests);
//! let mut client = EndpointsClient::new(connect::mutual_tls(&credentials).await?);
//! let mut watch = client.watch(requests).await?.into_inner();
//! while let Some(message) = watch.message().await? {
//!     let Some(response) = message.response else { continue };
//!     if set.apply(response)?.is_some() {
//!         set.ready().for_each(|endpoint| println!("{}", endpoint.address));
//!         answers.send(endpoints::ack(set.revision())).await?;
//!     }
//! }
//! # Ok(())
//! # }
//! ```
//! A certificate is good for a year: [`connect::renew_kept`] replaces it when [`connect::Credentials::is_due`] says so.
//! `lb-examples/nginx` is a whole program of this kind.
#![forbid(unsafe_code)]

#[allow(missing_docs, clippy::all, reason = "generated; the contract documents it")]
pub mod v1 {
    tonic::include_proto!("hextet.v1");
}

pub mod address;
pub mod connect;
pub mod endpoints;
pub mod token;

/// The contract as an encoded `FileDescriptorSet`, for gRPC reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// The metadata of an ALREADY_EXISTS answer that says what is taken: `name` or `subnet` by Enroll, `machine` by Attach.
pub const TAKEN: &str = "hextet-taken";

/// The value of [`TAKEN`] for a machine with the name and key of a node for which another one speaks.
pub const TAKEN_MACHINE: &str = "machine";

/// The metadata of the same answer that says how many milliseconds the other's lease runs if that one is dead.
pub const TAKEN_FOR_MS: &str = "hextet-taken-for-ms";

/// The metadata of a PERMISSION_DENIED answer to a node that somebody deleted.
pub const DELETED: &str = "hextet-deleted";

/// The port the server listens on when none is given.
pub const DEFAULT_PORT: u16 = 4679;

/// The server's Unix socket when none is given.
pub const DEFAULT_SOCKET: &str = "/run/hextet/server.sock";
