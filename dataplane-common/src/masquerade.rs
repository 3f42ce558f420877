//! Masquerade: IPv4 packets of pods leave with the node's address, replies find their way back (NAPT44). IPv6
//! packets of pods whose addresses are unique local do so, too, on their way to the internet (NAPT66).
//!
//! Mapping is endpoint-independent (RFC 4787 REQ-1, RFC 5382 REQ-1): one inside address and port has one
//! outside port, whatever the remote. Filtering is address-dependent, or endpoint-independent when asked for
//! (RFC 4787 REQ-8). Ports come from blocks that belong to one pod each ([`block`]). It is no firewall and
//! knows no application protocol.
//!
//! # Tables
//! | map | key | value | read |
//! | --- | --- | --- | --- |
//! | `NAT_SESSIONS`, hash | [`SessionKey`] | [`Session`] | every packet |
//! | `NAT_PORTS`, array | [`port_index`] | [`owner`] | every packet that comes in |
//! | `NAT_MAPPINGS`, hash | [`MappingKey`] | [`Mapping`] | new flows |
//! | `NAT_BLOCKS`, array | block | [`Block`] | new flows |
//! | `NAT_SOURCES`, LPM trie | remote | [`Source`] | new flows of a node with several addresses |
//! | `NAT_FRAGMENTS`, LRU hash | [`FragmentKey`] | [`Fragment`] | fragments |
//! | `NAT_KEPT`, LRU hash | [`KeptKey`] | [`Kept`] | fragments that come before their first |
//!
//! The engine is one for both families ([`Family`]). `NAT_PORTS` and `NAT_BLOCKS` are for both: a pod's block is
//! its own at each of the node's addresses. IPv6 has tables of its own for what holds addresses (`NAT6_SESSIONS`,
//! `NAT6_MAPPINGS`, `NAT6_FRAGMENTS`, `NAT6_KEPT`), and two more:
//!
//! | map | key | value | read |
//! | --- | --- | --- | --- |
//! | `PODS6`, hash | the pod's address | its private IPv4 address | every packet of a pod to the internet |
//! | `NAT6_DIRECT`, LPM trie | remote | [`Direct`] | new flows, and all that has no flow |
//!
//! The programs make flows, and reuse the port of a flow that has ended; the agent's sweep frees the rest.
//! With the agent gone, flows of one inside port and one remote recycle themselves; an inside port that has
//! written to several remotes keeps its outside port until the sweep comes back.

pub mod block;
mod claim;
mod error;
mod family;
mod flow;
pub mod fragment;
mod hairpin;
mod inward;
#[cfg(any(test, feature = "memory"))]
pub mod memory;
mod port;
mod segment;
mod session;
mod translate;

pub use block::{BLOCKS_MAX, Block, Pool};
pub use family::{Family, Header, Ipv4, Ipv6, Part, port_index};
pub use flow::{egress, is_direct};
pub use fragment::{KEPT_MAX, Kept, KeptKey};
pub use hairpin::{Hairpin, hairpin};
pub use inward::ingress;
pub use port::{OWNER_FREE, is_owned_by, owner, owner_inside};
pub use session::{
    ICMP_TIMEOUT_NS, SESSION_REFRESH_NS, State, TCP_CLOSED_RECLAIM_NS, TCP_ESTABLISHED_TIMEOUT_NS,
    TCP_TRANSITORY_TIMEOUT_NS, TcpFlags, UDP_DNS_TIMEOUT_NS, UDP_TIMEOUT_NS, expired, timeout_ns,
};
pub use translate::PacketMut;

use crate::{counter::Counter, ipv4::Address, ipv6, packet::Packet};

/// Capacity of the map `NAT_SESSIONS`.
///
/// 16 MB of buckets; 96 bytes more for each session that there is, 100 MB at most. Written by `uplink_egress`
/// (new, state, time), `uplink_ingress` (state, time) and the agent's sweep (removal). When full, a new flow
/// is dropped and counted; nothing live is evicted.
pub const SESSIONS_MAX: u32 = 1_048_576;

/// Capacity of the map `NAT_MAPPINGS`: one for each outside port of each protocol, so it is never full
/// before the ports are.
///
/// Allocated in full: 196,608 x 80 bytes + 4 MB of buckets = 20 MB. Written by `uplink_egress` and the
/// agent's sweep.
pub const MAPPINGS_MAX: u32 = 3 * 65_536;

/// Capacity of the map `NAT_PORTS`: 65,536 ports for each of TCP, UDP and ICMP (whose ports are the
/// identifiers of echoes), of each family; 8 bytes each = 3 MB.
///
/// Written by `uplink_egress` and, mapped into its memory, the agent's sweep, both by
/// compare-and-exchange.
pub const PORTS_MAX: u32 = 6 * 65_536;

