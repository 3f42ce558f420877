//! Holders of certificates replace their keys.

use std::sync::Arc;

use crate::{
    change::{Key, Value},
    draft::Draft,
    event::{Enrolled, Refusal, Renew},
    node::Node,
    renewal::{DELETED_MAX, RENEWALS_MAX, RENEWALS_OF_HOLDER_MAX, Renewal},
    time::WallTime,
    token::Role,
    transition::{Step, authority},
};

/// Writes down which key comes next. Asked again, the last answer counts.
pub(super) fn renew(draft: &mut Draft<'_>, renew: &Renew, now: WallTime) -> Result<Step, Refusal> {
    let holder = renew.holder.uri();
    forget_ended(draft, now);
    // Who asks with a key that is to be confirmed has it.
    confirm_key(draft, &renew.holder, &renew.old);
    check_is_good(draft, &renew.holder, &renew.old)?;
    check_unused(draft, &renew.new)?;
    check_room(draft, &holder, &renew.old)?;
    let ca = draft.authorities().map(|authorities| authorities.for_renewal(renew.takes_ca).to_owned());
    let renewal = Renewal {
        holder: holder.clone(),
        new: renew.new.clone(),
        confirmed: false,
        ca,
        ends: renew.ends,
        deleted: None,
    };
    draft.put(Key::Renewal(renew.old.clone()), Some(Value::Renewal(Arc::new(renewal))));
    Ok(Step { message: format!("{holder} gets another key"), replan: false })
}

/// A key that was given out was used: the one before it is not good any more.
pub(super) fn confirm(draft: &mut Draft<'_>, holder: &Enrolled, key: &str) -> Step {
    confirm_key(draft, holder, key);
    Step { message: format!("{} has another key", holder.uri()), replan: false }
}

fn confirm_key(draft: &mut Draft<'_>, holder: &Enrolled, key: &str) {
    let uri = holder.uri();
    let mut renewals = draft.renewals().iter();
    let found =
        renewals.find(|(_, renewal)| renewal.new == key && renewal.holder == uri && !renewal.confirmed);
    let Some((old, renewal)) = found.map(|(old, renewal)| (old.clone(), Renewal::clone(renewal))) else {
        return;
    };
    if holder.role != Role::Node {
        let confirmed = Renewal { confirmed: true, ..renewal };
        authority::no_longer_late(draft, &old);
        return draft.put(Key::Renewal(old), Some(Value::Renewal(Arc::new(confirmed))));
    }
    // Of a node one key is known, and no other is good.
    draft.put(Key::Renewal(old.clone()), None);
    if let Some(node) = draft.nodes().get(&holder.name).filter(|node| node.key == old).cloned() {
        draft.put_node(Node { key: key.to_owned(), ca: renewal.ca, ..Node::clone(&node) });
    }
}

/// The node is deleted: whoever comes with its key is told so, and a machine that was only never known is not.
pub(super) fn delete(draft: &mut Draft<'_>, node: &Node, now: WallTime) {
    let next = draft.renewals().get(&node.key).map(|renewal| renewal.new.clone());
    let new = next.unwrap_or_else(|| node.key.clone());
    let holder = Enrolled { role: Role::Node, name: node.name.clone() }.uri();
    let deleted = Renewal { holder, new, confirmed: true, ca: None, ends: now, deleted: Some(now) };
    draft.put(Key::Renewal(node.key.clone()), Some(Value::Renewal(Arc::new(deleted))));
    let all = draft.renewals().iter().filter_map(|(key, renewal)| Some((renewal.deleted?, key.clone())));
    let mut all: Vec<_> = all.collect();
    all.sort_unstable();
    let beyond = all.len().saturating_sub(DELETED_MAX);
    all.into_iter().take(beyond).for_each(|(_, key)| draft.put(Key::Renewal(key), None));
}

fn check_is_good(draft: &Draft<'_>, holder: &Enrolled, key: &str) -> Result<(), Refusal> {
    let is_good = match holder.role {
        Role::Node => draft.nodes().get(&holder.name).is_some_and(|node| node.key == key),
        _ => !draft.is_replaced(key),
    };
    if is_good { Ok(()) } else { Err(Refusal::KeyReplaced) }
}

