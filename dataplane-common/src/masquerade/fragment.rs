//! Fragments. Only the first of a datagram has the ports; where the others go is remembered when it comes. Those
//! that come before it are kept, and sent again when it is there (RFC 4787 REQ-14: in whatever order they come).

use super::{
    Config, Family, Fragment, FragmentKey, Header, Inserted, Ipv4, Ipv6, PacketMut, Part, Tables,
    flow::is_direct,
    owner_inside, port_index,
    segment::{Direction, Segment},
    translate::translate_later,
};
use crate::{counter::Counter, ipv4::Address, packet::Packet};

/// Capacity of the maps `NAT_KEPT` and `NAT6_KEPT`: fragments that came before their first.
///
/// LRU hash, allocated in full: 512 x 9.3 KB = 4.8 MB each. Written and read by the fragment programs. When full, the
/// fragment that was kept the longest is forgotten, and with it its datagram; processors take free entries in stocks, so
/// that it may be full with half of them in use.
pub const KEPT_MAX: u32 = 512;

/// The longest frame that is kept: of a link with jumbo frames. A longer one is lost if it comes before its first.
pub const KEPT_BYTES_MAX: usize = 9_216;

/// Fragments of one datagram that are kept: of 64 KB on a link with an MTU of 1280, all but the first. Further
/// ones are lost.
pub const KEPT_OF_DATAGRAM_MAX: u16 = 64;

/// A fragment whose first has not come for this long is no longer waited for, as in the kernel's own reassembly
/// (`IP_FRAG_TIME`).
pub const KEPT_TIMEOUT_NS: u64 = 30_000_000_000;

/// Key of `NAT_KEPT`. It has nothing in it that translation changes, so that the first fragment finds the others when
/// it is translated.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeptKey<F: Family> {
    /// The remote's address, wire order.
    pub remote: F::Address,
    /// Identification, wire order.
    pub identification: u32,
    /// The private address of the pod that sends, wire order; 0 on the way in, where nobody knows whose it is.
    pub inside: Address,
    /// Protocol; 0 for IPv6, where fragments may differ in it.
    pub protocol: u8,
    /// Zero.
    pub zero: u8,
    /// The how-manieth to come, from 0, in host order.
    pub number: u16,
    /// Zero.
    pub pad: F::Pad,
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

const _: () = assert!(size_of::<KeptKey<Ipv4>>() == 16 && size_of::<KeptKey<Ipv6>>() == 32);
const _: () = assert!(size_of::<Kept>() == 16 + KEPT_BYTES_MAX);

/// Where a datagram goes is known for as long: an identification comes back.
const KNOWN_MAX: u32 = (KEPT_TIMEOUT_NS >> 20) as u32;

/// Whether a fragment that was kept is too old to be sent on.
#[inline(always)]
pub fn is_too_old(now_ns: u64, came_ns: u64) -> bool {
    now_ns.saturating_sub(came_ns) > KEPT_TIMEOUT_NS
}

/// Identifications tried before the pod's own stays.
const IDENTIFICATIONS_MAX: u32 = 4;

/// Remembers where the fragments of a datagram go, of which this is the first. One that comes twice keeps the
/// identification that it got.
#[inline(always)]
pub(super) fn note_first<F: Family, T: Tables<F>>(tables: &mut T, header: &Header<F>, address: F::Address) {
    let key = datagram(header);
    let before = known(tables, &key).filter(|before| before.address == address);
    let identification = before.map_or(header.identification, |before| before.identification);
    insert(tables, &key, address, identification);
}

#[inline(always)]
fn insert<F: Family, T: Tables<F>>(
    tables: &mut T,
    key: &FragmentKey<F>,
    address: F::Address,
    identification: u32,
) {
    let came = time(tables);
    tables.insert_fragment(key, &Fragment { address, identification, came });
}

/// Where a datagram goes, as long as its identification is that datagram's.
#[inline(always)]
fn known<F: Family, T: Tables<F>>(tables: &mut T, key: &FragmentKey<F>) -> Option<Fragment<F>> {
    let now = time(tables);
    tables.fragment(key).filter(|fragment| now.wrapping_sub(fragment.came) <= KNOWN_MAX)
}

#[inline(always)]
fn time<F: Family, T: Tables<F>>(tables: &mut T) -> u32 {
    (tables.now_ns() >> 20) as u32
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

/// `inside`: the pod that sends it; 0 on the way in.
#[inline(always)]
fn kept<F: Family>(header: &Header<F>, inside: Address) -> KeptKey<F> {
    KeptKey {
        remote: if inside == 0 { header.source } else { header.destination },
        identification: header.identification,
        inside,
        protocol: protocol(header),
        zero: 0,
        number: 0,
        pad: F::PAD,
    }
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
            return first_out(packet, tables, &header).map_or(Sent::Next, Sent::Release);
        }
        Some(header) => later_out(packet, tables, &header),
        None => (Counter::EgressDropHeader, Sent::Drop),
    };
    tables.count(counter);
    sent
}

/// Goes on with a first fragment, which is translated already. `None`: it has no port, and nobody waits for it.
#[inline(always)]
fn first_out<F: Family, P: PacketMut + ?Sized, T: Tables<F>>(
    packet: &mut P,
    tables: &mut T,
    header: &Header<F>,
) -> Option<KeptKey<F>> {
    let segment = Segment::read(packet, header, Direction::Out).ok()?;
    let (inside, _) = owner_inside(tables.port(port_index::<F>(header.protocol, segment.near_port)));
    if F::IS_PRIVATE {
        number(packet, tables, header, inside);
    }
    Some(kept(header, inside))
}

/// Gives a first fragment an identification that no other pod's datagram to the same remote has (RFC 6864 section
/// 5.3.1): they all come from one address now.
#[inline(always)]
fn number<F: Family, P: PacketMut + ?Sized, T: Tables<F>>(
    packet: &mut P,
    tables: &mut T,
    header: &Header<F>,
    inside: Address,
) -> Option<()> {
    let pod = tables.pod(inside)?;
    let own = FragmentKey { source: pod, ..datagram(header) };
    let mut taken = datagram(header);
    taken.identification = known(tables, &own)?.identification;
    for _ in 0..IDENTIFICATIONS_MAX {
        match known(tables, &taken) {
            Some(other) if other.address != pod => {
                taken.identification = F::identification(tables.random());
            }
            _ => {
                insert(tables, &taken, pod, header.identification);
                break;
            }
        }
    }
    if taken.identification != header.identification {
        insert(tables, &own, header.source, taken.identification);
        F::set_identification(packet, header.identification, taken.identification)?;
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
    let inside = tables.inside(header.source).unwrap_or(0);
    match follow_first(packet, tables, header, inside) {
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
                return Sent::Release(kept(&header, 0));
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
    match follow_first(packet, tables, header, 0) {
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
    inside: Address,
) -> First<F> {
    let datagram = datagram(header);
    if let Some(fragment) = known(tables, &datagram) {
        return First::Known(fragment);
    }
    if !keep(packet, tables, kept(header, inside)) {
        return First::Unknown;
    }
    // The first may have come by now, on another CPU, which then saw nothing kept.
    known(tables, &datagram).map_or(First::Awaited, First::Known)
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
