//! The steps of a pod: the table of `docs/lifecycle.md`, as data.

use std::{collections::BTreeMap, fmt::Write as _};

use crate::{
    graph::{Graph, GraphError, STOPPED},
    hook::{Hook, HookError, HookProblem},
    step::{Owner, Step},
};

/// It has a node and an address.
pub const PLACED: &str = "placed";
/// Its node was told.
pub const ASSIGNED: &str = "assigned";
/// Network namespace, veth pair and addresses.
pub const LINK: &str = "link";
/// Routes, neighbours and the source guard.
pub const ROUTES: &str = "routes";
/// Neighbours and switches are told, and on a LAN asked.
pub const ANNOUNCED: &str = "announced";
/// Target: its packets travel.
pub const NETWORKING: &str = "networking";
/// Its folders.
pub const FOLDERS: &str = "folders";
/// Target: it can write.
pub const STORAGE: &str = "storage";
/// Its supervisor.
pub const SUPERVISOR: &str = "supervisor";
/// Its tasks.
pub const TASKS: &str = "tasks";
/// Target: every task runs.
pub const RUNNING: &str = "running";
/// Load balancers have its address.
pub const PUBLISHED: &str = "published";

/// The step of a pod whose hooks are no graph, as when one of its job's has the name of one of the operator's.
pub const HOOKS: &str = "hooks";

/// The most hooks of a group or of a node's configuration.
pub const HOOKS_MAX: usize = 16;

/// Every step of a pod that has no hooks, the control plane's among them.
#[must_use]
pub fn steps() -> Vec<Step> {
    use Owner::{Node, Server};
    vec![
        Step::target(STOPPED, Node, "nothing of the pod is left, or it never was"),
        Step::new(PLACED, Server, "it has a node and an address").after(STOPPED),
        Step::new(ASSIGNED, Server, "its node has written down that it runs there").requires(PLACED),
        Step::new(LINK, Node, "its network namespace, veth pair and addresses are there")
            .requires(ASSIGNED)
            .part_of(NETWORKING)
            .undo(),
        Step::new(ROUTES, Node, "its routes, neighbours and source guard are there")
            .requires(LINK)
            .part_of(NETWORKING),
        Step::new(ANNOUNCED, Node, "neighbours are told of its address, which on a LAN is probed meanwhile")
            .requires(ROUTES)
            .part_of(NETWORKING)
            .optional()
            .attempts(1),
        Step::target(NETWORKING, Node, "its packets travel"),
        Step::new(FOLDERS, Node, "its folders are there").requires(ASSIGNED).part_of(STORAGE).undo(),
        Step::target(STORAGE, Node, "it can write"),
        Step::new(SUPERVISOR, Node, "its supervisor is there, and has started its tasks")
            .requires(NETWORKING)
            .requires(STORAGE)
            .part_of(RUNNING)
            .undo(),
        Step::new(TASKS, Node, "every task runs").requires(SUPERVISOR).part_of(RUNNING),
        Step::target(RUNNING, Node, "the pod runs"),
        Step::new(
            PUBLISHED,
            Server,
            "load balancers have its address; on the way down: they know that it goes",
        )
        .requires(RUNNING)
        .undo(),
    ]
}

