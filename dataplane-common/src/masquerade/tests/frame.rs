//! Frames with right checksums, and whether a frame's are.

use crate::{
    checksum::sum_bytes,
    ipv4::{ICMP, TCP, UDP},
};

pub(super) type End = ([u8; 4], u16);

pub(super) const FIN_ACK: u8 = 0x11;
pub(super) const SYN: u8 = 2;
pub(super) const RST: u8 = 4;
pub(super) const ACK: u8 = 0x10;
pub(super) const SYN_ACK: u8 = 0x12;

/// An IPv4 packet in an Ethernet frame, as it is: the transport's checksum is the caller's.
pub(super) fn ip(protocol: u8, from: [u8; 4], to: [u8; 4], payload: &[u8]) -> Vec<u8> {
    let mut f = vec![0; 12];
    f.extend([8, 0, 0x45, 0]);
    f.extend((20 + payload.len() as u16).to_be_bytes());
    f.extend([0, 1, 0x40, 0, 64, protocol, 0, 0]);
    f.extend(from);
    f.extend(to);
    seal_header(&mut f);
    f.extend(payload);
    f
}

fn seal_header(f: &mut [u8]) {
    f[24..26].fill(0);
    let sum = sum_bytes(&f[14..34]).checksum();
    f[24..26].copy_from_slice(&sum.to_ne_bytes());
}

/// Makes a frame a fragment.
pub(super) fn fragment(mut f: Vec<u8>, identification: u16, offset_units: u16, more: bool) -> Vec<u8> {
    f[18..20].copy_from_slice(&identification.to_be_bytes());
    f[20..22].copy_from_slice(&(offset_units | if more { 0x2000 } else { 0 }).to_be_bytes());
    seal_header(&mut f);
    f
}

fn ports(from: End, to: End) -> Vec<u8> {
    [from.1.to_be_bytes(), to.1.to_be_bytes()].concat()
}

pub(super) fn tcp(from: End, to: End, flags: u8) -> Vec<u8> {
    let rest = [0, 0, 0, 0, 0, 0, 0, 0, 0x50, flags, 0, 0, 0, 0, 0, 0];
    seal(ip(TCP, from.0, to.0, &[&ports(from, to)[..], &rest].concat()))
}

pub(super) fn udp(from: End, to: End) -> Vec<u8> {
    seal(ip(UDP, from.0, to.0, &[&ports(from, to)[..], &[0, 12, 0, 0, 1, 2, 3, 4]].concat()))
}

/// A message with the identifier of an echo.
pub(super) fn echo(from: [u8; 4], to: [u8; 4], kind: u8, identifier: u16) -> Vec<u8> {
    let [a, b] = identifier.to_be_bytes();
    seal(ip(ICMP, from, to, &[kind, 0, 0, 0, a, b, 0, 1, 9, 9, 9, 9]))
}

/// An error about `quoted`, a frame, of which the IPv4 header and 8 bytes are quoted.
pub(super) fn error(from: [u8; 4], to: [u8; 4], kind: u8, code: u8, quoted: &[u8]) -> Vec<u8> {
    seal(ip(ICMP, from, to, &[&[kind, code, 0, 0, 0, 0, 0, 0], &quoted[14..42]].concat()))
}

fn checksum_at(f: &[u8]) -> usize {
    34 + match f[23] {
        TCP => 16,
        UDP => 6,
        _ => 2,
    }
}

fn transport_sum(f: &[u8]) -> crate::checksum::Sum {
    let sum = sum_bytes(&f[34..]);
    if f[23] == ICMP {
        return sum;
    }
    let length = (f.len() - 34) as u16;
    [26, 28, 30, 32]
        .iter()
        .fold(sum, |sum, at| sum.add16(u16::from_ne_bytes([f[*at], f[*at + 1]])))
        .add16((f[23] as u16).to_be())
        .add16(length.to_be())
}

fn seal(mut f: Vec<u8>) -> Vec<u8> {
    let at = checksum_at(&f);
    f[at..at + 2].fill(0);
    let sum = transport_sum(&f).checksum();
    f[at..at + 2].copy_from_slice(&sum.to_ne_bytes());
    f
}

/// Whether header and transport have their right checksums.
pub(super) fn is_sealed(f: &[u8]) -> bool {
    sum_bytes(&f[14..34]).is_valid() && transport_sum(f).is_valid()
}

pub(super) fn source(f: &[u8]) -> End {
    (f[26..30].try_into().unwrap(), u16::from_be_bytes([f[34], f[35]]))
}

pub(super) fn destination(f: &[u8]) -> End {
    (f[30..34].try_into().unwrap(), u16::from_be_bytes([f[36], f[37]]))
}
