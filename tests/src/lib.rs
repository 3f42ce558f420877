//! The testbed (a small internet of network namespaces), the demo and what scenarios need.
//!
//! Everything here drives `netctl` from outside, as a user would: no crate of this workspace is linked, so
//! that a scenario can only see what a user can see. `docs/testing.md` has the map and the addresses.

pub mod balancer;
pub mod capture;
pub mod cluster;
pub mod command;
pub mod demo;
pub mod echo;
pub mod frame;
pub mod interrupt;
pub mod jobs;
pub mod lan;
pub mod machine;
pub mod meter;
pub mod moved_clock;
pub mod netns;
pub mod probe;
pub mod process;
pub mod progress;
pub mod report;
pub mod scenario;
pub mod status;
pub mod testbed;
pub mod topology;
pub mod wait;
pub mod walk;

pub use cluster::Pod;
pub use scenario::{Needs, scenario};
pub use testbed::{Options, Testbed};
pub use wait::{scaled, wait_until};
