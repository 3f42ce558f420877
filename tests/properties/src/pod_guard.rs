//! The guard: whatever a pod sends, what passes is from its own addresses and speaks for nobody else.

use dataplane_common::{
    guard::{self, Entry, Verdict},
    ipv6::Address,
};

use crate::{frame, ndp_proxy};

/// The pod's address.
pub const POD: [u8; 16] = ndp_proxy::POD;
/// The pod's private address.
pub const POD_IPV4: [u8; 4] = [10, 254, 1, 9];
/// The pod's MAC address.
pub const POD_MAC: [u8; 6] = [2, 0xaa, 0xbb, 0xcc, 0xdd, 0xee];
/// The MAC address of the node's end.
pub const HOST_MAC: [u8; 6] = [6, 0xaa, 0xbb, 0xcc, 0xdd, 0xee];

const GATEWAY: [u8; 16] = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];

/// What the guard does with a frame of the pod.
pub fn judge(frame: &[u8]) -> Verdict {
    let entry = Entry {
        ipv6: Address::new(POD),
        ipv4: u32::from_ne_bytes(POD_IPV4),
        pod_network: u32::from_ne_bytes([10, 254, 0, 0]),
        pod_mask: u32::from_ne_bytes([255, 255, 240, 0]),
        pod_mac: POD_MAC,
        host_mac: HOST_MAC,
    };
    guard::check(frame, &entry)
}

/// The property.
///
/// # Panics
/// When it does not hold.
pub fn holds(data: &[u8]) {
    for frame in frame::variants(data) {
        match judge(&frame) {
            Verdict::Drop(_) => {}
            Verdict::Pass => passes_rightly(&frame),
            Verdict::Answer(answer) => {
                assert!(ndp_proxy::is_valid(&frame), "what is not valid is answered: {frame:02x?}");
                assert_eq!(frame[22..38], POD, "another than the pod is answered");
                assert_eq!(frame[62..78], GATEWAY, "another than the gateway is answered for");
                ndp_proxy::answer_is_right(&frame, &answer, GATEWAY, HOST_MAC);
            }
        }
    }
}

fn passes_rightly(frame: &[u8]) {
    assert_eq!(frame[6..12], POD_MAC, "a foreign MAC address: {frame:02x?}");
    match [frame[12], frame[13]] {
        [0x86, 0xdd] => {
            assert_eq!((frame[14] >> 4, &frame[22..38]), (6, &POD[..]), "a foreign source: {frame:02x?}");
            assert_ne!(frame[38], 0xff, "to a group: {frame:02x?}");
            // Router and neighbour discovery, and what could hide it (RFC 7113).
            let discovery = frame[20] == 58 && (133..=137).contains(&frame[54]) && frame[54] != 133;
            let hidden = [0, 43, 44, 60].contains(&frame[20]) && frame[21] == 255;
            assert!(!discovery && !hidden, "neighbour discovery: {frame:02x?}");
            assert!(
                frame[20] != 17 || frame[54..56] != 547_u16.to_be_bytes(),
                "a DHCPv6 server: {frame:02x?}"
            );
        }
        [8, 0] => {
            assert_eq!(
                (frame[14] >> 4, &frame[26..30]),
                (4, &POD_IPV4[..]),
                "a foreign source: {frame:02x?}"
            );
            let to = u32::from_be_bytes(frame[30..34].try_into().expect("four bytes"));
            assert!(to >> 28 != 0xe && to != u32::MAX, "to a group: {frame:02x?}");
            assert_ne!(to >> 12, 0x0afe_0000 >> 12, "to another pod: {frame:02x?}");
        }
        other => panic!("neither IPv6 nor IPv4 passes: {other:02x?}"),
    }
}
