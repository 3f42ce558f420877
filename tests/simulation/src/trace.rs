//! What happened: the last steps as text, and a hash of all.

use std::collections::VecDeque;

use crate::clock::Time;

/// Steps that a failure prints.
const KEPT: usize = 120;

#[derive(Clone, Debug)]
pub(crate) struct Trace {
    hash: u64,
    last: VecDeque<String>,
}

impl Trace {
    pub(crate) fn new() -> Trace {
        Trace { hash: 0xcbf2_9ce4_8422_2325, last: VecDeque::new() }
    }

    pub(crate) fn note(&mut self, now: Time, line: &str) {
        let line = format!("{now} {line}");
        for byte in line.bytes() {
            // FNV-1a, which needs nothing and is the same everywhere.
            self.hash = (self.hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
        if self.last.len() == KEPT {
            self.last.pop_front();
        }
        self.last.push_back(line);
    }

    pub(crate) fn hash(&self) -> u64 {
        self.hash
    }

    pub(crate) fn last(&self) -> Vec<String> {
        self.last.iter().cloned().collect()
    }
}
