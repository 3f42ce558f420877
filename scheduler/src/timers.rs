//! What happens because time passes: leases end, drains are over, a restore is settled, and the log is trimmed.

use std::{sync::Arc, time::Duration};

use hextet_api::v1::LookFor;
use scheduler_core::{
    event::Event,
    lease::{self, Finding, Look},
    state::State,
    transition::Origin,
};
use tokio::{task::JoinHandle, time};
use tracing::{info, warn};

use crate::{
    compaction,
    hub::{self, Hub},
};

/// Leases are looked at this often in the time after which a silent node is asked about.
const LOOKS_PER_SILENCE: u32 = 10;
/// Deploys are looked at this often.
const DEPLOYS_INTERVAL: Duration = Duration::from_millis(250);
const RETRY: Duration = Duration::from_secs(1);
/// How often the size of the log is looked at.
const TRIM_INTERVAL: Duration = Duration::from_secs(30);

/// Asks about nodes that are silent, and tells the writer what is found out about them. It goes on looking while a slow
/// disk holds the writer up: a gap between looks would be taken for a stop of the server itself.
pub(crate) async fn look_at_leases(hub: Arc<Hub>) {
    let interval = hub.leases().silence_max() / LOOKS_PER_SILENCE;
    let mut ticks = time::interval(interval.max(Duration::from_millis(10)));
    let mut telling: Option<JoinHandle<()>> = None;
    loop {
        ticks.tick().await;
        let findings = look(&hub);
        let busy = telling.as_ref().is_some_and(|task| !task.is_finished());
        if !findings.is_empty() && !busy {
            telling = Some(tokio::spawn(tell_all(hub.clone(), findings)));
        }
    }
}

/// Asks what is to be asked; what is found out. It lets go of the state: a snapshot that is held keeps old values in memory.
fn look(hub: &Hub) -> Vec<Finding> {
    let state = hub.state();
    let Look { questions, findings } = hub.leases().look(&state, hub.clock.now());
    for question in questions {
        if let Some(look_for) = look_for(&state, question.about, question.routed) {
            hub.lease_streams.ask(&question.witness, look_for);
        }
    }
    findings
}

fn look_for(state: &State, node: String, routed: bool) -> Option<LookFor> {
    let underlay = state.nodes().get(&node)?.underlay?.octets().to_vec();
    Some(LookFor { node, underlay, routed })
}

async fn tell_all(hub: Arc<Hub>, findings: Vec<Finding>) {
    for event in lease::events(findings) {
        tell(&hub, hub::scheduler(), event).await;
    }
}

/// Tells the writer which pods every load balancer knows to terminate.
pub(crate) async fn finish_drains(hub: Arc<Hub>) {
    loop {
        let finished = hub.drains().finished(hub.clock.now());
        if finished.is_empty() {
            wait_for_drains(&hub).await;
        } else {
            tell(&hub, hub::scheduler(), Event::Drained(finished)).await;
        }
    }
}

/// Goes on with the deploys that are under way.
pub(crate) async fn drive_deploys(hub: Arc<Hub>) {
    let mut ticks = time::interval(DEPLOYS_INTERVAL);
    loop {
        ticks.tick().await;
        let moves = hub.deploys().look(&hub.state(), hub.clock.now());
        for (id, moves, decided) in moves {
            tell(&hub, hub::deploy(), Event::DeployMoved(id, moves, decided)).await;
        }
    }
}

/// After a restore: tells the writer when no lease of the server before can run any more.
pub(crate) async fn settle_restore(hub: Arc<Hub>) {
    while let Some(wait) = hub.restore_wait() {
        if wait.is_zero() {
            tell(&hub, hub::scheduler(), Event::RestoreSettled).await;
        } else {
            time::sleep(wait).await;
        }
    }
    // A timer lasts as long as the server.
    std::future::pending().await
}

/// Keeps the log at its size.
pub(crate) async fn trim_history(hub: Arc<Hub>) {
    let mut ticks = time::interval(TRIM_INTERVAL);
    loop {
        ticks.tick().await;
        match compaction::to_size(&hub).await {
            Ok(0) => {}
            Ok(revisions) => info!(revisions, "the oldest part of the history is forgotten"),
            Err(error) => warn!(%error, "the history is not trimmed"),
        }
    }
}

async fn wait_for_drains(hub: &Hub) {
    let deadline = hub.drains().poll_timeout().map(|moment| hub.clock.instant(moment));
    let timeout = async {
        match deadline {
            Some(deadline) => time::sleep_until(deadline.into()).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        () = hub.drains_changed.notified() => {}
        () = timeout => {}
    }
}

/// When the store takes nothing, the timers ask again a little later.
async fn tell(hub: &Hub, origin: Origin, event: Event) {
    if let Err(error) = hub.write(origin, event).await {
        warn!(%error, "a timer's event was not taken");
        time::sleep(RETRY).await;
    }
}
