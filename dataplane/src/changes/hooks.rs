//! Tells when the programs of a TCX hook have changed, which the kernel announces to nobody: it counts the changes of
//! each hook, and the counts are compared.
//!
//! # Cost
//! The uplink's two hooks ten times a second, and with them those of [`GUARDS_AT_A_TIME`] pods in turn: a few hundred
//! microseconds a second. A guard that somebody takes off is so found within 100 ms on a node with up to 16 pods, and
//! within 1 s on one with 160; the audit finds it in any case.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use dataplane_core::Program;
use tokio::time::{MissedTickBehavior, interval};

use super::{Heard, message::Subject};
use crate::bpf;

const PERIOD: Duration = Duration::from_millis(100);

const GUARDS_AT_A_TIME: usize = 16;

/// Programs and the devices that they hang on, as last observed.
#[derive(Clone, Debug, Default)]
pub(crate) struct Watched(Arc<Mutex<Vec<Place>>>);

type Place = (Program, String);

impl Watched {
    pub(crate) fn set(&self, places: impl Iterator<Item = Place>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = places.collect();
    }

    fn get(&self) -> Vec<Place> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Compares for ever.
pub(super) async fn watch(watched: Watched, heard: Heard) {
    let mut ticks = interval(PERIOD);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut known = BTreeMap::new();
    let mut turn = 0;
    loop {
        ticks.tick().await;
        let places = watched.get();
        known.retain(|place, _| places.contains(place));
        for place in next(&places, &mut turn) {
            let count = bpf::hook_revision(place.0, &place.1);
            let before = known.insert(place.clone(), count);
            if before.is_some_and(|before| before != count) {
                heard.change(Subject::Hook, None);
            }
        }
    }
}

/// The uplink's, and some of the pods'; `turn` goes round.
fn next(places: &[Place], turn: &mut usize) -> Vec<Place> {
    let (guards, uplink): (Vec<_>, Vec<_>) = places.iter().partition(|place| place.0 == Program::PodGuard);
    let count = guards.len().min(GUARDS_AT_A_TIME);
    let some = guards.iter().cycle().skip(*turn).take(count);
    let next = uplink.iter().chain(some).map(|place| (*place).clone()).collect();
    *turn = (*turn + count) % guards.len().max(1);
    next
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_uplink_is_always_looked_at_and_every_pod_in_its_turn() {
        let uplink = (Program::UplinkIngress, "eth0".to_owned());
        let guards = (0..40).map(|n| (Program::PodGuard, format!("hx{n}")));
        let places: Vec<Place> = guards.chain([uplink.clone()]).collect();
        let (mut seen, mut turn) = (BTreeSet::new(), 0);
        for _ in 0..3 {
            let now = next(&places, &mut turn);
            assert!(now.contains(&uplink) && now.len() == 1 + GUARDS_AT_A_TIME, "{now:?}");
            seen.extend(now);
        }
        assert_eq!(seen.len(), places.len());
        assert_eq!(next(&[], &mut turn), []);
    }
}
