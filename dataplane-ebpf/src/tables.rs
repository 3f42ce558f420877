//! The masquerade's tables: maps, clock and the host's sockets behind the trait of `dataplane-common`.

use core::mem::zeroed;

use aya_ebpf::{
    EbpfContext as _,
    bindings::{__sk_buff, BPF_NOEXIST, bpf_sock_tuple},
    helpers::{
        bpf_get_prandom_u32, bpf_ktime_get_coarse_ns, bpf_sk_lookup_udp, bpf_sk_release, bpf_skc_lookup_tcp,
    },
    maps::lpm_trie::Key,
    programs::TcContext,
};
use dataplane_common::{
    counter::Counter,
    ipv4, ipv6,
    masquerade::{
        Block, Common, Fragment, FragmentKey, HostSocket, Inserted, Ipv4, Ipv6, KeptKey, Mapping, MappingKey,
        OWNER_FREE, Session, SessionKey, Tables,
    },
    packet::Packet,
};

use crate::{
    fragment::{self, KeptMap as _},
    log::event,
    maps::{
        NAT_BLOCKS, NAT_FRAGMENTS, NAT_KEPT, NAT_MAPPINGS, NAT_PORTS, NAT_SESSIONS, NAT_SOURCES, NAT6_DIRECT,
        NAT6_FRAGMENTS, NAT6_KEPT, NAT6_MAPPINGS, NAT6_SESSIONS, PODS, PODS6, count,
    },
    skb::Skb,
};

/// The network namespace of the interface (`BPF_F_CURRENT_NETNS`).
const CURRENT_NETNS: u64 = -1_i32 as u32 as u64;
/// The key is there already.
const EEXIST: i32 = 17;

/// The maps, as one program run sees them.
pub(crate) struct Maps<'a> {
    pub(crate) ctx: &'a TcContext,
}

impl Maps<'_> {
    #[inline(always)]
    fn skb(&self) -> *mut __sk_buff {
        self.ctx.as_ptr().cast()
    }

    /// Whether the host has a socket for `tuple`, of which `size` bytes count.
    #[inline(always)]
    fn has_socket(&self, protocol: u8, tuple: &mut bpf_sock_tuple, size: u32) -> bool {
        // SAFETY: the context is valid, and `tuple` has at least `size` bytes.
        let sock = unsafe {
            match protocol {
                ipv4::TCP => bpf_skc_lookup_tcp(self.skb().cast(), tuple, size, CURRENT_NETNS, 0).cast(),
                ipv4::UDP => bpf_sk_lookup_udp(self.skb().cast(), tuple, size, CURRENT_NETNS, 0),
                _ => return false,
            }
        };
        if sock.is_null() {
            return false;
        }
        // SAFETY: the lookup gave a reference, which is given back here, once.
        unsafe { bpf_sk_release(sock.cast()) };
        true
    }
}

#[inline(always)]
fn inserted(result: Result<(), i32>) -> Inserted {
    match result {
        Ok(()) => Inserted::Done,
        Err(e) if e == -EEXIST => Inserted::Exists,
        Err(_) => Inserted::Full,
    }
}

impl Common for Maps<'_> {
    #[inline(always)]
    fn now_ns(&mut self) -> u64 {
        // SAFETY: takes nothing.
        unsafe { bpf_ktime_get_coarse_ns() }
    }

    #[inline(always)]
    fn random(&mut self) -> u32 {
        // SAFETY: takes nothing.
        unsafe { bpf_get_prandom_u32() }
    }

    #[inline(always)]
    fn count(&mut self, counter: Counter) {
        count(counter);
        if counter == Counter::EgressNewFlow {
            event!(self.ctx, "masquerade_egress: new flow");
        }
    }

    #[inline(always)]
    fn port(&mut self, index: u32) -> u64 {
        NAT_PORTS.get(index).copied().unwrap_or(OWNER_FREE)
    }

    #[inline(always)]
    fn claim_port(&mut self, index: u32, from: u64, to: u64) -> bool {
        match NAT_PORTS.get_ptr_mut(index) {
            Some(port) => compare_exchange(port, from, to),
            None => false,
        }
    }

    #[inline(always)]
    fn block(&mut self, block: u32) -> Option<&mut Block> {
        // SAFETY: an element of an array stays where it is. Its owner is only read through this; the other
        // fields are hints and counts, of which a lost write does no harm.
        NAT_BLOCKS.get_ptr_mut(block).map(|p| unsafe { &mut *p })
    }

    #[inline(always)]
    fn claim_block(&mut self, block: u32, from: u64, to: u64) -> bool {
        match NAT_BLOCKS.get_ptr_mut(block) {
            // The owner is the block's first field.
            Some(block) => compare_exchange(block.cast(), from, to),
            None => false,
        }
    }
}

