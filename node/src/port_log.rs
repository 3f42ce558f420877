//! Which pod had which outside IPv4 ports, and since when: what `netctl whois` answers from (RFC 6888 REQ-12, RFC 7422).
//!
//! Ports are handed out in blocks that change hands only through the agent, so a line per change is the whole
//! history, also of the time in which no agent ran. Lines of JSON are appended to `ports.log` in the state
//! folder; at [`LOG_BYTES_MAX`] the file becomes `ports.log.1`, and a new one begins with what is then held. The one
//! before that is forgotten.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io::{self, BufRead as _, BufReader, Write as _},
    net::Ipv4Addr,
    path::{Path, PathBuf},
};

use dataplane::PortBlock;
use serde::{Deserialize, Serialize};

/// A file's size at which the next one is begun: some 40,000 changes.
const LOG_BYTES_MAX: u64 = 4 * 1024 * 1024;
const FILE_NAME: &str = "ports.log";
const OLDER_NAME: &str = "ports.log.1";
/// Ports of a block.
const BLOCK_PORTS: u16 = 128;

/// Who has a block of ports.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// The pod.
    pub pod: String,
    /// Its private address.
    pub ipv4: Ipv4Addr,
}

/// From this moment on the ports are the holder's, or nobody's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Line {
    /// Seconds since the Unix epoch.
    at: u64,
    first: u16,
    holder: Option<Holder>,
}

/// Blocks by their first port.
type Holders = BTreeMap<u16, Holder>;

/// The log, as its writer has it.
#[derive(Debug)]
pub(crate) struct PortLog {
    folder: PathBuf,
    holders: Holders,
}

/// What one reading of the kernel says.
pub(crate) struct Reading<'a> {
    pub(crate) blocks: &'a BTreeMap<u16, PortBlock>,
    /// Pods by their private addresses.
    pub(crate) pods: &'a BTreeMap<Ipv4Addr, String>,
    /// Seconds since the Unix epoch, and of CLOCK_MONOTONIC.
    pub(crate) now: (u64, u64),
}

impl PortLog {
    /// Takes up the log in `folder`. One that cannot be read is begun anew.
    pub(crate) fn open(folder: &Path) -> Self {
        let mut holders = Holders::new();
        if let Ok(lines) = read(&folder.join(FILE_NAME)) {
            lines.into_iter().for_each(|line| replay(&mut holders, line));
        }
        Self { folder: folder.to_owned(), holders }
    }

    /// Writes down what has changed hands.
    ///
    /// # Errors
    /// When the file cannot be written; then the same is tried again with the next reading.
    pub(crate) fn note(&mut self, reading: &Reading<'_>) -> io::Result<()> {
        let now = holders(reading);
        let lines = changes(&self.holders, &now, reading);
        if lines.is_empty() {
            return Ok(());
        }
        let path = self.folder.join(FILE_NAME);
        if fs::metadata(&path).is_ok_and(|file| file.len() > LOG_BYTES_MAX) {
            fs::rename(&path, self.folder.join(OLDER_NAME))?;
            append(&path, &snapshot(&self.holders, reading.now.0))?;
        }
        append(&path, &lines)?;
        self.holders = now;
        Ok(())
    }
}

/// Who had `port` at `at` (seconds since the Unix epoch), by the log in `folder`.
///
/// # Errors
/// When there is a log that cannot be read.
pub(crate) fn holder_at(folder: &Path, port: u16, at: u64) -> io::Result<Option<Holder>> {
    let mut holders = Holders::new();
    for name in [OLDER_NAME, FILE_NAME] {
        let lines = match read(&folder.join(name)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            lines => lines?,
        };
        lines.into_iter().filter(|line| line.at <= at).for_each(|line| replay(&mut holders, line));
    }
    Ok(holders.remove(&(port - port % BLOCK_PORTS)))
}

fn holders(reading: &Reading<'_>) -> Holders {
    let named = reading.blocks.iter().filter_map(|(first, block)| {
        let pod = reading.pods.get(&block.ipv4)?.clone();
        Some((*first, Holder { pod, ipv4: block.ipv4 }))
    });
    named.collect()
}

fn changes(old: &Holders, new: &Holders, reading: &Reading<'_>) -> Vec<Line> {
    let (unix_s, monotonic_s) = reading.now;
    let since = |first: &u16| {
        let since_s = reading.blocks.get(first).and_then(|block| block.since_s);
        unix_s - since_s.map_or(0, |since_s| monotonic_s.saturating_sub(since_s.into()))
    };
    let lost = old.keys().filter(|first| !new.contains_key(first));
    let lost = lost.map(|first| Line { at: unix_s, first: *first, holder: None });
    let gained = new.iter().filter(|(first, holder)| old.get(first) != Some(holder));
    let gained =
        gained.map(|(first, holder)| Line { at: since(first), first: *first, holder: Some(holder.clone()) });
    lost.chain(gained).collect()
}

fn snapshot(holders: &Holders, at: u64) -> Vec<Line> {
    holders.iter().map(|(first, holder)| Line { at, first: *first, holder: Some(holder.clone()) }).collect()
}

