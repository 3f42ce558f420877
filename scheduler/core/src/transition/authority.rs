//! One CA takes the place of another.

use std::sync::Arc;

use crate::{
    authority::{self, Authorities, LATE_MAX, Late, Turn},
    change::{Key, Value},
    draft::Draft,
    event::{Enrolled, Refusal},
    node::Node,
    time::WallTime,
    transition::Step,
};

pub(super) fn turn(draft: &mut Draft<'_>, turn: &Turn, now: WallTime) -> Result<Step, Refusal> {
    let present = draft.authorities().cloned();
    let nodes = draft.nodes().values().map(AsRef::<Node>::as_ref);
    let missing = present.as_ref().map(|present| present.missing(nodes, now)).unwrap_or_default();
    let next = authority::turn(present.as_deref(), turn, &missing, now)?;
    let message = message(turn, &next, missing.len());
    if next.leaving.as_ref().is_some_and(|leaving| leaving.compromised) {
        forget_unused_tokens(draft);
    }
    put(draft, next);
    Ok(Step { message, replan: false })
}

/// Somebody came with a certificate of the CA that goes out of use, and may have another by now. More than [`LATE_MAX`]
/// are not remembered.
pub(super) fn late(draft: &mut Draft<'_>, holder: &Enrolled, key: &str, ends: WallTime) -> Step {
    if draft.is_replaced(key) {
        return Step::nothing();
    }
    let holder = holder.uri();
    let message = format!("{holder} came with a certificate of the old CA");
    change_late(draft, |late| {
        if late.len() < LATE_MAX {
            late.insert(key.to_owned(), Late { holder, ends });
        }
    });
    Step { message, replan: false }
}

/// The holder of this key has another one by now.
pub(super) fn no_longer_late(draft: &mut Draft<'_>, key: &str) {
    change_late(draft, |late| drop(late.remove(key)));
}

fn change_late(draft: &mut Draft<'_>, change: impl FnOnce(&mut std::collections::BTreeMap<String, Late>)) {
    let Some(mut authorities) = draft.authorities().map(|authorities| Authorities::clone(authorities)) else {
        return;
    };
    let Some(leaving) = &mut authorities.leaving else { return };
    let before = leaving.late.len();
    change(&mut leaving.late);
    if leaving.late.len() != before {
        put(draft, authorities);
    }
}

fn put(draft: &mut Draft<'_>, authorities: Authorities) {
    draft.put(Key::Authorities, Some(Value::Authorities(Arc::new(authorities))));
}

/// Whoever had the CA's key could have made them.
fn forget_unused_tokens(draft: &mut Draft<'_>) {
    let unused = draft.tokens().iter().filter(|(_, token)| token.used_by.is_none());
    let unused: Vec<String> = unused.map(|(id, _)| id.clone()).collect();
    unused.into_iter().for_each(|id| draft.put(Key::Token(id), None));
}

fn message(turn: &Turn, next: &Authorities, missing: usize) -> String {
    let short = |ca: &str| ca.chars().take(16).collect::<String>();
    let issuing = short(&next.issuing);
    match turn {
        Turn::Rotate { present, compromised: true, .. } => {
            format!("CA {issuing} takes the place of {}, which is compromised", short(present))
        }
        Turn::Rotate { present, .. } => format!("CA {issuing} takes the place of {}", short(present)),
        Turn::Undo => format!("back to CA {issuing}"),
        Turn::Retire { .. } if missing > 0 => {
            format!("CA {issuing} is the only one, {missing} were left out")
        }
        Turn::Retire { .. } => format!("CA {issuing} is the only one"),
    }
}

#[cfg(test)]
mod tests {
    use rand::{SeedableRng as _, rngs::StdRng};

    use super::*;
    use crate::{
        event::{Event, Renew},
        state::State,
        testing,
        token::{Role, Token},
        transition::{Context, Origin, handle},
    };

    const NOW: WallTime = WallTime(1_000);
    const ENDS: WallTime = WallTime(10_000);

    fn rotate(compromised: bool) -> Event {
        Event::TurnCa(Turn::Rotate { present: "a".into(), next: "b".into(), compromised })
    }

    fn retire() -> Event {
        Event::TurnCa(Turn::Retire { force: false })
    }

    fn tell(state: &mut State, event: &Event) -> Result<String, Refusal> {
        let mut rng = StdRng::seed_from_u64(1);
        let mut context = Context { wall: NOW, rng: &mut rng, is_watched: &|_| false };
        let origin = Origin { changer: "user:alice".into(), message: String::new() };
        let revision = handle(state, event, &origin, &mut context)?;
        Ok(revision.map(|revision| revision.message).unwrap_or_default())
    }

