//! Bounds-checked reads of a packet: a byte slice on the host, `data..data_end` in a program.

/// A packet that starts with its Ethernet header.
///
/// Integers come back in wire order: `u16::from_be` makes a number of them.
pub trait Packet {
    /// The byte at `offset`, if the packet reaches so far.
    fn byte(&self, offset: usize) -> Option<u8>;
    /// Two bytes at `offset`.
    fn wire16(&self, offset: usize) -> Option<u16>;
    /// Four bytes at `offset`.
    fn wire32(&self, offset: usize) -> Option<u32>;
    /// Eight bytes at `offset`.
    fn wire64(&self, offset: usize) -> Option<u64>;
    /// The length in bytes of the whole packet.
    fn length(&self) -> usize;

    /// Six bytes at `offset`: a MAC address.
    #[inline(always)]
    fn mac(&self, offset: usize) -> Option<[u8; 6]> {
        let [a, b, c, d] = self.wire32(offset)?.to_ne_bytes();
        let [e, f] = self.wire16(offset + 4)?.to_ne_bytes();
        Some([a, b, c, d, e, f])
    }

    /// Sixteen bytes at `offset`: an IPv6 address.
    #[inline(always)]
    fn address(&self, offset: usize) -> Option<crate::ipv6::Address> {
        Some(crate::ipv6::Address([self.wire64(offset)?, self.wire64(offset + 8)?]))
    }
}

impl Packet for [u8] {
    fn byte(&self, offset: usize) -> Option<u8> {
        self.get(offset).copied()
    }

    fn wire16(&self, offset: usize) -> Option<u16> {
        array(self, offset).map(u16::from_ne_bytes)
    }

    fn wire32(&self, offset: usize) -> Option<u32> {
        array(self, offset).map(u32::from_ne_bytes)
    }

    fn wire64(&self, offset: usize) -> Option<u64> {
        array(self, offset).map(u64::from_ne_bytes)
    }

    fn length(&self) -> usize {
        self.len()
    }
}

fn array<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes.get(offset..offset.checked_add(N)?)?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_end_at_the_last_byte() {
        let bytes: &[u8] = &[1, 2, 3, 4, 5, 6, 7, 8];
        assert_eq!(bytes.wire64(0), Some(u64::from_ne_bytes([1, 2, 3, 4, 5, 6, 7, 8])));
        assert_eq!(bytes.wire64(1), None);
        assert_eq!(bytes.wire32(4), Some(u32::from_ne_bytes([5, 6, 7, 8])));
        assert_eq!(bytes.wire16(7), None);
        assert_eq!(bytes.byte(7), Some(8));
        assert_eq!(bytes.byte(usize::MAX), None);
        assert_eq!(bytes.wire32(usize::MAX - 1), None);
    }
}
