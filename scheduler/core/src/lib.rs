//! Cluster state, placement and lifecycle as pure functions.
//!
//! [`transition::handle`] takes the [`state::State`], an [`event::Event`], the time and a random number
//! generator, and makes one [`change::Revision`]: a list of keys with their old and new values. The shell
//! (package `scheduler`) makes it durable and shows it to nodes and load balancers, or takes it back with
//! [`state::State::undo`]. This crate deliberately knows no clock, file, socket or async runtime.
#![forbid(unsafe_code)]

pub mod assignment;
pub mod authority;
pub mod batch;
pub mod change;
pub mod claim;
pub mod cluster;
pub mod countable;
pub mod deploy;
mod draft;
pub mod drain;
pub mod ending;
pub mod endpoint;
pub mod event;
pub mod failure;
pub mod history;
pub mod job;
pub mod lease;
pub mod name;
pub mod node;
pub mod ownership;
pub mod placement;
pub mod plan;
pub mod pod;
pub mod quantity;
pub mod renewal;
pub mod restore;
pub mod rollout;
pub mod session;
pub mod state;
pub mod tenure;
#[cfg(test)]
mod testing;
pub mod time;
pub mod token;
pub mod transition;
pub mod version;
pub mod watch;
