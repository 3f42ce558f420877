//! The masquerade against a model that is simple enough to be right by reading: one table of mappings, one of
//! permissions, both with the times of the RFCs. Random packets go through both; every answer is compared.

use std::collections::BTreeMap;

use super::*;

/// Deterministic dice of the test itself.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }

    fn one_of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len() as u64) as usize]
    }
}

type Inside = (u8, [u8; 4], u16);

/// What RFC 4787 and RFC 5382 promise, without a word on how.
#[derive(Default)]
struct Model {
    /// The outside port of an inside end, as it was first seen.
    outside: BTreeMap<Inside, u16>,
    /// Until when a remote's address gets in.
    admitted: BTreeMap<(Inside, [u8; 4]), u64>,
}

impl Model {
    /// A packet has left; what is known of it must agree with what was seen.
    fn sent(&mut self, inside: Inside, remote: [u8; 4], port: u16, until_ns: u64) {
        let known = *self.outside.entry(inside).or_insert(port);
        assert_eq!(known, port, "one outside port for each inside end");
        let mine = |(other, at): (&Inside, &u16)| *at != port || *other == inside || other.0 != inside.0;
        assert!(self.outside.iter().all(mine), "no outside port for two inside ends");
        let admitted = self.admitted.entry((inside, remote)).or_default();
        *admitted = until_ns.max(*admitted);
    }

    /// Whom a UDP packet from outside is for.
    fn receiver(&self, protocol: u8, remote: [u8; 4], port: u16, now_ns: u64) -> Option<Inside> {
        let (inside, _) = self.outside.iter().find(|(inside, at)| inside.0 == protocol && **at == port)?;
        (*self.admitted.get(&(*inside, remote))? >= now_ns).then_some(*inside)
    }
}

/// UDP and echoes of a few pods with a few remotes over hours.
#[test]
fn random_datagrams_go_where_the_model_says() {
    for seed in 0..40 {
        run(seed);
    }
}

fn run(seed: u64) {
    let mut dice = Dice(seed);
    let mut world = Memory { seed: seed as u32, ..Memory::default() };
    let mut model = Model::default();
    let remotes = [REMOTE, OTHER, [203, 0, 113, 7]];
    for step in 0..400 {
        world.now_ns += dice.one_of(&[0, SECOND_NS / 2, 3 * SECOND_NS, 70 * SECOND_NS]);
        let remote = dice.one_of(&remotes);
        if dice.below(2) == 0 {
            outward(&mut dice, &mut world, &mut model, remote);
        } else {
            from_outside(&mut dice, &mut world, &model, remote, (seed, step));
        }
    }
    assert!(
        model.outside.len() > 5 && world.count_of(Counter::IngressTranslated) > 10,
        "seed {seed}: too quiet"
    );
}

fn outward(dice: &mut Dice, world: &mut Memory, model: &mut Model, remote: [u8; 4]) {
    let inside = (ipv4::UDP, pod(dice.below(3) as u8 + 1), 40_000 + dice.below(4) as u16);
    let remote_port = 1_000 + dice.below(3) as u16;
    let port = port_out(world, &udp((inside.1, inside.2), (remote, remote_port)));
    model.sent(inside, remote, port, world.now_ns + UDP_TIMEOUT_NS);
}

fn from_outside(dice: &mut Dice, world: &mut Memory, model: &Model, remote: [u8; 4], at: (u64, u32)) {
    let known: Vec<u16> = model.outside.values().copied().collect();
    let port = if known.is_empty() { 2_000 } else { dice.one_of(&known) };
    let packet = udp((remote, 1_000 + dice.below(5) as u16), (NODE, port));
    let (verdict, got) = receive(world, &packet);
    let delivered = (verdict == Sent::Next && got != packet).then(|| destination(&got));
    // The time that is written down is at most this much behind.
    let ends = [0, SESSION_REFRESH_NS].map(|behind| {
        let inside = model.receiver(ipv4::UDP, remote, port, world.now_ns + behind);
        inside.map(|(_, address, port)| (address, port))
    });
    assert!(ends.contains(&delivered), "seed and step {at:?}: {delivered:?}, the model says {ends:?}");
}