/// Capacity of the map `NAT_FRAGMENTS`: datagrams in fragments that are on their way.
///
/// LRU hash, 8,192 x 80 bytes = 0.7 MB. Written and read by both programs. When full, the datagram that was
/// longest without a fragment is forgotten; its later fragments are kept as if its first had not come.
pub const FRAGMENTS_MAX: u32 = 8_192;

/// Capacity of the map `NAT6_SESSIONS`.
///
/// 4 MB of buckets; 128 bytes more for each session that there is, 34 MB at most. Written and read as
/// `NAT_SESSIONS`, with the same behaviour when full.
pub const SESSIONS6_MAX: u32 = 262_144;

/// Capacity of the map `NAT6_MAPPINGS`: one for each outside port of each protocol.
///
/// 4 MB of buckets; 96 bytes more for each mapping that there is, 19 MB at most. Written and read as
/// `NAT_MAPPINGS`.
pub const MAPPINGS6_MAX: u32 = 3 * 65_536;

/// Capacity of the map `NAT6_FRAGMENTS`.
///
/// LRU hash, 8,192 x 120 bytes = 1 MB. Written and read as `NAT_FRAGMENTS`, with the same behaviour when full.
pub const FRAGMENTS6_MAX: u32 = 8_192;

/// Capacity of the map `NAT6_DIRECT`: prefixes that pods reach with their own addresses.
///
/// LPM trie, allocated entry by entry: 64 x about 100 bytes. Written by the agent, read by `uplink_egress` and
/// `uplink_backstop`. When full, further prefixes are reached translated.
pub const DIRECT_MAX: u32 = 64;

/// Capacity of the map `PODS6`: the pods of one node.
///
/// Hash of the pod's address to its private IPv4 address, allocated in full: 16,384 x 72 bytes = 1.2 MB.
/// Written by the agent with the pod's guard, read by `uplink_egress` and `pod_guard`. When full, a further pod is
/// refused with an error.
pub const PODS6_MAX: u32 = crate::guard::GUARD_MAX;

/// Ports tried for a new flow before it is dropped.
pub const PROBES_MAX: u32 = 32;

/// Capacity of the map `NAT_TAILS`, a program array: what the programs on interfaces hand rare packets over to.
///
/// Written by the agent. Without an entry, fragments are dropped on their way out and left to the host on their way in, and
/// what a pod sends to the node is the host's.
pub const TAILS_MAX: u32 = 4;
/// The place of `fragment_egress`.
pub const TAIL_FRAGMENT_EGRESS: u32 = 0;
/// The place of `fragment_ingress`.
pub const TAIL_FRAGMENT_INGRESS: u32 = 1;
/// The place of `hairpin_ipv4`.
pub const TAIL_HAIRPIN_IPV4: u32 = 2;
/// The place of `hairpin_ipv6`.
pub const TAIL_HAIRPIN_IPV6: u32 = 3;

/// Addresses of a node's uplink that packets may leave with.
pub const NODES_MAX: usize = 4;

/// Capacity of the map `NAT_SOURCES`: prefixes for which packets leave with another address than the first.
///
/// LPM trie, allocated entry by entry: 64 x about 100 bytes. Written by the agent, read by `uplink_egress`.
/// When full, remotes of further prefixes see the first address.
pub const SOURCES_MAX: u32 = 64;

/// The only value of the map `MASQUERADE`, an array of one. Written by the agent.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// The addresses that packets leave with. The first is for remotes without an entry in `NAT_SOURCES`;
    /// unused ones are zero.
    pub nodes: [Address; NODES_MAX],
    /// The range whose packets are translated.
    pub pod_network: Address,
    /// The mask of that range.
    pub pod_mask: Address,
    /// The ports that pods get.
    pub pool: Pool,
    /// Whom a mapping lets in besides those who were written to; one of [`Config::ADDRESS_DEPENDENT`] and
    /// [`Config::ENDPOINT_INDEPENDENT`].
    pub filtering: u32,
    /// 1: translate. 0: pass everything.
    pub enabled: u32,
    /// The address that IPv6 packets to the internet leave with. Without one they do not leave.
    pub node6: ipv6::Address,
    /// The first half of the pods' IPv6 addresses, in wire order.
    pub pods6: u64,
    /// 1: translate IPv6, too. 0: pass it.
    pub exit: u32,
    /// Zero.
    pub zero: u32,
}

impl Config {
    /// Other ports of an address that was written to (RFC 4787 section 5).
    pub const ADDRESS_DEPENDENT: u32 = 0;
    /// Everybody.
    pub const ENDPOINT_INDEPENDENT: u32 = 1;

