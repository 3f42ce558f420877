//! When a deploy goes on: what its stage asks for, and how long that has been so.
//!
//! Kept in memory alone, by the monotonic clock: when a server starts, each stage's times begin anew.

use std::{collections::BTreeMap, time::Duration};

use super::{
    Deploy, DeployId, Fault, Move, Stage,
    health::{self, Health},
};
use crate::{state::State, time::Moment};

/// After a longer gap between two looks the server itself was away: what the pods did meanwhile is not known.
const GAP_MAX: Duration = Duration::from_secs(3);

/// The deploys that are under way, and since when they are as they are.
#[derive(Clone, Debug, Default)]
pub struct Deploys {
    looked: Moment,
    watches: BTreeMap<DeployId, Watch>,
}

#[derive(Clone, Debug)]
struct Watch {
    /// Of which stage.
    moves: u64,
    since: Moment,
    /// Since when the pods do well, if they do.
    good: Option<Moment>,
    /// Since when they do not.
    late: Moment,
    /// What is waited for.
    what: String,
}

/// What a deploy waits for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outlook {
    /// In words; empty when it is time alone.
    pub what: String,
    /// When it goes on if nothing changes.
    pub left: Option<Duration>,
}

impl Deploys {
    /// What is to be done now, with the number of moves after which it was decided. It must be called often.
    pub fn look(&mut self, state: &State, now: Moment) -> Vec<(DeployId, u64, Move)> {
        let away = now - self.looked > GAP_MAX;
        self.looked = now;
        self.watches.retain(|id, _| state.deploys().get(id).is_some_and(|deploy| !deploy.stage.is_end()));
        let mut moves = Vec::new();
        for deploy in state.deploys().values().filter(|deploy| !deploy.stage.is_end()) {
            let watch = self.watches.entry(deploy.id.clone()).or_insert_with(|| Watch::new(deploy, now));
            if away || watch.moves != deploy.moves {
                *watch = Watch::new(deploy, now);
            }
            let decided = watch.decide(state, deploy, now);
            moves.extend(decided.map(|decided| (deploy.id.clone(), deploy.moves, decided)));
        }
        moves
    }

    /// What a deploy waits for, as of the last look.
    #[must_use]
    pub fn outlook(&self, deploy: &Deploy, now: Moment) -> Outlook {
        let watch = self.watches.get(&deploy.id).filter(|watch| watch.moves == deploy.moves);
        watch.map(|watch| watch.outlook(deploy, now)).unwrap_or_default()
    }
}

impl Watch {
    fn new(deploy: &Deploy, now: Moment) -> Watch {
        Watch { moves: deploy.moves, since: now, good: None, late: now, what: String::new() }
    }

    fn decide(&mut self, state: &State, deploy: &Deploy, now: Moment) -> Option<Move> {
        match deploy.stage {
            Stage::Growing | Stage::Watching | Stage::Held => self.watch(state, deploy, now),
            Stage::Waiting => {
                (now - self.since >= deploy.schedule.wait(deploy.failures)).then_some(Move::TryAgain)
            }
            Stage::GoingBack => self.go_back(state, deploy),
            Stage::Stuck | Stage::Promoted | Stage::Aborted | Stage::GaveUp => None,
        }
    }

    fn watch(&mut self, state: &State, deploy: &Deploy, now: Moment) -> Option<Move> {
        match health::health(state, deploy) {
            Health::Bad(fault) => return Some(Move::Failed(fault)),
            Health::Good => {
                self.what.clear();
                let good = *self.good.get_or_insert(now);
                let passed = now - good >= deploy.healthy_for();
                return (passed && deploy.stage != Stage::Held).then_some(Move::Passed);
            }
            Health::NotYet(what) => {
                if self.good.take().is_some() {
                    self.late = now;
                }
                self.what = what;
            }
        }
        let timeout = Duration::from_millis(deploy.schedule.timeout_ms);
        let why = || format!("not so after {timeout:?}: {}", self.what);
        (now - self.late >= timeout).then(|| Move::Failed(Fault { why: why(), output: String::new() }))
    }

    fn go_back(&mut self, state: &State, deploy: &Deploy) -> Option<Move> {
        if health::is_back(state, deploy) {
            return Some(Move::Back);
        }
        self.what = format!("pods of version {} stop as others run in their place", deploy.id.version);
        None
    }

    fn outlook(&self, deploy: &Deploy, now: Moment) -> Outlook {
        let left = match (deploy.stage, self.good) {
            (Stage::Growing | Stage::Watching, Some(good)) => {
                Some(deploy.healthy_for().saturating_sub(now - good))
            }
            (Stage::Waiting, _) => {
                Some(deploy.schedule.wait(deploy.failures).saturating_sub(now - self.since))
            }
            _ => None,
        };
        Outlook { what: self.what.clone(), left }
    }
}
