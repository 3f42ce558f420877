//! IPv6 frames with right checksums, and whether a frame's are.

use std::net::Ipv6Addr;

use crate::{
    checksum::{Sum, sum_bytes},
    ipv4::{TCP, UDP},
    ipv6::{FRAGMENT, ICMPV6},
};

pub(super) type End = (&'static str, u16);

fn octets(address: &str) -> [u8; 16] {
    address.parse::<Ipv6Addr>().unwrap().octets()
}

/// An IPv6 packet in an Ethernet frame, as it is: the transport's checksum is the caller's.
pub(super) fn extended(next_header: u8, from: &str, to: &str, payload: &[u8]) -> Vec<u8> {
    let mut f = vec![0; 12];
    f.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
    f.extend((payload.len() as u16).to_be_bytes());
    f.extend([next_header, 64]);
    f.extend(octets(from));
    f.extend(octets(to));
    f.extend(payload);
    f
}

/// A fragment that starts with all of `whole`'s payload.
pub(super) fn fragment(whole: &[u8], identification: u32, offset_units: u16, more: bool) -> Vec<u8> {
    let mut header = vec![whole[20], 0];
    header.extend((offset_units << 3 | u16::from(more)).to_be_bytes());
    header.extend(identification.to_be_bytes());
    let mut f = [&whole[..54], &header, &whole[54..]].concat();
    f[20] = FRAGMENT;
    f[18..20].copy_from_slice(&(whole.len() as u16 - 54 + 8).to_be_bytes());
    f
}

/// The last fragment of a datagram; its next header may be anything.
pub(super) fn later(from: &str, to: &str, identification: u32) -> Vec<u8> {
    fragment(&extended(59, from, to, &[7; 16]), identification, 3, false)
}

fn ports(from: End, to: End) -> Vec<u8> {
    [from.1.to_be_bytes(), to.1.to_be_bytes()].concat()
}

pub(super) fn tcp(from: End, to: End, flags: u8) -> Vec<u8> {
    let rest = [0, 0, 0, 0, 0, 0, 0, 0, 0x50, flags, 0, 0, 0, 0, 0, 0];
    seal(extended(TCP, from.0, to.0, &[&ports(from, to)[..], &rest].concat()))
}

pub(super) fn udp(from: End, to: End) -> Vec<u8> {
    seal(extended(UDP, from.0, to.0, &[&ports(from, to)[..], &[0, 12, 0, 0, 1, 2, 3, 4]].concat()))
}

/// A message with the identifier of an echo.
pub(super) fn echo(from: &str, to: &str, kind: u8, identifier: u16) -> Vec<u8> {
    let [a, b] = identifier.to_be_bytes();
    seal(extended(ICMPV6, from, to, &[kind, 0, 0, 0, a, b, 0, 1, 9, 9, 9, 9]))
}

/// An error about `quoted`, a frame, of which the IPv6 header and, of TCP, 8 bytes are quoted: TCP's checksum,
/// which nobody looks at in a quote, is not mended.
pub(super) fn error(from: &str, to: &str, kind: u8, quoted: &[u8]) -> Vec<u8> {
    let end = if quoted[20] == TCP { 62 } else { quoted.len() };
    seal(extended(ICMPV6, from, to, &[&[kind, 0, 0, 0, 0, 0, 5, 0], &quoted[14..end]].concat()))
}

fn transport_sum(f: &[u8]) -> Sum {
    sum_bytes(&f[22..]).add16(u16::from(f[20]).to_be()).add16((f.len() as u16 - 54).to_be())
}

fn seal(mut f: Vec<u8>) -> Vec<u8> {
    let at = 54
        + match f[20] {
            TCP => 16,
            UDP => 6,
            _ => 2,
        };
    f[at..at + 2].fill(0);
    let sum = transport_sum(&f).checksum();
    f[at..at + 2].copy_from_slice(&sum.to_ne_bytes());
    f
}

/// Whether the transport of a whole packet has its right checksum.
pub(super) fn is_sealed(f: &[u8]) -> bool {
    transport_sum(f).is_valid()
}

pub(super) fn source(f: &[u8]) -> (Ipv6Addr, u16) {
    let octets: [u8; 16] = f[22..38].try_into().unwrap();
    (octets.into(), u16::from_be_bytes([f[54], f[55]]))
}
