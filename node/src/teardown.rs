//! `netctl node down`: stops the pods and takes everything of Hextet's out of the kernel; the identity stays.

use anyhow::{Context as _, Result};
use dataplane::Dataplane;
use tokio::task::JoinSet;

use crate::{
    config::NodePaths,
    files, hook_keeper,
    keeper::{self, Place},
    leftovers::{self, Owner},
    pods::folders,
};

/// What a line of something that could not be done begins with.
pub(crate) const FAILED: &str = "failed: ";

/// Supervisors that are stopped at a time.
const STOPS_MAX: usize = 64;

/// Stops every pod, empties the kernel, and says what was done. Goes on after a failure and says it too.
///
/// `planned` is what the kernel is expected to lose, line by line.
pub(crate) async fn all(
    paths: &NodePaths,
    dataplane: &mut Dataplane,
    planned: Vec<String>,
) -> Result<Vec<String>> {
    let mut lines = stop_pods(paths).await;
    lines.extend(empty_kernel(paths, dataplane, planned).await?);
    Ok(lines)
}

/// Takes everything out of the kernel, and says what was done.
pub(crate) async fn empty_kernel(
    paths: &NodePaths,
    dataplane: &mut Dataplane,
    planned: Vec<String>,
) -> Result<Vec<String>> {
    let failures =
        dataplane.teardown().await.context("cannot read the kernel: nothing was taken out of it")?;
    let mut lines = planned;
    for (op, error) in &failures {
        lines.push(format!("{FAILED}{op}: {:#}", anyhow::anyhow!("{error}")));
    }
    if let Err(error) = files::remove_folder(&paths.pods_run_dir()) {
        lines.push(format!("{FAILED}remove {}: {error}", paths.pods_run_dir().display()));
    }
    // Pods that begin anew run them again. That they were begun stays known, for what undoes them.
    for pod in folders(&paths.hooks_dir()) {
        if let Err(error) = hook_keeper::forget_results(&paths.hooks_dir().join(&pod)) {
            lines.push(format!("{FAILED}forget that hooks of {pod} were done: {error}"));
        }
    }
    Ok(lines)
}

/// Stops every pod that the run folder or a process tells of, and says what was done.
pub(crate) async fn stop_pods(paths: &NodePaths) -> Vec<String> {
    let mut lines = Vec::new();
    let mut stops = JoinSet::new();
    for id in folders(&paths.pods_run_dir()) {
        if stops.len() == STOPS_MAX {
            lines.extend(stops.join_next().await.and_then(Result::ok));
        }
        let place = Place::of(paths, &id);
        stops.spawn(async move {
            match keeper::stop(&place).await {
                Ok(()) => format!("stop pod {}", place.pod),
                Err(error) => format!("{FAILED}stop pod {}: {error:#}", place.pod),
            }
        });
    }
    while let Some(line) = stops.join_next().await {
        lines.extend(line.ok());
    }
    lines.sort();
    lines.extend(end_leftovers(paths).await);
    lines
}

/// Also of pods that the run folder knows nothing of any more.
async fn end_leftovers(paths: &NodePaths) -> Option<String> {
    match leftovers::end(&Owner::agent(paths)).await {
        Ok(0) => None,
        Ok(count) => Some(format!("end {count} processes that pods had left behind")),
        Err(error) => Some(format!("{FAILED}end what pods have left behind: {error:#}")),
    }
}
