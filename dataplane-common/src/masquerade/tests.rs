//! The masquerade over tables in memory.

use std::collections::BTreeMap;

use super::*;
use crate::{checksum::sum_bytes, ipv4};

const SECOND_NS: u64 = 1_000_000_000;

/// Maps, clock and dice of a test.
#[derive(Default)]
struct World {
    now_ns: u64,
    dice: u32,
    sessions: BTreeMap<SessionKey, Session>,
    sessions_max: usize,
    mappings: BTreeMap<MappingKey, Mapping>,
    ports: BTreeMap<u32, u64>,
    fragments: BTreeMap<FragmentKey, Address>,
    host_ports: Vec<u16>,
    counts: BTreeMap<&'static str, u32>,
}

impl World {
    fn new() -> World {
        World { now_ns: SECOND_NS, sessions_max: usize::MAX, ..World::default() }
    }

    fn count_of(&self, name: &str) -> u32 {
        self.counts.get(name).copied().unwrap_or(0)
    }
}

impl Tables for World {
    fn now_ns(&mut self) -> u64 {
        self.now_ns
    }

    fn random(&mut self) -> u32 {
        self.dice = self.dice.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        self.dice
    }

    fn count(&mut self, counter: Counter) {
        *self.counts.entry(counter.name()).or_default() += 1;
    }

    fn session(&mut self, key: &SessionKey) -> Option<&mut Session> {
        self.sessions.get_mut(key)
    }

    fn insert_session(&mut self, key: &SessionKey, session: &Session) -> Inserted {
        if self.sessions.len() >= self.sessions_max {
            return Inserted::Full;
        }
        match self.sessions.insert(*key, *session) {
            None => Inserted::Done,
            Some(old) => {
                self.sessions.insert(*key, old);
                Inserted::Exists
            }
        }
    }

    fn remove_session(&mut self, key: &SessionKey) {
        self.sessions.remove(key);
    }

    fn mapping(&mut self, key: &MappingKey) -> Option<&mut Mapping> {
        self.mappings.get_mut(key)
    }

    fn insert_mapping(&mut self, key: &MappingKey, mapping: &Mapping) -> Inserted {
        if self.mappings.contains_key(key) {
            return Inserted::Exists;
        }
        self.mappings.insert(*key, *mapping);
        Inserted::Done
    }

    fn remove_mapping(&mut self, key: &MappingKey) {
        self.mappings.remove(key);
    }

    fn port(&mut self, index: u32) -> u64 {
        self.ports.get(&index).copied().unwrap_or(OWNER_FREE)
    }

    fn claim_port(&mut self, index: u32, from: u64, to: u64) -> bool {
        let free = self.port(index) == from;
        if free {
            self.ports.insert(index, to);
        }
        free
    }

    fn host_has_port(&mut self, _: Address, _: &SessionKey, port: u16) -> bool {
        self.host_ports.contains(&u16::from_be(port))
    }

    fn fragment(&mut self, key: &FragmentKey) -> Option<Address> {
        self.fragments.get(key).copied()
    }

    fn insert_fragment(&mut self, key: &FragmentKey, address: Address) {
        self.fragments.insert(*key, address);
    }
}

fn config() -> Config {
    Config {
        node: ipv4::address([192, 0, 2, 11]),
        pod_network: ipv4::address([10, 254, 0, 0]),
        pod_mask: ipv4::address([255, 255, 240, 0]),
        host_ports_min: 32_768,
        host_ports_max: 60_999,
        enabled: 1,
    }
}

const NODE: [u8; 4] = [192, 0, 2, 11];
const REMOTE: [u8; 4] = [198, 51, 100, 2];

fn pod(n: u8) -> [u8; 4] {
    [10, 254, 0, n]
}

/// TCP with right checksums.
fn tcp(from: ([u8; 4], u16), to: ([u8; 4], u16), flags: u8) -> Vec<u8> {
    let mut f = vec![0; 12];
    f.extend([8, 0, 0x45, 0, 0, 40, 0, 1, 0x40, 0, 64, 6, 0, 0]);
    f.extend(from.0);
    f.extend(to.0);
    f.extend(from.1.to_be_bytes());
    f.extend(to.1.to_be_bytes());
    f.extend([0, 0, 0, 0, 0, 0, 0, 0, 0x50, flags, 0, 0, 0, 0, 0, 0]);
    let header = sum_bytes(&f[14..34]).checksum();
    f[24..26].copy_from_slice(&header.to_ne_bytes());
    let transport = sum_bytes(&f[26..]).add16(6_u16.to_be()).add16(20_u16.to_be()).checksum();
    f[50..52].copy_from_slice(&transport.to_ne_bytes());
    f
}

fn send(world: &mut World, frame: &[u8]) -> (Verdict, Vec<u8>) {
    let mut frame = frame.to_vec();
    let verdict = egress(&mut frame[..], world, &config());
    (verdict, frame)
}

fn receive(world: &mut World, frame: &[u8]) -> (Verdict, Vec<u8>) {
    let mut frame = frame.to_vec();
    let verdict = ingress(&mut frame[..], world, &config());
    (verdict, frame)
}

const SYN: u8 = 2;
const RST: u8 = 4;
const SYN_ACK: u8 = 0x12;

fn port_of(frame: &[u8]) -> u16 {
    u16::from_be_bytes([frame[34], frame[35]])
}

#[test]
fn nobody_outside_reaches_a_private_address_by_itself() {
    let mut world = World::new();
    let (verdict, _) = receive(&mut world, &tcp((REMOTE, 80), (pod(5), 4000), SYN));
    assert_eq!(verdict, Verdict::Drop);
    assert_eq!(world.count_of("drop_private"), 1);
}

