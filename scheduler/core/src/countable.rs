//! Things that a node has a number of and pods take some of, such as `gpu`: the user names them.

use std::{collections::BTreeMap, fmt};

use serde::{Deserialize, Serialize};

/// The most kinds of countables of a node or a pod.
pub const COUNTABLES_MAX: usize = 16;
/// The most of one kind.
pub const COUNTABLE_MAX: u32 = 1_000_000;

/// Numbers by name; what is not there is none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Countables(pub BTreeMap<String, u32>);

impl Countables {
    /// Nothing at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many of `name` there are.
    #[must_use]
    pub fn get(&self, name: &str) -> u32 {
        self.0.get(name).copied().unwrap_or(0)
    }

    /// Adds all of `other`. Saturates at an amount that no node has.
    pub fn add(&mut self, other: &Countables) {
        for (name, number) in &other.0 {
            let sum = self.0.entry(name.clone()).or_default();
            *sum = sum.saturating_add(*number);
        }
    }

    /// Takes all of `other` away; what becomes none is no longer named.
    pub fn take_away(&mut self, other: &Countables) {
        for (name, number) in &other.0 {
            if let Some(sum) = self.0.get_mut(name) {
                *sum = sum.saturating_sub(*number);
            }
        }
        self.0.retain(|_, number| *number > 0);
    }
}

impl fmt::Display for Countables {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (place, (name, number)) in self.0.iter().enumerate() {
            let comma = if place == 0 { "" } else { "," };
            write!(f, "{comma}{name}={number}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_added_can_be_taken_away() {
        let (gpu, mut sum) = (of(&[("gpu", 2), ("fpga", 1)]), Countables::default());
        sum.add(&gpu);
        sum.add(&of(&[("gpu", 1)]));
        assert_eq!((sum.get("gpu"), sum.get("fpga"), sum.get("tpu")), (3, 1, 0));
        assert_eq!(sum.to_string(), "fpga=1,gpu=3");
        sum.take_away(&gpu);
        assert_eq!(sum, of(&[("gpu", 1)]));
    }

    fn of(numbers: &[(&str, u32)]) -> Countables {
        Countables(numbers.iter().map(|(name, number)| ((*name).to_owned(), *number)).collect())
    }
}
