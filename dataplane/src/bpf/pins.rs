//! The folder of pins: `<dir>/v<LAYOUT>/` with maps by name, `link-<ifname>-<program>`, and empty folders
//! `clsact-<ifname>` for qdiscs that were made here.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use dataplane_common::LAYOUT_VERSION;
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use super::{BpfError, Program, attach};

/// The folder of this layout's pins.
pub(super) fn layout(dir: &Path) -> PathBuf {
    dir.join(format!("v{LAYOUT_VERSION}"))
}

/// Makes the folder, if `dir` is on a BPF file system.
pub(super) fn prepare(dir: &Path) -> Result<PathBuf, BpfError> {
    let existing = dir.ancestors().find(|d| d.exists()).unwrap_or(Path::new("/"));
    let on_bpf = statfs(existing).is_ok_and(|fs| fs.filesystem_type() == BPF_FS_MAGIC);
    if !on_bpf {
        return Err(BpfError::NoBpfFs(dir.to_owned()));
    }
    let pins = layout(dir);
    fs::create_dir_all(&pins).map_err(|source| match source.kind() {
        io::ErrorKind::PermissionDenied => BpfError::NotPermitted,
        _ => BpfError::Path { action: "make", path: pins.clone(), source },
    })?;
    Ok(pins)
}

/// The folders of other layouts beside this one.
pub(super) fn others(dir: &Path) -> Vec<PathBuf> {
    let own = layout(dir);
    let folders = names(dir).unwrap_or_default();
    folders
        .iter()
        .filter(|name| is_version(name))
        .map(|name| dir.join(name))
        .filter(|path| *path != own)
        .collect()
}

/// The pin of a link.
pub(super) fn link(pins: &Path, program: Program, ifname: &str) -> PathBuf {
    pins.join(format!("link-{ifname}-{program}"))
}

/// The mark of a clsact qdisc that was made here.
pub(super) fn qdisc_mark(pins: &Path, ifname: &str) -> PathBuf {
    pins.join(format!("clsact-{ifname}"))
}

/// The links pinned in the folder: program, interface, pin.
pub(super) fn links(pins: &Path) -> io::Result<Vec<(Program, String, PathBuf)>> {
    Ok(names(pins)?
        .into_iter()
        .filter_map(|name| {
            // An interface's name may hold a dash, a program's does not.
            let (ifname, program) = name.strip_prefix("link-")?.rsplit_once('-')?;
            Some((Program::named(program)?, ifname.to_owned(), pins.join(&name)))
        })
        .collect())
}

/// The interfaces whose clsact qdisc was made here.
pub(super) fn marked_qdiscs(pins: &Path) -> io::Result<Vec<String>> {
    Ok(names(pins)?.iter().filter_map(|name| Some(name.strip_prefix("clsact-")?.to_owned())).collect())
}

fn names(dir: &Path) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
}

/// Detaches and removes everything below `dir`, and `dir`.
pub(super) fn teardown(dir: &Path) -> Vec<BpfError> {
    let mut errors = Vec::new();
    let versions = match names(dir) {
        Ok(names) => names,
        Err(source) => return vec![BpfError::Path { action: "read", path: dir.to_owned(), source }],
    };
    for version in versions.iter().filter(|v| is_version(v)) {
        let pins = dir.join(version);
        errors.extend(attach::detach_all(&pins));
        errors.extend(remove(&pins).err());
    }
    // Only an empty folder goes: what others put there stays.
    if let Err(source) = fs::remove_dir(dir)
        && !matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty)
        && source.raw_os_error() != Some(libc::EBUSY)
    {
        errors.push(BpfError::Path { action: "remove", path: dir.to_owned(), source });
    }
    errors
}

fn is_version(name: &str) -> bool {
    name.strip_prefix('v').is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
}

/// Removes the pins of a layout, and its folder.
pub(super) fn remove(pins: &Path) -> Result<(), BpfError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| BpfError::Path { action: "remove", path, source }
    };
    for name in names(pins).map_err(failed(pins))? {
        let path = pins.join(name);
        let removed = if path.is_dir() { fs::remove_dir(&path) } else { fs::remove_file(&path) };
        removed.map_err(failed(&path))?;
    }
    fs::remove_dir(pins).map_err(failed(pins))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_is_on_no_bpf_file_system_says_what_to_mount() {
        let error = prepare(Path::new("/proc/self/no/such")).unwrap_err();
        assert_eq!(
            error.to_string(),
            "/proc/self/no/such is not on a BPF file system: mount -t bpf bpf /sys/fs/bpf"
        );
    }

    #[test]
    fn pins_of_links_are_told_from_others_and_interfaces_may_hold_dashes() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["link-br-lan0-uplink_ingress", "link-eth0-pod_guard", "link-eth0-other", "COUNTERS"] {
            fs::write(dir.path().join(name), "").unwrap();
        }
        fs::create_dir(dir.path().join("clsact-eth0")).unwrap();
        let mut found = links(dir.path()).unwrap();
        found.sort();
        let found: Vec<_> = found.iter().map(|(p, i, _)| (p.as_str(), i.as_str())).collect();
        assert_eq!(found, [("uplink_ingress", "br-lan0"), ("pod_guard", "eth0")]);
        assert_eq!(marked_qdiscs(dir.path()).unwrap(), ["eth0"]);
    }

    #[test]
    fn only_version_folders_are_taken_down() {
        assert!(is_version("v1") && is_version("v12"));
        assert!(!is_version("v") && !is_version("v1a") && !is_version("x1"));
    }

    #[test]
    fn taking_down_what_is_not_there_is_fine() {
        let dir = tempfile::tempdir().unwrap();
        assert!(teardown(&dir.path().join("none")).is_empty());
    }
}
