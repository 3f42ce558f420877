//! Damage at every place of a store: what an agent opens is what was written, and `netctl node down` invents nothing.
//!
//! Of 15 pages of a node's store 6 made redb panic when they were overwritten, and with it the agent and
//! `netctl node down`.

use std::{fs, thread::sleep as pause};

use hextet_api::v1;
use rand::{Rng as _, RngCore as _, SeedableRng as _, rngs::StdRng};

use super::*;
use crate::{
    assignment::{
        merge,
        tests::{peer, pod},
    },
    commands::blind::settle_store,
    config::NodePaths,
    identity::tests::identity,
};

const PAGE: usize = 4096;
/// The header and its two commit slots.
const HEADER_BYTES: usize = 320;
/// The header's flags, which no checksum covers.
const FLAGS: usize = 9;
const COMMITS: u16 = 20;

/// A store as an agent leaves it.
struct Written {
    bytes: Vec<u8>,
    assignment: Assignment,
    /// That of the commit before.
    previous: Assignment,
    /// Whether the agent has ended; or else it was killed.
    is_clean: bool,
}

fn settings() -> Settings {
    Settings {
        uplink: Some("eth0".into()),
        underlay: None,
        ndp: NdpBackend::Ebpf,
        masquerade: MasqueradeBackend::Ebpf,
        filtering: Filtering::default(),
        ipv6_exit: Ipv6Exit::default(),
    }
}

/// The pods come one by one, and their last ones go.
fn assigned(revision: u16) -> Assignment {
    let hosts = 1..=(3 * revision).min(50);
    let message = v1::Assignment {
        revision: revision.into(),
        epoch: "e".into(),
        full: true,
        peers: (100..140).map(|subnet| peer(&format!("peer-{subnet}"), subnet)).collect(),
        pods: hosts.map(|host| pod(&format!("blog-web-{host}"), host)).collect(),
        ..v1::Assignment::default()
    };
    merge(&identity(), &Assignment::default(), message).next
}

/// A process that another test starts has this one's lock for the moment until it is another program.
fn open(path: &Path) -> Result<Store, StoreError> {
    let end = Instant::now() + Duration::from_secs(5);
    loop {
        match Store::open(path) {
            Err(StoreError::InUse { .. }) if Instant::now() < end => pause(Duration::from_millis(1)),
            result => return result,
        }
    }
}

fn written(is_clean: bool) -> Written {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("node.redb");
    let store = open(&path).unwrap();
    store.save_identity(&identity()).unwrap();
    store.save_settings(&settings()).unwrap();
    let (mut previous, mut assignment) = (Assignment::default(), Assignment::default());
    for revision in 1..=COMMITS {
        let next = assigned(revision);
        store.commit(&assignment, &next).unwrap();
        (previous, assignment) = (assignment, next);
    }
    let killed = fs::read(&path).unwrap();
    drop(store);
    let bytes = if is_clean { fs::read(&path).unwrap() } else { killed };
    Written { bytes, assignment, previous, is_clean }
}

/// One store with damage after the other.
struct Trial {
    written: Written,
    paths: NodePaths,
    _folder: tempfile::TempDir,
    runtime: tokio::runtime::Runtime,
    whole: usize,
    damaged: usize,
    known: usize,
}

impl Trial {
    fn new(is_clean: bool) -> Trial {
        let folder = tempfile::tempdir().unwrap();
        let of = |name: &str| folder.path().join(name);
        let paths = NodePaths { state_dir: of("state"), run_dir: of("run"), bpf_dir: of("bpf") };
        fs::create_dir(&paths.state_dir).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        Trial { written: written(is_clean), paths, _folder: folder, runtime, whole: 0, damaged: 0, known: 0 }
    }

