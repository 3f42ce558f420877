//! The /48 of a cluster, the 16 bits of a node in it, and the /64 that they make.

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

    /// Accepts a /48 of unicast space, local or global.
    ///
    /// # Errors
    /// [`AddressError`] when the length is not 48, host bits are set or it is not unicast space.
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

/// The /64 of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct NodePrefix(Ipv6Network);

impl NodePrefix {
    /// Its length.
    pub const LEN_BITS: u8 = 64;

    /// Accepts a /64 of unicast space.
    ///
    /// # Errors
    /// [`AddressError`] when the length is not 64, host bits are set or it is not unicast space.
    pub fn new(network: Ipv6Network) -> Result<Self, AddressError> {
        check_prefix(network, Self::LEN_BITS).map(Self)
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
    // Unspecified, loopback and v4-mapped share the first 64 zero bits.
    let address = network.ip();
    if address.is_multicast() || address.is_unicast_link_local() || address.to_bits() >> 64 == 0 {
        return Err(AddressError::NotUnicast(network));
    }
    Ok(network)
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
    fn wrong_prefixes_are_refused_with_the_reason() {
        let refuse = |text: &str| text.parse::<ClusterPrefix>().unwrap_err().to_string();
        assert_eq!(refuse("fd00::/64"), "fd00::/64 must be a /48");
        assert_eq!(
            refuse("fd00::1/48"),
            "fd00::1/48 has bits set behind its length; did you mean fd00::/48?"
        );
        assert_eq!(refuse("ff02::/48"), "ff02::/48 is not unicast space that pods can have addresses in");
        assert_eq!(refuse("fe80::/48"), "fe80::/48 is not unicast space that pods can have addresses in");
        assert_eq!(refuse("::/48"), "::/48 is not unicast space that pods can have addresses in");
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
