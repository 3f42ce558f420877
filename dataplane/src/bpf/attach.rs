//! Puts programs on interfaces and takes them off: pinned TCX links, or filters on a clsact qdisc. Both stay
//! when the agent ends, and both are replaced without a gap. Programs, filters and qdiscs of others are left
//! alone.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io, mem,
    path::{Path, PathBuf},
};

use aya::{
    programs::{
        LinkOrder, ProgramError, ProgramId, ProgramInfo, SchedClassifier, TcAttachType,
        links::{FdLink, LinkError, PinnedLink},
        tc::{NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle, qdisc_add_clsact},
    },
    sys::SyscallError,
};
use nix::net::if_::if_nametoindex;

use super::{
    AttachError, Attachment, BpfError, Hook, Program,
    filter::{self, Filter},
    object::Build,
    pins,
};

/// Where a program goes.
pub(super) struct Place<'a> {
    pub(super) pins: &'a Path,
    pub(super) program: Program,
    pub(super) ifindex: u32,
    pub(super) ifname: &'a str,
}

/// The priority of our filters: low numbers come first, and this leaves room on both sides.
const PRIORITY: u16 = 4_678;

/// The backstop's comes behind.
fn priority(program: Program) -> u16 {
    PRIORITY + u16::from(program == Program::UplinkBackstop)
}

fn attach_type(program: Program) -> TcAttachType {
    match program {
        Program::UplinkEgress | Program::UplinkBackstop | Program::FragmentEgress => TcAttachType::Egress,
        _ => TcAttachType::Ingress,
    }
}

pub(super) fn attach(
    place: &Place<'_>,
    hook: Hook,
    classifier: &mut SchedClassifier,
) -> Result<(), AttachError> {
    match hook {
        Hook::Tcx => attach_tcx(place, classifier),
        Hook::Clsact => attach_clsact(place, classifier),
    }
}

fn attach_tcx(place: &Place<'_>, classifier: &mut SchedClassifier) -> Result<(), AttachError> {
    let pin = pins::link(place.pins, place.program, place.ifname);
    if let Some(link) = pinned(&pin)? {
        if is_on(&link, place.program, place.ifname)? {
            let id = classifier.attach_to_link(link.try_into().map_err(pin_failed(&pin))?)?;
            // The pin keeps the link; without this, dropping the object would end it.
            mem::drop(classifier.take_link(id)?);
            return Ok(());
        }
        // The interface that it was on has gone, and this is another of the same name.
        mem::drop(link);
        remove_pin(&pin)?;
    }
    if let Some((link, older)) = inherited(place)? {
        let id = classifier.attach_to_link(link.try_into().map_err(pin_failed(&older))?)?;
        let link: FdLink = classifier.take_link(id)?.try_into().map_err(pin_failed(&pin))?;
        link.pin(&pin).map(mem::drop).map_err(pin_failed(&pin))?;
        return remove_pin(&older);
    }
    let order = TcAttachOptions::TcxOrder(order(place)?);
    let id = classifier.attach_with_options(place.ifname, attach_type(place.program), order)?;
    let link: FdLink = classifier.take_link(id)?.try_into().map_err(pin_failed(&pin))?;
    link.pin(&pin).map(mem::drop).map_err(pin_failed(&pin))
}

/// The link of a build with another layout, whose program is replaced without a gap.
fn inherited(place: &Place<'_>) -> Result<Option<(FdLink, PathBuf)>, AttachError> {
    let dir = place.pins.parent().unwrap_or(place.pins);
    for other in pins::others(dir) {
        let pin = pins::link(&other, place.program, place.ifname);
        match pinned(&pin)? {
            Some(link) if is_on(&link, place.program, place.ifname)? => return Ok(Some((link, pin))),
            Some(_) => remove_pin(&pin)?,
            None => {}
        }
    }
    Ok(None)
}

/// Behind all others, but before the backstop: what it sees must be translated by then.
fn order(place: &Place<'_>) -> Result<LinkOrder, AttachError> {
    if place.program == Program::UplinkEgress
        && let Some(backstop) = pinned(&pins::link(place.pins, Program::UplinkBackstop, place.ifname))?
        && is_on(&backstop, Program::UplinkBackstop, place.ifname)?
    {
        let id = backstop.info().map_err(|e| AttachError::Filters(io::Error::other(e)))?.program_id();
        // SAFETY: the number is that of a program which hangs there, says the kernel.
        return Ok(LinkOrder::before_program_id(unsafe { ProgramId::new(id) }));
    }
    Ok(LinkOrder::default())
}

/// The link behind a pin, if there is one.
fn pinned(pin: &Path) -> Result<Option<FdLink>, AttachError> {
    match PinnedLink::from_pin(pin) {
        Ok(link) => Ok(Some(link.into())),
        Err(LinkError::SyscallError(SyscallError { io_error, .. }))
            if io_error.kind() == io::ErrorKind::NotFound =>
        {
            Ok(None)
        }
        Err(e) => Err(pin_failed(pin)(e)),
    }
}

