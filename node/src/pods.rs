//! The processes of this node's pods: the keepers of their supervisors, and their folders.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::PathBuf,
    time::Duration,
};

use hextet_lifecycle::{Hook, Owner, Phase as StepPhase, StepStatus, pod};
use nix::unistd::User;
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
    time::sleep,
};
use tracing::{info, warn};

use crate::{
    assignment::{Assignment, PodRecord},
    config::NodePaths,
    desired, files, hook_keeper,
    identity::Identity,
    keeper::{self, News, Place, Wanted},
    lease_file,
    leftovers::{self, Owner as Belongs},
    pod_state::{Action, Event, HookFailure},
    scripts::{self, Ended, ScriptNews, Scripts},
    socket,
    supervisor::{
        hook::HookSpec,
        spec::PodSpec,
        status::{SOCKET_FILE, Status},
    },
};

/// Where `ip` and the dataplane keep network namespaces.
pub(crate) const NETNS_DIR: &str = "/run/netns";

const RETRY_FIRST: Duration = Duration::from_millis(250);
/// What runs on the way up, on the way down, and on events.
pub(crate) const UP: &str = "up";
const DOWN: &str = "down";
const ON: &str = "on";

/// What drives the pods.
pub(crate) struct Pods {
    paths: NodePaths,
    identity: Identity,
    program: PathBuf,
    all: BTreeMap<String, watch::Sender<Wanted>>,
    keepers: JoinSet<()>,
    news: mpsc::Sender<(String, News)>,
    /// The last run of each hook of each pod; what an earlier one says counts for nothing.
    runs: BTreeMap<(String, String), u64>,
    scripts: Scripts,
    boot: String,
}

/// A hook that is to be run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Order<'a> {
    pub(crate) name: &'a str,
    pub(crate) hook: &'a Hook,
    pub(crate) owner: Owner,
}

impl Pods {
    pub(crate) fn new(
        paths: NodePaths,
        identity: Identity,
        program: PathBuf,
        news: mpsc::Sender<(String, News)>,
    ) -> Pods {
        Pods {
            paths,
            identity,
            program,
            all: BTreeMap::new(),
            keepers: JoinSet::new(),
            scripts: Scripts::new(news.clone()),
            news,
            runs: BTreeMap::new(),
            boot: lease_file::boot_id().unwrap_or_default(),
        }
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
        wanted.any(|(id, _)| !self.is_up(id))
    }

    /// Whether a pod runs already.
    pub(crate) fn is_any_up(&self, assignment: &Assignment) -> bool {
        assignment.pods.keys().any(|id| self.is_up(id))
    }

    fn is_up(&self, id: &str) -> bool {
        socket::connect(&self.paths.pod_run_dir(id), SOCKET_FILE).is_ok()
    }

    /// What a keeper's news mean for its pod.
    pub(crate) fn heard(&mut self, id: &str, news: News) -> Option<Event> {
        Some(match news {
            // It has yet to hear of the present text.
            News::Status(status) if self.is_outdated(id, &status) => return None,
            News::Status(status) => Event::Status(status),
            News::Hook { name, run, result } => {
                if self.runs.get(&(id.to_owned(), name.clone())) != Some(&run) {
                    return None;
                }
                let output = if result.is_err() { self.hook_output(id, &name) } else { String::new() };
                Event::Hook(name, result.map_err(|why| HookFailure { why, output }))
            }
            // It is no step of the pod: see [`Pods::heard_script`].
            News::Script(_) => return None,
            News::Lost(why) => {
                self.all.remove(id);
                warn!(pod = id, why, "a pod has no supervisor");
                Event::SupervisorLost(why)
            }
            News::Stopped => {
                self.all.remove(id);
                Event::SupervisorStopped
            }
        })
    }

    fn is_outdated(&self, id: &str, status: &Status) -> bool {
        let wanted = self.all.get(id).map(watch::Sender::borrow);
        wanted.is_some_and(|wanted| !wanted.stop && wanted.spec.fingerprint != status.fingerprint)
    }

