//! From desired and observed state to an ordered list of operations.
//!
//! # Order
//! 1. The protocol's name, then the unreachable routes: from the first moment on, nothing that is sent to a pod
//!    that does not exist leaks to the default route.
//! 2. What is no longer wanted goes, from the outside in: a pod stops being announced, then its routes go, then
//!    what its guard lets through, its link and its network namespace.
//! 3. The node's sysctls, routes to peers, group, programs and table. Only then programs go that are no longer
//!    wanted at the uplink: at no moment is nobody there who translates or drops a pod's private source.
//! 4. Pods, one after the other by ID. Inside first, then the host side; the routes to the pod and its entry
//!    for neighbour discovery come last, so that a pod is reachable only when it is complete.
//!
//! [`plan_teardown`] is step 2 for everything, then the sysctls as they were, the programs and the unreachable
//! routes.

use std::collections::BTreeSet;

use crate::{
    Action, Address, Desired, Hop, Neighbour, Observed, ObservedBpf, ObservedPod, Op, Program, ProtocolName,
    Route, Stack, diff,
    wanted::{Wanted, WantedPod},
};

/// What to do so that the kernel holds what is desired. Empty when it does.
pub fn plan(desired: &Desired, observed: &Observed) -> Vec<Op> {
    let wanted = Wanted::of(desired, observed);
    let mut planner = Planner { wanted, observed: observed.clone(), ops: Vec::new() };
    planner.register_protocol();
    planner.add_unreachable_routes();
    planner.remove_stale(false);
    planner.set_up_node();
    planner.remove_translation();
    planner.set_up_pods();
    planner.ops
}

/// What to do so that the kernel holds nothing of Hextet's. Empty when it does.
pub fn plan_teardown(observed: &Observed) -> Vec<Op> {
    let mut planner = Planner { wanted: Wanted::nothing(), observed: observed.clone(), ops: Vec::new() };
    planner.remove_stale(true);
    planner.remove_translation();
    planner.remove_unreachable_routes();
    planner.unpin();
    planner.unregister_protocol();
    planner.ops
}

struct Planner {
    wanted: Wanted,
    /// What the kernel holds after `ops` as far as links and namespaces go.
    observed: Observed,
    ops: Vec<Op>,
}

impl Planner {
    fn node(&mut self, action: Action) {
        self.ops.push(Op::node(action));
    }

    /// An action on the host side of whichever pod has `dev`, or of the node.
    fn on_dev(&mut self, dev: Option<&str>, action: Action) {
        let link = dev.and_then(|dev| self.observed.links.get(dev));
        let pod = link.and_then(|link| link.alias.as_deref());
        self.ops.push(Op::host(pod, action));
    }

    fn register_protocol(&mut self) {
        if self.observed.protocol_name == ProtocolName::Missing {
            self.node(Action::ProtocolRegister);
        }
    }

    fn unregister_protocol(&mut self) {
        if self.observed.protocol_name == ProtocolName::Ours {
            self.node(Action::ProtocolUnregister);
        }
    }

    fn add_unreachable_routes(&mut self) {
        let (unreachable, _) = split_unreachable(&self.wanted.routes);
        for action in diff::missing_routes(&unreachable, &self.observed.host.routes) {
            self.node(action);
        }
    }

    fn remove_unreachable_routes(&mut self) {
        let (unreachable, _) = split_unreachable(&self.observed.host.routes);
        for route in unreachable {
            self.node(Action::RouteDelete(route));
        }
    }

    fn remove_stale(&mut self, keep_unreachable: bool) {
        self.remove_answers();
        self.remove_routes(keep_unreachable);
        self.remove_neighbours_and_addresses();
        self.remove_guards();
        self.remove_links();
        self.remove_namespaces();
        self.restore_sysctls();
    }

