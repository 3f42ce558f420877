//! Debian packages, downloaded and unpacked under `target/vm` and never installed. Delete that folder to get
//! newer ones.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

use crate::{process, workspace::Workspace};

/// What the simulated installation names and a program never needs.
const NEVER_NEEDED: [&str; 2] = ["linux-perf", "linux-libc-dev"];

/// The folder of unpacked packages.
pub(super) struct Store {
    folder: PathBuf,
}

/// QEMU and the libraries that came with it; `root` is `/` for an installed one.
pub(super) struct Qemu {
    pub(super) program: PathBuf,
    pub(super) root: PathBuf,
}

/// A kernel image and the tree that holds its modules.
pub(super) struct Kernel {
    /// As `uname -r` says it, such as `6.1.0-50-cloud-amd64`.
    pub(super) release: String,
    pub(super) root: PathBuf,
}

impl Store {
    /// Opens `target/vm`.
    pub(super) fn open(workspace: &Workspace) -> Result<Self> {
        let folder = workspace.target().join("vm");
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        Ok(Self { folder })
    }

    /// A folder for what is derived from packages.
    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    /// QEMU: the installed one, or Debian's.
    pub(super) fn qemu(&self) -> Result<Qemu> {
        let name = "qemu-system-x86_64";
        if let Some(program) = process::find_program(name) {
            return Ok(Qemu { program, root: PathBuf::from("/") });
        }
        let root = self.unpacked("qemu", || needed_packages(&["qemu-system-x86"]))?;
        Ok(Qemu { program: root.join("usr/bin").join(name), root })
    }

    /// A program to handle kernel modules with: `depmod`, `modprobe` and the others are names of it.
    pub(super) fn kmod(&self) -> Result<PathBuf> {
        if let Some(program) = process::find_program("kmod") {
            return Ok(program);
        }
        Ok(self.unpacked("kmod", || Ok(vec!["kmod".to_owned()]))?.join("bin/kmod"))
    }

    /// Debian's cloud kernel of this version: small, and with all of the networking.
    pub(super) fn kernel(&self, version: &str) -> Result<Kernel> {
        if !version.starts_with(|c: char| c.is_ascii_digit()) || version.contains('/') {
            bail!("a kernel is named by its version, such as 6.1 or 6.12, not `{version}`");
        }
        let root = self.unpacked(&format!("kernel-{version}"), || kernel_packages(version))?;
        let release =
            fs::read_dir(module_folder(&root)?)?.next().context("the kernel package holds no modules")??;
        Ok(Kernel { release: release.file_name().to_string_lossy().into_owned(), root })
    }

    /// Unpacks packages into a folder of their own, once.
    fn unpacked(&self, name: &str, packages: impl FnOnce() -> Result<Vec<String>>) -> Result<PathBuf> {
        self.kept(name, |folder| unpack(&packages()?, folder))
    }

    /// A folder that is filled once. One without the final mark was not filled to the end and is made again.
    fn kept(&self, name: &str, fill: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
        let folder = self.folder.join(name);
        let mark = folder.join(".complete");
        if mark.exists() {
            return Ok(folder);
        }
        _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        if let Err(error) = fill(&folder) {
            _ = fs::remove_dir_all(&folder);
            return Err(error);
        }
        fs::write(&mark, "").with_context(|| format!("cannot write {}", mark.display()))?;
        Ok(folder)
    }
}

impl Kernel {
    /// The file that the machine boots.
    pub(super) fn image(&self) -> Result<PathBuf> {
        let places = [
            self.root.join(format!("boot/vmlinuz-{}", self.release)),
            self.root.join(format!("usr/lib/modules/{}/vmlinuz", self.release)),
        ];
        places.into_iter().find(|path| path.exists()).context("the kernel package holds no image")
    }

    /// The folder of its modules.
    pub(super) fn modules(&self) -> Result<PathBuf> {
        Ok(module_folder(&self.root)?.join(&self.release))
    }
}

/// `lib/modules`, in `/usr` from Debian 13 on.
fn module_folder(root: &Path) -> Result<PathBuf> {
    let places = [root.join("lib/modules"), root.join("usr/lib/modules")];
    places.into_iter().find(|path| path.is_dir()).context("the kernel package holds no modules")
}