    fn with_node() -> State {
        let node = Node { key: "k1".into(), ..testing::node("n1") };
        State::load(0, [(Key::Node("n1".into()), Value::Node(Arc::new(node)))])
    }

    fn renew(holder: &str, old: &str, new: &str, takes_ca: bool) -> Event {
        let holder = Enrolled::from_uri(holder).unwrap();
        Event::Renew(Renew { holder, old: old.into(), new: new.into(), ends: ENDS, takes_ca })
    }

    fn used(holder: &str, key: &str) -> Event {
        Event::KeyUsed(Enrolled::from_uri(holder).unwrap(), key.into())
    }

    #[test]
    fn a_node_has_moved_when_it_has_used_its_new_certificate() {
        let mut state = with_node();
        assert!(tell(&mut state, &rotate(false)).unwrap().contains("CA b takes the place of a"));
        let error = tell(&mut state, &retire()).unwrap_err().to_string();
        assert!(
            error.starts_with("1 would be locked out, whose certificates are of the old CA: node/n1."),
            "{error}"
        );
        tell(&mut state, &renew("hextet:node/n1", "k1", "k2", true)).unwrap();
        assert!(tell(&mut state, &retire()).is_err(), "it may never have got it");
        tell(&mut state, &used("hextet:node/n1", "k2")).unwrap();
        tell(&mut state, &retire()).unwrap();
        assert_eq!(state.authorities().unwrap().leaving, None);
    }

    /// A program that cannot keep another CA goes on with the one that it has, and is missing by name.
    #[test]
    fn a_node_of_an_older_version_stays_with_the_old_ca() {
        let mut state = with_node();
        tell(&mut state, &rotate(false)).unwrap();
        tell(&mut state, &renew("hextet:node/n1", "k1", "k2", false)).unwrap();
        tell(&mut state, &used("hextet:node/n1", "k2")).unwrap();
        assert!(tell(&mut state, &retire()).is_err());
        // The way back is free: nobody has moved.
        tell(&mut state, &Event::TurnCa(Turn::Undo)).unwrap();
        tell(&mut state, &retire()).unwrap();
        assert_eq!(state.authorities().unwrap().issuing, "a");
    }

    #[test]
    fn a_person_who_came_with_the_old_ca_is_waited_for() {
        let (bob, mut state) = ("hextet:viewer/bob", State::default());
        tell(&mut state, &rotate(false)).unwrap();
        let late = Event::LateCa(Enrolled::from_uri(bob).unwrap(), "k1".into(), ENDS);
        tell(&mut state, &late).unwrap();
        assert_eq!(tell(&mut state, &late).unwrap(), "", "once is enough");
        assert!(tell(&mut state, &retire()).unwrap_err().to_string().contains(": viewer/bob."));
        tell(&mut state, &renew(bob, "k1", "k2", true)).unwrap();
        tell(&mut state, &used(bob, "k2")).unwrap();
        assert_eq!(tell(&mut state, &late).unwrap(), "", "it was said late, too");
        tell(&mut state, &retire()).unwrap();
    }

    #[test]
    fn the_list_of_those_who_come_late_has_an_end() {
        let mut state = State::default();
        tell(&mut state, &rotate(false)).unwrap();
        for number in 0..LATE_MAX + 5 {
            let holder = Enrolled::from_uri("hextet:viewer/bob").unwrap();
            tell(&mut state, &Event::LateCa(holder, format!("k{number}"), ENDS)).unwrap();
        }
        assert_eq!(state.authorities().unwrap().leaving.as_ref().unwrap().late.len(), LATE_MAX);
    }

    #[test]
    fn tokens_of_before_a_compromise_are_forgotten_and_of_before_a_rotation_not() {
        for compromised in [false, true] {
            let token = |used_by: Option<&str>| {
                let used_by = used_by.map(str::to_owned);
                Value::Token(Arc::new(Token { role: Role::Node, name: None, expires: ENDS, used_by }))
            };
            let mut state = State::load(
                0,
                [(Key::Token("t1".into()), token(None)), (Key::Token("t2".into()), token(Some("k")))],
            );
            tell(&mut state, &rotate(compromised)).unwrap();
            let left: Vec<_> = state.tokens().keys().cloned().collect();
            assert_eq!(left, if compromised { vec!["t2"] } else { vec!["t1", "t2"] });
        }
    }
}
