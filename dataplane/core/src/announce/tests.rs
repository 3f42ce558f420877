//! Announcements as a table of frames over time.

use super::*;
use crate::Place;

const OWN: Mac = Mac([2, 0, 0, 0, 0, 0x11]);
const OTHER: Mac = Mac([2, 0, 0, 0, 0, 0x12]);
const NONCE: Nonce = [1, 2, 3, 4, 5, 6];

fn address(n: u16) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0, 0, 1, 0, n, 0xab, 0xcdef)
}

fn watching(n: u16) -> Announcements {
    let mut announcements = Announcements::default();
    announcements.watch(&(0..n).map(address).collect());
    announcements
}

fn at(ms: u64) -> Duration {
    // Some time after the epoch, as on a machine that runs.
    Duration::from_secs(1000) + Duration::from_millis(ms)
}

/// Sends whatever is due until nothing is left, sleeping as told: when, in ms, and what.
fn run(announcements: &mut Announcements, from_ms: u64) -> Vec<(u64, Frame)> {
    let mut now = at(from_ms);
    let mut sent = Vec::new();
    loop {
        while let Some(frame) = announcements.next(now) {
            sent.push(((now - at(0)).as_millis() as u64, frame));
        }
        match announcements.wake(now) {
            None => return sent,
            Some(wake) => {
                assert!(wake > now, "a wake that does not wait would spin");
                now = wake;
            }
        }
    }
}

fn line((ms, frame): &(u64, Frame)) -> String {
    match frame {
        Frame::Probe { .. } => format!("{ms} probe"),
        Frame::Advertisement { to, overrides, .. } => format!("{ms} {to:?} O={}", u8::from(*overrides)),
    }
}

fn lines(sent: &[(u64, Frame)]) -> Vec<String> {
    sent.iter().map(line).collect()
}

fn claim(mac: Mac, kind: ClaimKind) -> Claim {
    Claim { address: address(0), mac, kind }
}

#[test]
fn an_address_is_announced_three_times_to_nodes_and_once_to_routers() {
    let mut announcements = watching(1);
    announcements.announce(at(0), address(0), None);
    let sent = lines(&run(&mut announcements, 0));
    assert_eq!(sent, ["0 Nodes O=1", "0 Routers O=0", "1000 Nodes O=1", "2000 Nodes O=1"]);
}

#[test]
fn a_probed_address_overrides_nobody_until_the_probe_is_over() {
    let mut announcements = watching(1);
    announcements.announce(at(0), address(0), Some(NONCE));
    let sent = run(&mut announcements, 0);
    let expected = ["0 probe", "0 Nodes O=0", "0 Routers O=0", "1000 Nodes O=1", "2000 Nodes O=1"];
    assert_eq!(lines(&sent), expected);
    assert_eq!(sent[0].1, Frame::Probe { address: address(0), nonce: NONCE });
    assert!(!announcements.is_probing());
}

#[test]
fn what_is_only_watched_is_not_announced() {
    let mut announcements = watching(3);
    assert_eq!(announcements.wake(at(0)), None);
    announcements.announce(at(0), address(7), None);
    assert_eq!(run(&mut announcements, 0), []);
}

#[test]
fn an_address_that_goes_is_not_announced_any_more() {
    let mut announcements = watching(2);
    announcements.announce(at(0), address(0), None);
    announcements.announce(at(0), address(1), None);
    while announcements.next(at(0)).is_some() {}
    announcements.watch(&[address(1)].into());
    let sent = run(&mut announcements, 0);
    assert_eq!(lines(&sent), ["1000 Nodes O=1", "2000 Nodes O=1"]);
}

#[test]
fn announcing_again_begins_anew_and_says_nothing_twice() {
    let mut announcements = watching(1);
    announcements.announce(at(0), address(0), None);
    while announcements.next(at(0)).is_some() {}
    announcements.announce(at(500), address(0), None);
    let sent = lines(&run(&mut announcements, 500));
    assert_eq!(sent, ["500 Nodes O=1", "500 Routers O=0", "1500 Nodes O=1", "2500 Nodes O=1"]);
}

#[test]
fn the_rate_holds_for_ten_thousand_addresses_and_new_ones_go_first() {
    const N: u16 = 10_000;
    let mut announcements = watching(N);
    announcements.announce_all(at(0));
    let sent = run(&mut announcements, 0);
    assert_eq!(sent.len(), usize::from(N) * 4);
    for window in sent.windows(FRAMES_PER_SECOND_MAX as usize + FRAMES_BURST_MAX as usize + 1) {
        assert!(window[window.len() - 1].0 - window[0].0 >= 1000, "more than the rate within a second");
    }
    let firsts = sent.iter().take(usize::from(N) * 2);
    let heard_of: BTreeSet<_> = firsts.filter_map(|(_, frame)| advertised(frame)).collect();
    assert_eq!(heard_of.len(), usize::from(N), "a repetition went before a new address");
    let last = sent.last().unwrap().0;
    assert!(
        last < 4 * u64::from(N) * 1000 / u64::from(FRAMES_PER_SECOND_MAX),
        "slower than the rate: {last} ms"
    );
}

