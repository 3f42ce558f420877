//! Refusals of calls that a machine makes again and again: told the first time, and then counted.

use std::collections::BTreeMap;

/// Machines that are remembered; when there are more, all are told anew.
const MACHINES_MAX: usize = 1_024;

/// Who was refused what, why, and how often.
#[derive(Debug, Default)]
pub(super) struct Repeats(BTreeMap<(String, String), (String, u64)>);

impl Repeats {
    /// How often it was refused so far, if that is to be told: for the first time, and whenever the number has a digit
    /// more. Another reason is another refusal.
    pub(super) fn count(&mut self, who: &str, what: &str, why: &str) -> Option<u64> {
        let key = (who.to_owned(), what.to_owned());
        if self.0.len() >= MACHINES_MAX && !self.0.contains_key(&key) {
            self.0.clear();
        }
        let (reason, times) = self.0.entry(key).or_default();
        if reason != why {
            (*reason, *times) = (why.to_owned(), 0);
        }
        *times += 1;
        let mut power = *times;
        while power % 10 == 0 {
            power /= 10;
        }
        (power == 1).then_some(*times)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_is_told_and_then_each_with_a_digit_more() {
        let mut repeats = Repeats::default();
        let told: Vec<u64> = (0..1_000).filter_map(|_| repeats.count("n1", "attach", "deleted")).collect();
        assert_eq!(told, [1, 10, 100, 1_000]);
        assert_eq!(repeats.count("n1", "attach", "not known"), Some(1), "another reason");
        assert_eq!(repeats.count("n2", "attach", "deleted"), Some(1));
    }

    #[test]
    fn who_comes_under_ever_new_names_uses_no_more_room() {
        let mut repeats = Repeats::default();
        for number in 0..3 * MACHINES_MAX {
            repeats.count(&format!("n{number}"), "attach", "deleted");
        }
        assert!(repeats.0.len() <= MACHINES_MAX);
    }
}
