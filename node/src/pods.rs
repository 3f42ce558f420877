//! The pods of this node while the agent runs: their states, their keepers, and the actions that follow.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::PathBuf,
    time::Duration,
};

use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
    time::sleep,
};
use tracing::{debug, info, warn};

use crate::{
    assignment::{Assignment, PodRecord},
    backoff::Backoff,
    config::NodePaths,
    desired, files,
    identity::Identity,
    keeper::{self, News, Place, Wanted},
    pod_state::{Action, Event, PodState, Report, Stage},
    supervisor::{spec::PodSpec, status::SOCKET_FILE},
};

/// Where `ip` and the dataplane keep network namespaces.
pub(crate) const NETNS_DIR: &str = "/run/netns";

const RETRY_FIRST: Duration = Duration::from_millis(250);
const RETRY_MAX: Duration = Duration::from_secs(30);

/// What the agent has to do for a pod that [`Pods`] cannot do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Duty {
    Reconcile,
    Finish(String),
}

/// The pods and what drives them.
pub(crate) struct Pods {
    paths: NodePaths,
    identity: Identity,
    program: PathBuf,
    all: BTreeMap<String, LocalPod>,
    keepers: JoinSet<()>,
    news: mpsc::Sender<(String, News)>,
    retries: mpsc::Sender<String>,
}

struct LocalPod {
    state: PodState,
    keeper: Option<watch::Sender<Wanted>>,
}

impl Pods {
    pub(crate) fn new(
        paths: NodePaths,
        identity: Identity,
        program: PathBuf,
        news: mpsc::Sender<(String, News)>,
        retries: mpsc::Sender<String>,
    ) -> Pods {
        Pods { paths, identity, program, all: BTreeMap::new(), keepers: JoinSet::new(), news, retries }
    }

    /// Whether nothing of the pod may be in the kernel.
    pub(crate) fn is_absent(&self, pod: &str) -> bool {
        self.all.get(pod).is_some_and(|pod| pod.state.is_absent())
    }

    pub(crate) fn stage(&self, pod: &str) -> Option<&Stage> {
        self.all.get(pod).map(|pod| pod.state.stage())
    }

    pub(crate) fn report(&self, pod: &str) -> Option<Report> {
        self.all.get(pod)?.state.report()
    }

    pub(crate) fn reports(&self) -> BTreeMap<String, Report> {
        self.all.iter().filter_map(|(id, pod)| Some((id.clone(), pod.state.report()?))).collect()
    }

    pub(crate) fn ids(&self) -> Vec<String> {
        self.all.keys().cloned().collect()
    }

    /// Takes over what the node must run: new pods begin, changed ones are told, removed ones end.
    pub(crate) fn assign(&mut self, old: &Assignment, new: &Assignment, from_store: bool) -> Vec<Duty> {
        let mut duties = vec![Duty::Reconcile];
        for (id, record) in &new.pods {
            self.all.entry(id.clone()).or_insert_with(|| {
                let supervised = self.paths.pod_run_dir(id).join(SOCKET_FILE).exists();
                LocalPod { state: PodState::new(from_store && supervised), keeper: None }
            });
            let before = old.pods.get(id);
            let moved = before.is_some_and(|before| before.address != record.address);
            let changed = before.is_some_and(|before| self.spec(id, before) != self.spec(id, record));
            if record.removing {
                duties.extend(self.happen(id, record, Event::Remove));
            } else if moved {
                duties.extend(self.happen(id, record, Event::Displaced));
            } else if changed {
                duties.extend(self.happen(id, record, Event::Changed));
            }
        }
        duties
    }

    /// What a keeper said.
    pub(crate) fn heard(&mut self, id: &str, record: &PodRecord, news: News) -> Vec<Duty> {
        let event = match news {
            News::Status(status) => Event::Status(status),
            News::Lost(why) => {
                self.drop_keeper(id);
                warn!(pod = id, why, "a pod has no supervisor");
                Event::SupervisorLost(why)
            }
            News::Stopped => {
                self.drop_keeper(id);
                Event::SupervisorStopped
            }
        };
        self.happen(id, record, event)
    }

    /// Steps the pod's state and acts on it.
    pub(crate) fn happen(&mut self, id: &str, record: &PodRecord, event: Event) -> Vec<Duty> {
        let Some(pod) = self.all.get_mut(id) else { return Vec::new() };
        let before = pod.state.report();
        let actions = pod.state.step(event);
        log_change(id, before.as_ref(), pod.state.report().as_ref());
        actions.into_iter().filter_map(|action| self.act(id, record, action)).collect()
    }

    /// Removes what a pod left on disk.
    pub(crate) fn remove_folders(&self, id: &str) -> std::io::Result<()> {
        files::remove_folder(&self.paths.pod_run_dir(id))?;
        files::remove_folder(&self.paths.pod_state_dir(id))
    }

    /// Nothing is left of the pod.
    pub(crate) fn forget(&mut self, id: &str) {
        info!(pod = id, "pod removed");
        self.all.remove(id);
    }

    /// Nothing is left of the pod, and it is wanted again.
    pub(crate) fn begin_anew(&mut self, id: &str) {
        self.all.insert(id.to_owned(), LocalPod { state: PodState::new(false), keeper: None });
    }