/// The package of the newest kernel of this version: Debian's metapackages depend on it.
fn kernel_packages(version: &str) -> Result<Vec<String>> {
    let start = format!("linux-image-{version}.");
    let metas = [format!("linux-image-{version}-cloud-amd64"), "linux-image-cloud-amd64".to_owned()];
    let image = metas.iter().flat_map(|meta| depends(meta)).find(|name| name.starts_with(&start));
    let Some(image) = image else {
        bail!(
            "apt knows no cloud kernel {version} (is the security suite in its sources? `apt-get update` reads them)"
        );
    };
    // From 7.0 on the image only depends on the packages that hold the files.
    let parts = ["linux-base-", "linux-binary-", "linux-modules-"];
    let rest = depends(&image).into_iter().filter(|name| parts.iter().any(|part| name.starts_with(part)));
    Ok(rest.chain([image.clone()]).collect())
}

fn depends(package: &str) -> Vec<String> {
    let shown = process::output(Command::new("apt-cache").args(["depends", package]).env("LC_ALL", "C"));
    let text = shown.unwrap_or_default();
    text.lines().filter_map(|line| line.trim().strip_prefix("Depends: ")).map(str::to_owned).collect()
}

/// What an installation of `packages` would bring onto this machine.
fn needed_packages(packages: &[&str]) -> Result<Vec<String>> {
    let mut command = Command::new("apt-get");
    command.args(["install", "--simulate", "--no-install-recommends"]).args(packages).env("LC_ALL", "C");
    let text = process::output(&mut command)?;
    let names = text.lines().filter_map(|line| line.strip_prefix("Inst ")?.split(' ').next());
    Ok(names.filter(|name| !NEVER_NEEDED.contains(name)).map(str::to_owned).collect())
}

fn unpack(packages: &[String], folder: &Path) -> Result<()> {
    let downloads = folder.join(".downloads");
    fs::create_dir_all(&downloads).with_context(|| format!("cannot make {}", downloads.display()))?;
    download(packages, &downloads)?;
    for package in fs::read_dir(&downloads)? {
        process::run(Command::new("dpkg").arg("-x").arg(package?.path()).arg(folder))?;
    }
    fs::remove_dir_all(&downloads).with_context(|| format!("cannot remove {}", downloads.display()))
}

/// Downloads into `folder`; once more with new lists when the old ones name packages that are gone.
fn download(packages: &[String], folder: &Path) -> Result<()> {
    if fetch(packages, folder).is_ok() {
        return Ok(());
    }
    if process::is_root() {
        process::run(Command::new("apt-get").args(["update", "--quiet"]))?;
    }
    fetch(packages, folder)
        .context("cannot download from Debian; are its package lists read (`apt-get update`)?")
}

fn fetch(packages: &[String], folder: &Path) -> Result<()> {
    // The sandbox user of apt may not enter a folder of root's.
    let options = ["-o", "APT::Sandbox::User=root", "--quiet=2", "download"];
    process::run(Command::new("apt-get").args(options).args(packages).current_dir(folder))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_that_is_no_version_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store { folder: folder.path().to_owned() };
        for version in ["latest", "../x", "6.1/../.."] {
            assert!(
                store.kernel(version).is_err_and(|error| error.to_string().contains("named by its version"))
            );
        }
    }

    #[test]
    fn a_folder_that_was_half_filled_is_made_again() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store { folder: folder.path().to_owned() };
        fs::create_dir_all(folder.path().join("tool/half")).unwrap();
        let tool = store.kept("tool", |tool| Ok(fs::write(tool.join("whole"), "")?)).unwrap();
        assert!(tool.join("whole").exists() && !tool.join("half").exists());
        assert_eq!(store.kept("tool", |_| bail!("filled twice")).unwrap(), tool);
    }

    #[test]
    fn a_folder_that_cannot_be_filled_is_not_left_behind() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store { folder: folder.path().to_owned() };
        let asked = store.unpacked("tool", || bail!("apt knows no such package"));
        assert_eq!(asked.unwrap_err().to_string(), "apt knows no such package");
        assert!(!folder.path().join("tool").exists());
    }
}