fn advertised(frame: &Frame) -> Option<Ipv6Addr> {
    match frame {
        Frame::Advertisement { address, to: Audience::Nodes, .. } => Some(*address),
        _ => None,
    }
}

#[test]
fn anothers_advertisement_is_a_conflict_whenever_it_comes() {
    for probe in [None, Some(NONCE)] {
        let mut announcements = watching(1);
        announcements.announce(at(0), address(0), probe);
        let heard = announcements.hear(at(1), OWN, &claim(OTHER, ClaimKind::Advertisement));
        assert_eq!(heard, Some(Conflict { address: address(0), mac: OTHER, probed: probe.is_some() }));
        let left = run(&mut announcements, 1);
        assert_eq!(left.is_empty(), probe.is_some(), "an address that failed its probe is announced no more");
    }
}

#[test]
fn our_own_frames_are_no_conflict() {
    let mut announcements = watching(1);
    announcements.announce(at(0), address(0), Some(NONCE));
    for kind in [ClaimKind::Advertisement, ClaimKind::Probe(Some(NONCE)), ClaimKind::Probe(None)] {
        assert_eq!(announcements.hear(at(1), OWN, &claim(OWN, kind)), None);
    }
    let echo = claim(OTHER, ClaimKind::Probe(Some(NONCE)));
    assert_eq!(announcements.hear(at(1), OWN, &echo), None, "RFC 7527: the nonce is ours");
}

#[test]
fn anothers_probe_is_a_conflict_only_while_we_probe() {
    for kind in [ClaimKind::Probe(None), ClaimKind::Probe(Some([9; 6]))] {
        let mut announcements = watching(1);
        announcements.announce(at(0), address(0), Some(NONCE));
        while announcements.next(at(0)).is_some() {}
        assert!(announcements.is_probing());
        assert!(announcements.hear(at(999), OWN, &claim(OTHER, kind)).is_some());
        assert!(!announcements.is_probing());
        let mut announcements = watching(1);
        announcements.announce(at(0), address(0), Some(NONCE));
        run(&mut announcements, 0);
        assert_eq!(
            announcements.hear(at(3000), OWN, &claim(OTHER, kind)),
            None,
            "it is defended by the answer"
        );
    }
}

#[test]
fn what_is_not_watched_is_nobodys_conflict() {
    let mut announcements = watching(1);
    let foreign = Claim { address: address(5), mac: OTHER, kind: ClaimKind::Advertisement };
    assert_eq!(announcements.hear(at(0), OWN, &foreign), None);
}

#[test]
fn conflicts_are_reported_at_a_bounded_rate() {
    let mut announcements = watching(1000);
    let hear = |announcements: &mut Announcements, ms: u64, n: u16| {
        let claim = Claim { address: address(n), mac: OTHER, kind: ClaimKind::Advertisement };
        announcements.hear(at(ms), OWN, &claim).is_some()
    };
    assert!(hear(&mut announcements, 0, 0));
    assert!(!hear(&mut announcements, 9_999, 0), "the same address within the interval");
    assert!(hear(&mut announcements, 10_000, 0));
    let reported = (0..1000).filter(|n| hear(&mut announcements, 60_000, *n)).count();
    assert_eq!(reported, CONFLICTS_PER_SECOND_MAX as usize);
}

#[test]
fn addresses_beyond_the_bound_are_left_out() {
    let mut announcements = Announcements::default();
    let many = (0..ADDRESSES_MAX as u128 + 5).map(|n| Ipv6Addr::from(u128::from(address(0)) + n)).collect();
    announcements.watch(&many);
    assert_eq!(announcements.entries.len(), ADDRESSES_MAX);
}

#[test]
fn addresses_appear_by_the_operations_of_either_backend_unless_they_failed() {
    let op = |action| Op { pod: Some("p".to_owned()), place: Place::Host, action };
    let ops = [
        op(Action::NdpSet { address: address(1), mac: OWN }),
        op(Action::ProxyAdd { dev: "eth0".to_owned(), address: address(2) }),
        op(Action::NdpSet { address: address(3), mac: OWN }),
        op(Action::NdpDelete { address: address(4) }),
    ];
    assert_eq!(appeared(&ops, [&ops[2]].into_iter()), [address(1), address(2)].into());
}

