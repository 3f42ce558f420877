//! What is inside a machine: the tests and our programs at the same paths as here, the tools that they start
//! with the libraries these need, and the kernel's modules.

use std::{
    fs::{self, File},
    io::{BufWriter, Write},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

use super::{
    archive::Archive,
    modules,
    packages::{Kernel, Store},
};
use crate::{
    artifacts::TestBinary,
    process::{self, find_program},
    workspace::Workspace,
};

/// Our own programs, from `target/debug`.
const PROGRAMS: [&str; 3] = ["lb-nginx", "netctl", "testbed"];

/// Tools that scenarios and pods start. Real ones, not busybox: Debian's prefers its own `ip` and `ping`.
const TOOLS: &[&str] = &[
    "awk", "base64", "bpftool", "bridge", "busybox", "cat", "chgrp", "chmod", "chown", "chroot", "cp",
    "curl", "cut", "date", "dd", "df", "dmesg", "echo", "env", "false", "find", "free", "getent", "grep",
    "head", "hostname", "id", "ip", "iperf3", "kill", "ln", "ls", "mkdir", "mkfifo", "mknod", "mktemp",
    "mount", "mv", "nft", "nginx", "nsenter", "od", "pgrep", "ping", "pkill", "printf", "ps", "radvd",
    "readlink", "rm", "rmdir", "sed", "seq", "setpriv", "sh", "sleep", "sort", "ss", "stat", "stty", "sync",
    "sysctl", "tail", "tc", "tcpdump", "tee", "test", "timeout", "touch", "tr", "true", "umount", "uname",
    "unshare", "wc", "which", "xargs",
];

/// Accounts that pods and nginx run as.
const PASSWD: &str = "root:x:0:0::/root:/bin/sh\n\
                      www-data:x:33:33::/var/www:/bin/false\n\
                      tcpdump:x:102:102::/nonexistent:/bin/false\n\
                      nobody:x:65534:65534::/nonexistent:/bin/false\n";
const GROUP: &str = "root:x:0:\nwww-data:x:33:\ntcpdump:x:102:\nnogroup:x:65534:\n";

/// The script that runs the tests in the machine, one binary after the other.
pub(super) fn script(binaries: &[TestBinary], filter: Option<&str>) -> String {
    let mut script = String::from("status=0\nmount -t bpf bpf /sys/fs/bpf\nulimit -n 65536\n");
    for binary in binaries {
        let filter = filter.map(|text| format!(" {}", quoted(text))).unwrap_or_default();
        script += &format!("echo {}\n", quoted(&format!("{}{}", super::machine::BINARY_MARK, binary.name())));
        script += &format!(
            "cd {} && {} --test-threads=2 --show-output{filter} || status=1\n",
            quoted(&binary.folder.to_string_lossy()),
            quoted(&binary.executable.to_string_lossy())
        );
    }
    script + "exit $status\n"
}

/// Packs the initramfs and returns its file.
pub(super) fn pack(
    workspace: &Workspace,
    store: &Store,
    kernel: &Kernel,
    binaries: &[TestBinary],
    script: &str,
) -> Result<PathBuf> {
    let mut guest = Guest { archive: Archive::default(), scratch: store.folder().join("stripped") };
    guest.skeleton(workspace);
    guest.tools(store)?;
    guest.ours(workspace, binaries)?;
    guest.archive.copy_folder(&modules::prepare(store, kernel)?.join("lib"), Path::new("usr/lib"))?;
    guest.archive.file("run.sh", 0o644, script);
    let path = store.folder().join(format!("initramfs-{}", kernel.release));
    let mut out =
        BufWriter::new(File::create(&path).with_context(|| format!("cannot write {}", path.display()))?);
    guest.archive.write(&mut out)?;
    out.flush()?;
    Ok(path)
}

struct Guest {
    archive: Archive,
    /// Where programs without their debug information are made.
    scratch: PathBuf,
}

impl Guest {
    fn skeleton(&mut self, workspace: &Workspace) {
        let folders =
            ["dev", "etc", "mnt", "proc", "root", "run", "sys", "tmp", "usr/bin", "usr/sbin", "usr/lib64"];
        let nginx = ["var/lib/nginx", "var/log/nginx", "var/www"];
        folders.iter().chain(&nginx).for_each(|folder| self.archive.folder(folder));
        for (link, to) in
            [("bin", "usr/bin"), ("sbin", "usr/sbin"), ("lib", "usr/lib"), ("lib64", "usr/lib64")]
        {
            self.archive.link(link, to);
        }
        self.archive.link("var/run", "/run");
        self.archive.file("init", 0o755, include_str!("init.sh"));
        self.archive.file("etc/passwd", 0o644, PASSWD);
        self.archive.file("etc/group", 0o644, GROUP);
        self.archive.file("etc/hosts", 0o644, "127.0.0.1 localhost\n::1 localhost\n");
        self.archive.folder(workspace.target());
    }

    fn tools(&mut self, store: &Store) -> Result<()> {
        for tool in TOOLS {
            let Some(program) = find_program(tool) else {
                bail!("this machine has no `{tool}` to put into the virtual one");
            };
            self.program(&program, &tool_path(tool, &program))?;
        }
        let kmod = store.kmod()?;
        self.program(&kmod, Path::new("usr/bin/kmod"))?;
        for name in ["insmod", "lsmod", "modprobe"] {
            self.archive.link(Path::new("usr/bin").join(name), "kmod");
        }
        for file in ["/etc/iproute2", "/usr/share/iproute2", "/etc/nginx"] {
            if Path::new(file).is_dir() {
                self.archive.copy_folder(Path::new(file), Path::new(file))?;
            }
        }
        for file in ["/etc/protocols", "/etc/services"] {
            if Path::new(file).is_file() {
                self.archive.copy(Path::new(file), Path::new(file))?;
            }
        }
        Ok(())
    }

    /// Tests and programs where they are here, so that paths compiled into them hold.
    fn ours(&mut self, workspace: &Workspace, binaries: &[TestBinary]) -> Result<()> {
        for name in PROGRAMS {
            let path = workspace.target().join("debug").join(name);
            self.stripped(&path)?;
        }
        for binary in binaries {
            self.stripped(&binary.executable)?;
            self.archive.folder(&binary.folder);
        }
        for folder in ["examples", "fuzz/corpus"].map(|name| workspace.root().join(name)) {
            if folder.is_dir() {
                self.archive.copy_folder(&folder, &folder)?;
            }
        }
        Ok(())
    }

    fn stripped(&mut self, path: &Path) -> Result<()> {
        fs::create_dir_all(&self.scratch)?;
        let small = self.scratch.join(path.file_name().context("a program has a name")?);
        process::run(Command::new("strip").arg("--strip-debug").arg("-o").arg(&small).arg(path))?;
        self.program(&small, path)
    }

    /// A program and the libraries that the loader would find for it.
    fn program(&mut self, from: &Path, to: &Path) -> Result<()> {
        self.archive.copy(from, to)?;
        // ldd fails on scripts and static programs, which need nothing.
        let listed = process::output(Command::new("ldd").arg(from)).unwrap_or_default();
        for library in listed.split_whitespace().filter(|word| word.starts_with('/')) {
            self.library(Path::new(library))?;
        }
        Ok(())
    }

    fn library(&mut self, from: &Path) -> Result<()> {
        let name = from.file_name().context("a library has a name")?;
        let is_loader = name.to_string_lossy().starts_with("ld-linux");
        let folder = if is_loader { "usr/lib64" } else { "usr/lib/x86_64-linux-gnu" };
        let to = Path::new(folder).join(name);
        if self.archive.contains(&to) {
            return Ok(());
        }
        self.archive.copy(from, &to)
    }
}

/// `/usr/bin` or `/usr/sbin`, whichever it has here: the older names are links to these.
fn tool_path(tool: &str, program: &Path) -> PathBuf {
    let is_admin = program.parent().is_some_and(|folder| folder.ends_with("sbin"));
    Path::new(if is_admin { "usr/sbin" } else { "usr/bin" }).join(tool)
}

/// As one word of a shell.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_is_one_word_for_the_shell() {
        assert_eq!(quoted("it's $HOME"), r"'it'\''s $HOME'");
    }

    #[test]
    fn a_failed_binary_does_not_keep_the_next_from_running() {
        let binary = |name: &str| TestBinary {
            package: "hextet-tests".to_owned(),
            target: name.to_owned(),
            integration: true,
            executable: PathBuf::from(format!("/t/{name}")),
            folder: PathBuf::from("/s/tests"),
        };
        let script = script(&[binary("pods"), binary("nodes")], Some("ping"));
        assert!(script.contains("'/t/pods' --test-threads=2 --show-output 'ping' || status=1"), "{script}");
        assert!(script.contains("'/t/nodes'"), "{script}");
        assert!(script.ends_with("exit $status\n"), "{script}");
    }
}
