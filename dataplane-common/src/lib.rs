//! Packet logic and map layouts shared by the BPF programs and the host.
//!
//! Everything here is pure: no clock, no map, no allocation. The programs in `dataplane-ebpf` bring the
//! packet and the maps; unit tests and differential tests bring byte slices. The same source is compiled
//! for both.
//!
//! # Byte order
//! Addresses, ports and whole header fields are integers *in wire order*: the bytes lie in memory as they
//! lie in the packet, so that reading, comparing and hashing them costs no swap. Such a field is called
//! `wire` where it could be mistaken. Lengths and counts are in host order.
#![cfg_attr(not(test), no_std)]
#![warn(unsafe_op_in_unsafe_fn)]

#[cfg(all(feature = "memory", not(test)))]
extern crate std;

pub mod checksum;
pub mod counter;
pub mod ethernet;
pub mod guard;
pub mod ipv4;
pub mod ipv6;
pub mod masquerade;
pub mod ndp;
pub mod packet;
pub mod pod_link;
#[cfg(feature = "user")]
mod user;

/// The version of every map's name, key, value and meaning. Pins live below a folder of this name, so that
/// an agent of another version never adopts maps that it would misread.
pub const LAYOUT_VERSION: u32 = 2;
