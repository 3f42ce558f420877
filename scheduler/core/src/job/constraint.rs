//! What a group asks of one label of a node.
//!
//! In YAML: `rack: a` (equal), `rack: [a, b]` (one of them), or a map of conditions that all hold:
//! `{not: a}`, `{not: [a, b]}`, `{exists: true}`, `{at-least: 5}`, `{at-most: 9}`. A node without the label meets
//! `not` and `exists: false` alone.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de, de::value};

/// The most values of one list.
pub(super) const VALUES_MAX: usize = 64;

/// What a group asks of one label of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Constraint {
    /// It has this value.
    Is(String),
    /// It has one of these.
    OneOf(Vec<String>),
    /// All of these hold.
    All(Conditions),
}

/// Conditions that all hold; at least one is set.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Conditions {
    /// It has none of these values, or is not there.
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "one_or_more")]
    pub not: Vec<String>,
    /// It is there, or it is not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exists: Option<bool>,
    /// It is a whole number, and not less.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at_least: Option<i64>,
    /// It is a whole number, and not more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at_most: Option<i64>,
}

impl Constraint {
    /// Whether a label with this value, or none, is as wanted.
    #[must_use]
    pub fn is_met(&self, found: Option<&str>) -> bool {
        match self {
            Constraint::Is(wanted) => found == Some(wanted),
            Constraint::OneOf(wanted) => found.is_some_and(|found| wanted.iter().any(|one| one == found)),
            Constraint::All(conditions) => conditions.are_met(found),
        }
    }

    /// The values that are written in it.
    pub fn values(&self) -> impl Iterator<Item = &String> {
        let (one, many): (Option<&String>, &[String]) = match self {
            Constraint::Is(value) => (Some(value), &[]),
            Constraint::OneOf(values) => (None, values),
            Constraint::All(conditions) => (None, &conditions.not),
        };
        one.into_iter().chain(many)
    }

    /// The values of which a label has to have one; none when it is not so simple.
    #[must_use]
    pub fn alternatives(&self) -> &[String] {
        match self {
            Constraint::Is(value) => std::slice::from_ref(value),
            Constraint::OneOf(values) => values,
            Constraint::All(_) => &[],
        }
    }

    /// Whether nothing could ever meet it, or everything does.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        match self {
            Constraint::Is(_) => false,
            Constraint::OneOf(values) => values.is_empty(),
            Constraint::All(conditions) => *conditions == Conditions::default(),
        }
    }

    /// A value that meets it, if there is one: the first that is written, or the nearest number.
    #[must_use]
    pub fn example(&self) -> Option<String> {
        let example = match self {
            Constraint::Is(value) => Some(value.clone()),
            Constraint::OneOf(values) => values.first().cloned(),
            Constraint::All(conditions) => {
                let number = conditions.at_least.or(conditions.at_most);
                number.map(|number| number.to_string()).or_else(|| Some("ANY".to_owned()))
            }
        };
        example.filter(|value| self.is_met(Some(value)))
    }

    /// It in words, with the label that it is of: `rack=a`, `rack=a|b`, `rack!=a`.
    #[must_use]
    pub fn of(&self, key: &str) -> String {
        match self {
            Constraint::Is(value) => format!("{key}={value}"),
            Constraint::OneOf(values) => format!("{key}={}", values.join("|")),
            Constraint::All(conditions) => conditions.of(key),
        }
    }
}

impl Conditions {
    fn are_met(&self, found: Option<&str>) -> bool {
        let number = || found.and_then(|found| found.parse::<i64>().ok());
        let not = !found.is_some_and(|found| self.not.iter().any(|one| one == found));
        let exists = self.exists.is_none_or(|exists| exists == found.is_some());
        let least = self.at_least.is_none_or(|least| number().is_some_and(|number| number >= least));
        let most = self.at_most.is_none_or(|most| number().is_some_and(|number| number <= most));
        not && exists && least && most
    }