fn pin_failed<E>(pin: &Path) -> impl FnOnce(E) -> AttachError
where
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let path = pin.to_owned();
    move |source| AttachError::Pin { path, source: source.into() }
}

fn remove_pin(pin: &Path) -> Result<(), AttachError> {
    match fs::remove_file(pin) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(pin_failed(pin)(e)),
        _ => Ok(()),
    }
}

/// Whether the link still holds its program on the interface of that name.
fn is_on(link: &FdLink, program: Program, ifname: &str) -> Result<bool, AttachError> {
    let id = link.info().map_err(|e| AttachError::Filters(io::Error::other(e)))?.program_id();
    Ok(on_interface(program, ifname)?.iter().any(|info| info.id() == id))
}

/// The TCX programs where `program` belongs; none when there is no such interface or no TCX.
fn on_interface(program: Program, ifname: &str) -> Result<Vec<ProgramInfo>, AttachError> {
    match SchedClassifier::query_tcx(ifname, attach_type(program)) {
        Ok((_, programs)) => Ok(programs),
        // No interface of that name.
        Err(ProgramError::TcError(TcError::IoError(_))) => Ok(Vec::new()),
        // Between the name's look-up and the question it went.
        Err(ProgramError::SyscallError(e)) if e.io_error.raw_os_error() == Some(libc::ENODEV) => {
            Ok(Vec::new())
        }
        Err(e) => Err(e.into()),
    }
}

pub(super) fn revision(program: Program, ifname: &str) -> Option<u64> {
    SchedClassifier::query_tcx(ifname, attach_type(program)).ok().map(|(revision, _)| revision)
}

fn attach_clsact(place: &Place<'_>, classifier: &mut SchedClassifier) -> Result<(), AttachError> {
    let direction = attach_type(place.program);
    let mut ours = ours(place.program, place.ifindex)?;
    let id = match ours.pop() {
        Some(old) => {
            // The kernel replaces the program of a filter in one step.
            let link = SchedClassifierLink::attached(
                place.ifname,
                direction,
                old.priority,
                TcHandle::from(old.handle),
                None,
            )
            .map_err(AttachError::Filters)?;
            classifier.attach_to_link(link)?
        }
        None => {
            add_qdisc(place)?;
            let options = NlOptions { priority: priority(place.program), ..NlOptions::default() };
            classifier.attach_with_options(place.ifname, direction, TcAttachOptions::Netlink(options))?
        }
    };
    // Dropped, it would remove the filter.
    mem::forget(classifier.take_link(id)?);
    for extra in ours {
        filter::remove(place.ifindex, &extra).map_err(AttachError::Filters)?;
    }
    Ok(())
}

/// Our filters for the program: by its name and priority.
fn ours(program: Program, ifindex: u32) -> Result<Vec<Filter>, AttachError> {
    let mut filters = filter::list(ifindex, attach_type(program)).map_err(AttachError::Filters)?;
    filters.retain(|f| f.name == program.as_str() && f.priority == priority(program));
    Ok(filters)
}

/// Adds the qdisc, and notes that it was not there before.
fn add_qdisc(place: &Place<'_>) -> Result<(), AttachError> {
    if filter::has_clsact(place.ifindex).map_err(AttachError::Filters)? {
        return Ok(());
    }
    qdisc_add_clsact(place.ifname).map_err(AttachError::Qdisc)?;
    let mark = pins::qdisc_mark(place.pins, place.ifname);
    match fs::create_dir(&mark) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(pin_failed(&mark)(e)),
        _ => Ok(()),
    }
}

pub(super) fn attached(
    pins: &Path,
    builds: &BTreeMap<Program, Build>,
) -> Result<BTreeSet<Attachment>, BpfError> {
    let mut attached = attached_tcx(pins, builds)?;
    attached.extend(attached_clsact(builds)?);
    Ok(attached)
}

fn attached_tcx(pins: &Path, builds: &BTreeMap<Program, Build>) -> Result<BTreeSet<Attachment>, BpfError> {
    let links = pins::links(pins).map_err(|source| BpfError::Path {
        action: "read",
        path: pins.to_owned(),
        source,
    })?;
    let mut attached = BTreeSet::new();
    for (program, ifname, pin) in links {
        if is_attached(program, &ifname, &pin, builds.get(&program)).map_err(find_failed(program, &ifname))?
            && let Ok(ifindex) = if_nametoindex(ifname.as_str())
        {
            attached.insert(Attachment { program, ifname, ifindex });
        }
    }
    Ok(attached)
}