    /// Ends supervisors and removes folders of pods that nobody assigned, as a removed store leaves them.
    pub(crate) fn clean_up(&mut self, known: &Assignment) {
        let known = |id: &String| known.pods.contains_key(id);
        for id in folders(&self.paths.pods_run_dir()).into_iter().filter(|id| !known(id)) {
            let place = self.place(&id);
            self.keepers.spawn(async move {
                warn!(pod = id, "stopping a pod that is not assigned to this node");
                if let Err(error) = keeper::stop(&place).await {
                    warn!(pod = id, error = format!("{error:#}"), "it cannot be stopped");
                } else if let Err(error) = files::remove_folder(&place.run_dir) {
                    warn!(pod = id, %error, "its run folder cannot be removed");
                }
            });
        }
        for id in folders(&self.paths.pods_state_dir()).into_iter().filter(|id| !known(id)) {
            if let Err(error) = files::remove_folder(&self.paths.pod_state_dir(&id)) {
                warn!(pod = id, %error, "the folder of a pod that is not assigned cannot be removed");
            }
        }
    }

    /// Lets go of every keeper and waits until none starts anything any more.
    pub(crate) async fn release(&mut self) {
        for pod in self.all.values_mut() {
            if let Some(keeper) = pod.keeper.take() {
                keeper.send_modify(|wanted| wanted.stop = true);
            }
        }
        while self.keepers.join_next().await.is_some() {}
    }

    fn act(&mut self, id: &str, record: &PodRecord, action: Action) -> Option<Duty> {
        match action {
            Action::Reconcile => return Some(Duty::Reconcile),
            Action::Finish => return Some(Duty::Finish(id.to_owned())),
            Action::Supervise => self.supervise(id, record),
            Action::Update => self.update(id, record),
            Action::Check => self.check(id),
            Action::Stop => self.stop(id),
            Action::RetryLater => self.retry_later(id),
        }
        None
    }

    fn supervise(&mut self, id: &str, record: &PodRecord) {
        let Some(spec) = self.spec(id, record) else { return };
        let (keeper, wanted) = watch::channel(Wanted { spec, stop: false });
        self.reap();
        self.keepers.spawn(keeper::keep(self.place(id), wanted, self.news.clone()));
        if let Some(pod) = self.all.get_mut(id) {
            pod.keeper = Some(keeper);
        }
    }

    fn update(&mut self, id: &str, record: &PodRecord) {
        let spec = self.spec(id, record);
        if let (Some(spec), Some(keeper)) = (spec, self.all.get(id).and_then(|pod| pod.keeper.as_ref())) {
            info!(pod = id, "pod changed");
            keeper.send_modify(|wanted| wanted.spec = spec);
        }
    }

    fn check(&self, id: &str) {
        if let Some(keeper) = self.all.get(id).and_then(|pod| pod.keeper.as_ref()) {
            keeper.send_modify(|_| {});
        }
    }

    fn stop(&mut self, id: &str) {
        info!(pod = id, "stopping pod");
        if let Some(keeper) = self.all.get(id).and_then(|pod| pod.keeper.as_ref()) {
            keeper.send_modify(|wanted| wanted.stop = true);
            return;
        }
        let (place, news) = (self.place(id), self.news.clone());
        self.reap();
        self.keepers.spawn(async move {
            let last = match keeper::stop(&place).await {
                Ok(()) => News::Stopped,
                Err(error) => {
                    sleep(RETRY_FIRST).await;
                    News::Lost(format!("{error:#}"))
                }
            };
            // The agent may be ending.
            let _ = news.send((place.pod, last)).await;
        });
    }

    fn retry_later(&self, id: &str) {
        let failures = self.all.get(id).map_or(0, |pod| pod.state.failures());
        let wait = Backoff::after(RETRY_FIRST, RETRY_MAX, failures).next(&mut rand::rng());
        let (id, retries) = (id.to_owned(), self.retries.clone());
        debug!(pod = id, ?wait, "the next supervisor is tried later");
        tokio::spawn(async move {
            sleep(wait).await;
            // The agent may be ending.
            let _ = retries.send(id).await;
        });
    }

    fn drop_keeper(&mut self, id: &str) {
        if let Some(pod) = self.all.get_mut(id) {
            pod.keeper = None;
        }
    }

    /// Forgets the tasks of keepers that have ended.
    fn reap(&mut self) {
        while self.keepers.try_join_next().is_some() {}
    }

    fn spec(&self, id: &str, record: &PodRecord) -> Option<PodSpec> {
        desired::spec(&self.identity, &self.paths, PathBuf::from(NETNS_DIR).join(id), id, record)
    }

    fn place(&self, id: &str) -> Place {
        Place { pod: id.to_owned(), run_dir: self.paths.pod_run_dir(id), program: self.program.clone() }
    }
}

fn log_change(id: &str, before: Option<&Report>, after: Option<&Report>) {
    let Some(after) = after.filter(|after| Some(*after) != before) else { return };
    let phase = format!("{:?}", after.phase).to_lowercase();
    if before.map(|before| before.phase) == Some(after.phase) {
        debug!(pod = id, phase, restarts = after.restarts, message = after.message, "pod");
    } else {
        info!(pod = id, phase, restarts = after.restarts, message = after.message, "pod");
    }
}

/// The names of the folders in `parent`, in order.
pub(crate) fn folders(parent: &std::path::Path) -> BTreeSet<String> {
    let entries = fs::read_dir(parent).into_iter().flatten().flatten();
    let folders = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    folders.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}
