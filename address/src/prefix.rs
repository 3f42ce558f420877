//! The /48 of a cluster, the 16 bits of a node in it, and the /64 in which a node's pods have their addresses:
//! one of the /48 that is the node's alone, or that of its LAN.

use std::{fmt, net::Ipv6Addr, str::FromStr};

use ipnetwork::Ipv6Network;
use rand::Rng;
use serde::{Deserialize, Serialize};

use crate::{AddressError, hex};

/// The /48 of a cluster, generated once and kept for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ClusterPrefix(Ipv6Network);

impl ClusterPrefix {
    /// Its length.
    pub const LEN_BITS: u8 = 48;

    /// Draws a locally assigned ULA prefix: `fd` and 40 random bits.
    ///
    /// # Source
    /// RFC 4193 section 3.2, with the pseudo-random global ID taken from a random generator.
    pub fn generate(rng: &mut (impl Rng + ?Sized)) -> Self {
        let global_id: u64 = rng.random_range(0..1 << 40);
        let bits = (0xfd_u128 << 120) | (u128::from(global_id) << 80);
        Self(Ipv6Network::new(Ipv6Addr::from_bits(bits), Self::LEN_BITS).expect("48 is at most 128"))
    }

    /// Accepts a /48 of global unicast or unique local space.
    ///
    /// # Errors
    /// [`AddressError`] when the length is not 48, host bits are set or it is of other space.
    pub fn new(network: Ipv6Network) -> Result<Self, AddressError> {
        check_prefix(network, Self::LEN_BITS).map(Self)
    }

    /// The prefix.
    pub fn network(self) -> Ipv6Network {
        self.0
    }

    /// The /64 of the node that claimed `subnet`.
    pub fn subnet(self, subnet: SubnetId) -> NodePrefix {
        let bits = self.0.network().to_bits() | (u128::from(subnet.0) << 64);
        NodePrefix(
            Ipv6Network::new(Ipv6Addr::from_bits(bits), NodePrefix::LEN_BITS).expect("64 is at most 128"),
        )
    }

    /// Whether `prefix` is a node's own /64 of this cluster. Any other is that of a LAN: it is the LAN's to
    /// route, and several nodes may share it.
    pub fn has_subnet(self, prefix: NodePrefix) -> bool {
        self.0.contains(prefix.0.network())
    }
}

/// The 16 bits that tell a node's /64 from its neighbours'. Drawn at random, then claimed at the control plane.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SubnetId(pub u16);

impl SubnetId {
    /// Draws one.
    pub fn random(rng: &mut (impl Rng + ?Sized)) -> Self {
        Self(rng.random())
    }
}

/// The /64 in which a node's pods have their addresses: the node's alone, or its LAN's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct NodePrefix(Ipv6Network);

impl NodePrefix {
    /// Its length.
    pub const LEN_BITS: u8 = 64;

    /// Accepts a /64 of global unicast or unique local space.
    ///
    /// # Errors
    /// [`AddressError`] when the length is not 64, host bits are set or it is of other space.
    pub fn new(network: Ipv6Network) -> Result<Self, AddressError> {
        check_prefix(network, Self::LEN_BITS).map(Self)
    }

    /// The /64 around an address.
    ///
    /// # Errors
    /// [`AddressError::NotUnicast`] when it is neither global unicast nor unique local.
    pub fn around(address: Ipv6Addr) -> Result<Self, AddressError> {
        let network = Ipv6Addr::from_bits(address.to_bits() >> 64 << 64);
        Self::new(Ipv6Network::new(network, Self::LEN_BITS).expect("64 is at most 128"))
    }

    /// The prefix.
    pub fn network(self) -> Ipv6Network {
        self.0
    }

    /// Whether `address` is in it.
    pub fn contains(self, address: Ipv6Addr) -> bool {
        self.0.contains(address)
    }
}

fn check_prefix(network: Ipv6Network, expected: u8) -> Result<Ipv6Network, AddressError> {
    if network.prefix() != expected {
        return Err(AddressError::WrongLength { prefix: network, expected });
    }
    if network.ip() != network.network() {
        return Err(AddressError::HostBits(network));
    }
    if is_global_or_local(network.ip()) { Ok(network) } else { Err(AddressError::NotUnicast(network)) }
}

/// 2000::/3, all that is assigned of global unicast space, and fc00::/7.
///
/// # Source
/// IANA's IPv6 address space registry (RFC 4291 section 2.4), RFC 4193.
fn is_global_or_local(address: Ipv6Addr) -> bool {
    address.to_bits() >> 125 == 0b001 || address.is_unique_local()
}

fn parse_prefix(text: &str) -> Result<Ipv6Network, AddressError> {
    text.contains('/')
        .then(|| text.parse().ok())
        .flatten()
        .ok_or_else(|| AddressError::NotAPrefix(text.to_owned()))
}

impl fmt::Display for ClusterPrefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for ClusterPrefix {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        Self::new(parse_prefix(text)?)
    }
}

impl fmt::Display for NodePrefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for NodePrefix {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        Self::new(parse_prefix(text)?)
    }
}

impl fmt::Display for SubnetId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}", self.0)
    }
}

impl FromStr for SubnetId {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let number = hex::parse(text, 4)?;
        Ok(Self(u16::try_from(number).expect("four hexadecimal digits are 16 bits")))
    }
}