    fn of(&self, key: &str) -> String {
        let mut all = Vec::new();
        if !self.not.is_empty() {
            all.push(format!("{key}!={}", self.not.join("|")));
        }
        all.extend(self.exists.map(|exists| match exists {
            true => format!("a label {key}"),
            false => format!("no label {key}"),
        }));
        all.extend(self.at_least.map(|least| format!("{key}>={least}")));
        all.extend(self.at_most.map(|most| format!("{key}<={most}")));
        all.join(" and ")
    }
}

impl From<&str> for Constraint {
    fn from(value: &str) -> Constraint {
        Constraint::Is(value.to_owned())
    }
}

impl fmt::Display for Constraint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.of("label"))
    }
}

impl Serialize for Constraint {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Constraint::Is(value) => value.serialize(serializer),
            Constraint::OneOf(values) => values.serialize(serializer),
            Constraint::All(conditions) => conditions.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Constraint {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Constraint, D::Error> {
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = Constraint;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(
                    "a label's value, a list of values, or a map of `not`, `exists`, `at-least`, `at-most`",
                )
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Constraint, E> {
                Ok(Constraint::Is(text.to_owned()))
            }

            fn visit_seq<A: de::SeqAccess<'de>>(self, access: A) -> Result<Constraint, A::Error> {
                Vec::deserialize(value::SeqAccessDeserializer::new(access)).map(Constraint::OneOf)
            }

            fn visit_map<A: de::MapAccess<'de>>(self, access: A) -> Result<Constraint, A::Error> {
                Conditions::deserialize(value::MapAccessDeserializer::new(access)).map(Constraint::All)
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

/// A value alone, or a list of them.
fn one_or_more<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    struct Visitor;
    impl<'de> de::Visitor<'de> for Visitor {
        type Value = Vec<String>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a label's value or a list of values")
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<Vec<String>, E> {
            Ok(vec![text.to_owned()])
        }

        fn visit_seq<A: de::SeqAccess<'de>>(self, access: A) -> Result<Vec<String>, A::Error> {
            Vec::deserialize(value::SeqAccessDeserializer::new(access))
        }
    }
    deserializer.deserialize_any(Visitor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_shape_is_read_written_and_met() {
        let cases = [
            ("a", "l=a", &[Some("a")][..], &[Some("b"), None][..]),
            ("[a, b]", "l=a|b", &[Some("a"), Some("b")], &[Some("c"), None]),
            ("{not: a}", "l!=a", &[Some("b"), None], &[Some("a")]),
            ("{not: [a, b]}", "l!=a|b", &[Some("c"), None], &[Some("b")]),
            ("{exists: true}", "a label l", &[Some("x")], &[None]),
            ("{exists: false}", "no label l", &[None], &[Some("x")]),
            (
                "{at-least: 5, at-most: 9}",
                "l>=5 and l<=9",
                &[Some("5"), Some("9")],
                &[Some("4"), Some("10"), Some("x"), None],
            ),
        ];
        for (yaml, words, met, unmet) in cases {
            let constraint: Constraint = serde_norway::from_str(yaml).unwrap();
            assert_eq!(constraint.of("l"), words);
            assert!(met.iter().all(|found| constraint.is_met(*found)), "{yaml}");
            assert!(!unmet.iter().any(|found| constraint.is_met(*found)), "{yaml}");
            let json = serde_json::to_string(&constraint).unwrap();
            assert_eq!(serde_json::from_str::<Constraint>(&json).unwrap(), constraint);
        }
    }

    #[test]
    fn an_unknown_operator_is_an_error() {
        let error = serde_norway::from_str::<Constraint>("{is-not: a}").unwrap_err().to_string();
        assert!(error.contains("unknown field `is-not`, expected one of `not`, `exists`"), "{error}");
    }

    #[test]
    fn an_example_meets_the_constraint() {
        let example = |yaml| serde_norway::from_str::<Constraint>(yaml).unwrap().example();
        assert_eq!(example("[a, b]").as_deref(), Some("a"));
        assert_eq!(example("{at-least: 5}").as_deref(), Some("5"));
        assert_eq!(example("{exists: false}"), None);
        assert_eq!(example("{at-least: 5, at-most: 4}"), None);
    }
}
