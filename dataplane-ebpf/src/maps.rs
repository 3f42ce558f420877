//! The maps, pinned by name. Their layouts, capacities and memory are documented beside the types in
//! `dataplane-common`.

use aya_ebpf::{
    macros::map,
    maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, ProgramArray},
};
use dataplane_common::{
    counter::{COUNTERS_MAX, Counter},
    guard::{self, GUARD_MAX},
    ipv4::Address as Address4,
    ipv6::Address,
    masquerade::{
        BLOCKS_MAX, Block, Config, DIRECT_MAX, Direct, FRAGMENTS_MAX, FRAGMENTS6_MAX, Fragment, FragmentKey,
        Ipv4, Ipv6, KEPT_MAX, Kept, KeptKey, MAPPINGS_MAX, MAPPINGS6_MAX, Mapping, MappingKey, PODS6_MAX,
        PORTS_MAX, SESSIONS_MAX, SESSIONS6_MAX, SOURCES_MAX, Session, SessionKey, Source, TAILS_MAX,
    },
    ndp::{NDP_PODS_MAX, PodMac},
    pod_link::{PODS_MAX, PodLink},
};

/// Memory is taken entry by entry.
const BPF_F_NO_PREALLOC: u32 = 1;
/// The agent maps `NAT_PORTS` and `NAT_BLOCKS` into its memory.
const BPF_F_MMAPABLE: u32 = 1 << 10;

/// Local pods and the MAC address to answer with.
#[map]
pub(crate) static NDP_PODS: HashMap<Address, PodMac> = HashMap::pinned(NDP_PODS_MAX, 0);

/// What may come from an interface.
#[map]
pub(crate) static GUARD: HashMap<u32, guard::Entry> = HashMap::pinned(GUARD_MAX, 0);

/// What is translated.
#[map]
pub(crate) static MASQUERADE: Array<Config> = Array::pinned(1, 0);

/// One inside port with one remote.
#[map]
pub(crate) static NAT_SESSIONS: HashMap<SessionKey, Session> =
    HashMap::pinned(SESSIONS_MAX, BPF_F_NO_PREALLOC);

/// Inside ports and their outside ports.
#[map]
pub(crate) static NAT_MAPPINGS: HashMap<MappingKey, Mapping> = HashMap::pinned(MAPPINGS_MAX, 0);

/// Outside ports and their owners.
#[map]
pub(crate) static NAT_PORTS: Array<u64> = Array::pinned(PORTS_MAX, BPF_F_MMAPABLE);

/// Blocks of outside ports.
#[map]
pub(crate) static NAT_BLOCKS: Array<Block> = Array::pinned(BLOCKS_MAX, BPF_F_MMAPABLE);

/// Prefixes for which packets leave with another address than the first.
#[map]
pub(crate) static NAT_SOURCES: LpmTrie<Address4, Source> = LpmTrie::pinned(SOURCES_MAX, BPF_F_NO_PREALLOC);

/// The links of pods by their IPv4 addresses.
#[map]
pub(crate) static PODS: HashMap<Address4, PodLink> = HashMap::pinned(PODS_MAX, 0);

/// Where the later fragments of a datagram go.
#[map]
pub(crate) static NAT_FRAGMENTS: LruHashMap<FragmentKey, Fragment> = LruHashMap::pinned(FRAGMENTS_MAX, 0);

/// Fragments that came before their first.
#[map]
pub(crate) static NAT_KEPT: LruHashMap<KeptKey<Ipv4>, Kept> = LruHashMap::pinned(KEPT_MAX, 0);

/// The programs for rare packets.
#[map]
pub(crate) static NAT_TAILS: ProgramArray = ProgramArray::pinned(TAILS_MAX, 0);

/// Room for a fragment that is about to be kept, and for a first one.
#[map]
pub(crate) static NAT_KEEPING: PerCpuArray<Kept> = PerCpuArray::pinned(2, 0);

/// One inside port with one remote, of IPv6.
#[map]
pub(crate) static NAT6_SESSIONS: HashMap<SessionKey<Ipv6>, Session<Ipv6>> =
    HashMap::pinned(SESSIONS6_MAX, BPF_F_NO_PREALLOC);

/// Inside ports and their outside ports, of IPv6.
#[map]
pub(crate) static NAT6_MAPPINGS: HashMap<MappingKey, Mapping<Ipv6>> =
    HashMap::pinned(MAPPINGS6_MAX, BPF_F_NO_PREALLOC);

/// Where the later fragments of an IPv6 datagram go.
#[map]
pub(crate) static NAT6_FRAGMENTS: LruHashMap<FragmentKey<Ipv6>, Fragment<Ipv6>> =
    LruHashMap::pinned(FRAGMENTS6_MAX, 0);

/// Fragments of IPv6 that came before their first.
#[map]
pub(crate) static NAT6_KEPT: LruHashMap<KeptKey<Ipv6>, Kept> = LruHashMap::pinned(KEPT_MAX, 0);

/// Prefixes that pods reach with their own IPv6 addresses.
#[map]
pub(crate) static NAT6_DIRECT: LpmTrie<Address, Direct> = LpmTrie::pinned(DIRECT_MAX, BPF_F_NO_PREALLOC);

/// The private IPv4 addresses of pods by their IPv6 addresses.
#[map]
pub(crate) static PODS6: HashMap<Address, Address4> = HashMap::pinned(PODS6_MAX, 0);

/// One number per verdict and per reason of a drop.
#[map]
pub(crate) static COUNTERS: PerCpuArray<u64> = PerCpuArray::pinned(COUNTERS_MAX, 0);

/// Not 0: rare events are logged. Written by the agent.
#[map]
pub(crate) static LOG: Array<u32> = Array::pinned(1, 0);

/// Counts on this CPU.
#[inline(always)]
pub(crate) fn count(counter: Counter) {
    if let Some(n) = COUNTERS.get_ptr_mut(counter as u32) {
        // SAFETY: the pointer is to this CPU's element of the map, which nobody else writes; programs of
        // one CPU do not interrupt each other on this hook but for ingress over egress, which can at
        // worst lose a count.
        unsafe { *n += 1 }
    }
}
