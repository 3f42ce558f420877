//! The interface ID of a pod, and what follows from it: its multicast group and the names of its link.

use std::{fmt, net::Ipv6Addr, str::FromStr};

use rand::Rng;
use serde::{Deserialize, Serialize};

use crate::{AddressError, NodePrefix, hex};

/// The low 24 bits that all pods of a node share: the part of an address that neighbour discovery groups by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct GroupId(u32);

/// First group whose addresses can be reserved subnet anycast ones, `fdff:ffff:ffff:ff80` and up (RFC 2526).
const FIRST_ANYCAST_GROUP: u32 = 0xff_ff80;

/// The 40 bits of the range that IANA reserves by its Ethernet block, `0200:5eff:fe00:0000` to
/// `0200:5eff:feff:ffff` (RFC 5453, as updated by RFC 7136's registry).
const IANA_ETHERNET_POD_BITS: u64 = 0x02_005e_fffe;

impl GroupId {
    /// Accepts 24 bits, less those that with some other 40 bits make a reserved interface ID.
    ///
    /// # Errors
    /// [`AddressError::ReservedGroup`] for 0 (the subnet-router anycast address), for `ffff80` and above
    /// (reserved subnet anycast) and for what does not fit.
    pub fn new(bits: u32) -> Result<Self, AddressError> {
        if bits == 0 || bits >= FIRST_ANYCAST_GROUP {
            return Err(AddressError::ReservedGroup(bits));
        }
        Ok(Self(bits))
    }

    /// Draws one.
    pub fn random(rng: &mut (impl Rng + ?Sized)) -> Self {
        Self(rng.random_range(1..FIRST_ANYCAST_GROUP))
    }

    /// The 24 bits.
    pub fn bits(self) -> u32 {
        self.0
    }

    /// The solicited-node multicast group of every pod with this group ID.
    pub fn multicast(self) -> Ipv6Addr {
        solicited_node_multicast(Ipv6Addr::from_bits(u128::from(self.0)))
    }
}

/// Draws the address of a new pod: 40 random bits, then the node's group.
///
/// Interface IDs that RFC 5453 reserves are never returned. Two calls may return the same address with a
/// chance of one in 2^40: whoever keeps the pods draws again.
pub fn pod_address(prefix: NodePrefix, group: GroupId, rng: &mut (impl Rng + ?Sized)) -> Ipv6Addr {
    loop {
        let pod_bits: u64 = rng.random_range(0..1 << 40);
        if pod_bits != IANA_ETHERNET_POD_BITS {
            return join(prefix, pod_bits, group);
        }
    }
}

fn join(prefix: NodePrefix, pod_bits: u64, group: GroupId) -> Ipv6Addr {
    let interface_id = (pod_bits << 24) | u64::from(group.0);
    Ipv6Addr::from_bits(prefix.network().network().to_bits() | u128::from(interface_id))
}

/// The multicast group at which an address is solicited: `ff02::1:ff` and its low 24 bits.
///
/// # Source
/// RFC 4291 section 2.7.1.
pub fn solicited_node_multicast(address: Ipv6Addr) -> Ipv6Addr {
    const PREFIX: u128 = 0xff02_0000_0000_0000_0000_0001_ff00_0000;
    Ipv6Addr::from_bits(PREFIX | (address.to_bits() & 0xff_ffff))
}

/// The names that a pod's link has, all made from the 40 bits of the pod's address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PodLink {
    pod_bits: [u8; 5],
}

impl PodLink {
    /// How the name of every host side begins.
    pub const HOST_IF_PREFIX: &'static str = "hx";

    /// The link of the pod with this address.
    pub fn of(address: Ipv6Addr) -> Self {
        let octets = address.octets();
        Self { pod_bits: [octets[8], octets[9], octets[10], octets[11], octets[12]] }
    }

    /// Name of the host side: `hx` and ten hexadecimal digits, within the kernel's 15 bytes.
    pub fn host_if(self) -> String {
        self.to_string()
    }

    /// MAC address of the host side, locally administered.
    pub fn host_mac(self) -> [u8; 6] {
        self.mac(0x06)
    }

    /// MAC address of the pod's side, locally administered.
    pub fn pod_mac(self) -> [u8; 6] {
        self.mac(0x02)
    }

    fn mac(self, first: u8) -> [u8; 6] {
        let [a, b, c, d, e] = self.pod_bits;
        [first, a, b, c, d, e]
    }
}

impl fmt::Display for PodLink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(Self::HOST_IF_PREFIX)?;
        self.pod_bits.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl FromStr for PodLink {
    type Err = AddressError;

    fn from_str(name: &str) -> Result<Self, AddressError> {
        let error = || AddressError::NotHex { text: name.to_owned(), digits: 10 };
        let digits = name.strip_prefix(Self::HOST_IF_PREFIX).ok_or_else(error)?;
        let exact = digits.len() == 10 && digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        if !exact {
            return Err(error());
        }
        let bits = u64::from_str_radix(digits, 16).map_err(|_| error())?;
        let [_, _, _, a, b, c, d, e] = bits.to_be_bytes();
        Ok(Self { pod_bits: [a, b, c, d, e] })
    }
}