/// What the families' tables do alike, each in maps of its own.
macro_rules! alike {
    ($family:ty, $sessions:ident, $mappings:ident, $fragments:ident, $kept:ident) => {
        #[inline(always)]
        fn session(&mut self, key: &SessionKey<$family>) -> Option<&mut Session<$family>> {
            // SAFETY: the element stays allocated while the program runs. Other CPUs may write it too; each
            // field but an IPv6 address, which is never written again, is one aligned integer, so that a reader
            // sees an old or a new value. An element that is removed meanwhile may already hold another flow,
            // whose time or state is then refreshed in vain: only flows that have ended are removed, so their
            // next packet is the first for a long time.
            $sessions.get_ptr_mut(key).map(|p| unsafe { &mut *p })
        }

        #[inline(always)]
        fn insert_session(&mut self, key: &SessionKey<$family>, session: &Session<$family>) -> Inserted {
            inserted($sessions.insert(key, session, BPF_NOEXIST as u64))
        }

        #[inline(always)]
        fn remove_session(&mut self, key: &SessionKey<$family>) {
            let _ = $sessions.remove(key);
        }

        #[inline(always)]
        fn mapping(&mut self, key: &MappingKey) -> Option<&mut Mapping<$family>> {
            // SAFETY: as for `session`.
            $mappings.get_ptr_mut(key).map(|p| unsafe { &mut *p })
        }

        #[inline(always)]
        fn insert_mapping(&mut self, key: &MappingKey, mapping: &Mapping<$family>) -> Inserted {
            inserted($mappings.insert(key, mapping, BPF_NOEXIST as u64))
        }

        #[inline(always)]
        fn remove_mapping(&mut self, key: &MappingKey) {
            let _ = $mappings.remove(key);
        }

        #[inline(always)]
        fn fragment(&mut self, key: &FragmentKey<$family>) -> Option<Fragment<$family>> {
            // SAFETY: copied at once. Fragments of one datagram that are looked up while its entry is replaced by
            // an equal one see either.
            unsafe { $fragments.get(key) }.copied()
        }

        #[inline(always)]
        fn insert_fragment(&mut self, key: &FragmentKey<$family>, fragment: &Fragment<$family>) {
            let _ = $fragments.insert(key, fragment, 0);
        }

        #[inline(always)]
        fn kept(&mut self, key: &KeptKey<$family>) -> Option<u64> {
            <$family>::kept(key).map(|kept| kept.came_ns)
        }

        #[inline(always)]
        fn keep<P: Packet + ?Sized>(&mut self, key: &KeptKey<$family>, _: &P, now_ns: u64) -> Inserted {
            match fragment::copy_later(&Skb::new(self.ctx), now_ns) {
                Some(kept) => inserted($kept.insert(key, kept, BPF_NOEXIST as u64)),
                None => Inserted::Full,
            }
        }

        #[inline(always)]
        fn remove_kept(&mut self, key: &KeptKey<$family>) {
            let _ = $kept.remove(key);
        }
    };
}