fn replay(holders: &mut Holders, line: Line) {
    match line.holder {
        Some(holder) => holders.insert(line.first, holder),
        None => holders.remove(&line.first),
    };
}

/// A line that was cut short by a crash is left out.
fn read(path: &Path) -> io::Result<Vec<Line>> {
    let lines = BufReader::new(File::open(path)?).lines();
    let parsed = lines.map(|line| Ok(serde_json::from_str::<Line>(&line?).ok()));
    Ok(parsed.collect::<io::Result<Vec<_>>>()?.into_iter().flatten().collect())
}

/// Begins with a line feed where a crash has cut the last line short.
fn append(path: &Path, lines: &[Line]) -> io::Result<()> {
    let mut text = String::new();
    if fs::read(path).is_ok_and(|old| old.last().is_some_and(|last| *last != b'\n')) {
        text.push('\n');
    }
    for line in lines {
        text.push_str(&serde_json::to_string(line)?);
        text.push('\n');
    }
    let mut file = OpenOptions::new().create(true).append(true).open(path)?;
    file.write_all(text.as_bytes())?;
    file.sync_data()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ipv4(n: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 254, 0, n)
    }

    fn pods() -> BTreeMap<Ipv4Addr, String> {
        [(ipv4(5), "web-1".to_owned()), (ipv4(6), "web-2".to_owned())].into()
    }

    fn note(log: &mut PortLog, blocks: &[(u16, u8, Option<u32>)], now: (u64, u64)) {
        let block = |(first, n, since_s): &(u16, u8, Option<u32>)| {
            (*first, PortBlock { ipv4: ipv4(*n), since_s: *since_s })
        };
        let blocks = blocks.iter().map(block).collect();
        log.note(&Reading { blocks: &blocks, pods: &pods(), now }).unwrap();
    }

    fn who(folder: &Path, port: u16, at: u64) -> Option<String> {
        holder_at(folder, port, at).unwrap().map(|holder| holder.pod)
    }

    #[test]
    fn the_holder_of_a_port_is_found_for_every_moment() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = PortLog::open(dir.path());
        note(&mut log, &[(64_768, 5, None)], (1_000, 50));
        // The extra was taken at second 70 of the monotonic clock, when no agent looked.
        note(&mut log, &[(64_768, 5, None), (2_048, 5, Some(70))], (1_100, 150));
        note(&mut log, &[(64_768, 5, None)], (1_200, 250));
        note(&mut log, &[(64_768, 6, None)], (1_300, 350));
        assert_eq!(who(dir.path(), 64_770, 999), None);
        assert_eq!(who(dir.path(), 64_770, 1_000).as_deref(), Some("web-1"));
        assert_eq!(who(dir.path(), 2_175, 1_019), None);
        assert_eq!(who(dir.path(), 2_175, 1_020).as_deref(), Some("web-1"));
        assert_eq!(who(dir.path(), 2_176, 1_020), None, "the next block");
        assert_eq!(who(dir.path(), 2_048, 1_200), None, "given back");
        assert_eq!(who(dir.path(), 64_768, 1_300).as_deref(), Some("web-2"));
    }

    #[test]
    fn what_has_not_changed_is_not_written_again_also_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        note(&mut PortLog::open(dir.path()), &[(64_768, 5, None)], (1_000, 50));
        let size = || fs::metadata(dir.path().join(FILE_NAME)).unwrap().len();
        let before = size();
        note(&mut PortLog::open(dir.path()), &[(64_768, 5, None)], (2_000, 10));
        assert_eq!(size(), before);
    }

    #[test]
    fn a_line_cut_short_costs_only_itself() {
        let dir = tempfile::tempdir().unwrap();
        note(&mut PortLog::open(dir.path()), &[(64_768, 5, None)], (1_000, 50));
        let path = dir.path().join(FILE_NAME);
        let mut bytes = fs::read(&path).unwrap();
        bytes.extend_from_slice(b"{\"at\":10");
        fs::write(&path, bytes).unwrap();
        note(&mut PortLog::open(dir.path()), &[(64_768, 6, None)], (1_100, 60));
        assert_eq!(who(dir.path(), 64_768, 1_000).as_deref(), Some("web-1"));
        assert_eq!(who(dir.path(), 64_768, 1_100).as_deref(), Some("web-2"));
    }

    #[test]
    fn a_full_log_is_begun_anew_with_what_is_held() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = PortLog::open(dir.path());
        note(&mut log, &[(64_768, 5, None), (2_048, 5, None)], (1_000, 50));
        let path = dir.path().join(FILE_NAME);
        let mut full = fs::read(&path).unwrap();
        full.resize(LOG_BYTES_MAX as usize + 1, b'\n');
        fs::write(&path, full).unwrap();
        note(&mut log, &[(64_768, 5, None)], (1_100, 60));
        assert!(fs::metadata(&path).unwrap().len() < 1_000);
        assert_eq!(who(dir.path(), 2_048, 1_050).as_deref(), Some("web-1"), "from the older file");
        assert_eq!(who(dir.path(), 64_768, 1_200).as_deref(), Some("web-1"));
        assert_eq!(who(dir.path(), 2_048, 1_200), None);
    }
}
