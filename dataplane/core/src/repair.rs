//! Which operations mend what others broke, and what they broke, in words.

use crate::{Action, Desired, Observed, Op, plan};

/// Those of `ops` that are there because the kernel no longer holds what it held.
///
/// `settled` is what was desired when a plan last left nothing to do: what a plan for it would do now is what others
/// have undone since, whatever is desired today.
pub fn repairs(settled: &Desired, observed: &Observed, ops: &[Op]) -> Vec<Op> {
    let undone = plan(settled, observed);
    ops.iter().filter(|op| undone.contains(op)).cloned().collect()
}

impl Op {
    /// What was found broken when this operation mended it: `route fd00::/64 dev eth0 proto hextet was removed`.
    pub fn found(&self) -> String {
        use Action::*;
        let text = self.to_string();
        // The text of an operation says what is done, then to what.
        let object = |verb: &str| text.replacen(verb, "", 1);
        match &self.action {
            SysctlSet { key, value } => format!("{}sysctl {key} was no longer {value}", self.inside_of()),
            NetnsAdd => format!("{} was removed", object("add ")),
            LinkAdd { dev, .. } => format!("link {dev} was removed"),
            LinkSet { dev, .. } => format!("{}link {dev} was changed", self.inside_of()),
            LinkDelete { dev } => format!("link {dev} had lost its other end"),
            LoopbackUp => format!("{}link lo was down", self.inside_of()),
            AddressAdd(_) => format!("{} was removed", object("replace ")),
            RouteAdd(_) => format!("{} was removed", object("add ")),
            RouteReplace(_) => format!("{} was changed", object("replace ")),
            NeighbourSet(_) => format!("{} was removed or changed", object("replace ")),
            ProxyAdd { .. } => format!("{} was removed", object("add ")),
            NftSet(_) => "table ip hextet was removed or changed".to_owned(),
            Attach { program, dev } => format!("bpf {program} was taken off {dev}"),
            Detach { program, dev } => format!("bpf {program} was put on {dev}"),
            NdpSet { .. } | GuardSet { .. } | MasqueradeSet(_) => {
                format!("{} was removed or changed", object("set "))
            }
            _ if self.removes() => format!("{} was not wanted", object("del ")),
            _ => format!("what `{text}` makes was not there"),
        }
    }

    fn inside_of(&self) -> String {
        match (self.place, &self.pod) {
            (crate::Place::Pod, Some(pod)) => format!("-n {pod} "),
            _ => String::new(),
        }
    }
}
