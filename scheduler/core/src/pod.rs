//! One running instance of a group, and the id that is its own for ever.

use std::{fmt, net::Ipv6Addr};

use serde::{Deserialize, Serialize};

use crate::{countable::Countables, quantity::Resources, time::WallTime};

/// The most bytes kept of what a node says about a pod.
pub const MESSAGE_LEN_MAX: usize = 512;

/// `job-group-xxxxx`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PodId(pub String);

/// One running instance of a group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pod {
    /// Its id, for ever its own.
    pub id: PodId,
    /// Its job.
    pub job: String,
    /// Its group in the job.
    pub group: String,
    /// The version of the job that its tasks are of.
    pub job_version: u32,
    /// Its place in the order in which pods were made.
    pub serial: u64,
    /// What it asks for.
    pub resources: Resources,
    /// What it takes of what nodes have a number of.
    #[serde(default, skip_serializing_if = "Countables::is_empty")]
    pub countables: Countables,
    /// Where it runs; none while pending.
    pub node: Option<String>,
    /// Its address, for ever its own; none while pending.
    pub address: Option<Ipv6Addr>,
    /// How far it is.
    pub phase: PodPhase,
    /// Why it is in this phase, in words.
    pub message: String,
    /// When it was made.
    pub created: WallTime,
    /// How often a task of it was started again.
    pub restarts: u32,
    /// Load balancers have been told that it terminates: its node stops it.
    #[serde(default)]
    pub stop: bool,
    /// It waits beside others until they are switched: load balancers are not told of it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub standby: bool,
}

/// How far a pod is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PodPhase {
    /// No node fits.
    Pending,
    /// It has a node and an address.
    Starting,
    /// Every task runs.
    Running,
    /// A task ended and waits for its next start.
    Failed,
    /// Load balancers are told, then it is stopped.
    Terminating,
    /// Its node's lease has ended.
    Lost,
}

impl Pod {
    /// Whether it counts towards the `count` of its group.
    #[must_use]
    pub fn is_wanted(&self) -> bool {
        self.phase != PodPhase::Terminating
    }

    /// Whether it runs, and load balancers are told so.
    #[must_use]
    pub fn serves(&self) -> bool {
        self.phase == PodPhase::Running && !self.standby
    }
}

impl PodId {
    /// The id of the pod with this serial number: a pair of serial numbers never has the same.
    #[must_use]
    pub fn of(job: &str, group: &str, serial: u64, id_key: u64) -> PodId {
        PodId(format!("{job}-{group}-{}", suffix(serial, id_key)))
    }

    /// The id as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for PodId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for PodPhase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            PodPhase::Pending => "pending",
            PodPhase::Starting => "starting",
            PodPhase::Running => "running",
            PodPhase::Failed => "failed",
            PodPhase::Terminating => "terminating",
            PodPhase::Lost => "lost",
        })
    }
}

/// Crockford's base 32, without the letters that look like digits.
const ALPHABET: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";
const SUFFIX_LEN_MIN: u32 = 5;

/// Five characters for the first 2^25 serial numbers, six for the next 2^30, and so on: a permutation
/// within each length, so that no list of used ids has to be kept to never use one twice.
fn suffix(serial: u64, id_key: u64) -> String {
    let (mut index, mut len) = (serial, SUFFIX_LEN_MIN);
    while len < 12 && index >= 1 << (5 * len) {
        index -= 1 << (5 * len);
        len += 1;
    }
    let mixed = permute(index, 5 * len, id_key);
    (0..len).rev().map(|place| char::from(ALPHABET[(mixed >> (5 * place) & 31) as usize])).collect()
}

/// A bijection on numbers of `bits` bits: each step (xor with a constant, multiplication by an odd number,
/// xor with a right shift) can be undone.
fn permute(index: u64, bits: u32, key: u64) -> u64 {
    let mask = (1 << bits) - 1;
    let mut mixed = (index ^ key) & mask;
    for factor in [0x9E37_79B9_7F4A_7C15_u64, 0xD1B5_4A32_D192_ED03] {
        mixed = mixed.wrapping_mul(factor) & mask;
        mixed ^= mixed >> (bits / 2);
    }
    mixed
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn no_two_serial_numbers_share_an_id() {
        let ids: BTreeSet<PodId> = (0..200_000).map(|serial| PodId::of("a", "b", serial, 0xABCD)).collect();
        assert_eq!(ids.len(), 200_000);
    }

    #[test]
    fn a_permutation_of_ten_bits_reaches_every_number_once() {
        let all: BTreeSet<u64> = (0..1024).map(|index| permute(index, 10, 7)).collect();
        assert_eq!(all.len(), 1024);
    }

    #[test]
    fn the_suffix_grows_when_all_short_ones_are_used() {
        assert_eq!(suffix(0, 1).len(), 5);
        assert_eq!(suffix((1 << 25) - 1, 1).len(), 5);
        assert_eq!(suffix(1 << 25, 1).len(), 6);
        assert_eq!(suffix(u64::MAX, 1).len(), 12);
    }
}
