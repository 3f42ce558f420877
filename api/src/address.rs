//! Addresses and prefixes, between the bytes of the contract and types with a text form.

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnetwork::{Ipv4Network, Ipv6Network};

use crate::v1;

/// Why bytes are not an address or prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// Neither 4 nor 16 bytes, as the case may be.
    #[error("an address of {given} bytes, not {expected}")]
    Len {
        /// How many there are.
        given: usize,
        /// How many there must be.
        expected: usize,
    },
    /// Longer than the address.
    #[error("a prefix of {0} bits")]
    PrefixLen(u32),
    /// Bits behind the prefix are set.
    #[error("a prefix with bits set behind its length")]
    HostBits,
}

/// An IPv6 address from its 16 bytes.
///
/// # Errors
/// [`AddressError::Len`].
pub fn ipv6(bytes: &[u8]) -> Result<Ipv6Addr, AddressError> {
    exact::<16>(bytes).map(Ipv6Addr::from)
}

/// An IPv4 address from its 4 bytes.
///
/// # Errors
/// [`AddressError::Len`].
pub fn ipv4(bytes: &[u8]) -> Result<Ipv4Addr, AddressError> {
    exact::<4>(bytes).map(Ipv4Addr::from)
}

fn exact<const LEN: usize>(bytes: &[u8]) -> Result<[u8; LEN], AddressError> {
    bytes.try_into().map_err(|_| AddressError::Len { given: bytes.len(), expected: LEN })
}

fn prefix_len(bits: u32) -> Result<u8, AddressError> {
    u8::try_from(bits).map_err(|_| AddressError::PrefixLen(bits))
}

impl TryFrom<&v1::Ipv6Prefix> for Ipv6Network {
    type Error = AddressError;

    fn try_from(prefix: &v1::Ipv6Prefix) -> Result<Ipv6Network, AddressError> {
        let network = Ipv6Network::new(ipv6(&prefix.address)?, prefix_len(prefix.length_bits)?)
            .map_err(|_| AddressError::PrefixLen(prefix.length_bits))?;
        if network.network() == network.ip() { Ok(network) } else { Err(AddressError::HostBits) }
    }
}

impl TryFrom<&v1::Ipv4Prefix> for Ipv4Network {
    type Error = AddressError;

    fn try_from(prefix: &v1::Ipv4Prefix) -> Result<Ipv4Network, AddressError> {
        let network = Ipv4Network::new(ipv4(&prefix.address)?, prefix_len(prefix.length_bits)?)
            .map_err(|_| AddressError::PrefixLen(prefix.length_bits))?;
        if network.network() == network.ip() { Ok(network) } else { Err(AddressError::HostBits) }
    }
}

impl From<Ipv6Network> for v1::Ipv6Prefix {
    fn from(network: Ipv6Network) -> v1::Ipv6Prefix {
        v1::Ipv6Prefix { address: network.network().octets().to_vec(), length_bits: network.prefix().into() }
    }
}

impl From<Ipv4Network> for v1::Ipv4Prefix {
    fn from(network: Ipv4Network) -> v1::Ipv4Prefix {
        v1::Ipv4Prefix { address: network.network().octets().to_vec(), length_bits: network.prefix().into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_survive_the_contract() {
        let six: Ipv6Network = "fd12:3456:789a:1::/64".parse().unwrap();
        assert_eq!(Ipv6Network::try_from(&v1::Ipv6Prefix::from(six)), Ok(six));
        let four: Ipv4Network = "10.254.0.0/20".parse().unwrap();
        assert_eq!(Ipv4Network::try_from(&v1::Ipv4Prefix::from(four)), Ok(four));
    }

    #[test]
    fn what_is_no_prefix_is_refused() {
        let prefix = |address: &[u8], length_bits| {
            Ipv6Network::try_from(&v1::Ipv6Prefix { address: address.to_vec(), length_bits })
        };
        assert_eq!(prefix(&[0; 4], 64), Err(AddressError::Len { given: 4, expected: 16 }));
        assert_eq!(prefix(&[0; 16], 129), Err(AddressError::PrefixLen(129)));
        assert_eq!(prefix(&[0; 16], 300), Err(AddressError::PrefixLen(300)));
        assert_eq!(prefix(&[1; 16], 64), Err(AddressError::HostBits));
    }
}
