//! The operator's backup of the server, and the server that goes on from it, which knows nothing of what came after.

use std::time::Duration;

use scheduler_core::{
    batch::{self, Surroundings},
    change::{Key, Revision},
    event::Event,
    restore::Restored,
    transition::{Context, Origin},
};

use super::{LEASE, Server, Then, by_scheduler};
use crate::{
    Broken,
    clock::ms,
    shared::{ServerDue, Shared},
    store::DiskError,
};

impl Server {
    /// The store's name.
    pub(super) fn epoch(&self) -> String {
        format!("e{}", self.epoch)
    }

    pub(crate) fn back_up(&mut self, shared: &mut Shared) {
        shared.note(format!("a backup is made of revision {}", self.disk.revision()));
        self.backup = Some(self.disk.clone());
    }

    /// The server ends, and another takes its place that has the backup.
    pub(crate) fn restore(&mut self, shared: &mut Shared) {
        let Some(backup) = self.backup.clone() else { return self.back_up(shared) };
        self.crash(false, shared);
        let revision = backup.revision();
        shared.note(format!("revision {revision} is restored, of {}", self.disk.revision()));
        shared.figures.restored += 1;
        shared.unwell.split_off(&(revision + 1));
        (self.disk, self.epoch) = (backup, self.epoch + 1);
        self.acknowledged.clear();
        self.go_on(revision, shared);
    }

    /// The clock of the machine that restores is right.
    fn go_on(&mut self, revision: u64, shared: &mut Shared) {
        let time = crate::clock::right(shared.now);
        let event = Event::Restored(Restored { revision, time, lease_ms: 0 });
        let origin = Origin { changer: "user:root".to_owned(), message: String::new() };
        let mut state = self.disk.state().clone();
        let mut rng = shared.rng.clone();
        let context = Context { wall: time, rng: &mut rng, is_watched: &|_| false };
        let mut surroundings = Surroundings { context, lease_runs: &|_| false };
        let disk = &mut self.disk;
        let written = batch::write(&mut state, &[(&event, &origin)], &mut surroundings, |revisions| {
            if !disk.takes(revisions) {
                return Err(DiskError::AddressUsed);
            }
            let revisions: Vec<_> = revisions.iter().map(|revision| damaged(revision, shared)).collect();
            disk.append(&revisions);
            Ok(())
        });
        shared.rng = rng;
        written.expect("the disk takes it")[0].as_ref().expect("it is not refused");
    }

    /// A server that starts on what was restored waits until no lease can run of the one before.
    pub(super) fn wait_for_leases(&mut self, shared: &mut Shared) {
        let Some(mark) = self.disk.state().restored() else { return };
        let wait = if shared.is_broken(Broken::DoesNotWaitForLeases) { ms(0) } else { mark.wait(LEASE) };
        self.plan(shared, wait.max(Duration::from_millis(1)), ServerDue::SettleRestore);
    }

    pub(super) fn settle_restore(&mut self, shared: &mut Shared) {
        self.ask(by_scheduler(Event::RestoreSettled, Then::RestoreSettled), shared);
    }
}

/// What the disk makes of it when it is broken so.
fn damaged(revision: &Revision, shared: &Shared) -> Revision {
    let mut revision = revision.clone();
    if shared.is_broken(Broken::KeepsTheNumbers) {
        revision.changes.retain(|change| !matches!(change.key, Key::Counters | Key::Node(_)));
    }
    revision
}