impl Tables<Ipv4> for Maps<'_> {
    alike!(Ipv4, NAT_SESSIONS, NAT_MAPPINGS, NAT_FRAGMENTS, NAT_KEPT);

    #[inline(always)]
    fn source(&mut self, remote: ipv4::Address) -> Option<ipv4::Address> {
        NAT_SOURCES.get(Key::new(32, remote)).map(|source| source.address)
    }

    #[inline(always)]
    fn is_direct(&mut self, _: ipv4::Address) -> bool {
        false
    }

    #[inline(always)]
    fn inside(&mut self, address: ipv4::Address) -> Option<ipv4::Address> {
        Some(address)
    }

    #[inline(always)]
    fn pod(&mut self, inside: ipv4::Address) -> Option<ipv4::Address> {
        Some(inside)
    }

    #[inline(always)]
    fn host_has(&mut self, socket: &HostSocket) -> bool {
        // SAFETY: integers only, for which zero is a value.
        let mut tuple: bpf_sock_tuple = unsafe { zeroed() };
        tuple.__bindgen_anon_1.ipv4.saddr = socket.remote;
        tuple.__bindgen_anon_1.ipv4.sport = socket.remote_port;
        tuple.__bindgen_anon_1.ipv4.daddr = socket.address;
        tuple.__bindgen_anon_1.ipv4.dport = socket.port;
        // The size says that it is IPv4.
        // SAFETY: the variant was written just above.
        let size = size_of_val(unsafe { &tuple.__bindgen_anon_1.ipv4 }) as u32;
        self.has_socket(socket.protocol, &mut tuple, size)
    }
}

impl Tables<Ipv6> for Maps<'_> {
    alike!(Ipv6, NAT6_SESSIONS, NAT6_MAPPINGS, NAT6_FRAGMENTS, NAT6_KEPT);

    #[inline(always)]
    fn source(&mut self, _: ipv6::Address) -> Option<ipv6::Address> {
        None
    }

    #[inline(always)]
    fn is_direct(&mut self, remote: ipv6::Address) -> bool {
        NAT6_DIRECT.get(Key::new(128, remote)).is_some()
    }

    #[inline(always)]
    fn inside(&mut self, address: ipv6::Address) -> Option<ipv4::Address> {
        // SAFETY: one integer, copied at once.
        unsafe { PODS6.get(address) }.copied()
    }

    #[inline(always)]
    fn pod(&mut self, inside: ipv4::Address) -> Option<ipv6::Address> {
        // SAFETY: copied at once; an update replaces the whole entry.
        unsafe { PODS.get(inside) }.map(|link| link.ipv6)
    }

    #[inline(always)]
    fn host_has(&mut self, socket: &HostSocket<Ipv6>) -> bool {
        // SAFETY: integers only, for which zero is a value.
        let mut tuple: bpf_sock_tuple = unsafe { zeroed() };
        tuple.__bindgen_anon_1.ipv6.saddr = words(socket.remote);
        tuple.__bindgen_anon_1.ipv6.sport = socket.remote_port;
        tuple.__bindgen_anon_1.ipv6.daddr = words(socket.address);
        tuple.__bindgen_anon_1.ipv6.dport = socket.port;
        // The size says that it is IPv6.
        // SAFETY: the variant was written just above.
        let size = size_of_val(unsafe { &tuple.__bindgen_anon_1.ipv6 }) as u32;
        self.has_socket(socket.protocol, &mut tuple, size)
    }
}

#[inline(always)]
fn words(address: ipv6::Address) -> [u32; 4] {
    let [a, b] = address.0;
    [a as u32, (a >> 32) as u32, b as u32, (b >> 32) as u32]
}

/// Atomic among the CPUs and with the agent, which has the map in its memory.
#[inline(always)]
fn compare_exchange(port: *mut u64, from: u64, to: u64) -> bool {
    let found: u64;
    // The target has no compare_exchange in core, so it is said in assembly.
    // SAFETY: `port` points to 8 bytes, aligned to 8, of an element of `NAT_PORTS` or `NAT_BLOCKS`.
    #[cfg(target_arch = "bpf")]
    unsafe {
        core::arch::asm!(
            "r0 = cmpxchg_64({port} + 0, r0, {to})",
            port = in(reg) port,
            to = in(reg) to,
            inout("r0") from => found,
        );
    }
    // For clippy on the host.
    #[cfg(not(target_arch = "bpf"))]
    {
        let _ = to;
        // SAFETY: as above.
        found = unsafe { *port };
    }
    found == from
}