    fn remove_answers(&mut self) {
        let answered: BTreeSet<_> =
            self.wanted.pods.values().filter_map(|pod| pod.ndp).map(|(address, _)| address).collect();
        let ndp: Vec<_> = self.bpf().ndp.into_keys().filter(|address| !answered.contains(address)).collect();
        for address in ndp {
            self.node(Action::NdpDelete { address });
        }
        let proxied: BTreeSet<_> = self.wanted.pods.values().filter_map(|pod| pod.proxy.clone()).collect();
        let proxies: Vec<_> = self.observed.proxies.difference(&proxied).cloned().collect();
        for (dev, address) in proxies {
            self.node(Action::ProxyDelete { dev, address });
        }
    }

    fn remove_routes(&mut self, keep_unreachable: bool) {
        let (_, routed) = split_unreachable(&self.observed.host.routes);
        let observed = if keep_unreachable { &routed } else { &self.observed.host.routes };
        for action in diff::extra_routes(&self.wanted.all_routes(), observed) {
            let dev = match &action {
                Action::RouteDelete(route) => route.dev().map(str::to_owned),
                _ => None,
            };
            self.on_dev(dev.as_deref(), action);
        }
    }

    /// On links that stay: those of the others go with their link.
    fn remove_neighbours_and_addresses(&mut self) {
        let doomed = self.doomed_links();
        let stays = |dev: &String| !doomed.contains(dev);
        let addresses: BTreeSet<Address> =
            self.observed.host.addresses.iter().filter(|a| stays(&a.dev)).cloned().collect();
        let neighbours: BTreeSet<Neighbour> =
            self.observed.host.neighbours.iter().filter(|n| stays(&n.dev)).cloned().collect();
        let wanted = Stack {
            addresses: self.wanted.all_addresses(),
            neighbours: self.wanted.all_neighbours(),
            ..Stack::default()
        };
        for action in diff::extra(&wanted, &Stack { addresses, neighbours, ..Stack::default() }) {
            let dev = match &action {
                Action::AddressDelete(address) => Some(address.dev.clone()),
                Action::NeighbourDelete(neighbour) => Some(neighbour.dev.clone()),
                _ => None,
            };
            self.on_dev(dev.as_deref(), action);
        }
    }

    /// A guard without an entry passes nothing, so its program goes with the link, or behind it.
    fn remove_guards(&mut self) {
        let doomed = self.doomed_links();
        for dev in self.bpf().guards.into_keys() {
            if doomed.contains(&dev) || !self.wanted.has_link(&dev) {
                self.on_dev(Some(&dev.clone()), Action::GuardDelete { dev: dev.clone() });
                self.observed.bpf.iter_mut().for_each(|bpf| {
                    bpf.guards.remove(&dev);
                });
            }
        }
    }

    fn remove_links(&mut self) {
        for dev in self.doomed_links() {
            self.on_dev(Some(&dev), Action::LinkDelete { dev: dev.clone() });
            let guard = (Program::PodGuard, dev.clone());
            if self.bpf().attachments.contains(&guard) {
                self.on_dev(Some(&dev), Action::Detach { program: guard.0, dev: guard.1 });
            }
            self.observed.remove_link(&dev);
        }
    }

    /// Links of pods that are not wanted, and links whose other end is not in their pod: a pair cannot be
    /// mended, only made anew.
    fn doomed_links(&self) -> Vec<String> {
        let whole = |dev: &String| {
            let mut wanted = self.wanted.pods.iter().filter(|(_, pod)| pod.dev == *dev);
            wanted.any(|(id, _)| self.observed.pods.get(id).is_some_and(|pod| pod.eth0.is_some()))
        };
        self.observed.links.keys().filter(|dev| !whole(dev)).cloned().collect()
    }

    fn remove_namespaces(&mut self) {
        let stale: Vec<_> =
            self.observed.pods.keys().filter(|id| !self.wanted.pods.contains_key(*id)).cloned().collect();
        for id in stale {
            self.ops.push(Op::host(Some(&id), Action::NetnsDelete));
            self.observed.pods.remove(&id);
        }
    }

