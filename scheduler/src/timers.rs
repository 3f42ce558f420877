//! What happens because time passes: leases end, and drains are over.

use std::{sync::Arc, time::Duration};

use scheduler_core::event::Event;
use tokio::{task::JoinHandle, time};
use tracing::warn;

use crate::hub::{self, Hub};

/// Leases are looked at this often in the time of one.
const LOOKS_PER_LEASE: u32 = 8;
const RETRY: Duration = Duration::from_secs(1);

/// Tells the writer which leases have ended. It goes on looking while a slow disk holds the writer up: a
/// gap between looks would be taken for a stop of the server itself.
pub(crate) async fn end_leases(hub: Arc<Hub>) {
    let interval = hub.leases().length() / LOOKS_PER_LEASE;
    let mut ticks = time::interval(interval.max(Duration::from_millis(10)));
    let mut telling: Option<JoinHandle<()>> = None;
    loop {
        ticks.tick().await;
        let state = hub.state();
        let ended = hub.leases().lost(&state, hub.clock.now());
        drop(state);
        let busy = telling.as_ref().is_some_and(|task| !task.is_finished());
        if !ended.is_empty() && !busy {
            telling = Some(tokio::spawn(tell(hub.clone(), Event::LeaseEnded(ended))));
        }
    }
}

/// Tells the writer which pods every load balancer knows to terminate.
pub(crate) async fn finish_drains(hub: Arc<Hub>) {
    loop {
        let finished = hub.drains().finished(hub.clock.now());
        if finished.is_empty() {
            wait_for_drains(&hub).await;
        } else {
            tell(hub.clone(), Event::Drained(finished)).await;
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
async fn tell(hub: Arc<Hub>, event: Event) {
    if let Err(error) = hub.write(hub::scheduler(), event).await {
        warn!(%error, "a timer's event was not taken");
        time::sleep(RETRY).await;
    }
}
