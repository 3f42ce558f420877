//! What people and their tools call.

use std::{sync::Arc, time::Duration};

use hextet_api::{
    token::{Fingerprint, Role as TokenRole, Token as JoinToken},
    v1::{self, cluster_server::Cluster, node_command::Command},
};
use rand::RngCore as _;
use scheduler_core::{
    endpoint::Selector,
    event::Event,
    pod::{Pod, PodId, PodPhase},
    token::{Role, Token},
    transition::Origin,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::{backup, ca, deploy, events, explain, history, malformed, plan, status};
use crate::{
    audit, auth, convert,
    hub::Hub,
    identity::Identity,
    logs,
    pki::sha256_hex,
    read_only,
    shown::Shown,
    writer::{Committed, WriteError, chain},
};

/// How long a token is good when nothing is said.
const TOKEN_VALID: Duration = Duration::from_secs(3600);
/// How long a token can be good at all.
const TOKEN_VALID_MAX: Duration = Duration::from_secs(30 * 24 * 3600);
/// The most bytes in the message of a revision.
const MESSAGE_LEN_MAX: usize = 4096;

pub(crate) struct ClusterService(pub(crate) Arc<Hub>);

#[tonic::async_trait]
impl Cluster for ClusterService {
    type WatchEventsStream = events::Events;
    type ReadLogsStream = ReceiverStream<Result<v1::LogChunk, Status>>;

    async fn get_status(
        &self,
        _request: Request<v1::GetStatusRequest>,
    ) -> Result<Response<v1::GetStatusResponse>, Status> {
        let cluster = self.0.cluster.as_deref();
        let damage = self.0.store.damage();
        let (ca_leaving, ca_missing) = ca::leaving(&self.0.state(), self.0.clock.wall());
        Ok(Response::new(v1::GetStatusResponse {
            ca_leaving,
            ca_missing,
            prefix: cluster.map(|cluster| cluster.prefix.network().into()),
            pod_ipv4: cluster.map(|cluster| cluster.pod_ipv4.into()),
            epoch: self.0.store.epoch().to_owned(),
            revision: self.0.state().revision(),
            pod_prefix: cluster.and_then(|cluster| cluster.pod_prefix).map(|prefix| prefix.network().into()),
            server_version: env!("CARGO_PKG_VERSION").to_owned(),
            restored: self.restored(),
            servers: self.0.servers.borrow().clone(),
            writes_fail: self.0.writes_fail().map(|error| chain(&error)).unwrap_or_default(),
            damage: damage.map(|damage| damage.lines().collect()).unwrap_or_default(),
        }))
    }

    async fn apply_job(
        &self,
        request: Request<v1::ApplyJobRequest>,
    ) -> Result<Response<v1::ApplyJobResponse>, Status> {
        let changer = auth::caller(&request).changer();
        let v1::ApplyJobRequest { job, message, if_version } = request.into_inner();
        let job = job.ok_or_else(|| Status::invalid_argument("job is missing"))?;
        let job = convert::job_from_message(job).map_err(malformed)?;
        let name = job.job.clone();
        let texts = history::texts(&self.0, &job).await?;
        let event = match if_version {
            Some(version) => Event::ApplyJobAt(version, job, texts),
            None => Event::ApplyJob(job, texts),
        };
        let committed = self.write(changer, message, event).await?;
        let state = self.0.state();
        let in_force = || state.job_record(&name).map_or(0, |record| record.version);
        let mut waiting = state.pods_of_job(&name).filter(|pod| pod.phase == PodPhase::Pending).peekable();
        let first_waits_for = waiting.peek().map(|pod| pod.message.clone()).unwrap_or_default();
        Ok(Response::new(v1::ApplyJobResponse {
            revision: committed.revision,
            // Others may have applied since.
            version: committed.version_of(&name).unwrap_or_else(in_force),
            changed: committed.changed(),
            pods_waiting: u32::try_from(waiting.count()).unwrap_or(u32::MAX),
            first_waits_for,
        }))
    }

    async fn get_job(
        &self,
        request: Request<v1::GetJobRequest>,
    ) -> Result<Response<v1::GetJobResponse>, Status> {
        let shown = Shown::to(&auth::caller(&request));
        let name = request.into_inner().name;
        let job = convert::job_status(&self.0.state(), &name).map(|job| shown.status(job));
        let job = job.ok_or_else(|| status(scheduler_core::event::Refusal::NoJob(name).into()))?;
        Ok(Response::new(v1::GetJobResponse { job: Some(job) }))
    }

    async fn list_jobs(
        &self,
        request: Request<v1::ListJobsRequest>,
    ) -> Result<Response<v1::ListJobsResponse>, Status> {
        let shown = Shown::to(&auth::caller(&request));
        let state = self.0.state();
        let jobs = state.jobs().filter_map(|(name, _)| convert::job_status(&state, name));
        let jobs = jobs.map(|job| shown.status(job)).collect();
        let unreadable = read_only::unreadable(self.0.store.as_ref(), "job");
        Ok(Response::new(v1::ListJobsResponse { jobs, unreadable }))
    }

    async fn delete_job(
        &self,
        request: Request<v1::DeleteJobRequest>,
    ) -> Result<Response<v1::DeleteJobResponse>, Status> {
        let changer = auth::caller(&request).changer();
        let v1::DeleteJobRequest { name, message } = request.into_inner();
        let Committed { revision, .. } = self.write(changer, message, Event::DeleteJob(name)).await?;
        Ok(Response::new(v1::DeleteJobResponse { revision }))
    }

    async fn rollback_job(
        &self,
        request: Request<v1::RollbackJobRequest>,
    ) -> Result<Response<v1::RollbackJobResponse>, Status> {
        let changer = auth::caller(&request).changer();
        let request = request.into_inner();
        let origin = origin(changer, request.message.clone())?;
        Ok(Response::new(history::rollback(&self.0, origin, request).await?))
    }

    async fn get_job_version(
        &self,
        request: Request<v1::GetJobVersionRequest>,
    ) -> Result<Response<v1::GetJobVersionResponse>, Status> {
        let shown = Shown::to(&auth::caller(&request));
        let mut answer = history::version(&self.0, request.into_inner()).await?;
        answer.job.iter_mut().for_each(|job| shown.job(job));
        Ok(Response::new(answer))
    }

    async fn plan_jobs(
        &self,
        request: Request<v1::PlanJobsRequest>,
    ) -> Result<Response<v1::PlanJobsResponse>, Status> {
        let changer = auth::caller(&request).changer();
        Ok(Response::new(plan::plan(&self.0, changer, request.into_inner()).await?))
    }

    async fn get_ca(
        &self,
        _request: Request<v1::GetCaRequest>,
    ) -> Result<Response<v1::GetCaResponse>, Status> {
        Ok(Response::new(ca::show(&self.0)))
    }

    async fn turn_ca(
        &self,
        request: Request<v1::TurnCaRequest>,
    ) -> Result<Response<v1::TurnCaResponse>, Status> {
        let changer = auth::caller(&request).changer();
        let request = request.into_inner();
        let origin = origin(changer, request.message.clone())?;
        Ok(Response::new(ca::turn(&self.0, origin, &request).await?))
    }

    async fn start_deploy(
        &self,
        request: Request<v1::StartDeployRequest>,
    ) -> Result<Response<v1::StartDeployResponse>, Status> {
        let changer = auth::caller(&request).changer();
        let request = request.into_inner();
        let origin = origin(changer, request.message.clone())?;
        Ok(Response::new(deploy::start(&self.0, origin, request).await?))
    }

    async fn list_deploys(
        &self,
        request: Request<v1::ListDeploysRequest>,
    ) -> Result<Response<v1::ListDeploysResponse>, Status> {
        Ok(Response::new(deploy::list(&self.0, &request.into_inner().deploy)?))
    }

    async fn steer_deploy(
        &self,
        request: Request<v1::SteerDeployRequest>,
    ) -> Result<Response<v1::SteerDeployResponse>, Status> {
        let changer = auth::caller(&request).changer();
        let request = request.into_inner();
        let origin = origin(changer, request.message.clone())?;
        Ok(Response::new(deploy::steer(&self.0, origin, request).await?))
    }

    async fn compact_history(
        &self,
        request: Request<v1::CompactHistoryRequest>,
    ) -> Result<Response<v1::CompactHistoryResponse>, Status> {
        Ok(Response::new(history::compact(&self.0, request.into_inner()).await?))
    }

    type BackupStream = ReceiverStream<Result<v1::BackupChunk, Status>>;

    async fn backup(
        &self,
        request: Request<v1::BackupRequest>,
    ) -> Result<Response<Self::BackupStream>, Status> {
        if auth::caller(&request) != Identity::Local {
            return Err(Status::permission_denied(
                "a backup holds the key of the cluster's CA: make it as root at the Unix socket of the server's machine",
            ));
        }
        Ok(Response::new(backup::start(&self.0).await?))
    }

    async fn list_revisions(
        &self,
        request: Request<v1::ListRevisionsRequest>,
    ) -> Result<Response<v1::ListRevisionsResponse>, Status> {
        let shown = Shown::to(&auth::caller(&request));
        let mut answer = history::list(&self.0, request.into_inner()).await?;
        let objects = answer.revisions.iter_mut().flat_map(|revision| &mut revision.objects);
        objects.for_each(|object| shown.object(object));
        Ok(Response::new(answer))
    }

    async fn diff_revisions(
        &self,
        request: Request<v1::DiffRevisionsRequest>,
    ) -> Result<Response<v1::DiffRevisionsResponse>, Status> {
        let shown = Shown::to(&auth::caller(&request));
        let mut answer = history::diff(&self.0, request.into_inner()).await?;
        answer.objects.iter_mut().for_each(|object| shown.object(object));
        Ok(Response::new(answer))
    }

    async fn list_pods(
        &self,
        request: Request<v1::ListPodsRequest>,
    ) -> Result<Response<v1::ListPodsResponse>, Status> {
        let v1::ListPodsRequest { job, group } = request.into_inner();
        let state = self.0.state();
        let selected = |pod: &&Arc<Pod>| group.is_empty() || pod.group == group;
        let pods = if job.is_empty() {
            state.pods().values().filter(selected).map(|pod| convert::pod(pod)).collect()
        } else {
            state.pods_of_job(&job).filter(selected).map(|pod| convert::pod(pod)).collect()
        };
        let unreadable = read_only::unreadable(self.0.store.as_ref(), "pod");
        Ok(Response::new(v1::ListPodsResponse { pods, revision: state.revision(), unreadable }))
    }

    async fn list_nodes(
        &self,
        _request: Request<v1::ListNodesRequest>,
    ) -> Result<Response<v1::ListNodesResponse>, Status> {
        let state = self.0.state();
        let nodes = state.nodes().values().map(|node| convert::node(&state, node)).collect();
        let unreadable = read_only::unreadable(self.0.store.as_ref(), "node");
        Ok(Response::new(v1::ListNodesResponse { nodes, revision: state.revision(), unreadable }))
    }

    async fn delete_node(
        &self,
        request: Request<v1::DeleteNodeRequest>,
    ) -> Result<Response<v1::DeleteNodeResponse>, Status> {
        let changer = auth::caller(&request).changer();
        let v1::DeleteNodeRequest { name, message } = request.into_inner();
        let event = Event::DeleteNode(name.clone());
        let Committed { revision, .. } = self.write(changer, message, event).await?;
        self.0.sessions.end(&name);
        Ok(Response::new(v1::DeleteNodeResponse { revision }))
    }

    async fn declare_dead(
        &self,
        request: Request<v1::DeclareDeadRequest>,
    ) -> Result<Response<v1::DeclareDeadResponse>, Status> {
        let changer = auth::caller(&request).changer();
        let v1::DeclareDeadRequest { name, message } = request.into_inner();
        let committed = self.write(changer, message, Event::NodeDead(name)).await?;
        let (revision, changed) = (committed.revision, committed.changed());
        Ok(Response::new(v1::DeclareDeadResponse { revision, changed }))
    }

    async fn create_token(
        &self,
        request: Request<v1::CreateTokenRequest>,
    ) -> Result<Response<v1::CreateTokenResponse>, Status> {
        let changer = auth::caller(&request).changer();
        let request = request.into_inner();
        let role = role(&request)?;
        let name = Some(request.name).filter(|name| !name.is_empty());
        let valid = match request.valid_seconds {
            0 => TOKEN_VALID,
            seconds => Duration::from_secs(seconds.into()),
        };
        if valid > TOKEN_VALID_MAX {
            return Err(Status::invalid_argument("a token is good for at most 30 days"));
        }
        let token = make_token(&self.0, changer, role, name, valid).await.map_err(status)?;
        Ok(Response::new(v1::CreateTokenResponse { token: token.to_string() }))
    }

    async fn retry_pod(
        &self,
        request: Request<v1::RetryPodRequest>,
    ) -> Result<Response<v1::RetryPodResponse>, Status> {
        let pod = request.into_inner().pod;
        audit::about(&format!("pod/{pod}"));
        Ok(Response::new(explain::retry(&self.0, pod).await?))
    }

    async fn explain_pod(
        &self,
        request: Request<v1::ExplainPodRequest>,
    ) -> Result<Response<v1::ExplainPodResponse>, Status> {
        Ok(Response::new(explain::explain(&self.0, request.into_inner().pod).await?))
    }

    async fn watch_events(
        &self,
        request: Request<v1::WatchEventsRequest>,
    ) -> Result<Response<Self::WatchEventsStream>, Status> {
        Ok(Response::new(events::watch(&self.0, request.into_inner()).await?))
    }

    async fn read_logs(
        &self,
        request: Request<v1::ReadLogsRequest>,
    ) -> Result<Response<Self::ReadLogsStream>, Status> {
        let v1::ReadLogsRequest { pod, task, tail_lines, follow, after } = request.into_inner();
        let (node, task) = self.locate(&pod, task)?;
        let (request_id, chunks) = self.0.relays.ask(&node)?;
        let command = v1::ReadLogs { request_id, pod, task, tail_lines, follow, after };
        if !self.0.sessions.send(&node, Command::ReadLogs(command)) {
            self.0.relays.give_up(request_id);
            return Err(Status::unavailable(format!(
                "node {node} is not attached: its logs cannot be read until its agent is back"
            )));
        }
        tokio::spawn(logs::watch_over(Arc::downgrade(&self.0), request_id, node));
        Ok(Response::new(ReceiverStream::new(chunks)))
    }
}

impl ClusterService {
    /// What a restore makes wait, and for how long.
    fn restored(&self) -> Option<v1::RestoredStatus> {
        let (state, wait) = (self.0.state(), self.0.restore_wait()?);
        let mark = state.restored()?;
        let wait_ms = u32::try_from(wait.as_millis()).unwrap_or(u32::MAX);
        Some(v1::RestoredStatus { revision: mark.revision, unix_ms: mark.time.0, wait_ms })
    }

    async fn write(&self, changer: String, message: String, event: Event) -> Result<Committed, Status> {
        self.0.write(origin(changer, message)?, event).await.map_err(status)
    }

    /// The node of a pod and the name of the task that is meant.
    fn locate(&self, id: &str, task: String) -> Result<(String, String), Status> {
        let state = self.0.state();
        let pod = state.pods().get(&PodId(id.to_owned()));
        let pod = pod
            .ok_or_else(|| Status::not_found(format!("there is no pod `{id}`; `netctl pods` lists them")))?;
        let node = pod.node.clone();
        let node =
            node.ok_or_else(|| Status::failed_precondition(format!("{id} runs nowhere: {}", pod.message)))?;
        let group = state.group_of(pod);
        let tasks: Vec<&str> =
            group.map(|group| group.tasks.keys().map(String::as_str).collect()).unwrap_or_default();
        match tasks.as_slice() {
            [only] if task.is_empty() => Ok((node, (*only).to_owned())),
            known if known.contains(&task.as_str()) => Ok((node, task)),
            known => {
                let known = known.join(", ");
                let problem = match task.is_empty() {
                    true => format!("{id} has several tasks, say which: {known}"),
                    false => format!("{id} has no task `{task}`; it has: {known}"),
                };
                Err(Status::invalid_argument(problem))
            }
        }
    }
}

fn origin(changer: String, message: String) -> Result<Origin, Status> {
    if message.len() > MESSAGE_LEN_MAX {
        return Err(Status::invalid_argument(format!("a message has at most {MESSAGE_LEN_MAX} bytes")));
    }
    Ok(Origin { changer, message })
}

fn role(request: &v1::CreateTokenRequest) -> Result<Role, Status> {
    match request.role() {
        v1::TokenRole::Node => Ok(Role::Node),
        // Who asks for a user may do everything, and so could users.
        v1::TokenRole::User | v1::TokenRole::Admin => Ok(Role::Admin),
        v1::TokenRole::Operator => Ok(Role::Operator),
        v1::TokenRole::Viewer => Ok(Role::Viewer),
        v1::TokenRole::Lb => {
            let selector: Selector = request.selector.parse().map_err(|error| {
                Status::invalid_argument(format!("selector, `job` or `job/group`: {error}"))
            })?;
            Ok(Role::Lb(selector))
        }
        v1::TokenRole::Unspecified => {
            Err(Status::invalid_argument("role is missing: admin, operator, viewer, node or lb"))
        }
    }
}

/// Makes a token. Its secret leaves the server in it and is kept nowhere.
pub(crate) async fn make_token(
    hub: &Hub,
    changer: String,
    role: Role,
    name: Option<String>,
    valid: Duration,
) -> Result<JoinToken, WriteError> {
    let mut secret = [0; 16];
    rand::rng().fill_bytes(&mut secret);
    let word = match role {
        Role::Node => TokenRole::Node,
        Role::User => TokenRole::User,
        Role::Admin => TokenRole::Admin,
        Role::Operator => TokenRole::Operator,
        Role::Viewer => TokenRole::Viewer,
        Role::Lb(_) => TokenRole::Lb,
    };
    let token = Token { role, name, expires: hub.clock.wall() + valid, used_by: None };
    let origin = Origin { changer, message: String::new() };
    hub.write(origin, Event::CreateToken(sha256_hex(&secret), token)).await?;
    let (fingerprint, servers) = (Fingerprint(hub.pki.fingerprint()), hub.servers.borrow().clone());
    Ok(JoinToken { role: word, fingerprint, secret, servers })
}