impl fmt::Display for GroupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:06x}", self.0)
    }
}

impl FromStr for GroupId {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        Self::new(hex::parse(text, 6)?)
    }
}

hex::text_serde!(GroupId);

#[cfg(test)]
mod tests {
    use rand::{RngCore, SeedableRng, rngs::StdRng};

    use super::*;

    fn prefix() -> NodePrefix {
        "fd12:3456:789a:beef::/64".parse().unwrap()
    }

    #[test]
    fn pods_of_a_node_share_their_group_and_nothing_else() {
        let mut rng = StdRng::seed_from_u64(1);
        let group = GroupId::new(0xabcdef).unwrap();
        let first = pod_address(prefix(), group, &mut rng);
        let second = pod_address(prefix(), group, &mut rng);
        assert_ne!(first, second);
        assert!(prefix().contains(first) && prefix().contains(second));
        assert_eq!(solicited_node_multicast(first), "ff02::1:ffab:cdef".parse::<Ipv6Addr>().unwrap());
        assert_eq!(solicited_node_multicast(first), solicited_node_multicast(second));
        assert_eq!(group.multicast(), solicited_node_multicast(first));
    }

    #[test]
    fn all_forty_bits_of_a_pod_vary() {
        let mut rng = StdRng::seed_from_u64(2);
        let group = GroupId::new(1).unwrap();
        let (mut ones, mut zeros) = (0_u128, 0_u128);
        for _ in 0..1000 {
            let bits = pod_address(prefix(), group, &mut rng).to_bits();
            ones |= bits;
            zeros |= !bits;
        }
        assert_eq!((ones & zeros) as u64, 0xffff_ffff_ff00_0000);
    }

    /// Returns the given words, then seeded noise: makes a rare draw happen.
    struct Scripted(Vec<u64>, StdRng);

    impl RngCore for Scripted {
        fn next_u32(&mut self) -> u32 {
            self.next_u64() as u32
        }
        fn next_u64(&mut self) -> u64 {
            if self.0.is_empty() { self.1.next_u64() } else { self.0.remove(0) }
        }
        fn fill_bytes(&mut self, bytes: &mut [u8]) {
            self.1.fill_bytes(bytes);
        }
    }

    #[test]
    fn iana_ethernet_interface_ids_are_drawn_again() {
        // The range sampler multiplies and keeps the high word: this is the word that it maps to the block.
        let word = (IANA_ETHERNET_POD_BITS << 24) | 1;
        let mut probe = Scripted(vec![word], StdRng::seed_from_u64(3));
        assert_eq!(
            probe.random_range(0..1_u64 << 40),
            IANA_ETHERNET_POD_BITS,
            "the script must hit the block"
        );

        let mut rng = Scripted(vec![word], StdRng::seed_from_u64(3));
        let address = pod_address(prefix(), GroupId::new(1).unwrap(), &mut rng);
        assert_ne!((address.to_bits() as u64) >> 24, IANA_ETHERNET_POD_BITS);
    }

    #[test]
    fn groups_that_could_make_reserved_ids_do_not_exist() {
        for bits in [0, 0xffff80, 0xffffff, 0x1000000, u32::MAX] {
            assert_eq!(GroupId::new(bits), Err(AddressError::ReservedGroup(bits)));
        }
        assert_eq!(GroupId::new(1).unwrap().to_string(), "000001");
        assert_eq!("ffff7f".parse(), GroupId::new(0xffff7f));
        assert!("ffff80".parse::<GroupId>().is_err());
    }

    #[test]
    fn random_groups_are_accepted_groups() {
        let mut rng = StdRng::seed_from_u64(4);
        for _ in 0..10_000 {
            let group = GroupId::random(&mut rng);
            assert_eq!(GroupId::new(group.bits()), Ok(group));
        }
    }

    #[test]
    fn link_names_follow_from_the_address() {
        let link = PodLink::of("fd00::7:0123:4567:89ab:cdef".parse().unwrap());
        assert_eq!(link.host_if(), "hx0123456789");
        assert_eq!(link.host_mac(), [0x06, 0x01, 0x23, 0x45, 0x67, 0x89]);
        assert_eq!(link.pod_mac(), [0x02, 0x01, 0x23, 0x45, 0x67, 0x89]);
        assert_eq!("hx0123456789".parse(), Ok(link));
        for name in
            ["hx", "hx012345678", "hx01234567899", "eth0", "hx01234567g9", "hx+123456789", "hx01234567AB"]
        {
            assert!(name.parse::<PodLink>().is_err(), "{name:?}");
        }
    }

    #[test]
    fn macs_are_unicast_and_locally_administered() {
        let link = PodLink::of("fd00::ffff:ffff:ffff:ffff".parse().unwrap());
        for mac in [link.host_mac(), link.pod_mac()] {
            assert_eq!(mac[0] & 0b11, 0b10);
        }
    }
}
