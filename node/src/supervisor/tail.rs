//! The end of what a task writes in one run, in memory: it is at hand when the task ends, however large its log is.

use hextet_lifecycle::ending::OUTPUT_BYTES_MAX;

/// One byte more than is kept, so that it can be told whether a line begins there.
const BYTES_MAX: usize = OUTPUT_BYTES_MAX + 1;

/// The last bytes of an output.
#[derive(Debug, Default)]
pub(super) struct Tail(Vec<u8>);

impl Tail {
    /// Takes what was written next.
    pub(super) fn push(&mut self, data: &[u8]) {
        let data = &data[data.len().saturating_sub(BYTES_MAX)..];
        let surplus = (self.0.len() + data.len()).saturating_sub(BYTES_MAX);
        self.0.drain(..surplus);
        self.0.extend_from_slice(data);
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_bytes_are_kept_however_they_come() {
        let all: Vec<u8> = (0..20_000_u32).map(|n| (n % 251) as u8).collect();
        for len in [1, 7, 2048, 2049, 5000, 20_000] {
            let mut tail = Tail::default();
            all.chunks(len).for_each(|chunk| tail.push(chunk));
            assert_eq!(tail.bytes(), &all[all.len() - BYTES_MAX..], "in chunks of {len}");
        }
    }
}
