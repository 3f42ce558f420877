//! Desired and observed state of a node's kernel, and the plan between them.
//!
//! [`plan`] is a pure function: what the node wants ([`Desired`]) and what its kernel holds ([`Observed`]) go in,
//! a list of operations ([`Op`]) comes out, and applying the list to the kernel makes the next plan empty. The text
//! of an operation is what a network engineer would have typed, and it is the same text in logs, in
//! `netctl node plan` and in tests.
//!
//! The crate knows no netlink, no file and no clock. `dataplane` reads the kernel into an [`Observed`] and carries
//! out each [`Op`].

#![forbid(unsafe_code)]

pub mod announce;
mod desired;
mod diff;
mod object;
mod observed;
mod op;
mod plan;
mod repair;
mod wanted;

pub use desired::{Desired, MasqueradeBackend, NdpBackend, Pod, Uplink};
pub use object::{
    Address, Exit, Filtering, Guard, Hop, Ipv6Exit, Link, Mac, Masquerade, Neighbour, NftExit, NftTable,
    Program, Route, UnknownExit, UnknownFiltering,
};
pub use observed::{Observed, ObservedBpf, ObservedPod, ObservedUplink, ProtocolName, Stack};
pub use op::{Action, Op, Place};
pub use plan::{plan, plan_teardown};
pub use repair::repairs;
pub use wanted::{node_sysctl_keys, pod_sysctl_keys, veth_sysctl_keys};

/// The route protocol number that marks routes, addresses and proxied neighbours as Hextet's.
pub const PROTOCOL: u8 = 118;

/// The name of [`PROTOCOL`] in `ip route show proto hextet`.
pub const PROTOCOL_NAME: &str = "hextet";

/// The name of the pod's side of its link.
pub const POD_IF: &str = "eth0";

/// The gateway of every pod: the host side of its link.
pub const GATEWAY: std::net::Ipv6Addr = std::net::Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);

/// Metric of the unreachable routes: behind everything that anybody routes there.
pub const UNREACHABLE_METRIC: u32 = u32::MAX;
