//! Who may call what: one table of every method and the least role that it needs.
//!
//! A method that is not in it is an admin's, and a test fails until it is. docs/operating.md has the same table for
//! people, which a test compares.

use scheduler_core::token::{Level, Role};

/// Who may call a method.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// Who has no certificate, too.
    Anybody,
    /// Who has a certificate, whatever it is for.
    Enrolled,
    /// A node, for itself.
    Node,
    /// People of this level and above.
    Person(Level),
    /// The same, and load balancers for what they may read.
    PersonOrLb(Level),
}

/// Whether a method changes something: such calls are audited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    /// It reads, or is the running word of a node about itself.
    Reads,
    /// It changes something that outlasts the call.
    Changes,
}

const VIEWER: Access = Access::Person(Level::Viewer);
const OPERATOR: Access = Access::Person(Level::Operator);
const ADMIN: Access = Access::Person(Level::Admin);

/// Service and method, who may call it, and what it does.
const METHODS: &[(&str, Access, Effect)] = &[
    ("hextet.v1.Enrollment/Enroll", Access::Anybody, Effect::Changes),
    ("hextet.v1.Renewal/Renew", Access::Enrolled, Effect::Changes),
    ("hextet.v1.Renewal/Confirm", Access::Enrolled, Effect::Changes),
    ("hextet.v1.Agent/Attach", Access::Node, Effect::Reads),
    ("hextet.v1.Agent/HoldLease", Access::Node, Effect::Reads),
    ("hextet.v1.Agent/SendLogs", Access::Node, Effect::Reads),
    ("hextet.v1.Agent/SendDescription", Access::Node, Effect::Reads),
    ("hextet.v1.Endpoints/Watch", Access::PersonOrLb(Level::Viewer), Effect::Reads),
    ("hextet.v1.Cluster/GetStatus", VIEWER, Effect::Reads),
    ("hextet.v1.Cluster/GetJob", VIEWER, Effect::Reads),
    ("hextet.v1.Cluster/ListJobs", VIEWER, Effect::Reads),
    ("hextet.v1.Cluster/ListPods", VIEWER, Effect::Reads),
    ("hextet.v1.Cluster/ListNodes", VIEWER, Effect::Reads),
    ("hextet.v1.Cluster/ReadLogs", VIEWER, Effect::Reads),
    ("hextet.v1.Cluster/ExplainPod", VIEWER, Effect::Reads),
    ("hextet.v1.Cluster/WatchEvents", VIEWER, Effect::Reads),
    ("hextet.v1.Cluster/ApplyJob", OPERATOR, Effect::Changes),
    ("hextet.v1.Cluster/GetJobVersion", VIEWER, Effect::Reads),
    ("hextet.v1.Cluster/ListRevisions", VIEWER, Effect::Reads),
    ("hextet.v1.Cluster/DiffRevisions", VIEWER, Effect::Reads),
    ("hextet.v1.Cluster/PlanJobs", OPERATOR, Effect::Reads),
    ("hextet.v1.Cluster/Backup", ADMIN, Effect::Changes),
    ("hextet.v1.Cluster/CompactHistory", ADMIN, Effect::Changes),
    ("hextet.v1.Cluster/RollbackJob", OPERATOR, Effect::Changes),
    ("hextet.v1.Cluster/DeleteJob", OPERATOR, Effect::Changes),
    ("hextet.v1.Cluster/StartDeploy", OPERATOR, Effect::Changes),
    ("hextet.v1.Cluster/ListDeploys", VIEWER, Effect::Reads),
    ("hextet.v1.Cluster/SteerDeploy", OPERATOR, Effect::Changes),
    ("hextet.v1.Cluster/RetryPod", OPERATOR, Effect::Changes),
    ("hextet.v1.Cluster/DeclareDead", OPERATOR, Effect::Changes),
    ("hextet.v1.Cluster/DeleteNode", ADMIN, Effect::Changes),
    ("hextet.v1.Cluster/CreateToken", ADMIN, Effect::Changes),
    ("hextet.v1.Cluster/GetCa", VIEWER, Effect::Reads),
    ("hextet.v1.Cluster/TurnCa", ADMIN, Effect::Changes),
    ("grpc.health.v1.Health/Check", VIEWER, Effect::Reads),
    ("grpc.health.v1.Health/Watch", VIEWER, Effect::Reads),
    ("grpc.health.v1.Health/List", VIEWER, Effect::Reads),
    ("grpc.reflection.v1.ServerReflection/ServerReflectionInfo", VIEWER, Effect::Reads),
];

