//! Programs that building and testing need, the Debian packages they come from, and the one apt call.

use std::process::Command;

use anyhow::{Context, Result, bail};

use super::services;
use crate::process::{self, find_program};

/// Programs and where Debian keeps them. A program found elsewhere is as good.
const PROGRAMS: [(&str, &str); 17] = [
    ("bpftool", "bpftool"),
    ("busybox", "busybox-static"),
    ("cc", "gcc"),
    ("curl", "curl"),
    ("etcd", "etcd-server"),
    ("etcdctl", "etcd-client"),
    ("faketime", "faketime"),
    ("ip", "iproute2"),
    ("iperf3", "iperf3"),
    ("ndppd", "ndppd"),
    ("nft", "nftables"),
    ("nginx", "nginx-light"),
    ("nsenter", "util-linux"),
    ("ping", "iputils-ping"),
    ("ps", "procps"),
    ("radvd", "radvd"),
    ("tcpdump", "tcpdump"),
];

/// The packages of the programs that this machine lacks.
pub(super) fn missing_programs() -> Vec<&'static str> {
    let missing = PROGRAMS.iter().filter(|(program, _)| find_program(program).is_none());
    missing.map(|(_, package)| *package).collect()
}

/// Installs `packages` in one call, without starting a service.
///
/// # Errors
/// One sentence that names the packages when this is not Debian or the user is not root.
pub(super) fn install(packages: &[&str]) -> Result<()> {
    let list = packages.join(" ");
    if find_program("apt-get").is_none() {
        bail!("this machine lacks what these Debian packages hold, and has no apt-get to get them: {list}");
    }
    if !process::is_root() {
        bail!(
            "this machine lacks packages that only root can install: \
             sudo apt-get install --no-install-recommends {list}"
        );
    }
    println!("setup: installing {list}");
    if !all_known(packages) {
        update();
    }
    let _quiet = services::KeepStopped::begin(packages)?;
    if process::run(&mut apt_get(packages)).is_ok() {
        return Ok(());
    }
    println!("setup: the package lists may be old; reading them again");
    update();
    process::run(&mut apt_get(packages)).context("apt-get could not install what is missing")
}

fn apt_get(packages: &[&str]) -> Command {
    let mut command = Command::new("apt-get");
    command.args(["install", "--yes", "--quiet", "--no-install-recommends"]).args(packages);
    command.env("DEBIAN_FRONTEND", "noninteractive");
    command
}

/// Whether apt has a candidate for every package: false on a machine whose lists were never read.
fn all_known(packages: &[&str]) -> bool {
    packages.iter().all(|package| {
        let shown = process::output(Command::new("apt-cache").args(["policy", package]).env("LC_ALL", "C"));
        shown.is_ok_and(|text| text.contains("Candidate: ") && !text.contains("Candidate: (none)"))
    })
}

/// Reads the package lists. One broken source of the user's own must not stop the others.
fn update() {
    if let Err(error) = process::run(Command::new("apt-get").args(["update", "--quiet"])) {
        println!("setup: note: {error:#}; going on with the lists there are");
    }
}