    /// An agent starts with the store, and if it cannot, the node is taken down.
    fn of(&mut self, bytes: &[u8], name: &str) {
        let path = self.paths.store();
        fs::write(&path, bytes).unwrap();
        match open(&path) {
            Ok(store) => {
                self.whole += 1;
                self.check_whole(&store, bytes, name);
            }
            Err(error @ StoreError::Damaged { .. }) => {
                self.damaged += 1;
                let text = error.to_string();
                assert!(
                    text.contains("node.redb") && text.contains("run `netctl node down`"),
                    "{name}: {text}"
                );
                assert!(fs::read(&path).unwrap() == bytes, "{name}: the file was changed");
                self.check_damaged(bytes, name);
            }
            Err(error) => panic!("{name}: {error}"),
        }
    }

    fn check_whole(&self, store: &Store, bytes: &[u8], name: &str) {
        assert_eq!(store.identity().unwrap(), Some(identity()), "{name}");
        assert_eq!(store.settings().unwrap(), Some(settings()), "{name}");
        let found = store.assignment().unwrap();
        // A killed agent may have died before this bit was turned: then the last commit was never acknowledged.
        let is_turned = !self.written.is_clean && bytes[FLAGS] != self.written.bytes[FLAGS];
        if !(is_turned && found == self.written.previous) {
            assert_eq!(found, self.written.assignment, "{name}");
        }
    }

    fn check_damaged(&mut self, bytes: &[u8], name: &str) {
        let path = self.paths.store();
        let found = look(&path).unwrap();
        assert!(found.identity.as_ref().is_none_or(|found| *found == identity()), "{name}");
        assert!(found.settings.as_ref().is_none_or(|found| *found == settings()), "{name}");
        let lines = self.runtime.block_on(settle_store(&self.paths, &[])).join("\n");
        assert!(lines.contains("node.redb is damaged: ") && !lines.contains("failed: "), "{name}: {lines}");
        assert!(fs::read(aside::path_of(&path)).unwrap() == bytes, "{name}: another file is kept");
        assert_eq!(path.exists(), found.identity.is_some(), "{name}: {lines}");
        if found.identity.is_some() {
            self.known += 1;
            let store = open(&path).unwrap();
            assert_eq!(store.identity().unwrap(), Some(identity()), "{name}");
            assert_eq!(store.settings().unwrap(), found.settings, "{name}");
            assert_eq!(store.assignment().unwrap(), Assignment::default(), "{name}");
        }
    }
}

/// Each page with zeros, with other bytes, and with one wrong bit at a few places.
#[test]
fn whichever_page_is_overwritten_an_agent_starts_with_what_was_written_or_not_at_all() {
    for is_clean in [true, false] {
        let mut trial = Trial::new(is_clean);
        let pages = trial.written.bytes.len() / PAGE;
        for page in 0..pages {
            let begin = page * PAGE;
            let mut rng = StdRng::seed_from_u64(page as u64);
            // Most pages are free; what hurts one of them hurts all.
            let kinds = if is_free(&trial.written.bytes[begin..begin + PAGE]) { 1..2 } else { 0..6 };
            for kind in kinds {
                let mut bytes = trial.written.bytes.clone();
                let there = &mut bytes[begin..begin + PAGE];
                match kind {
                    0 => there.fill(0),
                    1 => rng.fill_bytes(there),
                    _ => there[rng.random_range(0..PAGE)] ^= 1 << rng.random_range(0..8),
                }
                trial.of(&bytes, &format!("clean {is_clean}, page {page}, kind {kind}"));
            }
        }
        let Trial { whole, damaged, known, .. } = trial;
        println!("{pages} pages: {whole} harmless, {damaged} damaged, of which {known} with the identity");
        assert!(whole > 20 && damaged > 40 && known > 20 && known < damaged, "{whole} {damaged} {known}");
    }
}

fn is_free(page: &[u8]) -> bool {
    page.iter().all(|byte| *byte == 0)
}

#[test]
fn whichever_bit_of_the_header_is_wrong_an_agent_starts_with_what_was_written_or_not_at_all() {
    for is_clean in [true, false] {
        let mut trial = Trial::new(is_clean);
        // Every bit of the header, and of its slots one of thirteen.
        for bit in (0..64 * 8).chain((64 * 8..HEADER_BYTES * 8).step_by(13)) {
            let mut bytes = trial.written.bytes.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            trial.of(&bytes, &format!("clean {is_clean}, bit {bit}"));
        }
        assert!(trial.whole > 100 && trial.damaged > 50, "{} {}", trial.whole, trial.damaged);
    }
}