fn find_failed(program: Program, ifname: &str) -> impl FnOnce(AttachError) -> BpfError {
    let ifname = ifname.to_owned();
    move |source| BpfError::Attach { action: "find", program, ifname, source }
}

/// Whether the pinned link is on the interface with the program of this build and these maps.
fn is_attached(
    program: Program,
    ifname: &str,
    pin: &Path,
    build: Option<&Build>,
) -> Result<bool, AttachError> {
    let Some(link) = pinned(pin)? else { return Ok(false) };
    let id = link.info().map_err(|e| AttachError::Filters(io::Error::other(e)))?.program_id();
    let found = on_interface(program, ifname)?;
    Ok(found.iter().any(|info| info.id() == id && build.is_some_and(|build| build.is(info))))
}

/// By the tag alone: a filter does not tell its program's maps.
fn attached_clsact(builds: &BTreeMap<Program, Build>) -> Result<BTreeSet<Attachment>, BpfError> {
    let mut attached = BTreeSet::new();
    for (ifindex, ifname) in interfaces_with_clsact()? {
        for program in Program::ON_INTERFACES {
            let ours = ours(program, ifindex).map_err(find_failed(program, &ifname))?;
            if ours.iter().any(|f| f.tag.is_some() && f.tag == builds.get(&program).map(|build| build.tag)) {
                attached.insert(Attachment { program, ifname: ifname.clone(), ifindex });
            }
        }
    }
    Ok(attached)
}

/// Index and name. An interface that goes meanwhile is left out.
fn interfaces_with_clsact() -> Result<Vec<(u32, String)>, BpfError> {
    let indices = filter::with_clsact().map_err(BpfError::Qdiscs)?;
    let named =
        |index| Some((index, nix::net::if_::if_indextoname(index).ok()?.to_string_lossy().into_owned()));
    Ok(indices.into_iter().filter_map(named).collect())
}

pub(super) fn detach(pins: &Path, program: Program, ifname: &str) -> Result<(), AttachError> {
    // The link's last reference is its pin: removing it detaches.
    remove_pin(&pins::link(pins, program, ifname))?;
    let Ok(ifindex) = if_nametoindex(ifname) else {
        return remove_mark(pins, ifname);
    };
    for ours in ours(program, ifindex)? {
        filter::remove(ifindex, &ours).map_err(AttachError::Filters)?;
    }
    remove_qdisc(pins, ifname, ifindex)
}

/// Removes a qdisc that was made here, once no filter is left on it.
fn remove_qdisc(pins: &Path, ifname: &str, ifindex: u32) -> Result<(), AttachError> {
    if !pins::qdisc_mark(pins, ifname).exists() {
        return Ok(());
    }
    if filter::has_clsact(ifindex).map_err(AttachError::Filters)? {
        if !filter::is_empty(ifindex).map_err(AttachError::Filters)? {
            return Ok(());
        }
        filter::remove_clsact(ifindex).map_err(AttachError::Filters)?;
    }
    remove_mark(pins, ifname)
}

fn remove_mark(pins: &Path, ifname: &str) -> Result<(), AttachError> {
    let mark = pins::qdisc_mark(pins, ifname);
    match fs::remove_dir(&mark) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(pin_failed(&mark)(e)),
        _ => Ok(()),
    }
}

/// Detaches all programs whose pins are in the folder, and all our filters in this network namespace. Goes
/// on after a failure.
pub(super) fn detach_all(pins: &Path) -> Vec<BpfError> {
    let mut places: BTreeSet<(Program, String)> =
        pins::links(pins).unwrap_or_default().into_iter().map(|(p, ifname, _)| (p, ifname)).collect();
    let with_filters = interfaces_with_clsact().unwrap_or_default().into_iter().map(|(_, ifname)| ifname);
    for ifname in with_filters.chain(pins::marked_qdiscs(pins).unwrap_or_default()) {
        places.extend(Program::ON_INTERFACES.map(|program| (program, ifname.clone())));
    }
    places
        .into_iter()
        .filter_map(|(program, ifname)| {
            detach(pins, program, &ifname).err().map(|source| BpfError::Attach {
                action: "detach",
                program,
                ifname,
                source,
            })
        })
        .collect()
}

/// Removes what interfaces that have gone left behind. What cannot be removed now is tried again next time.
pub(super) fn collect_stale(pins: &Path) {
    for (program, ifname, pin) in pins::links(pins).unwrap_or_default() {
        if if_nametoindex(ifname.as_str()).is_err() {
            let removed = fs::remove_file(&pin);
            tracing::debug!(%program, ifname, ok = removed.is_ok(), "pin of a vanished interface");
        }
    }
    for ifname in pins::marked_qdiscs(pins).unwrap_or_default() {
        if if_nametoindex(ifname.as_str()).is_err() {
            let _ = remove_mark(pins, &ifname);
        }
    }
}
