//! Loads the object: maps made or adopted, programs verified.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::Path,
    thread,
};

use aya::{
    Ebpf, EbpfError, EbpfLoader,
    maps::{MapInfo, ProgramArray},
    programs::{ProgramError, ProgramInfo, SchedClassifier},
};
use dataplane_common::masquerade::{
    TAIL_FRAGMENT_EGRESS, TAIL_FRAGMENT_INGRESS, TAIL_HAIRPIN_IPV4, TAIL_HAIRPIN_IPV6,
};
use nix::sys::signal::{SigSet, SigmaskHow};

use super::{BpfError, OBJECT, Program};

/// Lines of the verifier's log that an error shows: the last ones hold the reason.
const VERIFIER_LINES_MAX: usize = 12;

/// aya-log's ring buffer. Pinned with the maps, so that an adopted program is still heard.
pub(super) const LOGS: &str = "AYA_LOGS";

/// The programs that rare packets are handed over to.
const TAILS: &str = "NAT_TAILS";

pub(super) fn load(pins: &Path, capacities: &BTreeMap<&'static str, u32>) -> Result<Ebpf, BpfError> {
    let mut loader = EbpfLoader::new();
    loader.default_map_pin_directory(pins).map_pin_path(LOGS, pins.join(LOGS));
    for (map, capacity) in capacities {
        loader.map_max_entries(map, *capacity);
    }
    loader.load(OBJECT).map_err(|source| match is_permission(&source) {
        true => BpfError::NotPermitted,
        false => BpfError::Object { dir: pins.to_owned(), source: Box::new(source) },
    })
}

/// What tells a program of this object from one of another build, or of this one with other maps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Build {
    /// Of its instructions.
    pub(super) tag: u64,
    /// The IDs of its pinned maps, where the kernel tells them. They are others when pins were removed meanwhile.
    pub(super) maps: BTreeSet<u32>,
}

impl Build {
    /// Whether `info` is of such a program.
    pub(super) fn is(&self, info: &ProgramInfo) -> bool {
        info.tag() == self.tag && self.maps.is_subset(&map_ids(info))
    }
}

fn map_ids(info: &ProgramInfo) -> BTreeSet<u32> {
    info.map_ids().ok().flatten().unwrap_or_default().into_iter().collect()
}

/// The IDs of the maps that are pinned in the folder; other pins are no maps.
fn pinned_ids(pins: &Path) -> BTreeSet<u32> {
    let entries = fs::read_dir(pins).into_iter().flatten().flatten();
    entries.filter_map(|entry| Some(MapInfo::from_pin(entry.path()).ok()?.id())).collect()
}

/// Has the kernel verify every program, each in a thread: a start waits for the largest alone.
pub(super) fn load_programs(object: &mut Ebpf, pins: &Path) -> Result<BTreeMap<Program, Build>, BpfError> {
    let pinned = pinned_ids(pins);
    let named = |name: &str| Program::ALL.into_iter().find(|program| program.as_str() == name);
    let programs = object.programs_mut().filter_map(|(name, program)| Some((named(name)?, program)));
    let mut builds: BTreeMap<Program, Result<Build, BpfError>> = thread::scope(|scope| {
        let load = |(name, program)| {
            let pinned = &pinned;
            (name, scope.spawn(move || without_signals(|| load_program(name, program, pinned))))
        };
        let threads: Vec<_> = programs.map(load).collect();
        let done = threads.into_iter().map(|(name, thread)| (name, thread.join()));
        done.map(|(name, build)| (name, build.expect("loading does not panic"))).collect()
    });
    let all = Program::ALL.into_iter();
    all.map(|name| Ok((name, builds.remove(&name).unwrap_or_else(|| Err(not_there(name)))?))).collect()
}

