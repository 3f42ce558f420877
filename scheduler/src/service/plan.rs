//! What an apply would do: the core's plan on a copy of the newest state.

use std::sync::Arc;

use hextet_api::v1;
use rand::{SeedableRng as _, rngs::StdRng};
use scheduler_core::{
    job::Job,
    plan::{self, JobPlan, PodFate, PodPlan},
    transition::{Context, Origin},
};
use tonic::Status;

use super::{history::no_version, in_thread, malformed, status};
use crate::{convert, history, hub::Hub};

/// Jobs in one call.
const JOBS_MAX: usize = 100;
/// Pods that are named of one job.
const PODS_MAX: usize = 10_000;

pub(super) async fn plan(
    hub: &Arc<Hub>,
    changer: String,
    request: v1::PlanJobsRequest,
) -> Result<v1::PlanJobsResponse, Status> {
    if request.jobs.len() > JOBS_MAX {
        return Err(Status::invalid_argument(format!("at most {JOBS_MAX} jobs are planned at a time")));
    }
    let jobs = request.jobs.into_iter().map(convert::job_from_message);
    let jobs: Vec<Job> = jobs.collect::<Result<_, _>>().map_err(malformed)?;
    in_thread(hub, move |hub| on_a_copy(hub, changer, jobs), |status| status).await
}

fn on_a_copy(hub: &Hub, changer: String, jobs: Vec<Job>) -> Result<v1::PlanJobsResponse, Status> {
    let state = hub.state();
    let mut rng = StdRng::from_rng(&mut rand::rng());
    let is_watched = |pod: &_| hub.drains().is_watched(pod, hub.clock.now());
    let mut context = Context { wall: hub.clock.wall(), rng: &mut rng, is_watched: &is_watched };
    let origin = Origin { changer, message: String::new() };
    let with_texts = |job: Job| Ok((job.clone(), history::texts(hub.store.as_ref(), &state, &job)?));
    let jobs: Vec<_> = jobs.into_iter().map(with_texts).collect::<Result<_, _>>().map_err(no_version)?;
    let planned = plan::plan(&state, &jobs, &origin, &mut context);
    let planned = planned.map_err(|refusal| status(refusal.into()))?;
    let jobs = planned.into_iter().map(job_message).collect();
    Ok(v1::PlanJobsResponse { jobs, revision: state.revision() })
}

fn job_message(plan: JobPlan) -> v1::JobPlan {
    v1::JobPlan {
        name: plan.job,
        from_version: plan.from,
        to_version: plan.to,
        pods_total: u32::try_from(plan.pods.len()).unwrap_or(u32::MAX),
        pods: plan.pods.into_iter().take(PODS_MAX).map(pod_message).collect(),
    }
}

fn pod_message(plan: PodPlan) -> v1::PodPlan {
    let PodPlan { pod, node, fate, why } = plan;
    let (fate, to, to_node) = match fate {
        PodFate::Placed => (v1::PodFate::Placed, String::new(), None),
        PodFate::Restarted => (v1::PodFate::Restarted, String::new(), None),
        PodFate::Kept => (v1::PodFate::Kept, String::new(), None),
        PodFate::Moved { to, node } => (v1::PodFate::Moved, to, node),
        PodFate::Stopped => (v1::PodFate::Stopped, String::new(), None),
        PodFate::Waits => (v1::PodFate::Waits, String::new(), None),
    };
    let (node, to_node) = (node.unwrap_or_default(), to_node.unwrap_or_default());
    v1::PodPlan { pod, node, fate: fate.into(), why, to, to_node }
}