#[test]
fn wherever_the_file_ends_an_agent_starts_with_what_was_written_or_not_at_all() {
    let mut trial = Trial::new(true);
    let len = trial.written.bytes.len();
    for end in (0..len).step_by(PAGE / 2).chain([1, HEADER_BYTES - 1, HEADER_BYTES, len - 1]) {
        let bytes = trial.written.bytes[..end].to_vec();
        trial.of(&bytes, &format!("{end} of {len} bytes"));
    }
    assert!(trial.damaged > 10, "{}", trial.damaged);
}

/// An entry that another version wrote, or a bit that was wrong in memory: its page has the right checksum.
#[test]
fn an_entry_that_does_not_read_is_named_and_the_identity_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("node.redb");
    let store = open(&path).unwrap();
    store.save_identity(&identity()).unwrap();
    let spoil = |tables: &mut Tables<'_>| {
        tables.pods.insert("blog-web-1", b"{".as_slice())?;
        Ok(())
    };
    store.write(spoil).unwrap();
    drop(store);
    let text = open(&path).unwrap_err().to_string();
    assert!(text.contains("pods: the entry of `blog-web-1` does not read"), "{text}");
    assert!(text.contains("which keeps the node's identity"), "{text}");
    assert_eq!(look(&path).unwrap().identity, Some(identity()));
}

/// A store of which nothing but its identity is known may not take the place of one while something of the node still runs.
#[tokio::test]
async fn a_damaged_store_stays_until_the_node_is_down() {
    let folder = tempfile::tempdir().unwrap();
    let of = |name: &str| folder.path().join(name);
    let paths = NodePaths { state_dir: of("state"), run_dir: of("run"), bpf_dir: of("bpf") };
    fs::create_dir(&paths.state_dir).unwrap();
    fs::write(paths.store(), "x".repeat(8192)).unwrap();
    let lines = settle_store(&paths, &["failed: stop pod a".to_owned()]).await.join("\n");
    assert!(lines.contains("is left as it is"), "{lines}");
    assert!(paths.store().exists() && !aside::path_of(&paths.store()).exists());
}

/// The disk forgets a page while an agent runs, which does not read its store again.
#[test]
fn whichever_page_is_overwritten_under_an_agent_it_goes_on_and_the_next_one_is_told_the_truth() {
    let mut trial = Trial::new(true);
    let (bytes, assignment) = (trial.written.bytes.clone(), trial.written.assignment.clone());
    let next = assigned(COMMITS - 10);
    let (mut kept, mut refused) = (0, 0);
    for page in (0..bytes.len() / PAGE).filter(|page| !is_free(&bytes[page * PAGE..(page + 1) * PAGE])) {
        let path = trial.paths.store();
        fs::write(&path, &bytes).unwrap();
        let store = open(&path).unwrap();
        assert_eq!(store.assignment().unwrap(), assignment);
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &[0xA5; PAGE], (page * PAGE) as u64).unwrap();
        let committed = store.commit(&assignment, &next);
        drop(store);
        let name = format!("page {page}: {committed:?}");
        match open(&path) {
            Ok(store) => {
                let wanted = if committed.is_ok() { &next } else { &assignment };
                assert_eq!(store.identity().unwrap(), Some(identity()), "{name}");
                assert_eq!(store.assignment().unwrap(), *wanted, "{name}");
                kept += 1;
            }
            Err(StoreError::Damaged { .. }) => {
                let bytes = fs::read(&path).unwrap();
                trial.check_damaged(&bytes, &name);
                refused += 1;
            }
            Err(error) => panic!("{name}: {error}"),
        }
    }
    assert!(kept > 10 && refused > 0, "{kept} {refused}");
}