/// Gives the programs that rare packets are handed over to their places, for those of this build and for those of an
/// older one that are still on an interface.
pub(super) fn set_tails(object: &mut Ebpf) -> Result<(), BpfError> {
    let tails = [
        (TAIL_FRAGMENT_EGRESS, Program::FragmentEgress),
        (TAIL_FRAGMENT_INGRESS, Program::FragmentIngress),
        (TAIL_HAIRPIN_IPV4, Program::HairpinIpv4),
        (TAIL_HAIRPIN_IPV6, Program::HairpinIpv6),
    ];
    for (place, name) in tails {
        let fd = program(object, name)?.fd().and_then(|fd| Ok(fd.try_clone()?));
        let fd = fd.map_err(|source| BpfError::Program { program: name, source: Box::new(source) })?;
        let map = object.map_mut(TAILS).ok_or(BpfError::NoMap(TAILS))?;
        let set = ProgramArray::try_from(map).and_then(|mut map| map.set(place, &fd, 0));
        set.map_err(|source| BpfError::Map { action: "write", map: TAILS, source: Box::new(source) })?;
    }
    Ok(())
}

fn load_program(
    name: Program,
    program: &mut aya::programs::Program,
    pinned: &BTreeSet<u32>,
) -> Result<Build, BpfError> {
    let classifier = classifier(name, program)?;
    classifier.load().map_err(|source| refused(name, source))?;
    let info =
        classifier.info().map_err(|source| BpfError::Program { program: name, source: Box::new(source) })?;
    let maps = map_ids(&info).intersection(pinned).copied().collect();
    Ok(Build { tag: info.tag(), maps })
}

/// Runs `load` with this thread's signals blocked: a signal, be it of a child that ended, makes the verifier
/// give up with EAGAIN (`do_check` in kernel/bpf/verifier.c). They are delivered after it, or to another thread.
fn without_signals<T>(load: impl FnOnce() -> T) -> T {
    let before =
        SigSet::all().thread_swap_mask(SigmaskHow::SIG_SETMASK).expect("a set that the kernel knows");
    let result = load();
    before.thread_set_mask().expect("the thread had this mask before");
    result
}

pub(super) fn program(object: &mut Ebpf, name: Program) -> Result<&mut SchedClassifier, BpfError> {
    let program = object.program_mut(name.as_str()).ok_or_else(|| not_there(name))?;
    classifier(name, program)
}

fn classifier(name: Program, program: &mut aya::programs::Program) -> Result<&mut SchedClassifier, BpfError> {
    match program {
        aya::programs::Program::SchedClassifier(classifier) => Ok(classifier),
        _ => Err(not_there(name)),
    }
}

fn not_there(name: Program) -> BpfError {
    BpfError::Program { program: name, source: Box::new(ProgramError::NotLoaded) }
}

fn refused(program: Program, error: ProgramError) -> BpfError {
    match error {
        ProgramError::LoadError { io_error, .. }
            if io_error.kind() == io::ErrorKind::PermissionDenied
                && io_error.raw_os_error() == Some(libc::EPERM) =>
        {
            BpfError::NotPermitted
        }
        ProgramError::LoadError { io_error, verifier_log } => {
            BpfError::Verifier { program, log: last_lines(&verifier_log.to_string()), source: io_error }
        }
        source => BpfError::Program { program, source: Box::new(source) },
    }
}

fn last_lines(log: &str) -> String {
    let lines: Vec<&str> = log.lines().filter(|l| !l.trim().is_empty()).collect();
    lines[lines.len().saturating_sub(VERIFIER_LINES_MAX)..].join("\n")
}

fn is_permission(error: &EbpfError) -> bool {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if let Some(io) = error.downcast_ref::<io::Error>() {
            return io.raw_os_error() == Some(libc::EPERM);
        }
        cause = error.source();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_shows_the_end_of_a_long_log() {
        let log: String = (0..40).map(|i| format!("line {i}\n\n")).collect();
        let shown = last_lines(&log);
        assert_eq!(shown.lines().count(), VERIFIER_LINES_MAX);
        assert!(shown.ends_with("line 39") && shown.starts_with("line 28"));
        assert_eq!(last_lines(""), "");
    }
}