    /// Takes note of how a script came out that followed an event of a pod; what is to be told of it.
    pub(crate) fn heard_script(&mut self, id: &str, news: ScriptNews) -> Option<String> {
        self.scripts.heard(id, news)
    }

    /// How the scripts that follow a pod's events came out last, as steps that nobody waits for.
    pub(crate) fn scripts(&self, id: &str) -> Vec<StepStatus> {
        let ms = |since: Duration| u64::try_from(since.as_millis()).unwrap_or(u64::MAX);
        let step = |(name, ended): (&String, &Ended)| StepStatus {
            name: name.clone(),
            owner: ended.owner.to_string(),
            phase: if ended.result.is_ok() { StepPhase::Done } else { StepPhase::Failed },
            optional: true,
            attempts: ended.runs,
            error: ended.result.clone().err(),
            ended_ms_ago: Some(ms(ended.at.elapsed())),
            output: ended.output.clone(),
            ..StepStatus::default()
        };
        self.scripts.ended(id).map(step).collect()
    }

    /// Makes the folders of a pod.
    pub(crate) fn make_folders(&self, id: &str) -> Result<(), String> {
        let make = |path: PathBuf, mode| {
            files::folder(&path, mode).map_err(|error| format!("cannot make {}: {error}", path.display()))
        };
        make(self.paths.pod_run_dir(id), 0o700)?;
        make(self.paths.pod_state_dir(id), 0o711)
    }

    /// Whether a hook was ever begun for the pod.
    pub(crate) fn was_hooked(&self, id: &str, hook: &str) -> bool {
        self.hook_folder(id, hook, UP).exists()
    }

    /// The last lines of what a hook of the pod said.
    pub(crate) fn hook_output(&self, id: &str, hook: &str) -> String {
        let said = |what| hook_keeper::output(&self.hook_folder(id, hook, what));
        Some(said(DOWN)).filter(|text| !text.is_empty()).unwrap_or_else(|| said(UP))
    }

    /// Removes what the hooks of a pod left on disk.
    pub(crate) fn forget(&mut self, id: &str) {
        self.scripts.forget(id);
        self.runs.retain(|(pod, _), _| pod != id);
        let folder = self.paths.hooks_dir().join(id);
        if let Err(error) = files::remove_folder(&folder) {
            warn!(pod = id, %error, "the folder of its hooks cannot be removed");
        }
    }

    /// Runs a hook, or finds the run that is under way or was successful when this agent has not begun one yet.
    pub(crate) fn run_hook(&mut self, id: &str, record: &PodRecord, order: Order<'_>) {
        let spec = self.hook_spec(id, record, order, &order.hook.exec, None);
        let run = self.count(id, order.name);
        self.spawn_hook(id, order.name, run, UP, spec, run == 1, false);
    }

    /// Ends a hook that is under way, then runs what undoes it, if it has that.
    pub(crate) fn undo_hook(&mut self, id: &str, record: &PodRecord, order: Order<'_>) {
        let run = self.count(id, order.name);
        if order.hook.undo.is_empty() {
            return self.end_hook(id, order.name, run);
        }
        let spec = self.hook_spec(id, record, order, &order.hook.undo, None);
        // What gives something up does so also without the lease.
        let spec = spec.map(|spec| HookSpec { lease: None, ..spec });
        self.spawn_hook(id, order.name, run, DOWN, spec, run == 1, true);
    }

    /// What was to be run is known to be in vain.
    pub(crate) fn hook_failed(&mut self, id: &str, name: &str, why: String) {
        let (run, news, pod) = (self.count(id, name), self.news.clone(), id.to_owned());
        let name = name.to_owned();
        self.keepers.spawn(async move {
            // The agent may be ending.
            let _ = news.send((pod, News::Hook { name, run, result: Err(why) })).await;
        });
    }

