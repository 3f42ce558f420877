//! The masquerade: no private source leaves, every packet that is changed stays right, a reply finds the pod that it
//! is for, and what is not for a flow is not touched.

use dataplane_common::masquerade::fragment::Sent;

use crate::{
    frame::{self, Ipv4},
    tables::HostTables,
};

/// The node's address.
pub const NODE: [u8; 4] = [192, 0, 2, 11];
/// The range of the pods.
pub const POD_NETWORK: [u8; 4] = [10, 254, 0, 0];
/// Its mask.
pub const POD_MASK: [u8; 4] = [255, 255, 240, 0];
/// A pod that has flows.
pub const POD: [u8; 4] = [10, 254, 0, 5];
/// Where its flows go to.
pub const REMOTE: [u8; 4] = [198, 51, 100, 2];

const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
const SYN: u8 = 2;
const ECHO: u8 = 8;
const ECHO_REPLY: u8 = 0;

/// One packet of each flow that is there before the packet under test comes in.
pub fn opening() -> [Vec<u8>; 3] {
    [
        frame::ipv4(TCP, (POD, 4000), (REMOTE, 80), SYN),
        frame::ipv4(UDP, (POD, 4000), (REMOTE, 7), 0),
        frame::ipv4(ICMP, (POD, 77), (REMOTE, 0), ECHO),
    ]
}

/// What must hold for a packet that leaves by the uplink.
///
/// # Panics
/// When it does not hold.
pub fn egress_holds(data: &[u8]) {
    for sent in frame::variants(data) {
        let mut tables = HostTables::default();
        let mut left = sent.clone();
        if tables.egress(&mut left) != Sent::Next {
            continue;
        }
        let is_ipv4 = sent.get(12..14) == Some(&[8, 0]);
        let source: Option<[u8; 4]> = sent.get(26..30).map(|bytes| bytes.try_into().expect("four bytes"));
        match source.filter(|source| is_ipv4 && is_pods(*source)) {
            Some(_) => {
                leaves_rightly(&sent, &left);
                reply_returns(&mut tables, &sent, &left);
            }
            None => assert_eq!(left, sent, "what is not of a pod is changed"),
        }
    }
}

fn is_pods(address: [u8; 4]) -> bool {
    (0..4).all(|i| address[i] & POD_MASK[i] == POD_NETWORK[i])
}

fn leaves_rightly(sent: &[u8], left: &[u8]) {
    let before = Ipv4::read(sent).expect("a packet of a pod that cannot be read is dropped");
    let after = Ipv4::read(left).expect("the translated packet can be read");
    assert_eq!(after.source(), NODE, "a private source leaves: {sent:02x?}");
    assert_eq!(after.destination(), before.destination(), "the destination is changed");
    assert!([ICMP, TCP, UDP].contains(&before.protocol()), "protocol {} leaves", before.protocol());
    stays_right(&before, &after);
    only_changed(sent, left, &[24..26, 26..30]);
}

/// Checksums that were right are right.
fn stays_right(before: &Ipv4<'_>, after: &Ipv4<'_>) {
    assert!(!before.is_header_intact() || after.is_header_intact(), "the header's checksum");
    assert!(!before.is_transport_intact() || after.is_transport_intact(), "the transport's checksum");
    let is_none = |packet: &Ipv4<'_>| packet.payload().get(6..8) == Some(&[0, 0]);
    if before.protocol() == UDP && !before.is_later_fragment() {
        assert_eq!(is_none(before), is_none(after), "a UDP checksum of zero stays, and none becomes zero");
    }
}

/// Beside these ranges nothing differs but, in the transport header, ports or identifier and checksum.
fn only_changed(before: &[u8], after: &[u8], ranges: &[std::ops::Range<usize>]) {
    assert_eq!(before.len(), after.len(), "the length");
    let packet = Ipv4::read(before).expect("it was read before");
    let start = before.len() - before[14..].len() + usize::from(before[14] & 15) * 4;
    let transport = if packet.is_later_fragment() { start..start } else { start..start + 18 };
    for (at, (old, new)) in before.iter().zip(after).enumerate() {
        let may = transport.contains(&at) || ranges.iter().any(|range| range.contains(&at));
        assert!(may || old == new, "byte {at} is changed: {before:02x?}");
    }
}

