//! Builds the BPF object and puts it at `$OUT_DIR/hextet.o`.
//!
//! The compiler is the first of
//! 1. `$HEXTET_BPF_PREBUILT`: an object file, copied as it is;
//! 2. `$HEXTET_BPF_RUSTC`: a rustc whose sysroot has the library source;
//! 3. rustup's nightly with rust-src, the ordinary way of aya;
//! 4. `/usr/bin/rustc` with library source (Debian's rustc-web and rust-web-src).
//!
//! The linker is `$HEXTET_BPF_LINKER`, else `target/bpf-tools/bin/bpf-linker`, else the one in `$PATH`.
//! `cargo xtask setup` installs what is missing. It does not build the host's half of anything.

use std::{
    env,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::{Command, exit},
};

const PACKAGE: &str = "dataplane-ebpf";
const BINARY: &str = "hextet";
const TARGET: &str = "bpfel-unknown-none";
const VARIABLES: [&str; 3] = ["HEXTET_BPF_PREBUILT", "HEXTET_BPF_RUSTC", "HEXTET_BPF_LINKER"];

fn main() {
    if let Err(message) = build() {
        eprintln!("error: {message}");
        exit(1);
    }
}

fn build() -> Result<(), String> {
    let top = workspace();
    for variable in VARIABLES {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    for source in ["dataplane-ebpf", "dataplane-common", "Cargo.toml", "Cargo.lock"] {
        println!("cargo::rerun-if-changed={}", top.join(source).display());
    }
    let out_dir = PathBuf::from(variable("OUT_DIR"));
    let built = match env::var_os("HEXTET_BPF_PREBUILT") {
        Some(object) => {
            println!("cargo::rerun-if-changed={}", Path::new(&object).display());
            PathBuf::from(object)
        }
        None => compile(&top, &out_dir)?,
    };
    fs::copy(&built, out_dir.join("hextet.o"))
        .map(drop)
        .map_err(|e| format!("cannot copy the BPF object {}: {e}", built.display()))
}

fn workspace() -> PathBuf {
    let parent = Path::new(&variable("CARGO_MANIFEST_DIR")).join("..");
    fs::canonicalize(parent).expect("the package lies in the workspace")
}

/// Of a variable that cargo always sets for build scripts.
fn variable(name: &str) -> OsString {
    env::var_os(name).unwrap_or_else(|| panic!("cargo sets {name}"))
}

fn compile(top: &Path, out_dir: &Path) -> Result<PathBuf, String> {
    let compiler = Compiler::find()?;
    let target = target_dir(top, out_dir);
    let linker = find_linker(&target)?;
    // A folder of its own: the outer cargo holds the lock of the other while this runs. One for all
    // profiles, so that core is compiled once.
    let bpf_target = target.join("bpf");
    let mut cargo = Command::new(variable("CARGO"));
    cargo
        .args(["build", "--release", "-Zbuild-std=core", "--bins", "--target", TARGET])
        .args(["--package", PACKAGE, "--manifest-path"])
        .arg(top.join("Cargo.toml"))
        .arg("--target-dir")
        .arg(&bpf_target)
        .env("RUSTC", &compiler.rustc)
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER", linker)
        .env("CARGO_ENCODED_RUSTFLAGS", rustflags(top, &compiler)?.join("\x1f"));
    for outer in ["RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER", "RUSTFLAGS", "CARGO_BUILD_TARGET"] {
        cargo.env_remove(outer);
    }
    match cargo.status() {
        Ok(status) if status.success() => Ok(bpf_target.join(TARGET).join("release").join(BINARY)),
        Ok(status) => Err(format!(
            "the BPF object does not build with {} ({status}); if a tool is missing, run `cargo xtask setup`",
            compiler.rustc.display()
        )),
        Err(e) => Err(format!("cannot run cargo for the BPF object: {e}")),
    }
}

/// The workspace's target folder: `OUT_DIR` is `<target>/[<triple>/]<profile>/build/<package>/out`.
fn target_dir(top: &Path, out_dir: &Path) -> PathBuf {
    let above = out_dir.ancestors().skip(4).take(2);
    above
        .into_iter()
        .find(|d| d.join("CACHEDIR.TAG").exists())
        .map_or_else(|| top.join("target"), Path::to_owned)
}

/// A compiler that can build core for the BPF target.
struct Compiler {
    rustc: PathBuf,
    /// Its library source.
    source: PathBuf,
}

impl Compiler {
    fn find() -> Result<Compiler, String> {
        if let Some(rustc) = env::var_os("HEXTET_BPF_RUSTC") {
            let rustc = PathBuf::from(rustc);
            return Self::with_source(&rustc).ok_or_else(|| {
                format!("HEXTET_BPF_RUSTC={} has no library source for -Zbuild-std", rustc.display())
            });
        }
        let nightly = output(Command::new("rustup").args(["which", "--toolchain", "nightly", "rustc"]));
        [nightly.map(PathBuf::from), Some(PathBuf::from("/usr/bin/rustc"))]
            .into_iter()
            .flatten()
            .find_map(|rustc| Self::with_source(&rustc))
            .ok_or_else(|| "no compiler with library source for BPF: run `cargo xtask setup`".to_owned())
    }

    fn with_source(rustc: &Path) -> Option<Compiler> {
        let sysroot = output(Command::new(rustc).args(["--print", "sysroot"]))?;
        let source = Path::new(&sysroot).join("lib/rustlib/src/rust");
        let found = source.join("library/core/src/lib.rs").exists();
        found.then(|| Compiler { rustc: rustc.to_owned(), source })
    }
}

fn find_linker(target: &Path) -> Result<PathBuf, String> {
    if let Some(linker) = env::var_os("HEXTET_BPF_LINKER") {
        return Ok(linker.into());
    }
    let installed = target.join("bpf-tools/bin/bpf-linker");
    let in_path = env::var_os("PATH").into_iter().flat_map(|p| env::split_paths(&p).collect::<Vec<_>>());
    let mut candidates = vec![installed];
    candidates.extend(in_path.map(|dir| dir.join("bpf-linker")));
    candidates
        .into_iter()
        .find(|linker| linker.exists())
        .ok_or_else(|| "bpf-linker is not installed: run `cargo xtask setup`".to_owned())
}

fn rustflags(top: &Path, compiler: &Compiler) -> Result<Vec<String>, String> {
    let arch = variable("CARGO_CFG_TARGET_ARCH").into_string().map_err(|_| "strange target")?;
    let cargo_home = env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| env::var_os("HOME").map(|home| Path::new(&home).join(".cargo")));
    let real_source = fs::canonicalize(&compiler.source).unwrap_or_else(|_| compiler.source.clone());
    let mut flags = vec![
        format!("--cfg=bpf_target_arch=\"{arch}\""),
        // BTF is made from the debug info.
        "-Cdebuginfo=2".to_owned(),
        "-Clink-arg=--btf".to_owned(),
        // The same bytes wherever the checkout is. LLVM copies source lines into .BTF.ext when it finds the
        // files, so they are remapped to where none are.
        remap(top, "/_/src"),
        remap(&compiler.source, "/_/rust"),
        remap(&real_source, "/_/rust"),
    ];
    flags.extend(cargo_home.map(|home| remap(&home.join("registry/src"), "/_/registry")));
    Ok(flags)
}

fn remap(from: &Path, to: &str) -> String {
    format!("--remap-path-prefix={}={to}", from.display())
}

/// What a command prints, run as from a plain shell: without the settings of this cargo.
fn output(command: &mut Command) -> Option<String> {
    let output = command.env_remove("RUSTC").env_remove("RUSTUP_TOOLCHAIN").output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
