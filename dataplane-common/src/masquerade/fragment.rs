//! Fragments. Only the first of a datagram has the ports; where the others go is remembered when it comes. Those
//! that come before it are kept, and sent again when it is there (RFC 4787 REQ-14: in whatever order they come).

use super::{
    Config, Family, Fragment, FragmentKey, Header, Inserted, Ipv4, Ipv6, PacketMut, Part, Tables,
    flow::is_direct,
    owner_inside, port_index,
    segment::{Direction, Segment},
    translate::translate_later,
};
use crate::{counter::Counter, packet::Packet};

/// Capacity of the maps `NAT_KEPT` and `NAT6_KEPT`: fragments that came before their first.
///
/// LRU hash, allocated in full: 512 x 9.3 KB = 4.8 MB each. Written and read by both of the uplink's programs. When
/// full, the fragment that was kept the longest is forgotten, and with it its datagram.
pub const KEPT_MAX: u32 = 512;

/// The longest frame that is kept: of a link with jumbo frames. A longer one is lost if it comes before its first.
pub const KEPT_BYTES_MAX: usize = 9_216;

/// Fragments of one datagram that are kept: of 64 KB on a link with an MTU of 1500, all but the first. Further
/// ones are lost.
pub const KEPT_OF_DATAGRAM_MAX: u16 = 48;

/// A fragment whose first has not come for this long is no longer waited for, as in the kernel's own reassembly
/// (`IP_FRAG_TIME`).
pub const KEPT_TIMEOUT_NS: u64 = 30_000_000_000;

/// Key of `NAT_KEPT`. It has nothing in it that translation changes, so that the first fragment finds the others when
/// it is translated. Datagrams of two pods may share it: the other's are then kept once more.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeptKey<F: Family> {
    /// The remote's address, wire order.
    pub remote: F::Address,
    /// Identification, wire order.
    pub identification: u32,
    /// Protocol; 0 for IPv6, where fragments may differ in it.
    pub protocol: u8,
    /// 0: on the way out. 1: on the way in.
    pub inward: u8,
    /// The how-manieth to come, from 0, in host order.
    pub number: u16,
}

/// Value of `NAT_KEPT`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Kept {
    /// When it came (CLOCK_MONOTONIC).
    pub came_ns: u64,
    /// The length of the frame.
    pub bytes: u32,
    /// Zero.
    pub zero: u32,
    /// The frame as it came, from the Ethernet header on.
    pub frame: [u8; KEPT_BYTES_MAX],
}

const _: () = assert!(size_of::<KeptKey<Ipv4>>() == 12 && size_of::<KeptKey<Ipv6>>() == 24);
const _: () = assert!(size_of::<Kept>() == 16 + KEPT_BYTES_MAX);

/// Whether a fragment that was kept is too old to be sent on.
#[inline(always)]
pub fn is_too_old(now_ns: u64, came_ns: u64) -> bool {
    now_ns.saturating_sub(came_ns) > KEPT_TIMEOUT_NS
}

/// Identifications tried before the pod's own stays.
const IDENTIFICATIONS_MAX: u32 = 4;

/// Remembers where the fragments of a datagram go, of which this is the first.
#[inline(always)]
pub(super) fn note_first<F: Family, T: Tables<F>>(tables: &mut T, header: &Header<F>, address: F::Address) {
    let fragment = Fragment { address, identification: header.identification, pad: F::PAD };
    tables.insert_fragment(&datagram(header), &fragment);
}

/// The key of `NAT_FRAGMENTS` for the datagram that the packet is a part of.
#[inline(always)]
fn datagram<F: Family>(header: &Header<F>) -> FragmentKey<F> {
    FragmentKey {
        source: header.source,
        destination: header.destination,
        identification: header.identification,
        protocol: protocol(header),
        zero: [0; 3],
    }
}

/// Only the first fragment's next header counts (RFC 8200 section 4.5).
#[inline(always)]
fn protocol<F: Family>(header: &Header<F>) -> u8 {
    if F::IS_PRIVATE { header.protocol } else { 0 }
}

#[inline(always)]
fn kept<F: Family>(header: &Header<F>, direction: Direction) -> KeptKey<F> {
    let (remote, inward) = match direction {
        Direction::Out => (header.destination, 0),
        Direction::In => (header.source, 1),
    };
    KeptKey { remote, identification: header.identification, protocol: protocol(header), inward, number: 0 }
}

/// What the fragment program of a direction does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent<F: Family> {
    /// The packet goes on, as it is or translated. Counted.
    Next,
    /// It is dropped, perhaps to be sent when its first comes. Counted.
    Drop,
    /// Those that are kept under this key and the numbers behind it are sent again from where they came from; then it
    /// goes on. It is translated and counted already.
    Release(KeptKey<F>),
}

/// Goes on with a fragment of which [`egress`](super::egress) says [`Verdict::Fragment`](super::Verdict::Fragment).
#[inline(always)]
pub fn egress<F: Family, P: PacketMut + ?Sized, T: Tables<F>>(packet: &mut P, tables: &mut T) -> Sent<F> {
    let (counter, sent) = match F::header(packet) {
        Some(header) if header.part == Part::First => {
            // Before it is numbered anew, for those that are kept are not.
            let key = kept(&header, Direction::Out);
            if F::IS_PRIVATE {
                number(packet, tables, &header);
            }
            return Sent::Release(key);
        }
        Some(header) => later_out(packet, tables, &header),
        None => (Counter::EgressDropHeader, Sent::Drop),
    };
    tables.count(counter);
    sent
}

