//! Says of the map keys and values that they are plain bytes, so that aya may copy them.

use aya::Pod;

use crate::{
    guard, ipv6, masquerade,
    masquerade::{Ipv4, Ipv6},
    ndp, pod_link,
};

macro_rules! pod {
    ($($ty:ty),*) => {$(
        // SAFETY: `repr(C)` or `repr(transparent)` over integers and byte arrays only; the asserted
        // sizes beside the types are the sums of their fields, so there is no padding, and every bit
        // pattern is a value.
        unsafe impl Pod for $ty {}
    )*};
}

pod!(
    ipv6::Address,
    ndp::PodMac,
    guard::Entry,
    pod_link::PodLink,
    masquerade::Config,
    masquerade::SessionKey,
    masquerade::Session,
    masquerade::MappingKey,
    masquerade::Mapping,
    masquerade::Block,
    masquerade::Source,
    masquerade::FragmentKey,
    masquerade::Fragment,
    masquerade::KeptKey<Ipv4>,
    masquerade::KeptKey<Ipv6>,
    masquerade::Kept,
    masquerade::Direct,
    masquerade::SessionKey<Ipv6>,
    masquerade::Session<Ipv6>,
    masquerade::Mapping<Ipv6>,
    masquerade::FragmentKey<Ipv6>,
    masquerade::Fragment<Ipv6>
);