/// Who may call the method with this path, `/package.Service/Method`, and what it does.
pub(crate) fn of_method(path: &str) -> (Access, Effect) {
    let name = path.trim_start_matches('/');
    let known = METHODS.iter().find(|(method, ..)| *method == name);
    known.map_or((ADMIN, Effect::Changes), |(_, access, effect)| (*access, *effect))
}

impl Access {
    /// Whether the holder of a certificate for this role has it.
    pub(crate) fn includes(self, role: &Role) -> bool {
        match self {
            Access::Anybody | Access::Enrolled => true,
            Access::Node => *role == Role::Node,
            Access::Person(least) => role.level().is_some_and(|level| level >= least),
            Access::PersonOrLb(least) => {
                matches!(role, Role::Lb(_)) || role.level().is_some_and(|level| level >= least)
            }
        }
    }

    /// The least role that has it, in words.
    pub(crate) fn needed(self) -> String {
        match self {
            Access::Anybody => "of nobody in particular".to_owned(),
            Access::Enrolled => "viewer, operator, admin, node or lb".to_owned(),
            Access::Node => "node".to_owned(),
            Access::Person(level) => level.to_string(),
            Access::PersonOrLb(level) => format!("{level} or lb"),
        }
    }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;
    use prost_types::FileDescriptorSet;

    use super::*;

    /// Every method of the contract, `package.Service/Method`.
    fn methods() -> Vec<String> {
        let files = FileDescriptorSet::decode(hextet_api::DESCRIPTORS).unwrap().file;
        let services = files.iter().flat_map(|file| {
            file.service.iter().map(|service| (format!("{}.{}", file.package(), service.name()), service))
        });
        let names = services.flat_map(|(name, service)| {
            service.method.iter().map(move |method| format!("{name}/{}", method.name()))
        });
        names.collect()
    }

    #[test]
    fn every_method_of_the_contract_has_one_entry() {
        let contract = methods();
        assert!(contract.len() > 10, "{contract:?}");
        for method in &contract {
            let entries = METHODS.iter().filter(|(name, ..)| name == method).count();
            assert_eq!(
                entries, 1,
                "{method}: say who may call it in scheduler/src/access.rs and docs/operating.md; \
                 until then it is an admin's"
            );
        }
        for (name, ..) in METHODS.iter().filter(|(name, ..)| name.starts_with("hextet.")) {
            assert!(contract.iter().any(|method| method == name), "{name} is not in the contract");
        }
    }

    #[test]
    fn what_is_not_listed_is_an_admins_and_a_change() {
        for path in ["/hextet.v1.Cluster/NoSuch", "/other.Service/X", "", "/", "hextet.v1.Cluster"] {
            assert_eq!(of_method(path), (ADMIN, Effect::Changes), "{path}");
        }
    }

    #[test]
    fn the_table_for_people_is_this_table() {
        let page = include_str!("../../docs/operating.md");
        for (name, access, _) in METHODS.iter().filter(|(name, ..)| name.starts_with("hextet.")) {
            let (_, method) = name.split_once('/').unwrap();
            let row = page.lines().find(|line| {
                line.starts_with("| ") && line.split(['|', '`', ',', ' ']).any(|word| word == method)
            });
            let row = row.unwrap_or_else(|| panic!("docs/operating.md does not say who may call {method}"));
            let needed = format!("| {} |", access.needed());
            let anybody = *access == Access::Anybody && row.contains("| anybody |");
            assert!(anybody || row.contains(&needed), "{method} is for {needed}, and the page says: {row}");
        }
    }

    #[test]
    fn viewers_change_nothing_and_people_do_not_speak_for_nodes() {
        for (name, access, effect) in METHODS {
            if !matches!(access, Access::Anybody | Access::Enrolled) && *effect == Effect::Changes {
                assert!(!access.includes(&Role::Viewer), "{name}");
            }
            assert!(*access != Access::Node || !access.includes(&Role::Admin), "{name}");
        }
    }
}