/// Gives a first fragment, which is translated already, an identification that no other pod's datagram to the same remote
/// has (RFC 6864 section 5.3.1): they all come from one address now.
#[inline(always)]
fn number<F: Family, P: PacketMut + ?Sized, T: Tables<F>>(
    packet: &mut P,
    tables: &mut T,
    header: &Header<F>,
) -> Option<()> {
    let segment = Segment::read(packet, header, Direction::Out).ok()?;
    let (inside, _) = owner_inside(tables.port(port_index::<F>(header.protocol, segment.near_port)));
    let pod = tables.pod(inside)?;
    let mut taken = datagram(header);
    for _ in 0..IDENTIFICATIONS_MAX {
        match tables.fragment(&taken) {
            Some(other) if other.address != pod => {
                taken.identification = F::identification(tables.random());
            }
            _ => {
                let own = Fragment { address: pod, identification: header.identification, pad: F::PAD };
                tables.insert_fragment(&taken, &own);
                break;
            }
        }
    }
    let identification = taken.identification;
    if identification != header.identification {
        let others = FragmentKey { source: pod, ..datagram(header) };
        tables.insert_fragment(&others, &Fragment { address: header.source, identification, pad: F::PAD });
        F::set_identification(packet, header.identification, identification)?;
    }
    Some(())
}

#[inline(always)]
fn later_out<F: Family, P: PacketMut + ?Sized, T: Tables<F>>(
    packet: &mut P,
    tables: &mut T,
    header: &Header<F>,
) -> (Counter, Sent<F>) {
    if is_direct(packet, tables) {
        return (Counter::EgressDirect, Sent::Next);
    }
    match follow_first(packet, tables, header, Direction::Out) {
        First::Known(to) => match leave(packet, header, &to) {
            Some(()) => (Counter::EgressFragment, Sent::Next),
            None => (Counter::EgressDropError, Sent::Drop),
        },
        First::Awaited => (Counter::EgressKept, Sent::Drop),
        First::Unknown => (Counter::EgressDropFragment, Sent::Drop),
    }
}

#[inline(always)]
fn leave<F: Family, P: PacketMut + ?Sized>(
    packet: &mut P,
    header: &Header<F>,
    to: &Fragment<F>,
) -> Option<()> {
    if to.identification != header.identification {
        F::set_identification(packet, header.identification, to.identification)?;
    }
    translate_later::<F, P>(packet, Direction::Out, header.source, to.address)
}

/// Goes on with a fragment of which [`ingress`](super::ingress) says [`Verdict::Fragment`](super::Verdict::Fragment).
#[inline(always)]
pub fn ingress<F: Family, P: PacketMut + ?Sized, T: Tables<F>>(
    packet: &mut P,
    tables: &mut T,
    config: &Config,
) -> Sent<F> {
    let (counter, sent) = match F::header(packet) {
        Some(header) if header.part == Part::First => {
            if !F::is_node(config, header.destination) {
                return Sent::Release(kept(&header, Direction::In));
            }
            // The host's: what comes behind it need not be kept.
            note_first(tables, &header, header.destination);
            return Sent::Next;
        }
        Some(header) => later_in(packet, tables, &header),
        None => (Counter::IngressPass, Sent::Next),
    };
    tables.count(counter);
    sent
}

#[inline(always)]
fn later_in<F: Family, P: PacketMut + ?Sized, T: Tables<F>>(
    packet: &mut P,
    tables: &mut T,
    header: &Header<F>,
) -> (Counter, Sent<F>) {
    match follow_first(packet, tables, header, Direction::In) {
        First::Known(host) if host.address == header.destination => (Counter::IngressPass, Sent::Next),
        First::Known(pod) => {
            match translate_later::<F, P>(packet, Direction::In, header.destination, pod.address) {
                Some(()) => (Counter::IngressFragment, Sent::Next),
                None => (Counter::IngressDropError, Sent::Drop),
            }
        }
        // It may be the host's own, which waits for the first, too.
        First::Awaited => (Counter::IngressKept, Sent::Next),
        First::Unknown => (Counter::IngressPass, Sent::Next),
    }
}

/// What a later fragment learns of its first.
enum First<F: Family> {
    /// It came, and this is where its datagram goes.
    Known(Fragment<F>),
    /// It did not come; the later one is kept.
    Awaited,
    /// It did not come, and the later one cannot be kept.
    Unknown,
}

#[inline(always)]
fn follow_first<F: Family, P: Packet + ?Sized, T: Tables<F>>(
    packet: &P,
    tables: &mut T,
    header: &Header<F>,
    direction: Direction,
) -> First<F> {
    let datagram = datagram(header);
    if let Some(fragment) = tables.fragment(&datagram) {
        return First::Known(fragment);
    }
    if !keep(packet, tables, kept(header, direction)) {
        return First::Unknown;
    }
    // The first may have come by now, on another CPU, which then saw nothing kept.
    tables.fragment(&datagram).map_or(First::Awaited, First::Known)
}

#[inline(always)]
fn keep<F: Family, P: Packet + ?Sized, T: Tables<F>>(
    packet: &P,
    tables: &mut T,
    mut key: KeptKey<F>,
) -> bool {
    if packet.length() > KEPT_BYTES_MAX {
        return false;
    }
    let now_ns = tables.now_ns();
    for number in 0..KEPT_OF_DATAGRAM_MAX {
        key.number = number;
        match tables.kept(&key) {
            Some(came_ns) if !is_too_old(now_ns, came_ns) => continue,
            Some(_) => tables.remove_kept(&key),
            None => {}
        }
        match tables.keep(&key, packet, now_ns) {
            Inserted::Done => return true,
            Inserted::Exists => {}
            Inserted::Full => return false,
        }
    }
    false
}
