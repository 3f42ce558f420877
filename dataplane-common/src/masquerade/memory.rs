//! The masquerade's tables in memory: what the maps are in the kernel, for tests and fuzzers.

use std::{
    collections::{BTreeMap, BTreeSet},
    vec,
    vec::Vec,
};

use super::{
    BLOCKS_MAX, Block, Common, Config, Family, Fragment, FragmentKey, HostSocket, Inserted, Ipv4, Mapping,
    MappingKey, OWNER_FREE, Session, SessionKey, Tables, Verdict,
    fragment::{self, KEPT_OF_DATAGRAM_MAX, KeptKey, Sent, is_too_old},
};
use crate::{counter::Counter, ipv4::Address, packet::Packet};

/// Maps of one family, clock, dice and sockets.
#[derive(Clone, Debug)]
pub struct Memory<F: Family = Ipv4> {
    /// CLOCK_MONOTONIC.
    pub now_ns: u64,
    /// The state of the dice.
    pub seed: u32,
    /// `NAT_SESSIONS`.
    pub sessions: BTreeMap<SessionKey<F>, Session<F>>,
    /// Its capacity.
    pub sessions_max: usize,
    /// `NAT_MAPPINGS`.
    pub mappings: BTreeMap<MappingKey, Mapping<F>>,
    /// `NAT_PORTS`, without those that are free.
    pub ports: BTreeMap<u32, u64>,
    /// `NAT_BLOCKS`.
    pub blocks: Vec<Block>,
    /// `NAT_FRAGMENTS`.
    pub fragments: BTreeMap<FragmentKey<F>, Fragment<F>>,
    /// `NAT_KEPT`: when a frame came, and the frame.
    pub kept: BTreeMap<KeptKey<F>, (u64, Vec<u8>)>,
    /// `NAT_SOURCES`, of whole addresses.
    pub sources: BTreeMap<F::Address, F::Address>,
    /// `NAT6_DIRECT`, of whole addresses.
    pub direct: BTreeSet<F::Address>,
    /// `PODS6` and, from the private address, `PODS`. Pods of IPv4 are not listed.
    pub pods: BTreeMap<Address, F::Address>,
    /// Ports (wire order) at which the host listens, by protocol.
    pub listening: BTreeSet<(u8, u16)>,
    /// The host's connected sockets.
    pub connected: Vec<HostSocket<F>>,
    /// `COUNTERS`.
    pub counts: BTreeMap<Counter, u32>,
}

impl<F: Family> Default for Memory<F> {
    fn default() -> Self {
        Self {
            now_ns: 1_000_000_000,
            seed: 1,
            sessions: BTreeMap::new(),
            sessions_max: usize::MAX,
            mappings: BTreeMap::new(),
            ports: BTreeMap::new(),
            blocks: vec![Block::default(); BLOCKS_MAX as usize],
            fragments: BTreeMap::new(),
            kept: BTreeMap::new(),
            sources: BTreeMap::new(),
            direct: BTreeSet::new(),
            pods: BTreeMap::new(),
            listening: BTreeSet::new(),
            connected: Vec::new(),
            counts: BTreeMap::new(),
        }
    }
}

impl<F: Family> Memory<F> {
    /// Sends a packet out by the uplink, as both programs of that direction do.
    pub fn egress(&mut self, frame: &mut [u8], config: &Config) -> Sent<F> {
        match super::egress::<F, [u8], _>(frame, self, config) {
            Verdict::Next => Sent::Next,
            Verdict::Drop => Sent::Drop,
            Verdict::Fragment => fragment::egress::<F, [u8], _>(frame, self),
        }
    }

    /// Lets a packet in by the uplink, as both programs of that direction do.
    pub fn ingress(&mut self, frame: &mut [u8], config: &Config) -> Sent<F> {
        match super::ingress::<F, [u8], _>(frame, self, config) {
            Verdict::Next => Sent::Next,
            Verdict::Drop => Sent::Drop,
            Verdict::Fragment => fragment::ingress::<F, [u8], _>(frame, self, config),
        }
    }

    /// What is sent again for [`Sent::Release`].
    pub fn release(&mut self, mut key: KeptKey<F>) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        for number in 0..KEPT_OF_DATAGRAM_MAX {
            key.number = number;
            let Some((came_ns, frame)) = self.kept.remove(&key) else { break };
            if !is_too_old(self.now_ns, came_ns) {
                frames.push(frame);
            }
        }
        frames
    }

    /// How often `counter` was counted.
    pub fn count_of(&self, counter: Counter) -> u32 {
        self.counts.get(&counter).copied().unwrap_or(0)
    }
}

