//! What a job says of where its pods may be, as messages and back.

use std::collections::BTreeMap;

use hextet_api::v1;
use scheduler_core::{
    job::{Apart, Conditions, Constraint, Spread},
    rollout::Rollout,
};

use super::ConvertError;

pub(super) fn spread_to_message(spread: &Spread) -> (v1::Spread, String) {
    match spread {
        Spread::Node => (v1::Spread::Node, String::new()),
        Spread::Pack => (v1::Spread::Pack, String::new()),
        Spread::Label(label) => (v1::Spread::Label, label.clone()),
    }
}

pub(super) fn spread_from_message(value: i32, label: String) -> Result<Spread, ConvertError> {
    match v1::Spread::try_from(value) {
        Ok(v1::Spread::Unspecified | v1::Spread::Node) => Ok(Spread::Node),
        Ok(v1::Spread::Pack) => Ok(Spread::Pack),
        Ok(v1::Spread::Label) => Ok(Spread::Label(label)),
        Err(_) => Err(ConvertError::Unknown { field: "spread", value }),
    }
}

/// Constraints to one value, and apart from them all others.
pub(super) fn constraints_to_message(
    all: &BTreeMap<String, Constraint>,
) -> (BTreeMap<String, String>, BTreeMap<String, v1::Constraint>) {
    let (mut simple, mut rules) = (BTreeMap::new(), BTreeMap::new());
    for (key, constraint) in all {
        let rule = match constraint {
            Constraint::Is(value) => {
                simple.insert(key.clone(), value.clone());
                continue;
            }
            Constraint::OneOf(values) => v1::Constraint { one_of: values.clone(), ..Default::default() },
            Constraint::All(conditions) => conditions_to_message(conditions),
        };
        rules.insert(key.clone(), rule);
    }
    (simple, rules)
}

pub(super) fn constraints_from_message(
    simple: BTreeMap<String, String>,
    rules: BTreeMap<String, v1::Constraint>,
) -> Result<BTreeMap<String, Constraint>, ConvertError> {
    let mut all: BTreeMap<_, _> =
        simple.into_iter().map(|(key, value)| (key, Constraint::Is(value))).collect();
    for (key, rule) in rules {
        let v1::Constraint { one_of, not, exists, at_least, at_most } = rule;
        let conditions = Conditions { not, exists, at_least, at_most };
        let constraint = match (one_of.is_empty(), conditions == Conditions::default()) {
            (true, _) => Constraint::All(conditions),
            (false, true) => Constraint::OneOf(one_of),
            (false, false) => return Err(ConvertError::Twice(format!("constraints.{key}"))),
        };
        if all.contains_key(&key) {
            return Err(ConvertError::Twice(format!("constraints.{key}")));
        }
        all.insert(key, constraint);
    }
    Ok(all)
}

fn conditions_to_message(conditions: &Conditions) -> v1::Constraint {
    let Conditions { not, exists, at_least, at_most } = conditions.clone();
    v1::Constraint { one_of: Vec::new(), not, exists, at_least, at_most }
}

pub(super) fn apart_to_message(apart: &Apart) -> v1::Apart {
    v1::Apart { from: apart.from.clone().unwrap_or_default(), by: apart.by.clone() }
}

pub(super) fn apart_from_message(message: v1::Apart) -> Apart {
    Apart { from: Some(message.from).filter(|from| !from.is_empty()), by: message.by }
}

pub(super) fn rollout_to_message(rollout: Rollout) -> v1::Rollout {
    let Rollout { previous, next, percent_next, percent_previous, standby, in_place } = rollout;
    v1::Rollout { previous, next, percent_next, percent_previous, standby, in_place }
}

pub(super) fn rollout_from_message(message: v1::Rollout) -> Rollout {
    let v1::Rollout { previous, next, percent_next, percent_previous, standby, in_place } = message;
    Rollout { previous, next, percent_next, percent_previous, standby, in_place }
}
