//! Differences between sets of kernel objects, as actions.

use std::collections::{BTreeMap, BTreeSet};

use crate::{Action, Route, Stack};

/// What to add so that `observed` holds all that is `wanted`, in the order: sysctls, addresses, neighbours, routes.
pub(crate) fn missing(wanted: &Stack, observed: &Stack) -> Vec<Action> {
    let mut actions = missing_sysctls(&wanted.sysctls, &observed.sysctls);
    actions.extend(wanted.addresses.difference(&observed.addresses).cloned().map(Action::AddressAdd));
    actions.extend(wanted.neighbours.difference(&observed.neighbours).cloned().map(Action::NeighbourSet));
    actions.extend(missing_routes(&wanted.routes, &observed.routes));
    actions
}

/// What to take away so that `observed` holds nothing but what is `wanted`, in the reverse order. Values of
/// sysctls stay: they are not objects.
pub(crate) fn extra(wanted: &Stack, observed: &Stack) -> Vec<Action> {
    let mut actions = extra_routes(&wanted.routes, &observed.routes);
    let stale = stale_neighbours(wanted, observed);
    actions.extend(stale);
    actions.extend(observed.addresses.difference(&wanted.addresses).cloned().map(Action::AddressDelete));
    actions
}

/// A neighbour of a wrong MAC address is overwritten, not removed.
fn stale_neighbours(wanted: &Stack, observed: &Stack) -> Vec<Action> {
    let keys: BTreeSet<_> = wanted.neighbours.iter().map(|n| (&n.dev, n.address)).collect();
    observed
        .neighbours
        .iter()
        .filter(|neighbour| !keys.contains(&(&neighbour.dev, neighbour.address)))
        .cloned()
        .map(Action::NeighbourDelete)
        .collect()
}

fn missing_sysctls(wanted: &BTreeMap<String, String>, observed: &BTreeMap<String, String>) -> Vec<Action> {
    wanted
        .iter()
        .filter(|(key, value)| observed.get(*key) != Some(value))
        .map(|(key, value)| Action::SysctlSet { key: key.clone(), value: value.clone() })
        .collect()
}

/// Adds routes, or replaces in place those of ours that lead elsewhere: no packet falls between.
///
/// Replacing is for our own routes only. Adding fails where somebody else's route of the same destination and
/// metric is, and leaves it alone.
pub(crate) fn missing_routes(wanted: &BTreeSet<Route>, observed: &BTreeSet<Route>) -> Vec<Action> {
    let keys: BTreeSet<_> = observed.iter().map(Route::key).collect();
    wanted
        .difference(observed)
        .map(|route| match keys.contains(&route.key()) {
            true => Action::RouteReplace(route.clone()),
            false => Action::RouteAdd(route.clone()),
        })
        .collect()
}

/// Deletes routes, except those that [`missing_routes`] replaces.
pub(crate) fn extra_routes(wanted: &BTreeSet<Route>, observed: &BTreeSet<Route>) -> Vec<Action> {
    let replaced: BTreeSet<_> = wanted.difference(observed).map(Route::key).collect();
    observed
        .difference(wanted)
        .filter(|route| !replaced.contains(&route.key()))
        .cloned()
        .map(Action::RouteDelete)
        .collect()
}