fn insert<K: Ord + Copy, V: Copy>(map: &mut BTreeMap<K, V>, key: &K, value: &V) -> Inserted {
    if map.contains_key(key) {
        return Inserted::Exists;
    }
    map.insert(*key, *value);
    Inserted::Done
}

impl<F: Family> Common for Memory<F> {
    fn now_ns(&mut self) -> u64 {
        self.now_ns
    }

    fn random(&mut self) -> u32 {
        // PCG: the high bits choose blocks and the low ones ports, so both must be good.
        self.seed = self.seed.wrapping_mul(747_796_405).wrapping_add(2_891_336_453);
        let word = ((self.seed >> ((self.seed >> 28) + 4)) ^ self.seed).wrapping_mul(277_803_737);
        (word >> 22) ^ word
    }

    fn count(&mut self, counter: Counter) {
        *self.counts.entry(counter).or_default() += 1;
    }

    fn port(&mut self, index: u32) -> u64 {
        self.ports.get(&index).copied().unwrap_or(OWNER_FREE)
    }

    fn claim_port(&mut self, index: u32, from: u64, to: u64) -> bool {
        let is_from = self.port(index) == from;
        if is_from {
            self.ports.insert(index, to);
        }
        is_from
    }

    fn block(&mut self, block: u32) -> Option<&mut Block> {
        self.blocks.get_mut(block as usize)
    }

    fn claim_block(&mut self, block: u32, from: u64, to: u64) -> bool {
        match self.blocks.get_mut(block as usize) {
            Some(block) if block.owner == from => {
                block.owner = to;
                true
            }
            _ => false,
        }
    }
}

impl<F: Family> Tables<F> for Memory<F> {
    fn session(&mut self, key: &SessionKey<F>) -> Option<&mut Session<F>> {
        self.sessions.get_mut(key)
    }

    fn insert_session(&mut self, key: &SessionKey<F>, session: &Session<F>) -> Inserted {
        if self.sessions.len() >= self.sessions_max && !self.sessions.contains_key(key) {
            return Inserted::Full;
        }
        insert(&mut self.sessions, key, session)
    }

    fn remove_session(&mut self, key: &SessionKey<F>) {
        self.sessions.remove(key);
    }

    fn mapping(&mut self, key: &MappingKey) -> Option<&mut Mapping<F>> {
        self.mappings.get_mut(key)
    }

    fn insert_mapping(&mut self, key: &MappingKey, mapping: &Mapping<F>) -> Inserted {
        insert(&mut self.mappings, key, mapping)
    }

    fn remove_mapping(&mut self, key: &MappingKey) {
        self.mappings.remove(key);
    }

    fn source(&mut self, remote: F::Address) -> Option<F::Address> {
        self.sources.get(&remote).copied()
    }

    fn is_direct(&mut self, remote: F::Address) -> bool {
        self.direct.contains(&remote)
    }

    fn inside(&mut self, address: F::Address) -> Option<Address> {
        let listed = || self.pods.iter().find(|(_, pod)| **pod == address).map(|(inside, _)| *inside);
        F::private(address).or_else(listed)
    }

    fn pod(&mut self, inside: Address) -> Option<F::Address> {
        F::of_private(inside).or_else(|| self.pods.get(&inside).copied())
    }

    fn host_has(&mut self, socket: &HostSocket<F>) -> bool {
        self.listening.contains(&(socket.protocol, socket.port)) || self.connected.contains(socket)
    }

    fn fragment(&mut self, key: &FragmentKey<F>) -> Option<Fragment<F>> {
        self.fragments.get(key).copied()
    }

    fn insert_fragment(&mut self, key: &FragmentKey<F>, fragment: &Fragment<F>) {
        self.fragments.insert(*key, *fragment);
    }

    fn kept(&mut self, key: &KeptKey<F>) -> Option<u64> {
        self.kept.get(key).map(|(came_ns, _)| *came_ns)
    }

    fn keep<P: Packet + ?Sized>(&mut self, key: &KeptKey<F>, packet: &P, now_ns: u64) -> Inserted {
        if self.kept.contains_key(key) {
            return Inserted::Exists;
        }
        let frame = (0..packet.length()).filter_map(|at| packet.byte(at)).collect();
        self.kept.insert(*key, (now_ns, frame));
        Inserted::Done
    }

    fn remove_kept(&mut self, key: &KeptKey<F>) {
        self.kept.remove(key);
    }
}