#[test]
fn there_and_back() {
    let mut world = World::new();
    let (verdict, sent) = send(&mut world, &tcp((pod(5), 4000), (REMOTE, 80), SYN));
    assert_eq!((verdict, sent), (Verdict::Next, tcp((NODE, 4000), (REMOTE, 80), SYN)));
    let (verdict, back) = receive(&mut world, &tcp((REMOTE, 80), (NODE, 4000), SYN_ACK));
    assert_eq!((verdict, back), (Verdict::Next, tcp((REMOTE, 80), (pod(5), 4000), SYN_ACK)));
}

#[test]
fn an_idle_flow_ends_for_the_remote_and_lives_on_for_the_pod() {
    let mut world = World::new();
    send(&mut world, &tcp((pod(5), 4000), (REMOTE, 80), SYN));
    world.now_ns += TCP_TRANSITORY_TIMEOUT_NS + 1;
    let answer = tcp((REMOTE, 80), (NODE, 4000), SYN_ACK);
    assert_eq!(receive(&mut world, &answer).1, answer, "left to the host");
    send(&mut world, &tcp((pod(5), 4000), (REMOTE, 80), SYN));
    assert_ne!(receive(&mut world, &answer).1, answer);
}

#[test]
fn the_time_is_written_once_a_second_and_the_state_at_once() {
    let mut world = World::new();
    let key_time = |world: &World| world.sessions.values().next().unwrap().last_seen_ns;
    send(&mut world, &tcp((pod(5), 4000), (REMOTE, 80), SYN));
    let start = key_time(&world);
    world.now_ns += SESSION_REFRESH_NS / 2;
    send(&mut world, &tcp((pod(5), 4000), (REMOTE, 80), SYN));
    assert_eq!(key_time(&world), start);
    receive(&mut world, &tcp((REMOTE, 80), (NODE, 4000), SYN_ACK));
    assert_eq!(key_time(&world), world.now_ns, "the state changed");
    world.now_ns += SESSION_REFRESH_NS + 1;
    send(&mut world, &tcp((pod(5), 4000), (REMOTE, 80), SYN));
    assert_eq!(key_time(&world), world.now_ns);
}

#[test]
fn a_port_of_the_host_is_never_given_away() {
    let mut world = World::new();
    world.host_ports = vec![4000];
    let (_, sent) = send(&mut world, &tcp((pod(5), 4000), (REMOTE, 80), SYN));
    assert_ne!(port_of(&sent), 4000);
}

#[test]
fn an_ended_flow_gives_its_port_to_a_new_one_without_the_agent() {
    let mut world = World::new();
    send(&mut world, &tcp((pod(5), 4000), (REMOTE, 80), SYN));
    send(&mut world, &tcp((pod(5), 4000), (REMOTE, 80), RST));
    let (_, sent) = send(&mut world, &tcp((pod(6), 4000), (REMOTE, 80), SYN));
    assert_ne!(port_of(&sent), 4000, "closed a moment ago");
    world.now_ns += TCP_CLOSED_TIMEOUT_NS + 1;
    let (_, sent) = send(&mut world, &tcp((pod(7), 4000), (REMOTE, 80), SYN));
    assert_eq!(port_of(&sent), 4000);
    assert_eq!(world.count_of("reclaimed"), 1);
    let answer = tcp((REMOTE, 80), (NODE, 4000), SYN_ACK);
    assert_eq!(receive(&mut world, &answer).1[30..34], pod(7));
    assert_eq!(world.sessions.len(), 2, "the ended session has gone");
}

#[test]
fn a_mapping_with_several_remotes_is_not_taken_over() {
    let mut world = World::new();
    for remote in [REMOTE, [198, 51, 100, 3]] {
        send(&mut world, &tcp((pod(5), 4000), (remote, 80), SYN));
    }
    world.now_ns += 2 * TCP_ESTABLISHED_TIMEOUT_NS;
    let (_, sent) = send(&mut world, &tcp((pod(6), 4000), (REMOTE, 80), SYN));
    assert_ne!(port_of(&sent), 4000);
}

#[test]
fn no_port_and_no_room_drop_the_new_flow_and_keep_the_old() {
    let mut world = World::new();
    send(&mut world, &tcp((pod(5), 4000), (REMOTE, 80), SYN));
    world.sessions_max = 1;
    assert_eq!(send(&mut world, &tcp((pod(5), 4001), (REMOTE, 80), SYN)).0, Verdict::Drop);
    assert_eq!(world.count_of("drop_table_full"), 1);
    world.sessions_max = 2;
    world.host_ports = (0..=u16::MAX).collect();
    assert_eq!(send(&mut world, &tcp((pod(5), 4002), (REMOTE, 80), SYN)).0, Verdict::Drop);
    assert_eq!(world.count_of("drop_no_port"), 1);
    assert_eq!(send(&mut world, &tcp((pod(5), 4000), (REMOTE, 80), SYN)).0, Verdict::Next);
}

#[test]
fn no_truncation_leaves_with_a_private_source() {
    let whole = tcp((pod(5), 4000), (REMOTE, 80), SYN);
    for n in 0..whole.len() {
        let mut world = World::new();
        let (verdict, frame) = send(&mut world, &whole[..n]);
        // Before the EtherType is known, it is no IPv4.
        let expected = if n < 14 { Verdict::Next } else { Verdict::Drop };
        assert_eq!(verdict, expected, "{n} bytes");
        assert_eq!(frame, whole[..n]);
        let (verdict, frame) = receive(&mut world, &tcp((REMOTE, 80), (NODE, 4000), SYN_ACK)[..n]);
        assert_eq!((verdict, frame.len()), (Verdict::Next, n));
    }
}
