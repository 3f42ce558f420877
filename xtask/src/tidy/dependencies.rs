//! Who may depend on whom, from `cargo metadata`.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

/// Packages that compute and never touch the world.
const PURE: [&str; 4] = ["dataplane-core", "hextet-address", "hextet-lifecycle", "scheduler-core"];

/// What a pure package must not reach, not even through another. A name that ends in `-` is a beginning.
const BANNED: [&str; 10] =
    ["aya", "hyper", "mio", "netlink-", "nftables", "nix", "redb", "rtnetlink", "tokio", "tonic"];

/// What each package may use of this workspace; `*` is everything but itself.
const ALLOWED: [(&str, &[&str]); 19] = [
    ("dataplane", &["dataplane-common", "dataplane-core", "hextet-address"]),
    ("dataplane-common", &[]),
    ("dataplane-core", &["dataplane-common", "hextet-address"]),
    ("dataplane-ebpf", &["dataplane-common"]),
    ("hextet-address", &[]),
    ("hextet-api", &["hextet-address"]),
    ("hextet-conformance", &["dataplane", "hextet-properties", "hextet-tests"]),
    ("hextet-lifecycle", &[]),
    ("hextet-properties", &["dataplane-common", "scheduler-core"]),
    (
        "hextet-simulation",
        &["hextet-address", "hextet-api", "hextet-lifecycle", "scheduler", "scheduler-core"],
    ),
    ("hextet-redb-check", &[]),
    ("hextet-tests", &["*"]),
    ("lb-nginx", &["hextet-api"]),
    (
        "netctl",
        &[
            "dataplane",
            "dataplane-core",
            "hextet-address",
            "hextet-api",
            "hextet-lifecycle",
            "node",
            "scheduler",
            "scheduler-core",
        ],
    ),
    (
        "node",
        &[
            "dataplane",
            "dataplane-core",
            "hextet-address",
            "hextet-api",
            "hextet-lifecycle",
            "hextet-redb-check",
        ],
    ),
    (
        "scheduler",
        &["hextet-address", "hextet-api", "hextet-lifecycle", "hextet-redb-check", "scheduler-core"],
    ),
    ("scheduler-bench", &["hextet-address", "hextet-api", "scheduler", "scheduler-core"]),
    ("scheduler-core", &["hextet-address", "hextet-lifecycle"]),
    ("xtask", &[]),
];

/// One line for each dependency that must not be.
pub(super) fn check(metadata: &Value) -> Vec<String> {
    let graph = Graph::of(metadata);
    let mut findings = impure(&graph);
    findings.extend(graph.members.iter().flat_map(|member| disallowed(&graph, member)));
    findings
}

/// Packages by name. Development dependencies are left out: tests may use anything.
struct Graph {
    members: BTreeSet<String>,
    edges: BTreeMap<String, BTreeSet<String>>,
}

impl Graph {
    fn of(metadata: &Value) -> Self {
        let packages = || array(&metadata["packages"]);
        let name_of: BTreeMap<&str, &str> = packages()
            .filter_map(|package| Some((package["id"].as_str()?, package["name"].as_str()?)))
            .collect();
        let name = |id: &Value| id.as_str().and_then(|id| name_of.get(id)).map(|name| (*name).to_owned());
        let members = array(&metadata["workspace_members"]).filter_map(name).collect();
        let mut edges: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
        for node in array(&metadata["resolve"]["nodes"]) {
            let Some(from) = name(&node["id"]) else { continue };
            let used = array(&node["deps"]).filter(|dep| is_used(dep)).filter_map(|dep| name(&dep["pkg"]));
            edges.entry(from).or_default().extend(used);
        }
        Self { members, edges }
    }

    fn direct(&self, package: &str) -> impl Iterator<Item = &str> {
        self.edges.get(package).into_iter().flatten().map(String::as_str)
    }

    /// Everything that is reachable from `package`, with who brought it in.
    fn reachable<'a>(&'a self, package: &'a str) -> BTreeMap<&'a str, &'a str> {
        let mut found = BTreeMap::new();
        let mut queue = vec![package];
        while let Some(from) = queue.pop() {
            for to in self.direct(from) {
                if found.insert(to, from).is_none() {
                    queue.push(to);
                }
            }
        }
        found
    }
}

fn array(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

/// A dependency of the program itself, not of its build script or tests.
fn is_used(dependency: &Value) -> bool {
    array(&dependency["dep_kinds"]).any(|kind| kind["kind"].is_null())
}

fn impure(graph: &Graph) -> Vec<String> {
    let findings = PURE.iter().flat_map(|pure| {
        let reached = graph.reachable(pure).into_iter().filter(|(name, _)| is_banned(name));
        reached.map(move |(name, through)| {
            format!("{pure} is pure and must not reach {name} (through {through})")
        })
    });
    findings.collect()
}

fn is_banned(name: &str) -> bool {
    BANNED.iter().any(|banned| if banned.ends_with('-') { name.starts_with(banned) } else { name == *banned })
}

fn disallowed(graph: &Graph, member: &str) -> Vec<String> {
    let Some((_, allowed)) = ALLOWED.iter().find(|(name, _)| *name == member) else {
        return vec![format!(
            "{member} is not in the list of xtask/src/tidy/dependencies.rs: who may it use?"
        )];
    };
    let own = graph.direct(member).filter(|name| graph.members.contains(*name));
    let wrong = own.filter(|name| !allowed.contains(name) && !allowed.contains(&"*"));
    wrong.map(|name| format!("{member} must not depend on {name}")).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn node(name: &str, deps: &[&str]) -> Value {
        let deps = deps.iter().map(|dep| json!({"pkg": dep, "dep_kinds": [{"kind": null}]}));
        json!({"id": name, "deps": deps.collect::<Vec<_>>()})
    }

    fn metadata(members: &[&str], nodes: &[Value]) -> Value {
        let packages = nodes.iter().map(|node| json!({"id": node["id"], "name": node["id"]}));
        json!({
            "packages": packages.collect::<Vec<_>>(),
            "workspace_members": members,
            "resolve": {"nodes": nodes},
        })
    }

    #[test]
    fn a_core_must_not_reach_tokio_through_another() {
        let nodes = [node("dataplane-core", &["clock"]), node("clock", &["tokio"]), node("tokio", &[])];
        assert_eq!(
            check(&metadata(&["dataplane-core"], &nodes)),
            ["dataplane-core is pure and must not reach tokio (through clock)"]
        );
    }

    #[test]
    fn a_development_dependency_is_nobody_elses_business() {
        let mut core = node("scheduler-core", &["tokio"]);
        core["deps"][0]["dep_kinds"][0]["kind"] = json!("dev");
        assert_eq!(check(&metadata(&["scheduler-core"], &[core, node("tokio", &[])])), [""; 0]);
    }

    #[test]
    fn a_load_balancer_uses_the_api_alone() {
        let nodes = [node("lb-nginx", &["node", "hextet-api"]), node("node", &[]), node("hextet-api", &[])];
        assert_eq!(
            check(&metadata(&["lb-nginx", "node", "hextet-api"], &nodes)),
            ["lb-nginx must not depend on node"]
        );
    }

    #[test]
    fn a_new_package_must_be_put_into_the_list() {
        let findings = check(&metadata(&["new"], &[node("new", &[])]));
        assert!(findings[0].starts_with("new is not in the list"), "{findings:?}");
    }
}
