//! Hairpinning: a pod writes to the outside address and port of another pod of its node, or of itself
//! (RFC 4787 REQ-9, RFC 5382 REQ-8, RFC 5508 REQ-7).
//!
//! Such a packet never sees the uplink: its destination is the node. So it is caught where it comes from the
//! pod, goes out and in again in one step, and is handed to the other pod with the outside source that it would
//! have anywhere else.

use super::{
    Config, HostSocket, Tables,
    flow::out,
    inward::inward,
    owner_inside, port_index,
    segment::{Direction, NoSegment, Segment},
    translate::PacketMut,
};
use crate::{
    counter::Counter,
    ipv4::{self, Address, Header},
    packet::Packet,
};

/// What becomes of a packet from a pod to the node's own address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hairpin {
    /// It is the host's.
    Host,
    /// It is translated, and for the pod with this address.
    Deliver(Address),
    /// Dropped, and why.
    Drop(Counter),
}

/// Whether the packet, which a pod has sent, is for an outside port of the node.
#[inline(always)]
pub fn hairpin<P: PacketMut + ?Sized, T: Tables>(packet: &mut P, tables: &mut T, config: &Config) -> Hairpin {
    let Some(header) = Header::read(packet) else { return Hairpin::Host };
    if !is_for_a_pod(packet, tables, &header) {
        return Hairpin::Host;
    }
    // The later fragments of a datagram have no ports to tell them from the host's.
    if header.is_first_fragment() {
        return Hairpin::Drop(Counter::HairpinDropFragment);
    }
    if out(packet, tables, config).is_err() {
        return Hairpin::Drop(Counter::HairpinDropOut);
    }
    match inward(packet, tables, config) {
        Counter::IngressTranslated | Counter::IngressError => match packet.wire32(ipv4::DESTINATION) {
            Some(inside) => Hairpin::Deliver(inside),
            None => Hairpin::Drop(Counter::HairpinDropIn),
        },
        _ => Hairpin::Drop(Counter::HairpinDropIn),
    }
}

/// Whether the destination is a port of a pod's, where the host has no socket of its own; or it is an error about
/// a packet that came in by hairpinning.
#[inline(always)]
fn is_for_a_pod<P: PacketMut + ?Sized, T: Tables>(packet: &P, tables: &mut T, header: &Header) -> bool {
    if header.is_later_fragment() {
        return false;
    }
    let segment = match Segment::read(packet, header, Direction::Out) {
        Ok(segment) if header.protocol != ipv4::ICMP => segment,
        Err(NoSegment::Protocol) => return header.protocol == ipv4::ICMP && is_error(packet, header),
        _ => return false,
    };
    let (inside, _) = owner_inside(tables.port(port_index(header.protocol, segment.far_port)));
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
fn is_error<P: Packet + ?Sized>(packet: &P, header: &Header) -> bool {
    packet.wire32(header.payload + 8 + 12) == Some(header.destination)
}
