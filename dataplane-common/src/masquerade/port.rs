//! Outside ports: who owns them.

use crate::ipv4::Address;

/// The value in `NAT_PORTS` of a port that nobody owns.
pub const OWNER_FREE: u64 = 0;

const INSIDE_BITS: u64 = !0xffff;

/// The value in `NAT_PORTS` of a port that `inside` and `inside_port` own. The stamp makes every claim
/// different, so that the sweep's compare-and-exchange cannot free a port that was claimed anew.
#[inline(always)]
pub const fn owner(inside: Address, inside_port: u16, stamp: u16) -> u64 {
    (inside as u64) << 32 | (inside_port as u64) << 16 | stamp as u64
}

/// The address and port that own it.
#[inline(always)]
pub const fn owner_inside(owner: u64) -> (Address, u16) {
    ((owner >> 32) as u32, (owner >> 16) as u16)
}

/// Whether `inside` and `inside_port` own it.
#[inline(always)]
pub const fn is_owned_by(value: u64, inside: Address, inside_port: u16) -> bool {
    value & INSIDE_BITS == owner(inside, inside_port, 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_owner_is_told_from_others_whatever_the_stamp() {
        let value = owner(0x0100_000a, 77, 0xbeef);
        assert_eq!(owner_inside(value), (0x0100_000a, 77));
        assert!(is_owned_by(value, 0x0100_000a, 77));
        assert!(!is_owned_by(value, 0x0200_000a, 77) && !is_owned_by(value, 0x0100_000a, 78));
        assert!(!is_owned_by(OWNER_FREE, 0x0100_000a, 77));
    }
}
