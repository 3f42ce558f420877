//! The NDP proxy: whatever arrives, it answers only valid solicitations for the pod, and its answers are right.

use dataplane_common::{
    ipv6::Address,
    ndp::{self, Advertisement, Verdict},
};

use crate::frame;

/// The only local pod, `fd12:3456:789a:1:aaaa:bbbb:cc12:3456`.
pub const POD: [u8; 16] =
    [0xfd, 0x12, 0x34, 0x56, 0x78, 0x9a, 0, 1, 0xaa, 0xaa, 0xbb, 0xbb, 0xcc, 0x12, 0x34, 0x56];
/// The uplink's MAC address.
pub const UPLINK: [u8; 6] = [2, 0, 0, 0, 0, 0x11];

const ALL_NODES: [u8; 16] = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];

/// What the proxy does with a frame on the uplink.
pub fn judge(frame: &[u8]) -> Verdict {
    let lookup = |target: &Address| (target.octets() == POD).then_some(UPLINK);
    if ndp::may_hide(frame) { ndp::hidden(frame, lookup) } else { ndp::proxy(frame, lookup) }
}

/// The property.
///
/// # Panics
/// When it does not hold.
pub fn holds(data: &[u8]) {
    for frame in frame::variants(data) {
        if let Verdict::Answer(answer, _) = judge(&frame) {
            assert!(is_valid(&frame), "what is not valid is answered: {frame:02x?}");
            assert_eq!(frame[62..78], POD, "another's address is answered for");
            answer_is_right(&frame, &answer, POD, UPLINK);
        }
    }
}

/// RFC 4861 section 7.1.1, and no header between (RFC 6980 section 5).
pub(crate) fn is_valid(frame: &[u8]) -> bool {
    let length = usize::from(u16::from_be_bytes([frame[18], frame[19]]));
    let from_nobody = frame[22..38] == [0; 16];
    let to_group = frame[38..51] == [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff];
    let options = options(&frame[78..54 + length]);
    let has_source_option = options.iter().flatten().any(|kind| *kind == 1);
    frame[12..15] == [0x86, 0xdd, 0x60 | frame[14] & 15]
        && frame[20..22] == [58, 255]
        && frame[54..56] == [135, 0]
        && length >= 24
        && frame::is_icmpv6_intact(frame)
        && frame[62] != 0xff
        && options.is_some()
        && frame[22] != 0xff
        && (!from_nobody || to_group && !has_source_option)
}

/// Their kinds; none when one has length 0 or goes past the end.
fn options(mut bytes: &[u8]) -> Option<Vec<u8>> {
    let mut kinds = Vec::new();
    while !bytes.is_empty() {
        let length = usize::from(*bytes.get(1)?) * 8;
        if length == 0 || length > bytes.len() {
            return None;
        }
        kinds.push(bytes[0]);
        bytes = &bytes[length..];
    }
    Some(kinds)
}

/// RFC 4861 section 4.4.
pub(crate) fn answer_is_right(asked: &[u8], answer: &Advertisement, target: [u8; 16], mac: [u8; 6]) {
    let sent = answer.frame();
    let to_nobody = asked[22..38] == [0; 16];
    let to: &[u8] = if to_nobody { &ALL_NODES } else { &asked[22..38] };
    assert!(frame::is_icmpv6_intact(&sent), "the checksum is wrong: {sent:02x?}");
    assert_eq!(sent[6..12], mac, "the frame's source");
    assert_eq!(sent[14] >> 4, 6, "the version");
    assert_eq!(sent[20..22], [58, 255], "the hop limit");
    assert_eq!(sent[22..38], target, "the source");
    assert_eq!(sent[38..54], *to, "the destination");
    assert_eq!(sent[54..56], [136, 0], "type and code");
    assert_eq!(sent[58] & 0x80, 0x80, "a router answers");
    assert_eq!(sent[58] & 0x40 == 0, to_nobody, "the solicited flag");
    assert_eq!(sent[62..78], target, "the target");
    assert_eq!((&sent[78..80], &sent[80..86]), (&[2, 1][..], &mac[..]), "the target's link-layer address");
    // To one machine, or to all nodes: never to another group.
    assert!(sent[0] & 1 == 0 || to_nobody && sent[..6] == [0x33, 0x33, 0, 0, 0, 1], "{:02x?}", &sent[..6]);
}
