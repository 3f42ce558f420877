//! Begins, lists and steers deploys: the calls of `deploy.proto`.

use std::sync::Arc;

use hextet_api::v1;
use scheduler_core::{
    deploy::{self as core, Deploy, DeployError, DeployId, Order},
    event::{Event, Refusal},
    state::State,
    transition::Origin,
};
use tonic::Status;

use super::{malformed, status};
use crate::{convert, hub::Hub, read_only};

pub(super) async fn start(
    hub: &Hub,
    origin: Origin,
    request: v1::StartDeployRequest,
) -> Result<v1::StartDeployResponse, Status> {
    let missing = |field| Status::invalid_argument(format!("{field} is missing"));
    let job = convert::job_from_message(request.job.ok_or_else(|| missing("job"))?).map_err(malformed)?;
    let schedule = request.schedule.ok_or_else(|| missing("schedule"))?;
    let schedule = convert::schedule_from_message(schedule).map_err(malformed)?;
    let name = job.job.clone();
    let committed = hub.write(origin, Event::Deploy(job, schedule)).await.map_err(status)?;
    let state = hub.state();
    let deploy = core::of_job(state.deploys(), &name).last().map(|deploy| message(hub, &state, deploy));
    Ok(v1::StartDeployResponse { revision: committed.revision, deploy })
}

pub(super) fn list(hub: &Hub, which: &str) -> Result<v1::ListDeploysResponse, Status> {
    let state = hub.state();
    let deploys = match which {
        "" => state.deploys().values().map(|deploy| message(hub, &state, deploy)).collect(),
        job if !job.contains('@') => {
            core::of_job(state.deploys(), job).map(|deploy| message(hub, &state, deploy)).collect()
        }
        _ => vec![message(hub, &state, find(&state, which)?)],
    };
    let unreadable = read_only::unreadable(hub.store.as_ref(), "deploy");
    Ok(v1::ListDeploysResponse { deploys, unreadable })
}

pub(super) async fn steer(
    hub: &Hub,
    origin: Origin,
    request: v1::SteerDeployRequest,
) -> Result<v1::SteerDeployResponse, Status> {
    let order = match request.order() {
        v1::DeployOrder::Resume => Order::Resume,
        v1::DeployOrder::Abort => Order::Abort { now: false },
        v1::DeployOrder::AbortNow => Order::Abort { now: true },
        v1::DeployOrder::Acknowledge => Order::Acknowledge,
        v1::DeployOrder::Unspecified => {
            return Err(Status::invalid_argument("order is missing: resume, abort or acknowledge"));
        }
    };
    let id = find(&hub.state(), &request.deploy)?.id.clone();
    let committed = hub.write(origin, Event::DeployOrder(id.clone(), order)).await.map_err(status)?;
    Ok(v1::SteerDeployResponse { revision: committed.revision, deploy: id.to_string() })
}

/// The deploy of this name, or of a job the one that is under way, or else its last.
fn find<'a>(state: &'a State, name: &str) -> Result<&'a Arc<Deploy>, Status> {
    let found = match name.parse::<DeployId>() {
        Ok(id) => state.deploys().get(&id),
        Err(_) => {
            let under_way = core::of_job(state.deploys(), name).find(|deploy| !deploy.stage.is_end());
            under_way.or_else(|| core::of_job(state.deploys(), name).last())
        }
    };
    found.ok_or_else(|| status(Refusal::from(DeployError::NoDeploy(name.to_owned())).into()))
}

fn message(hub: &Hub, state: &State, deploy: &Deploy) -> v1::Deploy {
    let outlook = hub.deploys().outlook(deploy, hub.clock.now());
    convert::deploy(state, deploy, outlook)
}