/// The remote's answer to the packet that left comes to the endpoint that sent it.
fn reply_returns(tables: &mut HostTables, sent: &[u8], left: &[u8]) {
    let (before, after) = (Ipv4::read(sent).expect("read"), Ipv4::read(left).expect("read"));
    let remote = before.destination();
    // To itself and to other pods it is no packet of the uplink.
    if before.is_fragment() || remote == NODE || is_pods(remote) {
        return;
    }
    let port = |packet: &Ipv4<'_>, at: usize| {
        let bytes = &packet.payload()[at..at + 2];
        u16::from_be_bytes([bytes[0], bytes[1]])
    };
    let (inside, outside, far, flags) = match before.protocol() {
        ICMP if before.payload()[0] == ECHO => (port(&before, 4), port(&after, 4), 0, ECHO_REPLY),
        // Errors have no answer.
        ICMP => return,
        protocol => {
            (port(&before, 0), port(&after, 0), port(&before, 2), if protocol == TCP { 0x12 } else { 0 })
        }
    };
    let echo = before.protocol() == ICMP;
    let reply = |to: [u8; 4], at: u16| {
        let from = (remote, if echo { at } else { far });
        frame::ipv4(before.protocol(), from, (to, at), flags)
    };
    let mut came = reply(NODE, outside);
    let verdict = tables.ingress(&mut came);
    assert_eq!(verdict, Sent::Next, "the reply is dropped: {sent:02x?}");
    assert_eq!(came, reply(before.source(), inside), "the reply comes to another: {sent:02x?}");
}

/// What must hold for a packet that comes in by the uplink.
///
/// # Panics
/// When it does not hold.
pub fn ingress_holds(data: &[u8]) {
    for sent in frame::variants(data) {
        let mut tables = HostTables::default();
        for mut packet in opening() {
            assert_eq!(tables.egress(&mut packet), Sent::Next, "the flows can be opened");
        }
        let mut came = sent.clone();
        let verdict = tables.ingress(&mut came);
        if verdict == Sent::Next && came != sent {
            comes_rightly(&sent, &came);
        }
    }
}

fn comes_rightly(sent: &[u8], came: &[u8]) {
    let before = Ipv4::read(sent).expect("what cannot be read is not changed");
    let after = Ipv4::read(came).expect("the translated packet can be read");
    assert_eq!(before.destination(), NODE, "a packet that is not for the node is changed: {sent:02x?}");
    assert_eq!(after.destination(), POD, "it comes to a pod without a flow: {sent:02x?}");
    assert_eq!(after.source(), before.source(), "the source is changed");
    stays_right(&before, &after);
    let is_error = before.protocol() == ICMP && ![ECHO, ECHO_REPLY].contains(&before.payload()[0]);
    if is_error {
        quotes_rightly(&before, &after);
    } else {
        // Filtering is by address: only who was written to comes in.
        assert_eq!(before.source(), REMOTE, "a stranger comes in: {sent:02x?}");
        only_changed(sent, came, &[24..26, 30..34]);
    }
}

/// An ICMP error that reaches the pod quotes what the pod has sent.
fn quotes_rightly(before: &Ipv4<'_>, after: &Ipv4<'_>) {
    let quoted = |packet: &Ipv4<'_>| -> [u8; 4] { packet.payload()[20..24].try_into().expect("four bytes") };
    assert_eq!((quoted(before), quoted(after)), (NODE, POD), "the quoted source");
    assert_eq!(before.payload()[..2], after.payload()[..2], "type and code");
    assert_eq!(before.payload()[24..28], REMOTE, "about a flow to another remote");
}