/// What a neighbour would complain about, found in whatever is done in whatever order.
#[derive(Default)]
struct Witness {
    /// When each address was last overridden for, and since when it may not be.
    overridden: BTreeMap<Ipv6Addr, Duration>,
    probed: BTreeMap<Ipv6Addr, Duration>,
    /// Advertisements to nodes since the last order to announce.
    said: BTreeMap<Ipv6Addr, usize>,
    sent: Vec<Duration>,
}

impl Witness {
    fn ordered(&mut self, address: Ipv6Addr) {
        self.said.insert(address, 0);
        self.overridden.remove(&address);
        self.probed.remove(&address);
    }

    fn sees(&mut self, now: Duration, frame: &Frame) {
        self.sent.push(now);
        let second = self.sent.iter().rev().take_while(|at| **at + Duration::from_secs(1) > now).count();
        assert!(second <= (FRAMES_PER_SECOND_MAX + FRAMES_BURST_MAX) as usize, "{second} frames in a second");
        match *frame {
            Frame::Probe { address, .. } => {
                assert_eq!(self.probed.insert(address, now), None, "probed twice")
            }
            Frame::Advertisement { address, to: Audience::Nodes, overrides } => {
                let said = self.said.get_mut(&address).expect("nobody ordered this");
                *said += 1;
                assert!(*said <= 3, "MAX_NEIGHBOR_ADVERTISEMENT");
                let probed = self.probed.get(&address).copied();
                assert!(
                    !overrides || probed.is_none_or(|at| now >= at + RETRANS_TIMER),
                    "the probe is under way"
                );
                if overrides && let Some(last) = self.overridden.insert(address, now) {
                    assert!(now >= last + RETRANS_TIMER, "sooner than RetransTimer");
                }
            }
            Frame::Advertisement { overrides, .. } => assert!(!overrides, "to routers with O=1"),
        }
    }
}

#[test]
fn no_order_of_events_makes_it_say_too_much() {
    let mut seed = 0x6172_6e6f_u64;
    let mut below = |n: u64| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) % n
    };
    let mut announcements = watching(20);
    let mut witness = Witness::default();
    let mut now = at(0);
    for _ in 0..50_000 {
        let some = address(below(20) as u16);
        match below(8) {
            0 => {
                announcements.announce(now, some, (below(2) == 0).then_some(NONCE));
                witness.ordered(some);
            }
            1 if below(50) == 0 => {
                announcements.announce_all(now);
                (0..20).for_each(|n| witness.ordered(address(n)));
            }
            2 => {
                let kind = if below(2) == 0 { ClaimKind::Advertisement } else { ClaimKind::Probe(None) };
                let mac = if below(2) == 0 { OWN } else { OTHER };
                announcements.hear(now, OWN, &Claim { address: some, mac, kind });
            }
            3 => now += Duration::from_millis(below(400)),
            _ => {
                while let Some(frame) = announcements.next(now) {
                    witness.sees(now, &frame);
                }
                let wake = announcements.wake(now);
                assert!(wake.is_none_or(|wake| wake > now), "a wake that does not wait would spin");
                now += Duration::from_millis(below(30));
            }
        }
    }
    assert!(witness.sent.len() > 10_000, "{} frames prove little", witness.sent.len());
}

/// RFC 4861 section 7.2.5: O=0 and another MAC address make an entry stale, and change nothing else.
#[test]
fn dead_nodes_addresses_are_doubted_once_behind_all_that_is_the_nodes_own() {
    let mut announcements = watching(2);
    announcements.announce(at(0), address(0), None);
    announcements.doubt(&[address(1), address(7), address(8)]);
    let sent = run(&mut announcements, 0);
    let doubts: Vec<_> = sent.iter().filter(|(_, frame)| is_doubt(frame)).map(|(ms, _)| *ms).collect();
    assert_eq!(doubts, [0, 0], "not of an address that is watched here: {sent:?}");
    assert_eq!(lines(&sent)[..2], ["0 Nodes O=1", "0 Routers O=0"]);
    assert_eq!(sent.len(), 6);
}

fn is_doubt(frame: &Frame) -> bool {
    matches!(frame, Frame::Advertisement { to: Audience::Nodes, overrides: false, .. })
}

#[test]
fn doubts_keep_to_the_rate_and_are_bounded() {
    let mut announcements = watching(0);
    let addresses: Vec<_> = (0..u16::try_from(DEAD_MAX).unwrap() + 9).map(address).collect();
    announcements.doubt(&addresses);
    let sent = run(&mut announcements, 0);
    assert_eq!(sent.len(), DEAD_MAX);
    let seconds = (DEAD_MAX - FRAMES_BURST_MAX as usize) as u64 / u64::from(FRAMES_PER_SECOND_MAX);
    assert_eq!(sent.last().unwrap().0 / 1000, seconds);
}
