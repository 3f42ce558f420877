//! What is wrong with a store that is served read-only: told to people, and asked by those who show what it holds.

use std::collections::BTreeMap;

use scheduler_core::change::Key;
use serde::{Deserialize, Serialize};

/// The most flaws that are told one by one.
const FLAWS_MAX: usize = 100;

/// What is wrong with a store.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Damage {
    /// What was found at the objects, a line each. What of them is lost is told by `unreadable` and `hidden`: the history may
    /// have the others.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    at_objects: Vec<String>,
    /// What else was found, a line each.
    flaws: Vec<String>,
    /// How many more there are.
    more: usize,
    /// Objects that are known to be there and cannot be read, and why.
    unreadable: BTreeMap<Key, String>,
    /// Between which keys there are objects of which nothing is known.
    hidden: Vec<Hidden>,
}

/// A part of the keys' order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Hidden {
    /// Greater than this one; from the first on when it is not there.
    pub(crate) after: Option<String>,
    /// And not greater than this one.
    pub(crate) up_to: Option<String>,
}

/// What a list cannot show.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Unreadable {
    /// A key; of a part of the keys' order its two ends, with ` .. ` between them.
    pub(crate) key: String,
    pub(crate) why: String,
}

impl Damage {
    /// What was found, a line each.
    pub fn lines(&self) -> impl Iterator<Item = String> + '_ {
        let more = (self.more > 0).then(|| format!("and {} more", self.more));
        self.at_objects.iter().chain(&self.flaws).cloned().chain(more)
    }

    /// What cannot be had any more, a line each, but for objects that the history still has.
    pub fn missing(&self) -> impl Iterator<Item = String> + '_ {
        let unreadable = self.unreadable.iter().map(|(key, why)| format!("{key}: {why}"));
        let hidden = self.hidden.iter().map(|hidden| format!("whatever was in `{}`", hidden.text()));
        let more = (self.more > 0).then(|| format!("and what {} more flaws hold", self.more));
        unreadable.chain(hidden).chain(self.flaws.iter().cloned()).chain(more)
    }

    /// How many flaws there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.at_objects.len() + self.flaws.len() + self.more
    }

    pub(crate) fn add(&mut self, flaw: String) {
        if self.has_room() { self.flaws.push(flaw) } else { self.more += 1 }
    }

    pub(crate) fn add_at_objects(&mut self, flaw: String) {
        if self.has_room() { self.at_objects.push(flaw) } else { self.more += 1 }
    }

    fn has_room(&self) -> bool {
        self.at_objects.len() + self.flaws.len() < FLAWS_MAX
    }

    pub(crate) fn add_unreadable(&mut self, key: Key, why: String) {
        self.unreadable.insert(key, why);
    }

    pub(crate) fn set_hidden(&mut self, hidden: Vec<Hidden>) {
        self.hidden = hidden;
    }

    /// Whether this object may be there although it cannot be read.
    pub(crate) fn may_hide(&self, key: &Key) -> bool {
        let text = key.to_string();
        self.unreadable.contains_key(key) || self.hidden.iter().any(|hidden| hidden.has(&text, &text))
    }

    /// Whether an object of this kind (`pod`, `node`) may be there although it cannot be read.
    pub(crate) fn may_hide_kind(&self, kind: &str) -> bool {
        !self.of_kind(kind).is_empty()
    }

    /// What a list of this kind cannot show.
    pub(crate) fn of_kind(&self, kind: &str) -> Vec<Unreadable> {
        let (first, last) = (format!("{kind}/"), format!("{kind}/\u{10FFFF}"));
        let known = self.unreadable.iter().map(|(key, why)| (key.to_string(), why.clone()));
        let known = known.filter(|(key, _)| key.starts_with(&first));
        let known = known.map(|(key, why)| Unreadable { key, why });
        let hidden = self.hidden.iter().filter(|hidden| hidden.has(&first, &last)).map(|hidden| Unreadable {
            key: hidden.text(),
            why: "the store is damaged between these two: nobody knows what was there".to_owned(),
        });
        known.chain(hidden).collect()
    }
}

impl Hidden {
    /// Whether there are keys from `first` to `last` in it.
    fn has(&self, first: &str, last: &str) -> bool {
        self.after.as_deref().is_none_or(|after| after < last)
            && self.up_to.as_deref().is_none_or(|up_to| first <= up_to)
    }

    fn text(&self) -> String {
        let end = |end: &Option<String>| end.clone().unwrap_or_default();
        format!("{} .. {}", end(&self.after), end(&self.up_to)).trim().to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_be_hidden_is_told_by_kind_and_key() {
        let key = |text: &str| text.parse::<Key>().unwrap();
        let mut damage = Damage::default();
        damage.add_unreadable(key("job/a"), "why".to_owned());
        damage.set_hidden(vec![Hidden { after: Some("node/n1".into()), up_to: Some("pod/b".into()) }]);
        for (text, hides) in [
            ("job/a", true),
            ("job/b", false),
            ("node/n1", false),
            ("node/n2", true),
            ("pod/a", true),
            ("pod/c", false),
        ] {
            assert_eq!(damage.may_hide(&key(text)), hides, "{text}");
        }
        let kinds = ["cluster", "job", "node", "pod", "token"].map(|kind| damage.may_hide_kind(kind));
        assert_eq!(kinds, [false, true, true, true, false]);
        assert_eq!(damage.of_kind("job")[0].key, "job/a");
        assert_eq!(damage.of_kind("pod")[0].key, "node/n1 .. pod/b");
        damage.set_hidden(vec![Hidden { after: None, up_to: None }]);
        assert!(damage.may_hide(&Key::Cluster) && damage.may_hide_kind("renewal"));
    }

    #[test]
    fn what_the_history_still_has_is_damaged_and_not_missing() {
        let mut damage = Damage::default();
        damage.add_at_objects("current: the page at byte 4096 cannot be read".to_owned());
        damage.add_at_objects("current: job/a: its record is lost; shown as revision 7 has it".to_owned());
        assert_eq!((damage.lines().count(), damage.missing().count()), (2, 0));
        damage.add("log: revision 3 is missing".to_owned());
        damage.add_unreadable("job/b".parse().unwrap(), "its record is lost".to_owned());
        damage.set_hidden(vec![Hidden { after: Some("node/n1".into()), up_to: Some("pod/b".into()) }]);
        let missing: Vec<String> = damage.missing().collect();
        let expected =
            ["job/b: its record is lost", "whatever was in `node/n1 .. pod/b`", "log: revision 3 is missing"];
        assert_eq!(missing, expected);
    }

    #[test]
    fn a_thousand_flaws_are_a_hundred_lines_and_a_number() {
        let mut damage = Damage::default();
        (0..1000).for_each(|number| damage.add(format!("{number}")));
        assert_eq!((damage.count(), damage.lines().count()), (1000, FLAWS_MAX + 1));
        assert_eq!(damage.lines().last().unwrap(), "and 900 more");
    }
}