    fn remove_translation(&mut self) {
        let bpf = self.bpf();
        let attachments = self.wanted.all_attachments();
        for (program, dev) in bpf.attachments.difference(&attachments).cloned() {
            self.on_dev(Some(&dev.clone()), Action::Detach { program, dev });
        }
        if self.observed.nft.is_some() && self.wanted.nft.is_none() {
            self.node(Action::NftDelete);
        }
        if self.observed.nft_exit.is_some() && self.wanted.nft_exit.is_none() {
            self.node(Action::NftExitDelete);
        }
        if self.bpf().masquerade.is_some() && self.wanted.masquerade.is_none() {
            self.node(Action::MasqueradeDelete);
        }
    }

    /// Puts back what is journalled and no longer wanted.
    fn restore_sysctls(&mut self) {
        let wanted: BTreeSet<_> = self.wanted.sysctls.iter().map(|(key, _)| key).collect();
        let all_forward = wanted.iter().any(|key| *key == ALL_FORWARDING);
        // Writing `all/forwarding` changed every device's own: they are put back together with it.
        let needed = |key: &String| wanted.contains(key) || (all_forward && is_ipv6_forwarding(key));
        let mut stale: Vec<_> = self
            .observed
            .journal
            .iter()
            .filter(|(key, _)| !needed(key))
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect();
        stale.sort_by_key(|(key, _)| (restore_rank(key), key.clone()));
        for (key, value) in stale {
            self.node(Action::SysctlRestore { key, value });
        }
    }

    fn set_up_node(&mut self) {
        for (key, value) in std::mem::take(&mut self.wanted.sysctls) {
            if self.observed.host.sysctls.get(&key) != Some(&value) {
                self.node(Action::SysctlSet { key, value });
            }
        }
        let (_, routes) = split_unreachable(&self.wanted.routes);
        for action in diff::missing_routes(&routes, &self.observed.host.routes) {
            self.node(action);
        }
        let joins: Vec<_> =
            self.wanted.addresses.difference(&self.observed.host.addresses).cloned().collect();
        for address in joins {
            self.node(Action::AddressAdd(address));
        }
        self.set_up_masquerade();
        self.attach_uplink_programs();
        self.set_up_nft();
    }

    /// After the programs: while it changes hands, two translate, of which the second finds nothing to do.
    fn set_up_nft(&mut self) {
        if let Some(table) = self.wanted.nft.clone().filter(|table| self.observed.nft.as_ref() != Some(table))
        {
            self.node(Action::NftSet(table));
        }
        let exit = self.wanted.nft_exit.clone();
        if let Some(table) = exit.filter(|table| self.observed.nft_exit.as_ref() != Some(table)) {
            self.node(Action::NftExitSet(table));
        }
    }

    fn set_up_masquerade(&mut self) {
        let masquerade = self.wanted.masquerade.clone();
        if let Some(masquerade) = masquerade.filter(|wanted| self.bpf().masquerade.as_ref() != Some(wanted)) {
            self.node(Action::MasqueradeSet(masquerade));
        }
    }

    fn attach_uplink_programs(&mut self) {
        let attached = self.bpf().attachments;
        for (program, dev) in self.wanted.attachments.clone() {
            if !attached.contains(&(program, dev.clone())) {
                self.node(Action::Attach { program, dev });
            }
        }
    }

    fn set_up_pods(&mut self) {
        let bpf = self.bpf();
        for (id, pod) in &self.wanted.pods {
            let inside = self.observed.pods.get(id);
            self.ops.extend(make_link(id, pod, inside, &self.observed));
            self.ops.extend(set_up_inside(id, pod, inside));
            self.ops.extend(set_up_guard(id, pod, &bpf));
            self.ops.extend(set_up_host_side(id, pod, &self.observed.host));
            self.ops.extend(announce(id, pod, &bpf, &self.observed.proxies));
        }
    }

    fn unpin(&mut self) {
        if self.bpf().pinned {
            self.node(Action::Unpin);
        }
    }

    fn bpf(&self) -> ObservedBpf {
        self.observed.bpf.clone().unwrap_or_default()
    }
}

