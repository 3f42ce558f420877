//! Holds the node's lease: a thread that does nothing else, on a connection of its own.
//!
//! Nothing that the agent does, and nothing that the server sends it, delays a renewal. The same thread tells the server
//! whether this node's kernel reaches a neighbour that has fallen silent.

use std::{
    collections::BTreeMap,
    io,
    net::Ipv6Addr,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use dataplane::{Neighbours, echo};
use hextet_api::{
    connect::mutual_tls,
    v1::{
        LeaseAnswer, LeaseGrant, LeaseRenewal, LookFor, NeighbourSeen, agent_client::AgentClient,
        lease_answer::Answer, lease_renewal::Renewal,
    },
};
use tokio::{
    runtime::Builder,
    sync::{Semaphore, mpsc, watch},
    time::{Instant, MissedTickBehavior, interval, sleep, timeout_at},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};
use tracing::{debug, warn};

use crate::{
    attach::Hello,
    certificates::Certificates,
    lease_file,
    refusal::{Deleted, Pace, TakenForCopy},
};

/// How often a lease is renewed before the first grant says so.
const RENEW_DEFAULT: Duration = Duration::from_millis(250);
const RENEW_MIN: Duration = Duration::from_millis(10);
/// Renewals that wait for the network; later ones are left out.
const RENEWALS_MAX: usize = 16;
/// Renewals that wait for their grant.
const SENT_MAX: usize = 64;
/// A stream on which nothing comes for so long is given up for another.
const SILENCE_MAX: Duration = Duration::from_secs(5);
/// Between two streams.
const RETRY: Duration = Duration::from_millis(250);
/// Neighbours that are looked for at a time. Who asks for more asks again, or somebody else.
const LOOKS_MAX: usize = 64;

/// What the server granted, and what of it is good for pods of which there may only be one.
#[derive(Debug)]
pub(crate) struct Hold {
    file: PathBuf,
    state: Mutex<State>,
    is_given_back: AtomicBool,
}

#[derive(Clone, Copy, Debug, Default)]
struct State {
    /// Until when, and in which term.
    granted: Option<(Duration, u64)>,
    /// The term of the assignment that is followed; none while no pod needs the lease.
    followed: Option<u64>,
}

impl Hold {
    pub(crate) fn new(run_dir: &Path) -> Hold {
        let file = run_dir.join(lease_file::LEASE_FILE);
        Hold { file, state: Mutex::default(), is_given_back: AtomicBool::new(false) }
    }

    /// The assignment that is followed now is of this term; none when no pod of it needs the lease.
    pub(crate) fn follow(&self, term: Option<u64>) {
        self.change(|state| state.followed = term);
    }

    /// The node is taken down: the lease is not renewed any more, which would bring the node back, and what may only
    /// run with it ends.
    pub(crate) fn give_back(&self) {
        self.is_given_back.store(true, Ordering::Relaxed);
        self.change(|state| state.granted = None);
    }

    fn is_given_back(&self) -> bool {
        self.is_given_back.load(Ordering::Relaxed)
    }

    fn grant(&self, until: Duration, term: u64) {
        self.change(|state| state.granted = Some((until, term)));
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.lock();
        change(&mut state);
        let result = match good_until(*state) {
            Some(until) if !self.is_given_back() => lease_file::write(&self.file, until),
            // Until the first grant, one of the agent before may be good.
            None if state.granted.is_none() && !self.is_given_back() => Ok(()),
            _ => lease_file::remove(&self.file),
        };
        if let Err(error) = result {
            warn!(%error, file = %self.file.display(), "the lease cannot be written: single pods will end");
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A grant and an assignment of one term: the node has heard what was replaced while it was away.
fn good_until(state: State) -> Option<Duration> {
    let (until, term) = state.granted?;
    (state.followed == Some(term)).then_some(until)
}

/// Starts the thread. It ends with the agent.
pub(crate) fn start(
    certificates: Arc<Certificates>,
    hello: watch::Receiver<Hello>,
    hold: Arc<Hold>,
) -> io::Result<()> {
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let body = move || runtime.block_on(renew_for_ever(certificates, hello, hold));
    thread::Builder::new().name("lease".to_owned()).spawn(body).map(drop)
}

async fn renew_for_ever(certificates: Arc<Certificates>, mut hello: watch::Receiver<Hello>, hold: Arc<Hold>) {
    let mut pace = Pace::default();
    while hello.wait_for(|hello| hello.underlay.is_some()).await.is_ok() {
        if hold.is_given_back() {
            return;
        }
        let result = renew(&certificates, &hello, &hold).await;
        if let Err(error) = &result {
            debug!(error = format!("{error:#}"), "the lease is not renewed");
        }
        let status = result.as_ref().err().and_then(|error| error.downcast_ref::<Status>());
        let wait = match status.and_then(TakenForCopy::of) {
            Some(copy) => pace.refused(&copy, Instant::now()),
            None if status.and_then(Deleted::of).is_some() => pace.deleted(),
            None => {
                pace.reset();
                RETRY
            }
        };
        sleep(wait).await;
    }
}

/// One stream.
async fn renew(certificates: &Certificates, hello: &watch::Receiver<Hello>, hold: &Hold) -> Result<()> {
    let mut client = AgentClient::new(mutual_tls(&certificates.credentials()).await?);
    let (renewals, receiver) = mpsc::channel(RENEWALS_MAX);
    let holder = hello.borrow().lease_holder();
    renewals.try_send(renewal(Renewal::Holder(holder))).context("the stream takes nothing")?;
    let answers = client.hold_lease(ReceiverStream::new(receiver)).await?.into_inner();
    let looker = Arc::new(Looker {
        neighbours: Neighbours::open().context("cannot open a netlink socket")?,
        hello: hello.clone(),
        answers: renewals.clone(),
        room: Semaphore::new(LOOKS_MAX),
    });
    Renewer { renewals, hold, looker, number: 0, sent: BTreeMap::new() }.run(answers).await
}

struct Renewer<'a> {
    renewals: mpsc::Sender<LeaseRenewal>,
    hold: &'a Hold,
    looker: Arc<Looker>,
    number: u64,
    /// When each number was sent that has no grant yet.
    sent: BTreeMap<u64, Duration>,
}

impl Renewer<'_> {
    async fn run(&mut self, mut answers: Streaming<LeaseAnswer>) -> Result<()> {
        let mut period = RENEW_DEFAULT;
        let mut ticks = ticks(period);
        let mut heard = Instant::now();
        loop {
            tokio::select! {
                _ = ticks.tick() => {
                    if self.hold.is_given_back() {
                        return Ok(());
                    }
                    self.renew();
                }
                answer = timeout_at(heard + SILENCE_MAX, answers.message()) => {
                    let answer = answer.context("nothing comes from the server")??;
                    heard = Instant::now();
                    match answer.context("the stream has ended")?.answer {
                        Some(Answer::Grant(grant)) => {
                            let renew = Duration::from_millis(grant.renew_ms.into()).max(RENEW_MIN);
                            if period != renew {
                                period = renew;
                                ticks = self::ticks(renew);
                            }
                            self.granted(&grant);
                        }
                        Some(Answer::LookFor(look_for)) => self.looker.clone().start(look_for),
                        None => bail!("an answer of another version"),
                    }
                }
            }
        }
    }

    /// The lease counts from before the number is sent.
    fn renew(&mut self) {
        self.number += 1;
        self.sent.insert(self.number, lease_file::boot_time());
        if self.sent.len() > SENT_MAX {
            self.sent.pop_first();
        }
        // A network that takes nothing gets the next one.
        let _ = self.renewals.try_send(renewal(Renewal::Number(self.number)));
    }

    fn granted(&mut self, grant: &LeaseGrant) {
        let later = self.sent.split_off(&grant.number.saturating_add(1));
        let Some(sent) = self.sent.remove(&grant.number) else {
            self.sent = later;
            return;
        };
        self.sent = later;
        self.hold.grant(sent + Duration::from_millis(grant.lease_ms.into()), grant.term);
    }
}

fn ticks(period: Duration) -> tokio::time::Interval {
    let mut ticks = interval(period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

fn renewal(renewal: Renewal) -> LeaseRenewal {
    LeaseRenewal { renewal: Some(renewal) }
}

/// Looks for neighbours.
struct Looker {
    neighbours: Neighbours,
    hello: watch::Receiver<Hello>,
    answers: mpsc::Sender<LeaseRenewal>,
    room: Semaphore,
}

impl Looker {
    /// Answers when it knows, which takes half a second at most, or not at all.
    fn start(self: Arc<Self>, LookFor { node, underlay, routed }: LookFor) {
        let Ok(octets) = <[u8; 16]>::try_from(underlay.as_slice()) else { return };
        tokio::spawn(async move {
            let Ok(_room) = self.room.try_acquire() else { return };
            let address = Ipv6Addr::from(octets);
            let is_there =
                if routed { self.answers_echo(address).await } else { self.is_neighbour(address).await };
            match is_there {
                Ok(Some(is_there)) => {
                    debug!(node, is_there, routed, "looked for a silent node");
                    let seen = NeighbourSeen { node, is_there };
                    let _ = self.answers.send(renewal(Renewal::Seen(seen))).await;
                }
                Ok(None) => debug!(node, "cannot look for a node: no carrier"),
                Err(error) => debug!(node, error = format!("{error:#}"), "cannot look for a node"),
            }
        });
    }

    async fn is_neighbour(&self, address: Ipv6Addr) -> Result<Option<bool>> {
        let Some(device) = self.hello.borrow().device.clone() else { return Ok(None) };
        Ok(self.neighbours.is_there(&device, address).await?)
    }

    async fn answers_echo(&self, address: Ipv6Addr) -> Result<Option<bool>> {
        Ok(Some(echo::answers(address).await?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grant_is_good_in_the_term_of_the_assignment_alone() {
        let until = Duration::from_secs(9);
        let state = |granted, followed| State { granted, followed };
        assert_eq!(good_until(state(Some((until, 3)), Some(3))), Some(until));
        assert_eq!(good_until(state(Some((until, 4)), Some(3))), None, "what was replaced is not known yet");
        assert_eq!(good_until(state(Some((until, 3)), None)), None);
        assert_eq!(good_until(state(None, Some(3))), None);
    }

    #[test]
    fn a_lease_that_is_given_back_is_over_at_once_and_for_good() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join(lease_file::LEASE_FILE);
        let later = lease_file::boot_time() + Duration::from_secs(60);
        for has_grant in [true, false] {
            lease_file::write(&file, later).unwrap();
            let hold = Hold::new(folder.path());
            hold.follow(Some(1));
            if has_grant {
                hold.grant(later, 1);
            }
            assert!(!lease_file::remaining(&file).is_zero());
            hold.give_back();
            assert!(lease_file::remaining(&file).is_zero(), "another node may start what only one may run");
            hold.grant(later, 1);
            hold.follow(Some(1));
            assert!(lease_file::remaining(&file).is_zero(), "an answer that was on its way changes nothing");
        }
    }

    #[test]
    fn an_agent_that_starts_leaves_the_lease_of_the_one_before_until_it_knows_better() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join(lease_file::LEASE_FILE);
        let later = lease_file::boot_time() + Duration::from_secs(60);
        lease_file::write(&file, later).unwrap();
        let hold = Hold::new(folder.path());
        hold.follow(Some(1));
        assert!(!lease_file::remaining(&file).is_zero());
        hold.grant(later, 2);
        assert!(lease_file::remaining(&file).is_zero(), "another term");
        hold.follow(Some(2));
        assert!(!lease_file::remaining(&file).is_zero());
    }
}
