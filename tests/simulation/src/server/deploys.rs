//! The server's side of deploys: their driver looks, and what it decides is told to the writer, one after the other.

use std::sync::Arc;

use scheduler_core::{
    change::{Revision, Value},
    deploy::{Deploys, Move, Stage},
    event::Event,
    transition::Origin,
};

use super::{Request, Server, Then};
use crate::{
    Broken,
    clock::ms,
    shared::{ServerDue, Shared},
};

const LOOK_MS: u64 = 250;

impl Server {
    pub(super) fn look_at_deploys(&mut self, shared: &mut Shared) {
        let now = self.clock.moment(shared.now);
        let process = self.process_mut();
        if shared.is_broken(Broken::ForgetsTheGood) {
            process.deploys = Deploys::default();
        }
        let shown = process.shown.clone();
        let moves = process.deploys.look(&shown, now).into_iter();
        process.moves = moves.map(|(id, moves, decided)| Event::DeployMoved(id, moves, decided)).collect();
        if shared.is_broken(Broken::PassesUnseen) {
            let under_way = shown.deploys().values().filter(|deploy| deploy.stage == Stage::Watching);
            let passed =
                under_way.map(|deploy| Event::DeployMoved(deploy.id.clone(), deploy.moves, Move::Passed));
            process.moves.extend(passed);
        }
        self.tell_deploys(shared);
    }

    /// The next move; when there is none, the next look is due after a while.
    pub(super) fn tell_deploys(&mut self, shared: &mut Shared) {
        match self.process_mut().moves.pop_front() {
            Some(event) => {
                let origin = Origin { changer: "deploy".to_owned(), message: String::new() };
                self.ask(Request { event, origin, then: Then::DeployMoved }, shared);
            }
            None => self.plan(shared, ms(LOOK_MS), ServerDue::LookAtDeploys),
        }
    }
}

/// What the disk makes of a revision when it is broken so.
pub(super) fn damaged(revision: &Revision, shared: &Shared) -> Revision {
    let mut revision = revision.clone();
    for change in &mut revision.changes {
        let Some(Value::Deploy(deploy)) = &mut change.new else { continue };
        if shared.is_broken(Broken::RecordsTheLastStep) && !deploy.stage.is_end() {
            let deploy = Arc::make_mut(deploy);
            deploy.step = deploy.step.saturating_sub(1);
        }
        if shared.is_broken(Broken::ForgetsWhoGaveUp) && deploy.stage == Stage::GaveUp {
            change.new = None;
        }
    }
    revision
}
