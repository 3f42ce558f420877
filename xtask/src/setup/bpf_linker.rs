//! bpf-linker, built against the LLVM that the compiler brings, into `target/bpf-tools`.

use std::{
    env, fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

use super::bpf_compiler::BpfCompiler;
use crate::{
    process::{self, succeeds},
    workspace::Workspace,
};

const VERSION: &str = "0.13.0";

/// Builds the linker unless there is one that starts and was built for this LLVM. Tells whether it did.
pub(super) fn ensure(workspace: &Workspace, compiler: &BpfCompiler) -> Result<bool> {
    let tools = workspace.bpf_tools();
    let built_for = tools.join("llvm-major");
    let program = tools.join("bin/bpf-linker");
    // A linker without the note was put there by hand: it is believed.
    let fits = fs::read_to_string(&built_for).map_or(true, |text| text == compiler.llvm_major.to_string());
    if fits && succeeds(Command::new(&program).arg("--version")) {
        return Ok(false);
    }
    if !program.exists() && succeeds(Command::new("bpf-linker").arg("--version")) {
        return Ok(false);
    }
    install(workspace, compiler, &tools)?;
    fs::write(&built_for, compiler.llvm_major.to_string()).context("cannot write into target/bpf-tools")?;
    Ok(true)
}

fn install(workspace: &Workspace, compiler: &BpfCompiler, tools: &Path) -> Result<()> {
    println!(
        "setup: building bpf-linker {VERSION} for LLVM {} of {} (about a minute)",
        compiler.llvm_major,
        compiler.rustc.display()
    );
    let library = find_llvm(compiler)?;
    let prefix = tools.join("llvm");
    link_llvm(&library, &prefix)?;
    // What an interrupted run left here is continued, and removed at the end.
    let build = tools.join("build");
    process::run(&mut cargo_install(workspace, compiler, &library, &prefix, &build))
        .context("cannot build bpf-linker; `cargo binstall bpf-linker` gets one that is ready")?;
    fs::remove_dir_all(&build).context("cannot remove target/bpf-tools/build")
}

fn cargo_install(
    workspace: &Workspace,
    compiler: &BpfCompiler,
    library: &Path,
    prefix: &Path,
    build: &Path,
) -> Command {
    let mut command = workspace.cargo("install");
    command
        .args(["bpf-linker", "--quiet", "--force", "--locked", "--version", VERSION])
        .args(["--no-default-features", "--features", &format!("llvm-{}", compiler.llvm_major)])
        .arg("--root")
        .arg(workspace.bpf_tools())
        .env("LLVM_PREFIX", prefix)
        .env("CARGO_TARGET_DIR", build)
        // It runs for two seconds a build: compile time counts, speed does not.
        .env("CARGO_PROFILE_RELEASE_DEBUG", "0")
        .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "0");
    if let Some(folder) = library.parent().filter(|folder| folder.starts_with(&compiler.sysroot)) {
        command.env("RUSTFLAGS", format!("-Clink-arg=-Wl,-rpath,{}", folder.display()));
    }
    command
}

/// `lib/libLLVM.so` is all that bpf-linker's build needs of an LLVM installation; llvm-dev would be 585 MB.
fn link_llvm(library: &Path, prefix: &Path) -> Result<()> {
    let folder = prefix.join("lib");
    let link = folder.join("libLLVM.so");
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    if link.is_symlink() {
        fs::remove_file(&link).with_context(|| format!("cannot remove {}", link.display()))?;
    }
    symlink(library, &link).with_context(|| format!("cannot link {}", link.display()))
}

/// The shared library of the compiler's LLVM: the system's, or the one in the toolchain's own folder.
fn find_llvm(compiler: &BpfCompiler) -> Result<PathBuf> {
    let major = compiler.llvm_major;
    let system = PathBuf::from(format!("/usr/lib/{}-linux-gnu", env::consts::ARCH));
    let folders = [system, PathBuf::from("/usr/lib64"), compiler.sysroot.join("lib")];
    let found = folders.iter().find_map(|folder| newest_llvm(folder, major));
    match found {
        Some(library) => Ok(library),
        None => bail!(
            "there is no libLLVM.so.{major}, which {} uses, to build bpf-linker with; \
             `cargo binstall bpf-linker` gets one that is ready",
            compiler.rustc.display()
        ),
    }
}

fn newest_llvm(folder: &Path, major: u32) -> Option<PathBuf> {
    let start = format!("libLLVM.so.{major}.");
    let names = fs::read_dir(folder).ok()?.flatten().map(|entry| entry.path());
    names.filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&start))).max()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_library_of_another_major_is_not_taken() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("libLLVM.so.14.0"), "").unwrap();
        fs::write(folder.path().join("libLLVM.so.22.1-rust-1.97.0-nightly"), "").unwrap();
        assert_eq!(newest_llvm(folder.path(), 14), Some(folder.path().join("libLLVM.so.14.0")));
        assert_eq!(newest_llvm(folder.path(), 15), None);
        assert!(newest_llvm(folder.path(), 22).is_some());
    }

    #[test]
    fn a_stale_link_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        for version in ["a", "b"] {
            link_llvm(Path::new(version), folder.path()).unwrap();
        }
        assert_eq!(fs::read_link(folder.path().join("lib/libLLVM.so")).unwrap(), Path::new("b"));
    }
}
