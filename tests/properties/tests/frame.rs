//! The judge of frames is right about right and wrong ones.

use hextet_properties::frame::{Ipv4, ipv4, mended};

#[test]
fn a_mended_frame_is_intact_and_one_flipped_bit_is_seen() {
    for (protocol, flags) in [(1, 8), (6, 2), (17, 0)] {
        let mut frame = ipv4(protocol, ([10, 0, 0, 1], 7), ([192, 0, 2, 1], 80), flags);
        let packet = Ipv4::read(&frame).unwrap();
        assert!(packet.is_header_intact() && packet.is_transport_intact(), "{protocol}");
        *frame.last_mut().unwrap() ^= 1;
        assert!(!Ipv4::read(&frame).unwrap().is_transport_intact(), "{protocol}");
        frame[22] ^= 1;
        assert!(!Ipv4::read(&frame).unwrap().is_header_intact(), "{protocol}");
    }
}

#[test]
fn a_udp_checksum_of_zero_stays_zero() {
    let mut frame = ipv4(17, ([10, 0, 0, 1], 7), ([192, 0, 2, 1], 80), 0);
    frame[40..42].fill(0);
    assert_eq!(mended(&frame), frame);
    assert!(Ipv4::read(&frame).unwrap().is_transport_intact());
}