    /// A masquerade that passes everything.
    pub const OFF: Config = Config {
        nodes: [0; NODES_MAX],
        pod_network: 0,
        pod_mask: 0,
        pool: Pool::EMPTY,
        filtering: Self::ADDRESS_DEPENDENT,
        enabled: 0,
        node6: ipv6::Address::UNSPECIFIED,
        pods6: 0,
        exit: 0,
        zero: 0,
    };

    /// Whether packets leave with `address`.
    #[inline(always)]
    pub fn is_node(&self, address: Address) -> bool {
        address != 0 && self.nodes.contains(&address)
    }

    /// Whether `address` is of the range that is translated.
    #[inline(always)]
    pub fn is_pod(&self, address: Address) -> bool {
        address & self.pod_mask == self.pod_network
    }

    /// The number of a pod in the range: what tells it from the node's others.
    #[inline(always)]
    pub fn pod_number(&self, pod: Address) -> u32 {
        u32::from_be(pod & !self.pod_mask)
    }
}

/// Key of `NAT_SESSIONS`: one inside address and port with one remote. All in wire order.
///
/// TCP has one session for each connection. UDP has one for each address of a remote, whatever its port:
/// that is what filtering asks for. Of an inside TCP port that has several remotes, those that came later
/// have one with port 0, too, which says that their address was written to.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionKey<F: Family = Ipv4> {
    /// The remote's address.
    pub remote: F::Address,
    /// The pod's private address.
    pub inside: Address,
    /// The pod's port, or the identifier of its echo.
    pub inside_port: u16,
    /// The remote's TCP port; 0 for UDP and ICMP.
    pub remote_port: u16,
    /// TCP, UDP or ICMP.
    pub protocol: u8,
    /// Zero.
    pub zero: [u8; 3],
    /// Zero.
    pub pad: F::Pad,
}

impl<F: Family> SessionKey<F> {
    /// The key of the session's mapping.
    #[inline(always)]
    pub fn mapping(&self) -> MappingKey {
        MappingKey { inside: self.inside, inside_port: self.inside_port, protocol: self.protocol, zero: 0 }
    }
}

/// Value of `NAT_SESSIONS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Session<F: Family = Ipv4> {
    /// When a packet was last seen (CLOCK_MONOTONIC), at most [`SESSION_REFRESH_NS`] behind.
    pub last_seen_ns: u64,
    /// The node's address.
    pub outside: F::Address,
    /// The port at that address, wire order.
    pub outside_port: u16,
    /// How far a TCP connection has come; a [`State`].
    pub state: State,
    /// Zero.
    pub zero: u8,
    /// Zero.
    pub pad: F::Pad,
}

/// Key of `NAT_MAPPINGS`: an inside address and port. In wire order.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MappingKey {
    /// The pod's private address.
    pub inside: Address,
    /// The pod's port, or the identifier of its echo.
    pub inside_port: u16,
    /// TCP, UDP or ICMP.
    pub protocol: u8,
    /// Zero.
    pub zero: u8,
}

/// Value of `NAT_MAPPINGS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping<F: Family = Ipv4> {
    /// When it was made (CLOCK_MONOTONIC).
    pub created_ns: u64,
    /// The first remote, wire order. With it goes the only session, unless `shared`.
    pub remote: F::Address,
    /// The first remote's port in [`SessionKey`].
    pub remote_port: u16,
    /// The port at the node's addresses, wire order.
    pub outside_port: u16,
    /// 1 once there was a second session: then only the sweep can tell whether all have ended.
    pub shared: u32,
    /// Zero.
    pub zero: u32,
    /// Zero.
    pub pad: F::Pad,
}

/// Key of `NAT_FRAGMENTS`: what the fragments of a datagram have in common (RFC 791 section 3.2, RFC 8200 section
/// 4.5), before translation.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FragmentKey<F: Family = Ipv4> {
    /// Source address, wire order.
    pub source: F::Address,
    /// Destination address, wire order.
    pub destination: F::Address,
    /// Identification, wire order.
    pub identification: u32,
    /// Protocol; 0 for IPv6, where fragments may differ in it.
    pub protocol: u8,
    /// Zero.
    pub zero: [u8; 3],
}

/// Value of `NAT_FRAGMENTS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fragment<F: Family = Ipv4> {
    /// The address that replaces the source (out) or the destination (in). Of a datagram as it has left, the pod that
    /// sent it.
    pub address: F::Address,
    /// Its identification on the other side, wire order.
    pub identification: u32,
    /// When its first came: CLOCK_MONOTONIC in units of 2^20 ns, modulo 2^32.
    pub came: u32,
}

/// Value of `NAT_SOURCES`, whose key is as the kernel wants it: the length of the prefix, then the address.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source {
    /// The address that packets to the prefix leave with, wire order.
    pub address: Address,
}

/// Value of `NAT6_DIRECT`, whose key is as that of `NAT_SOURCES`: packets to the prefix are not translated.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Direct {
    /// Zero.
    pub zero: u32,
}