/// Why hooks do not fit a pod.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HooksError {
    /// One of them is wrong in itself.
    #[error(transparent)]
    Hook(#[from] HookError),
    /// They do not fit the other steps.
    #[error(transparent)]
    Graph(#[from] GraphError),
}

/// The graph that a pod's node walks: without the steps of the control plane, with the hooks of the job and of the
/// node's operator. Hooks that follow events are none of its steps.
///
/// # Errors
/// See [`HooksError`].
pub fn graph(job: &BTreeMap<String, Hook>, operator: &BTreeMap<String, Hook>) -> Result<Graph, HooksError> {
    let mut steps = steps();
    let of_node = |name: &String| ![PLACED, ASSIGNED, PUBLISHED].contains(&name.as_str());
    steps.retain(|step| of_node(&step.name));
    steps.iter_mut().for_each(|step| step.requires.retain(of_node));
    let targets = [STOPPED, NETWORKING, STORAGE, RUNNING].map(str::to_owned);
    let names: Vec<String> =
        targets.into_iter().chain(job.keys().cloned()).chain(operator.keys().cloned()).collect();
    for (owner, hooks) in [(Owner::Job, job), (Owner::Operator, operator)] {
        if hooks.len() > HOOKS_MAX {
            return Err(GraphError::TooMany { given: steps.len() + hooks.len() }.into());
        }
        for (name, hook) in hooks {
            hook.check(name, owner)?;
            check_points(name, hook, &names)?;
            steps.extend(hook.step(name, owner));
        }
    }
    Ok(Graph::new(steps)?)
}

/// Hooks stand at targets and at each other: what belongs to a target is done in one go.
fn check_points(name: &str, hook: &Hook, points: &[String]) -> Result<(), HookError> {
    let unknown = |field, named: &[String]| {
        let point = named.iter().find(|point| !points.contains(point)).cloned()?;
        let problem = HookProblem::Point { point, known: points.join(", ") };
        Some(HookError { hook: name.to_owned(), field, problem })
    };
    match unknown("before", &hook.before).or_else(|| unknown("after", &hook.after)) {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

/// The table of the steps, in Markdown.
#[must_use]
pub fn table() -> String {
    let graph = Graph::new(steps()).expect("the pod's own steps are a graph");
    let mut table =
        "| step | owner | when | requires | belongs to |\n| --- | --- | --- | --- | --- |\n".to_owned();
    for step in graph.steps() {
        let name = if step.is_target { format!("**{}**", step.name) } else { format!("`{}`", step.name) };
        let optional = if step.optional { " (optional)" } else { "" };
        let target = step.part_of.as_deref().map(|name| format!("**{name}**")).unwrap_or_default();
        let needs: Vec<String> = graph
            .waits_for(&step.name)
            .iter()
            .filter(|(_, need)| *need)
            .map(|(name, _)| format!("`{name}`"))
            .collect();
        let _ = writeln!(
            table,
            "| {name}{optional} | {} | {} | {} | {target} |",
            step.owner,
            step.what,
            needs.join(", ")
        );
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hooks(text: &str) -> BTreeMap<String, Hook> {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn a_hook_stands_between_its_points() {
        let job =
            hooks(r#"{"migrate": {"exec": ["/bin/m"], "before": ["running"], "after": ["networking"]}}"#);
        let graph = graph(&job, &BTreeMap::new()).unwrap();
        assert!(graph.waits_for("supervisor").contains(&("migrate", true)));
        assert!(graph.waits_for("migrate").contains(&("networking", true)));
        assert!(graph.step("placed").is_none());
    }

    #[test]
    fn a_hook_cannot_take_the_name_of_a_step_or_of_another() {
        let job = hooks(r#"{"tasks": {"exec": ["/bin/m"], "before": ["running"]}}"#);
        let error = graph(&job, &BTreeMap::new()).unwrap_err().to_string();
        assert_eq!(
            error,
            "the step `tasks` is registered by node already and cannot be registered by job: choose another name"
        );
        let one = hooks(r#"{"a": {"exec": ["/bin/m"], "before": ["running"]}}"#);
        let error = graph(&one, &one).unwrap_err().to_string();
        assert!(error.contains("by job already and cannot be registered by operator"), "{error}");
    }

    #[test]
    fn hooks_in_a_circle_are_refused() {
        let operator = hooks(
            r#"{"a": {"exec": ["/bin/m"], "after": ["running"], "before": ["b"]},
                "b": {"exec": ["/bin/m"], "before": ["networking"]},
                "c": {"exec": ["/bin/m"], "on": ["pod-failed"]}}"#,
        );
        let error = graph(&BTreeMap::new(), &operator).unwrap_err().to_string();
        assert!(error.starts_with("steps wait for each other in a circle: "), "{error}");
        assert!(error.contains("b -> a -> running"), "{error}");
    }

    #[test]
    fn a_hook_stands_at_a_target_or_another_hook() {
        let error = |text| graph(&hooks(text), &BTreeMap::new()).unwrap_err().to_string();
        let expected = "hooks.a.after: `link` is no point for a hook; there are stopped, networking, storage, running, a";
        assert_eq!(error(r#"{"a": {"exec": ["/bin/m"], "after": ["link"]}}"#), expected);
        assert!(
            error(r#"{"a": {"exec": ["/bin/m"], "before": ["z"]}}"#)
                .starts_with("hooks.a.before: `z` is no point")
        );
    }

    #[test]
    fn a_jobs_hook_never_runs_while_its_supervisor_starts() {
        let job = hooks(r#"{"warm": {"exec": ["/bin/m"], "after": ["networking"]}}"#);
        assert!(graph(&job, &BTreeMap::new()).unwrap().waits_for("warm").contains(&("supervisor", false)));
    }

    /// `UPDATE_DOCS=1 cargo test -p hextet-lifecycle` rewrites the table in the docs.
    #[test]
    fn the_table_in_the_docs_is_this_one() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/lifecycle.md");
        let text = std::fs::read_to_string(path).unwrap();
        let (begin, end) = ("<!-- steps -->\n", "<!-- /steps -->");
        let (head, rest) = text.split_once(begin).expect("the page marks where the table begins");
        let (there, tail) = rest.split_once(end).expect("the page marks where the table ends");
        if std::env::var_os("UPDATE_DOCS").is_some() {
            std::fs::write(path, format!("{head}{begin}{}{end}{tail}", table())).unwrap();
        } else {
            assert_eq!(there, table(), "UPDATE_DOCS=1 cargo test -p hextet-lifecycle");
        }
    }
}