/// A key is one holder's, and is never given again.
pub(super) fn check_unused(draft: &Draft<'_>, key: &str) -> Result<(), Refusal> {
    let of_node = draft.nodes().values().any(|node| node.key == key);
    let mut renewals = draft.renewals().values();
    if of_node || draft.renewals().contains_key(key) || renewals.any(|renewal| renewal.new == key) {
        return Err(Refusal::KeyTaken);
    }
    Ok(())
}

fn check_room(draft: &Draft<'_>, holder: &str, old: &str) -> Result<(), Refusal> {
    let all = || draft.renewals().iter().filter(|(_, renewal)| renewal.deleted.is_none());
    let own = all().filter(|(key, renewal)| *key != old && renewal.holder == holder).count();
    if own >= RENEWALS_OF_HOLDER_MAX || all().count() >= RENEWALS_MAX {
        return Err(Refusal::TooManyRenewals);
    }
    Ok(())
}

/// A certificate that has ended needs nobody to remember that its key was replaced. A node's counts as long as the node
/// is there.
fn forget_ended(draft: &mut Draft<'_>, now: WallTime) {
    let is_nodes = |key: &String| draft.nodes().values().any(|node| node.key == *key);
    let is_over = |renewal: &Renewal| now >= renewal.ends && renewal.deleted.is_none();
    let ended = draft.renewals().iter().filter(|(key, renewal)| is_over(renewal) && !is_nodes(key));
    let ended: Vec<String> = ended.map(|(key, _)| key.clone()).collect();
    ended.into_iter().for_each(|key| draft.put(Key::Renewal(key), None));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{state::State, time::WallTime};

    const NOW: WallTime = WallTime(1_000);
    const ENDS: WallTime = WallTime(10_000);

    fn bob() -> Enrolled {
        Enrolled::from_uri("hextet:viewer/bob").unwrap()
    }

    fn ask(
        state: &mut State,
        holder: &Enrolled,
        old: &str,
        new: &str,
        now: WallTime,
    ) -> Result<Step, Refusal> {
        let renewal =
            Renew { holder: holder.clone(), old: old.into(), new: new.into(), ends: ENDS, takes_ca: true };
        renew(&mut Draft::new(state), &renewal, now)
    }

    #[test]
    fn both_keys_are_good_until_the_new_one_is_used() {
        let mut state = State::default();
        ask(&mut state, &bob(), "a", "b", NOW).unwrap();
        assert!(!state.is_replaced("a") && !state.is_replaced("b"));
        // The answer was lost: another is asked for.
        ask(&mut state, &bob(), "a", "c", NOW).unwrap();
        confirm(&mut Draft::new(&mut state), &bob(), "b");
        assert!(!state.is_replaced("a"), "that one was given up");
        confirm(&mut Draft::new(&mut state), &Enrolled::from_uri("hextet:viewer/eve").unwrap(), "c");
        assert!(!state.is_replaced("a"), "it is not hers");
        confirm(&mut Draft::new(&mut state), &bob(), "c");
        assert!(state.is_replaced("a") && !state.is_replaced("c"));
        assert_eq!(ask(&mut state, &bob(), "a", "d", NOW).err(), Some(Refusal::KeyReplaced));
        ask(&mut state, &bob(), "c", "d", NOW).unwrap();
    }

    #[test]
    fn a_key_is_given_once() {
        let mut state = State::default();
        ask(&mut state, &bob(), "a", "b", NOW).unwrap();
        for taken in ["a", "b"] {
            assert_eq!(ask(&mut state, &bob(), "b", taken, NOW).err(), Some(Refusal::KeyTaken), "{taken}");
        }
    }

    #[test]
    fn one_holder_does_not_use_up_the_room_of_the_others_and_time_makes_room() {
        let mut state = State::default();
        let chain = |from: usize, to: usize| (format!("k{from}"), format!("k{to}"));
        for number in 0..RENEWALS_OF_HOLDER_MAX {
            let (old, new) = chain(number, number + 1);
            ask(&mut state, &bob(), &old, &new, NOW).unwrap();
        }
        let (old, new) = chain(RENEWALS_OF_HOLDER_MAX, RENEWALS_OF_HOLDER_MAX + 1);
        assert_eq!(ask(&mut state, &bob(), &old, &new, NOW).err(), Some(Refusal::TooManyRenewals));
        ask(&mut state, &Enrolled::from_uri("hextet:viewer/eve").unwrap(), "x", "y", NOW).unwrap();
        ask(&mut state, &bob(), &old, &new, ENDS).unwrap();
        assert_eq!(state.renewals().len(), 1, "certificates that have ended are forgotten");
    }
}
