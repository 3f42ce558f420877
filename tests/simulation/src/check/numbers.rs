//! Numbers that only grow, also over a restore from a backup that does not know how far they were.

use std::collections::BTreeMap;

use scheduler_core::change::{Revision, Value};

use crate::machine::Machine;

/// The greatest of each that was ever seen.
#[derive(Default)]
pub(super) struct Numbers {
    /// Of nodes by name and key.
    terms: BTreeMap<(String, String), u64>,
    /// Of groups of which there may only be one pod.
    tokens: BTreeMap<String, u64>,
}

impl Numbers {
    /// No term of a node comes back: what was granted in it would be good again.
    pub(super) fn terms_grow(&mut self, revision: &Revision) -> Result<(), String> {
        let is_restored = revision.message.starts_with("restored from a backup");
        for change in &revision.changes {
            let Some(Value::Node(node)) = &change.new else { continue };
            let last = self.terms.entry((node.name.clone(), node.key.clone())).or_insert(node.term);
            if node.term < *last || (is_restored && node.term == *last && node.term > 0) {
                return Err(format!("{} was in term {last} and is in term {}", node.name, node.term));
            }
            *last = node.term;
        }
        Ok(())
    }

    /// Of what there may only be one the later shows the greater number.
    pub(super) fn tokens_grow(&mut self, machines: &[Machine]) -> Result<(), String> {
        let processes = machines.iter().flat_map(|machine| &machine.processes);
        for (pod, process) in processes.filter(|(_, process)| process.is_single && process.lives) {
            let last = self.tokens.entry(process.group.clone()).or_insert(process.token);
            if process.token < *last {
                return Err(format!("{pod} lives with the token {}, after one with {last}", process.token));
            }
            *last = process.token;
        }
        Ok(())
    }
}