    /// Ends what is under way for a hook; its end is told by who runs it.
    pub(crate) fn abort_hook(&mut self, id: &str, name: &str) {
        let folders = [UP, DOWN].map(|what| self.hook_folder(id, name, what));
        self.keepers.spawn(async move {
            for folder in folders {
                if let Err(error) = hook_keeper::end(&folder).await {
                    warn!(error = format!("{error:#}"), "a hook cannot be ended");
                }
            }
        });
    }

    /// Has a script run for an event.
    pub(crate) fn run_script(&mut self, id: &str, record: &PodRecord, order: Order<'_>, event: (&str, &str)) {
        let Ok(spec) = self.hook_spec(id, record, order, &order.hook.exec, Some(event)) else {
            return warn!(
                pod = id,
                hook = order.name,
                "a script cannot be run: its pod or its user has no id"
            );
        };
        let folder = match order.owner {
            Owner::Job => self.hook_folder(id, order.name, ON),
            _ => self.paths.hooks_dir().join(".node").join(order.name).join(ON),
        };
        let place = hook_keeper::Place { folder, program: self.program.clone() };
        self.scripts.run(place, scripts::Order { pod: id.to_owned(), owner: order.owner, spec });
    }

    fn count(&mut self, id: &str, name: &str) -> u64 {
        let run = self.runs.entry((id.to_owned(), name.to_owned())).or_default();
        *run += 1;
        *run
    }

    fn hook_folder(&self, id: &str, hook: &str, what: &str) -> PathBuf {
        self.paths.hooks_dir().join(id).join(hook).join(what)
    }

    fn end_hook(&mut self, id: &str, name: &str, run: u64) {
        let (news, pod, name) = (self.news.clone(), id.to_owned(), name.to_owned());
        let folder = self.hook_folder(id, &name, UP);
        self.keepers.spawn(async move {
            let result = hook_keeper::end(&folder).await.map_err(|error| format!("{error:#}"));
            // The agent may be ending.
            let _ = news.send((pod, News::Hook { name, run, result })).await;
        });
    }

    #[expect(clippy::too_many_arguments, reason = "one call for both ways")]
    fn spawn_hook(
        &mut self,
        id: &str,
        name: &str,
        run: u64,
        what: &str,
        spec: Result<HookSpec, String>,
        adopt: bool,
        end_first: bool,
    ) {
        let (news, pod, name) = (self.news.clone(), id.to_owned(), name.to_owned());
        let place =
            hook_keeper::Place { folder: self.hook_folder(id, &name, what), program: self.program.clone() };
        let up = self.hook_folder(id, &name, UP);
        self.reap();
        self.keepers.spawn(async move {
            let result = async {
                if end_first {
                    hook_keeper::end(&up).await.map_err(|error| format!("{error:#}"))?;
                }
                hook_keeper::run(&place, &spec?, adopt).await
            };
            let result = result.await;
            // The agent may be ending.
            let _ = news.send((pod, News::Hook { name, run, result })).await;
        });
    }

