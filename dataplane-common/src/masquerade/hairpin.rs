//! Hairpinning: a pod writes to the outside address and port of another pod of its node, or of itself
//! (RFC 4787 REQ-9, RFC 5382 REQ-8, RFC 5508 REQ-7).
//!
//! Such a packet never sees the uplink: its destination is the node. So it is caught where it comes from the
//! pod, goes out and in again in one step, and is handed to the other pod with the outside source that it would
//! have anywhere else.

use super::{
    Config, Family, Header, HostSocket, Part, Tables,
    flow::out,
    inward::inward,
    owner_inside, port_index,
    segment::{Direction, NoSegment, Segment},
    translate::PacketMut,
};
use crate::{counter::Counter, ipv4::Address, packet::Packet};

/// What becomes of a packet from a pod to the node's own address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hairpin {
    /// It is the host's.
    Host,
    /// It is translated, and for the pod with this private address.
    Deliver(Address),
    /// Dropped, and why.
    Drop(Counter),
}

/// Whether the packet, which a pod has sent, is for an outside port of the node.
#[inline(always)]
pub fn hairpin<F: Family, P: PacketMut + ?Sized, T: Tables<F>>(
    packet: &mut P,
    tables: &mut T,
    config: &Config,
) -> Hairpin {
    let Some(header) = F::header(packet) else { return Hairpin::Host };
    if !is_for_a_pod(packet, tables, &header) {
        return Hairpin::Host;
    }
    // The later fragments of a datagram have no ports to tell them from the host's.
    if header.part == Part::First {
        return Hairpin::Drop(Counter::HairpinDropFragment);
    }
    if out(packet, tables, config).is_err() {
        return Hairpin::Drop(Counter::HairpinDropOut);
    }
    let inside = match inward(packet, tables, config).0 {
        Counter::IngressTranslated | Counter::IngressError => F::address(packet, F::DESTINATION),
        _ => None,
    };
    match inside.and_then(|pod| tables.inside(pod)) {
        Some(inside) => Hairpin::Deliver(inside),
        None => Hairpin::Drop(Counter::HairpinDropIn),
    }
}

/// Whether the destination is a port of a pod's, where the host has no socket of its own; or it is an error about
/// a packet that came in by hairpinning.
#[inline(always)]
fn is_for_a_pod<F: Family, P: PacketMut + ?Sized, T: Tables<F>>(
    packet: &P,
    tables: &mut T,
    header: &Header<F>,
) -> bool {
    if header.part == Part::Later {
        return false;
    }
    let segment = match Segment::read(packet, header, Direction::Out) {
        Ok(segment) if header.protocol != F::ICMP => segment,
        Err(NoSegment::Protocol) => return header.protocol == F::ICMP && is_error(packet, header),
        _ => return false,
    };
    let (inside, _) = owner_inside(tables.port(port_index::<F>(header.protocol, segment.far_port)));
    let socket = HostSocket {
        protocol: header.protocol,
        address: header.destination,
        port: segment.far_port,
        remote: header.source,
        remote_port: segment.near_port,
    };
    inside != 0 && !tables.host_has(&socket)
}

/// Whether the ICMP message quotes a packet that came from the node's address, which is where it goes.
#[inline(always)]
fn is_error<F: Family, P: Packet + ?Sized>(packet: &P, header: &Header<F>) -> bool {
    F::address(packet, header.payload + 8 + F::SOURCE_IN_HEADER) == Some(header.destination)
}