/// A socket that the host may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostSocket<F: Family = Ipv4> {
    /// TCP, UDP or ICMP, which has no sockets.
    pub protocol: u8,
    /// The host's address, wire order.
    pub address: F::Address,
    /// The host's port, wire order.
    pub port: u16,
    /// Whom it may talk to, wire order.
    pub remote: F::Address,
    /// The port there, wire order.
    pub remote_port: u16,
}

const _: () = assert!(size_of::<Config>() == 72 && size_of::<Source>() == 4 && size_of::<Direct>() == 4);
const _: () = assert!(size_of::<SessionKey>() == 16 && size_of::<Session>() == 16);
const _: () = assert!(size_of::<MappingKey>() == 8 && size_of::<Mapping>() == 24);
const _: () = assert!(size_of::<FragmentKey>() == 16 && size_of::<Fragment>() == 12);
const _: () = assert!(size_of::<SessionKey<Ipv6>>() == 32 && size_of::<Session<Ipv6>>() == 32);
const _: () = assert!(size_of::<Mapping<Ipv6>>() == 40);
const _: () = assert!(size_of::<FragmentKey<Ipv6>>() == 40 && size_of::<Fragment<Ipv6>>() == 24);

/// What became of an insertion that does not overwrite.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inserted {
    /// It is in.
    Done,
    /// The key was there before.
    Exists,
    /// There was no room.
    Full,
}

/// What both families have in common: the clock, the counters, the ports and their blocks.
pub trait Common {
    /// CLOCK_MONOTONIC, some milliseconds behind at most.
    fn now_ns(&mut self) -> u64;
    /// A random number.
    fn random(&mut self) -> u32;
    /// Counts.
    fn count(&mut self, counter: Counter);
    /// The owner of a port.
    fn port(&mut self, index: u32) -> u64;
    /// Gives a port from one owner to another; false if it was not `from`'s.
    fn claim_port(&mut self, index: u32, from: u64, to: u64) -> bool;
    /// A block of ports in its place.
    fn block(&mut self, block: u32) -> Option<&mut Block>;
    /// Gives a block from one owner to another; false if it was not `from`'s.
    fn claim_block(&mut self, block: u32, from: u64, to: u64) -> bool;
}

/// The maps of a family and the host's sockets, as the logic sees them.
pub trait Tables<F: Family>: Common {
    /// The session in its place.
    fn session(&mut self, key: &SessionKey<F>) -> Option<&mut Session<F>>;
    /// Inserts a session, never over another.
    fn insert_session(&mut self, key: &SessionKey<F>, session: &Session<F>) -> Inserted;
    /// Removes a session, if there is one.
    fn remove_session(&mut self, key: &SessionKey<F>);
    /// The mapping in its place.
    fn mapping(&mut self, key: &MappingKey) -> Option<&mut Mapping<F>>;
    /// Inserts a mapping, never over another.
    fn insert_mapping(&mut self, key: &MappingKey, mapping: &Mapping<F>) -> Inserted;
    /// Removes a mapping, if there is one.
    fn remove_mapping(&mut self, key: &MappingKey);
    /// The node's address for a remote that does not see the first one.
    fn source(&mut self, remote: F::Address) -> Option<F::Address>;
    /// Whether pods reach the remote with their own addresses.
    fn is_direct(&mut self, remote: F::Address) -> bool;
    /// The private address of the pod with this address.
    fn inside(&mut self, address: F::Address) -> Option<Address>;
    /// The address of the pod with this private address.
    fn pod(&mut self, inside: Address) -> Option<F::Address>;
    /// Whether the host has a socket that would take the remote's packets: a connected or a listening one.
    fn host_has(&mut self, socket: &HostSocket<F>) -> bool;
    /// Where the fragments of a datagram go.
    fn fragment(&mut self, key: &FragmentKey<F>) -> Option<Fragment<F>>;
    /// Remembers where they go.
    fn insert_fragment(&mut self, key: &FragmentKey<F>, fragment: &Fragment<F>);
    /// When a fragment came that is kept.
    fn kept(&mut self, key: &KeptKey<F>) -> Option<u64>;
    /// Keeps the packet at hand, never in the place of another.
    fn keep<P: Packet + ?Sized>(&mut self, key: &KeptKey<F>, packet: &P, now_ns: u64) -> Inserted;
    /// Forgets a fragment, if it is kept.
    fn remove_kept(&mut self, key: &KeptKey<F>);
}

/// What a program does with a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// On its way, as it is or translated. Counted.
    Next,
    /// Dropped. Counted.
    Drop,
    /// A fragment, with which [`fragment`] goes on. A first one is translated, or the host's, and counted; a later one is
    /// neither.
    Fragment,
}

#[cfg(test)]
mod tests;