hex::text_serde!(ClusterPrefix);
hex::text_serde!(NodePrefix);
hex::text_serde!(SubnetId);

#[cfg(test)]
mod tests {
    use rand::{SeedableRng, rngs::StdRng};

    use super::*;

    #[test]
    fn generated_cluster_prefix_is_a_local_ula_48() {
        let mut rng = StdRng::seed_from_u64(1);
        for _ in 0..1000 {
            let prefix = ClusterPrefix::generate(&mut rng);
            assert_eq!(prefix.network().ip().octets()[0], 0xfd);
            assert_eq!(ClusterPrefix::new(prefix.network()), Ok(prefix));
        }
    }

    #[test]
    fn generated_cluster_prefixes_differ_in_every_random_byte() {
        let mut rng = StdRng::seed_from_u64(2);
        let drawn: Vec<_> =
            (0..100).map(|_| ClusterPrefix::generate(&mut rng).network().ip().octets()).collect();
        for byte in 1..6 {
            assert!(drawn.iter().any(|octets| octets[byte] != drawn[0][byte]), "byte {byte} never changes");
        }
    }

    #[test]
    fn subnet_fills_bits_48_to_63() {
        let cluster: ClusterPrefix = "fd12:3456:789a::/48".parse().unwrap();
        assert_eq!(cluster.subnet(SubnetId(0xbeef)).to_string(), "fd12:3456:789a:beef::/64");
        assert_eq!(cluster.subnet(SubnetId(0)).to_string(), "fd12:3456:789a::/64");
    }

    #[test]
    fn node_prefix_contains_only_its_own_addresses() {
        let node: NodePrefix = "fd00:0:0:7::/64".parse().unwrap();
        assert!(node.contains("fd00:0:0:7::1".parse().unwrap()));
        assert!(!node.contains("fd00:0:0:8::1".parse().unwrap()));
    }

    #[test]
    fn a_prefix_outside_of_the_cluster_is_a_lans() {
        let cluster: ClusterPrefix = "fd12:3456:789a::/48".parse().unwrap();
        assert!(cluster.has_subnet(cluster.subnet(SubnetId(7))));
        for lan in ["2001:db8:1::/64", "fd12:3456:789b::/64"] {
            assert!(!cluster.has_subnet(lan.parse().unwrap()), "{lan}");
        }
    }

    #[test]
    fn a_lan_has_global_or_unique_local_addresses() {
        let around = |text: &str| NodePrefix::around(text.parse().unwrap());
        assert_eq!(around("2001:db8:1::11"), "2001:db8:1::/64".parse());
        assert_eq!(around("fd00:0:0:7:1::1"), "fd00:0:0:7::/64".parse());
        for text in ["fe80::1", "ff02::1", "::1", "::ffff:192.0.2.1", "64:ff9b::1", "fec0::1"] {
            assert!(matches!(around(text), Err(AddressError::NotUnicast(_))), "{text}");
        }
    }

    #[test]
    fn wrong_prefixes_are_refused_with_the_reason() {
        let refuse = |text: &str| text.parse::<ClusterPrefix>().unwrap_err().to_string();
        assert_eq!(refuse("fd00::/64"), "fd00::/64 must be a /48");
        assert_eq!(
            refuse("fd00::1/48"),
            "fd00::1/48 has bits set behind its length; did you mean fd00::/48?"
        );
        assert_eq!(
            refuse("ff02::/48"),
            "ff02::/48 is neither global unicast (2000::/3) nor unique local (fc00::/7): pods cannot have addresses in it"
        );
        assert_eq!(
            refuse("fe80::/48"),
            "fe80::/48 is neither global unicast (2000::/3) nor unique local (fc00::/7): pods cannot have addresses in it"
        );
        assert_eq!(
            refuse("::/48"),
            "::/48 is neither global unicast (2000::/3) nor unique local (fc00::/7): pods cannot have addresses in it"
        );
        assert_eq!(refuse("fd00::"), "\"fd00::\" is not an IPv6 prefix such as fd12:3456:789a::/48");
        assert_eq!(refuse("pods"), "\"pods\" is not an IPv6 prefix such as fd12:3456:789a::/48");
    }

    #[test]
    fn serde_writes_text_and_checks_what_it_reads() {
        let node: NodePrefix = "fd00:0:0:7::/64".parse().unwrap();
        assert_eq!(serde_json::to_string(&node).unwrap(), r#""fd00:0:0:7::/64""#);
        assert_eq!(serde_json::from_str::<NodePrefix>(r#""fd00:0:0:7::/64""#).unwrap(), node);
        assert!(serde_json::from_str::<NodePrefix>(r#""fd00::/48""#).is_err());
        assert_eq!(serde_json::to_string(&SubnetId(7)).unwrap(), r#""0007""#);
    }

    #[test]
    fn subnet_id_takes_one_to_four_hex_digits() {
        assert_eq!("7".parse(), Ok(SubnetId(7)));
        assert_eq!("BEEF".parse(), Ok(SubnetId(0xbeef)));
        for text in ["", "12345", "+7", "0x7", "g"] {
            assert!(text.parse::<SubnetId>().is_err(), "{text:?}");
        }
    }
}
