//! Keeps the services that come with a package from being started, now or at the next boot: Debian does both
//! when it installs nginx, and a test tool must not open port 80 on its user's machine.

use std::{
    fs,
    io::Write,
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::Path,
    process::{self, Command},
};

use anyhow::{Context, Result};

use crate::process::succeeds;

/// What `invoke-rc.d` and `deb-systemd-invoke` ask before they start a service.
const POLICY: &str = "/usr/sbin/policy-rc.d";

/// Packages of ours that hold a service, and its name.
const SERVICES: [(&str, &str); 5] = [
    ("etcd-server", "etcd"),
    ("nginx-light", "nginx"),
    ("iperf3", "iperf3"),
    ("radvd", "radvd"),
    ("ndppd", "ndppd"),
];

/// While this value lives no service is started by an installation; when it is dropped the policy is gone
/// and the services that came with the packages are disabled.
pub(super) struct KeepStopped {
    policy_is_ours: bool,
    services: Vec<&'static str>,
}

impl KeepStopped {
    /// Puts the policy in place, unless the machine has one of its own, which is then obeyed.
    pub(super) fn begin(packages: &[&str]) -> Result<Self> {
        let services: Vec<_> = SERVICES
            .iter()
            .filter(|(package, _)| packages.contains(package))
            .map(|(_, name)| *name)
            .collect();
        let policy_is_ours = !services.is_empty() && !Path::new(POLICY).exists();
        if policy_is_ours {
            write_policy().with_context(|| format!("cannot write {POLICY}"))?;
        }
        Ok(Self { policy_is_ours, services })
    }
}

impl Drop for KeepStopped {
    fn drop(&mut self) {
        for service in &self.services {
            disable(service);
        }
        if self.policy_is_ours
            && let Err(error) = fs::remove_file(POLICY)
        {
            eprintln!("error: cannot remove {POLICY}, please do: {error}");
        }
    }
}

/// The policy forbids everything while this process lives. After that it removes itself when it is first
/// asked, so that not even `kill -9` leaves a machine whose services never start.
fn write_policy() -> std::io::Result<()> {
    let pid = process::id();
    let text = format!(
        "#!/bin/sh\n\
         # Made by `cargo xtask setup` (process {pid}) for the time of one installation.\n\
         [ \"$(cat /proc/{pid}/comm 2>/dev/null)\" = xtask ] && exit 101\n\
         rm -f {POLICY}\n\
         exit 0\n"
    );
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o755).open(POLICY)?;
    file.write_all(text.as_bytes())?;
    // The mode given to open() is narrowed by the umask.
    fs::set_permissions(POLICY, fs::Permissions::from_mode(0o755))
}

/// Takes the service out of the next boot. Works without a running systemd too; a package that holds no such
/// unit is left alone.
fn disable(service: &str) {
    let unit = format!("{service}.service");
    let systemd = succeeds(Command::new("deb-systemd-helper").args(["disable", &unit]));
    let sysv = succeeds(Command::new("update-rc.d").args([service, "disable"]));
    if systemd || sysv {
        println!("setup: the service {service} stays off");
    }
}