    /// What a hook is run with: a job's as its pod's user and in its pod's namespace.
    fn hook_spec(
        &self,
        id: &str,
        record: &PodRecord,
        order: Order<'_>,
        exec: &[String],
        event: Option<(&str, &str)>,
    ) -> Result<HookSpec, String> {
        let of_job = order.owner == Owner::Job;
        let user = if of_job {
            let pod = self.spec(id, record).and_then(|spec| spec.uid).ok_or("its pod has no user id yet")?;
            Some((pod, pod))
        } else {
            order.hook.user.as_deref().map(user).transpose()?
        };
        let mut env = desired::hook_environment(&self.identity, id, record, order.name, &order.hook.env);
        if let Some((kind, what)) = event {
            env.insert("HEXTET_EVENT".to_owned(), kind.to_owned());
            env.insert("HEXTET_MESSAGE".to_owned(), what.to_owned());
        }
        let spec = HookSpec {
            run: String::new(),
            name: order.name.to_owned(),
            exec: exec.to_owned(),
            env,
            user,
            netns: of_job.then(|| PathBuf::from(NETNS_DIR).join(id)),
            timeout_ms: u64::try_from(order.hook.timeout.0.as_millis()).unwrap_or(u64::MAX),
            // An operator's script that follows events is the node's, and not a part of the pod.
            lease: desired::lease(&self.paths, record).filter(|_| of_job || event.is_none()),
        };
        // What comes after the tasks is another run when they are others.
        let graph = pod::graph(&record.hooks, &BTreeMap::new()).ok();
        let follows = of_job && graph.is_some_and(|graph| graph.leans_on(order.name, pod::TASKS));
        let tasks = follows.then_some(&record.tasks);
        let text =
            serde_json::to_vec(&(&spec, &self.boot, tasks)).expect("a spec holds only strings and numbers");
        Ok(HookSpec { run: hextet_api::token::Fingerprint::of(&text).to_string(), ..spec })
    }

    /// Removes what a pod left on disk.
    pub(crate) fn remove_folders(&self, id: &str) -> std::io::Result<()> {
        files::remove_folder(&self.paths.pod_run_dir(id))?;
        files::remove_folder(&self.paths.pod_state_dir(id))
    }

    /// Ends what no supervisor holds any more, supervisors of pods that nobody assigned, and their folders, as a removed store
    /// leaves them.
    pub(crate) async fn clean_up(&mut self, known: &Assignment) {
        if let Err(error) = leftovers::end(&Belongs::agent(&self.paths)).await {
            warn!(error = format!("{error:#}"), "pods that ran here are not gone");
        }
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
        for id in folders(&self.paths.hooks_dir()).into_iter().filter(|id| !known(id) && id != ".node") {
            self.forget(&id);
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

    /// Stops these pods, all at once, and says whether nothing of them runs any more.
    pub(crate) async fn end(&self, ids: Vec<String>) -> bool {
        let mut ends = JoinSet::new();
        for id in ids {
            if let Some(keeper) = self.all.get(&id) {
                keeper.send_modify(|wanted| wanted.stop = true);
            }
            let place = self.place(&id);
            ends.spawn(async move { keeper::stop(&place).await });
        }
        let mut is_over = true;
        while let Some(ended) = ends.join_next().await {
            is_over &= matches!(ended, Ok(Ok(())));
        }
        is_over
    }

    /// Does something for the supervisor of a pod.
    pub(crate) fn act(&mut self, id: &str, record: &PodRecord, action: Action) {
        match action {
            Action::Supervise => self.supervise(id, record),
            Action::Update => self.update(id, record),
            Action::Check => self.check(id),
            Action::Stop => self.stop(id),
            // The agent's own.
            _ => {}
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

    /// Forgets the tasks of keepers that have ended.
    fn reap(&mut self) {
        while self.keepers.try_join_next().is_some() {}
    }

    fn spec(&self, id: &str, record: &PodRecord) -> Option<PodSpec> {
        desired::spec(&self.identity, &self.paths, PathBuf::from(NETNS_DIR).join(id), id, record)
    }

    fn place(&self, id: &str) -> Place {
        Place { program: self.program.clone(), ..Place::of(&self.paths, id) }
    }
}

/// The ids of a user of this machine.
fn user(name: &str) -> Result<(u32, u32), String> {
    match User::from_name(name) {
        Ok(Some(user)) => Ok((user.uid.as_raw(), user.gid.as_raw())),
        Ok(None) => Err(format!("there is no user `{name}` on this machine")),
        Err(errno) => Err(format!("cannot look up the user `{name}`: {errno}")),
    }
}

/// The names of the folders in `parent`, in order.
pub(crate) fn folders(parent: &std::path::Path) -> BTreeSet<String> {
    let entries = fs::read_dir(parent).into_iter().flatten().flatten();
    let folders = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    folders.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}
