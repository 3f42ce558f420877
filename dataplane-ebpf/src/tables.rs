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
    ipv4::{self, Address},
    masquerade::{
        Block, Fragment, FragmentKey, HostSocket, Inserted, Mapping, MappingKey, OWNER_FREE, Session,
        SessionKey, Tables,
    },
};

use crate::{
    log::event,
    maps::{NAT_BLOCKS, NAT_FRAGMENTS, NAT_MAPPINGS, NAT_PORTS, NAT_SESSIONS, NAT_SOURCES, count},
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
}

#[inline(always)]
fn inserted(result: Result<(), i32>) -> Inserted {
    match result {
        Ok(()) => Inserted::Done,
        Err(e) if e == -EEXIST => Inserted::Exists,
        Err(_) => Inserted::Full,
    }
}

impl Tables for Maps<'_> {
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
    fn session(&mut self, key: &SessionKey) -> Option<&mut Session> {
        // SAFETY: the element stays allocated while the program runs. Other CPUs may write it too; each
        // field is one aligned integer, so that a reader sees an old or a new value. An element that is
        // removed meanwhile may already hold another flow, whose time or state is then refreshed in vain:
        // only flows that have ended are removed, so their next packet is the first for a long time.
        NAT_SESSIONS.get_ptr_mut(key).map(|p| unsafe { &mut *p })
    }

    #[inline(always)]
    fn insert_session(&mut self, key: &SessionKey, session: &Session) -> Inserted {
        inserted(NAT_SESSIONS.insert(key, session, BPF_NOEXIST as u64))
    }

    #[inline(always)]
    fn remove_session(&mut self, key: &SessionKey) {
        let _ = NAT_SESSIONS.remove(key);
    }

    #[inline(always)]
    fn mapping(&mut self, key: &MappingKey) -> Option<&mut Mapping> {
        // SAFETY: as for `session`.
        NAT_MAPPINGS.get_ptr_mut(key).map(|p| unsafe { &mut *p })
    }

    #[inline(always)]
    fn insert_mapping(&mut self, key: &MappingKey, mapping: &Mapping) -> Inserted {
        inserted(NAT_MAPPINGS.insert(key, mapping, BPF_NOEXIST as u64))
    }

    #[inline(always)]
    fn remove_mapping(&mut self, key: &MappingKey) {
        let _ = NAT_MAPPINGS.remove(key);
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

    #[inline(always)]
    fn source(&mut self, remote: Address) -> Option<Address> {
        NAT_SOURCES.get(Key::new(32, remote)).map(|source| source.address)
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
        // SAFETY: the context is valid, and `tuple` has at least `size` bytes.
        let sock = unsafe {
            match socket.protocol {
                ipv4::TCP => bpf_skc_lookup_tcp(self.skb().cast(), &mut tuple, size, CURRENT_NETNS, 0).cast(),
                ipv4::UDP => bpf_sk_lookup_udp(self.skb().cast(), &mut tuple, size, CURRENT_NETNS, 0),
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

    #[inline(always)]
    fn fragment(&mut self, key: &FragmentKey) -> Option<Address> {
        // SAFETY: one integer, copied at once.
        unsafe { NAT_FRAGMENTS.get(key) }.map(|fragment| fragment.address)
    }

    #[inline(always)]
    fn insert_fragment(&mut self, key: &FragmentKey, address: Address) {
        let _ = NAT_FRAGMENTS.insert(key, Fragment { address }, 0);
    }
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
