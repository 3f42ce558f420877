//! Seats beside a plain list of them, sorted and filtered each time.

use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

use super::*;
use crate::{
    node::NodePhase,
    quantity::{Cpu, Memory},
    testing::node,
};

#[test]
fn chunks_change_nothing_of_order_and_room() {
    for seed in 0..20 {
        let (mut seats, mut plain) = (Seats::default(), Vec::<Seat>::new());
        let mut rng = StdRng::seed_from_u64(seed);
        for step in 0..2_000 {
            // Grows at first and shrinks in the end, so that chunks are split and joined.
            if rng.random_range(0..2_000) > step || plain.is_empty() {
                let seat = random(&mut rng);
                if plain.iter().any(|other| other.node.name == seat.node.name) {
                    continue;
                }
                seats.insert(&seat.node, seat.usage.clone());
                plain.push(seat);
            } else {
                let seat = plain.swap_remove(rng.random_range(0..plain.len()));
                seats.remove(&seat.node, &seat.usage);
            }
            if step % 50 == 0 {
                check(&seats, &mut plain, &mut rng);
            }
        }
    }
}

#[test]
fn a_seat_is_found_by_its_node_and_usage() {
    let mut seats = Seats::default();
    let mut rng = StdRng::seed_from_u64(1);
    let all: Vec<Seat> = (0..500).map(|number| numbered(number, &mut rng)).collect();
    all.iter().for_each(|seat| seats.insert(&seat.node, seat.usage.clone()));
    assert!(all.iter().all(|seat| seats.get(&seat.node, &seat.usage) == Some(seat)));
    assert_eq!(seats.get(&all[0].node, &Usage { cpu_millis: 999_999, ..Usage::default() }), None);
    all.iter().for_each(|seat| seats.remove(&seat.node, &seat.usage));
    assert!(seats.first().is_none() && seats.iter().next().is_none());
}

fn check(seats: &Seats, plain: &mut [Seat], rng: &mut StdRng) {
    plain.sort_by_key(|seat| (seat.usage.share(&seat.node), seat.node.name.clone()));
    assert!(seats.iter().eq(plain.iter()));
    let needs =
        Resources { cpu: Cpu(rng.random_range(0..1_200)), memory: Memory(rng.random_range(0..1_200)) };
    assert!(seats.with_room(needs).eq(plain.iter().filter(|seat| covers(seat.free(), needs))));
    let lens = seats.0.iter().map(|chunk| chunk.entries.len());
    assert!(lens.into_iter().all(|len| (1..=CHUNK_LEN_MAX).contains(&len)));
}

fn random(rng: &mut StdRng) -> Seat {
    let number = rng.random_range(0..1_000);
    numbered(number, rng)
}

fn numbered(number: u32, rng: &mut StdRng) -> Seat {
    let phase = if rng.random_bool(0.1) { NodePhase::Lost } else { NodePhase::Ready };
    let capacity = Resources { cpu: Cpu(1_000), memory: Memory(1_000) };
    let node = crate::node::Node { capacity, phase, ..node(&format!("n{number}")) };
    let cpu_millis = rng.random_range(0..12) * 100;
    let memory_bytes = rng.random_range(0..12) * 100;
    Seat { node: Arc::new(node), usage: Usage { cpu_millis, memory_bytes, ..Usage::default() } }
}