fn make_link(id: &str, pod: &WantedPod, inside: Option<&ObservedPod>, observed: &Observed) -> Vec<Op> {
    let mut ops = Vec::new();
    if inside.is_none() {
        ops.push(Op::host(Some(id), Action::NetnsAdd));
    }
    let link = observed.links.get(&pod.dev);
    if link.is_none() {
        ops.push(Op::host(
            Some(id),
            Action::LinkAdd {
                dev: pod.dev.clone(),
                host_mac: pod.link.mac,
                pod_mac: pod.eth0.mac,
                mtu_bytes: pod.link.mtu_bytes,
            },
        ));
    }
    if link != Some(&pod.link) {
        let action = Action::LinkSet { dev: pod.dev.clone(), link: pod.link.clone() };
        ops.push(Op::host(Some(id), action));
    }
    ops
}

fn set_up_inside(id: &str, pod: &WantedPod, inside: Option<&ObservedPod>) -> Vec<Op> {
    let nothing = ObservedPod::default();
    let inside = inside.unwrap_or(&nothing);
    let mut actions = Vec::new();
    if inside.eth0.as_ref() != Some(&pod.eth0) {
        actions.push(Action::LinkSet { dev: crate::POD_IF.to_owned(), link: pod.eth0.clone() });
    }
    if !inside.lo_up {
        actions.push(Action::LoopbackUp);
    }
    actions.extend(diff::extra(&pod.inside, &inside.stack));
    actions.extend(diff::missing(&pod.inside, &inside.stack));
    actions.into_iter().map(|action| Op::inside(id, action)).collect()
}

fn set_up_guard(id: &str, pod: &WantedPod, bpf: &ObservedBpf) -> Vec<Op> {
    let Some(guard) = pod.guard else { return Vec::new() };
    let mut ops = Vec::new();
    if bpf.guards.get(&pod.dev) != Some(&guard) {
        ops.push(Op::host(Some(id), Action::GuardSet { dev: pod.dev.clone(), guard }));
    }
    let attachment = (Program::PodGuard, pod.dev.clone());
    if !bpf.attachments.contains(&attachment) {
        ops.push(Op::host(Some(id), Action::Attach { program: attachment.0, dev: attachment.1 }));
    }
    ops
}

/// Only what is missing: what is too much was planned for the whole host.
fn set_up_host_side(id: &str, pod: &WantedPod, host: &Stack) -> Vec<Op> {
    diff::missing(&pod.host, host).into_iter().map(|action| Op::host(Some(id), action)).collect()
}

fn announce(
    id: &str,
    pod: &WantedPod,
    bpf: &ObservedBpf,
    proxies: &BTreeSet<(String, std::net::Ipv6Addr)>,
) -> Vec<Op> {
    let ndp = pod.ndp.filter(|(address, mac)| bpf.ndp.get(address) != Some(mac));
    let ndp = ndp.map(|(address, mac)| Action::NdpSet { address, mac });
    let proxy = pod.proxy.clone().filter(|proxy| !proxies.contains(proxy));
    let proxy = proxy.map(|(dev, address)| Action::ProxyAdd { dev, address });
    ndp.into_iter().chain(proxy).map(|action| Op::host(Some(id), action)).collect()
}

fn split_unreachable(routes: &BTreeSet<Route>) -> (BTreeSet<Route>, BTreeSet<Route>) {
    routes.iter().cloned().partition(|route| route.hop == Hop::Unreachable)
}

const ALL_FORWARDING: &str = "net/ipv6/conf/all/forwarding";

fn is_ipv6_forwarding(key: &str) -> bool {
    key.starts_with("net/ipv6/conf/") && key.ends_with("/forwarding")
}

/// `all/forwarding` first, because writing it overwrites the others; `accept_ra` after them, the reverse of how
/// they were set.
fn restore_rank(key: &str) -> u8 {
    match key {
        ALL_FORWARDING => 0,
        key if is_ipv6_forwarding(key) => 1,
        _ => 2,
    }
}

#[cfg(test)]
mod tests;
