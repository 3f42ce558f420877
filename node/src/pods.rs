//! The processes of this node's pods: the keepers of their supervisors, and their folders.

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
    pod_state::{Action, Event},
    socket,
    supervisor::{spec::PodSpec, status::SOCKET_FILE},
};

/// Where `ip` and the dataplane keep network namespaces.
pub(crate) const NETNS_DIR: &str = "/run/netns";

const RETRY_FIRST: Duration = Duration::from_millis(250);
const RETRY_MAX: Duration = Duration::from_secs(30);

/// What drives the pods.
pub(crate) struct Pods {
    paths: NodePaths,
    identity: Identity,
    program: PathBuf,
    all: BTreeMap<String, watch::Sender<Wanted>>,
    keepers: JoinSet<()>,
    news: mpsc::Sender<(String, News)>,
    retries: mpsc::Sender<String>,
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

    /// Whether a supervisor has been here for the pod.
    pub(crate) fn is_supervised(&self, pod: &str) -> bool {
        self.paths.pod_run_dir(pod).join(SOCKET_FILE).exists()
    }

    /// Whether a pod's supervisor must be told of its new record.
    pub(crate) fn is_changed(&self, id: &str, before: &PodRecord, now: &PodRecord) -> bool {
        self.spec(id, before) != self.spec(id, now)
    }

    /// Whether a pod that is to run has no supervisor that answers, as after a boot.
    pub(crate) fn is_any_down(&self, assignment: &Assignment) -> bool {
        let mut wanted = assignment.pods.iter().filter(|(_, record)| !record.removing);
        wanted.any(|(id, _)| socket::connect(&self.paths.pod_run_dir(id), SOCKET_FILE).is_err())
    }

    /// What a keeper's news mean for its pod.
    pub(crate) fn heard(&mut self, id: &str, news: News) -> Event {
        match news {
            News::Status(status) => Event::Status(status),
            News::Lost(why) => {
                self.all.remove(id);
                warn!(pod = id, why, "a pod has no supervisor");
                Event::SupervisorLost(why)
            }
            News::Stopped => {
                self.all.remove(id);
                Event::SupervisorStopped
            }
        }
    }

    /// Removes what a pod left on disk.
    pub(crate) fn remove_folders(&self, id: &str) -> std::io::Result<()> {
        files::remove_folder(&self.paths.pod_run_dir(id))?;
        files::remove_folder(&self.paths.pod_state_dir(id))
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
        for keeper in std::mem::take(&mut self.all).into_values() {
            keeper.send_modify(|wanted| wanted.stop = true);
        }
        while self.keepers.join_next().await.is_some() {}
    }

    /// Does something for the processes of a pod, of whose supervisors so many failed in a row.
    pub(crate) fn act(&mut self, id: &str, record: &PodRecord, failures: u32, action: Action) {
        match action {
            Action::Supervise => self.supervise(id, record),
            Action::Update => self.update(id, record),
            Action::Check => self.check(id),
            Action::Stop => self.stop(id),
            Action::RetryLater => self.retry_later(id, failures),
            // The agent's own.
            Action::Reconcile | Action::Finish => {}
        }
    }

    fn supervise(&mut self, id: &str, record: &PodRecord) {
        let Some(spec) = self.spec(id, record) else { return };
        let (keeper, wanted) = watch::channel(Wanted { spec, stop: false });
        self.reap();
        self.keepers.spawn(keeper::keep(self.place(id), wanted, self.news.clone()));
        self.all.insert(id.to_owned(), keeper);
    }

    fn update(&mut self, id: &str, record: &PodRecord) {
        let spec = self.spec(id, record);
        if let (Some(spec), Some(keeper)) = (spec, self.all.get(id)) {
            info!(pod = id, "pod changed");
            keeper.send_modify(|wanted| wanted.spec = spec);
        }
    }

    fn check(&self, id: &str) {
        if let Some(keeper) = self.all.get(id) {
            keeper.send_modify(|_| {});
        }
    }

    fn stop(&mut self, id: &str) {
        info!(pod = id, "stopping pod");
        if let Some(keeper) = self.all.get(id) {
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

    fn retry_later(&self, id: &str, failures: u32) {
        let wait = Backoff::after(RETRY_FIRST, RETRY_MAX, failures).next(&mut rand::rng());
        let (id, retries) = (id.to_owned(), self.retries.clone());
        debug!(pod = id, ?wait, "the next supervisor is tried later");
        tokio::spawn(async move {
            sleep(wait).await;
            // The agent may be ending.
            let _ = retries.send(id).await;
        });
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

/// The names of the folders in `parent`, in order.
pub(crate) fn folders(parent: &std::path::Path) -> BTreeSet<String> {
    let entries = fs::read_dir(parent).into_iter().flatten().flatten();
    let folders = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    folders.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}
