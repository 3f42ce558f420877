//! Following pings along every interface between two places.

use std::net::Ipv6Addr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::capture::{Capture, Packet};
use crate::cluster::Pod;
use crate::probe::{host_link, ping};
use crate::testbed::Testbed;

const ECHO_REQUEST: u8 = 128;

/// One interface on the way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hop {
    /// The place or pod.
    pub place: String,
    /// The interface in it.
    pub link: String,
}

impl Hop {
    fn new(place: &str, link: &str) -> Self {
        Self { place: place.to_owned(), link: link.to_owned() }
    }
}

/// What was seen at one hop.
#[derive(Debug)]
pub struct Sight {
    /// Where.
    pub hop: Hop,
    /// Requests and replies, in the order in which they came by.
    pub packets: Vec<Packet>,
    /// The same in tcpdump's words.
    pub text: String,
}

/// The way from a pod to a pod on another node.
///
/// # Errors
/// When an interface of theirs is missing.
pub fn between_pods(testbed: &Testbed, from: &Pod, to: &Pod) -> Result<Vec<Hop>> {
    let mut hops = vec![
        Hop::new(&from.id, "eth0"),
        Hop::new(&from.node, &host_link(testbed, from)?),
        Hop::new(&from.node, "eth0"),
        Hop::new("sw", &from.node),
    ];
    hops.extend(to_pod(testbed, to)?);
    Ok(hops)
}

/// The way from the LAN client to a pod.
///
/// # Errors
/// When an interface of the pod's is missing.
pub fn from_the_lan(testbed: &Testbed, to: &Pod) -> Result<Vec<Hop>> {
    let mut hops = vec![Hop::new("client", "eth0"), Hop::new("sw", "client")];
    hops.extend(to_pod(testbed, to)?);
    Ok(hops)
}

fn to_pod(testbed: &Testbed, to: &Pod) -> Result<Vec<Hop>> {
    Ok(vec![
        Hop::new("sw", &to.node),
        Hop::new(&to.node, "eth0"),
        Hop::new(&to.node, &host_link(testbed, to)?),
        Hop::new(&to.id, "eth0"),
    ])
}

/// Pings `to` from the first hop and captures at all of them.
///
/// # Errors
/// When a ping is lost or not seen everywhere.
pub fn pings(testbed: &Testbed, hops: &[Hop], to: Ipv6Addr, count: u32) -> Result<Vec<Sight>> {
    let filter = format!("icmp6 and host {to} and (ip6[40] == 128 or ip6[40] == 129)");
    let start = |hop: &Hop| Capture::start(&testbed.netns(&hop.place), &hop.link, &filter);
    let captures: Vec<Capture> = hops.iter().map(start).collect::<Result<_>>()?;
    let from = &hops.first().context("there are hops")?.place;
    let pings = ping(&testbed.netns(from), to.into(), count, Duration::from_millis(200))?;
    ensure!(pings.received == pings.sent, "pings got lost: {pings:?}");
    let seen = |(hop, capture): (&Hop, Capture)| {
        let packets = capture.wait_packets(Duration::from_secs(5), 2 * count as usize, |_| true)?;
        Ok(Sight { hop: hop.clone(), packets, text: capture.text()? })
    };
    hops.iter().zip(captures).map(seen).collect()
}

/// Checks that all hops saw the same packets but for the link layer and the hop limit, and that each of
/// `routers` lowered that by one.
///
/// # Errors
/// Names the first hop that saw something else.
pub fn same_everywhere(sights: &[Sight], routers: u8) -> Result<()> {
    let (first, last) = (sights.first().context("there are hops")?, sights.last().context("there are hops")?);
    for sight in sights {
        let same = unchanging(&sight.packets) == unchanging(&first.packets);
        ensure!(same, "{:?} sees other packets than {:?}", sight.hop, first.hop);
    }
    let lowered = request_hop_limit(first)?.checked_sub(request_hop_limit(last)?);
    ensure!(lowered == Some(routers), "the hop limit fell by {lowered:?}, not by {routers}");
    Ok(())
}

/// The hop limit of the first request that a hop saw.
///
/// # Errors
/// When it saw none.
pub fn request_hop_limit(sight: &Sight) -> Result<u8> {
    let request = sight.packets.iter().find(|packet| packet.icmpv6_type() == Some(ECHO_REQUEST));
    request.and_then(Packet::hop_limit).with_context(|| format!("{:?} saw no request", sight.hop))
}

fn unchanging(packets: &[Packet]) -> Vec<Vec<u8>> {
    let mut all: Vec<Vec<u8>> = packets.iter().filter_map(Packet::unchanging).collect();
    all.sort();
    all
}
