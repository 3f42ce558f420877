//! The internet checksum (RFC 1071) and its repair after a change (RFC 1624).
//!
//! A sum of 16-bit words is the same number, up to byte order, whichever order the words are read in
//! (RFC 1071 section 2, (B)); so words are added in wire order and never swapped.

/// A running one's complement sum. Holds 2^48 words before it could overflow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sum(u64);

impl Sum {
    /// The sum of nothing.
    pub const ZERO: Sum = Sum(0);

    /// Adds one word.
    #[inline(always)]
    #[must_use]
    pub fn add16(self, wire: u16) -> Sum {
        Sum(self.0 + wire as u64)
    }

    /// Adds two words.
    #[inline(always)]
    #[must_use]
    pub fn add32(self, wire: u32) -> Sum {
        Sum(self.0 + (wire & 0xffff) as u64 + (wire >> 16) as u64)
    }

    /// Adds four words.
    #[inline(always)]
    #[must_use]
    pub fn add64(self, wire: u64) -> Sum {
        self.add32(wire as u32).add32((wire >> 32) as u32)
    }

    /// The sum in one word, carries added back.
    #[inline(always)]
    pub fn fold(self) -> u16 {
        // Four times suffice for 64 bits: 32 + 1, 17, 16 + carry, 16.
        let mut sum = self.0;
        sum = (sum & 0xffff_ffff) + (sum >> 32);
        sum = (sum & 0xffff) + (sum >> 16);
        sum = (sum & 0xffff) + (sum >> 16);
        sum = (sum & 0xffff) + (sum >> 16);
        sum as u16
    }

    /// The checksum field, in wire order, that makes the whole sum to all ones.
    #[inline(always)]
    pub fn checksum(self) -> u16 {
        !self.fold()
    }

    /// Whether the summed bytes, their checksum field included, are intact.
    #[inline(always)]
    pub fn is_valid(self) -> bool {
        self.fold() == 0xffff
    }
}

/// The checksum after a 32-bit field that it covers changed from `from` to `to` (RFC 1624, eqn. 3).
#[inline(always)]
pub fn replace32(checksum: u16, from: u32, to: u32) -> u16 {
    Sum::ZERO.add16(!checksum).add32(!from).add32(to).checksum()
}

/// The checksum after a 16-bit field that it covers changed from `from` to `to` (RFC 1624, eqn. 3).
#[inline(always)]
pub fn replace16(checksum: u16, from: u16, to: u16) -> u16 {
    Sum::ZERO.add16(!checksum).add16(!from).add16(to).checksum()
}

/// The sum of `bytes`, an odd last one padded with zero. For the host: it loops over any length.
pub fn sum_bytes(bytes: &[u8]) -> Sum {
    bytes.chunks(2).fold(Sum::ZERO, |sum, pair| {
        sum.add16(u16::from_ne_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of RFC 1071 section 3.
    #[test]
    fn the_rfc_example_sums_as_printed() {
        let sum = sum_bytes(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]);
        assert_eq!(u16::from_be(sum.fold()), 0xddf2);
    }

    #[test]
    fn wide_adds_equal_narrow_ones() {
        let bytes = [0xff, 0xff, 0xfe, 0xdc, 0x01, 0x80, 0x7f, 0xff];
        let wide = Sum::ZERO.add64(u64::from_ne_bytes(bytes));
        assert_eq!(wide.fold(), sum_bytes(&bytes).fold());
    }

    #[test]
    fn a_repaired_checksum_is_the_one_computed_anew() {
        let mut seed = 1_u32;
        for _ in 0..10_000 {
            let mut bytes = [0_u8; 12];
            for b in &mut bytes {
                seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                *b = (seed >> 24) as u8;
            }
            let old = sum_bytes(&bytes).checksum();
            let from = u32::from_ne_bytes(bytes[4..8].try_into().unwrap());
            let to = from.rotate_left(7) ^ seed;
            bytes[4..8].copy_from_slice(&to.to_ne_bytes());
            assert_eq!(replace32(old, from, to), sum_bytes(&bytes).checksum());
            let from = u16::from_ne_bytes(bytes[8..10].try_into().unwrap());
            let to = from ^ seed as u16;
            let before = sum_bytes(&bytes).checksum();
            bytes[8..10].copy_from_slice(&to.to_ne_bytes());
            assert_eq!(replace16(before, from, to), sum_bytes(&bytes).checksum());
        }
    }

    #[test]
    fn an_intact_message_with_its_checksum_is_valid() {
        let mut bytes = [0x45, 0, 0, 84, 0, 0, 0x40, 0, 64, 1, 0, 0, 192, 0, 2, 1, 192, 0, 2, 2];
        let field = sum_bytes(&bytes).checksum();
        bytes[10..12].copy_from_slice(&field.to_ne_bytes());
        assert!(sum_bytes(&bytes).is_valid());
        bytes[3] ^= 1;
        assert!(!sum_bytes(&bytes).is_valid());
    }
}
