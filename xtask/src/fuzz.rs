//! `cargo xtask fuzz`: replays the corpus, then lets each fuzzer of `fuzz/` look for an input that breaks its
//! property.
//!
//! It needs what the compiler of this checkout and a C++ compiler can do, and neither cargo-fuzz nor a nightly: the
//! code under test is safe, so that no sanitizer is missed. The same targets work with cargo-fuzz.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    time::Duration,
};

use anyhow::{Context, Result, bail};

use crate::{process, stage::Progress, workspace::Workspace};

/// The package with the properties and the replay.
const PROPERTIES: &str = "hextet-properties";

/// Coverage, as libFuzzer reads it; the flags of cargo-fuzz without a sanitizer.
const FLAGS: [&str; 7] = [
    "--cfg=fuzzing",
    "-Ccodegen-units=1",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
];

/// Inputs are no longer than this: packets are shorter, and so are the job files that people write.
const INPUT_LEN_MAX: u32 = 4096;

/// One input takes microseconds; one that takes longer is a finding.
const INPUT_SECONDS_MAX: u32 = 5;

/// What is kept is read at every test run: so many inputs for each target, the smallest first.
const KEPT_MAX: usize = 120;

/// And none that is longer.
const KEPT_LEN_MAX: u64 = 512;

/// Arguments of `fuzz`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// How long each fuzzer runs
    #[arg(long, default_value_t = 30)]
    seconds: u64,
    /// Only these fuzzers, by the names of fuzz/fuzz_targets/
    targets: Vec<String>,
    /// Keeps what was found in fuzz/corpus/: few and small inputs that reach what the others do not
    #[arg(long)]
    keep: bool,
}

/// Replays, builds and fuzzes.
pub(crate) fn run(workspace: &Workspace, args: &Args) -> Result<ExitCode> {
    let progress = Progress::start();
    progress.stage("replaying the corpus", || {
        process::run(workspace.cargo("test").args(["--quiet", "--package", PROPERTIES]))
    })?;
    let targets = chosen(workspace, &args.targets)?;
    run_targets(workspace, &progress, &targets, Duration::from_secs(args.seconds), args.keep)?;
    Ok(ExitCode::SUCCESS)
}

/// For `cargo xtask test`, which has replayed the corpus by then: a short run of each, or why there is none.
pub(crate) fn short(workspace: &Workspace, progress: &Progress) -> Result<Option<String>> {
    const SECONDS: u64 = 3;
    if let Some(reason) = cannot_build() {
        return Ok(Some(reason));
    }
    let targets = chosen(workspace, &[])?;
    run_targets(workspace, progress, &targets, Duration::from_secs(SECONDS), false)?;
    Ok(None)
}

/// Why the fuzzers cannot be built here.
fn cannot_build() -> Option<String> {
    let has_compiler = env::var_os("CXX").is_some()
        || ["c++", "g++", "clang++"].iter().any(|name| process::find_program(name).is_some());
    (!has_compiler).then(|| "a C++ compiler for libFuzzer (apt-get install g++)".to_owned())
}

/// The names of the targets: all of them, or those that were asked for.
fn chosen(workspace: &Workspace, wanted: &[String]) -> Result<Vec<String>> {
    let folder = workspace.root().join("fuzz/fuzz_targets");
    let entries = fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let mut all = Vec::new();
    for entry in entries {
        all.extend(entry?.path().file_stem().and_then(|stem| stem.to_str()).map(str::to_owned));
    }
    all.sort();
    if let Some(unknown) = wanted.iter().find(|name| !all.contains(name)) {
        bail!("there is no fuzzer {unknown}: choose from {}", all.join(", "));
    }
    Ok(if wanted.is_empty() { all } else { wanted.to_vec() })
}

fn run_targets(
    workspace: &Workspace,
    progress: &Progress,
    targets: &[String],
    each: Duration,
    keep: bool,
) -> Result<()> {
    if let Some(reason) = cannot_build() {
        bail!("the fuzzers need {reason}");
    }
    let programs = progress.stage("building the fuzzers", || build(workspace))?;
    for target in targets {
        let name = format!("fuzzing {target} for {} s", each.as_secs());
        let fuzzer = Fuzzer { workspace, program: programs.join(target), target };
        progress.stage(&name, || fuzzer.run(each))?;
        if keep {
            progress.stage("keeping what covers most", || fuzzer.keep())?;
        }
    }
    Ok(())
}

/// Builds them into a folder of their own, because of the flags, and gives the folder of the programs.
fn build(workspace: &Workspace) -> Result<PathBuf> {
    let host = host()?;
    let target_dir = workspace.target().join("fuzz");
    let mut command = workspace.cargo("build");
    command.args([
        "--release",
        "--bins",
        "--locked",
        "--manifest-path",
        "fuzz/Cargo.toml",
        "--target",
        &host,
    ]);
    command.arg("--target-dir").arg(&target_dir).env("CARGO_ENCODED_RUSTFLAGS", FLAGS.join("\x1f"));
    process::run(&mut command)?;
    Ok(target_dir.join(host).join("release"))
}

/// With `--target`, build scripts and macros are built without the flags.
fn host() -> Result<String> {
    let version = process::output(Command::new("rustc").arg("-vV"))?;
    let host = version.lines().find_map(|line| line.strip_prefix("host: "));
    Ok(host.context("`rustc -vV` names no host")?.to_owned())
}

struct Fuzzer<'a> {
    workspace: &'a Workspace,
    program: PathBuf,
    target: &'a str,
}

impl Fuzzer<'_> {
    /// Starts from the corpus, and keeps what it finds apart from it.
    fn run(&self, time: Duration) -> Result<()> {
        let found = self.folder("fuzz-found")?;
        let broken = self.folder("fuzz-broken")?;
        let mut command = Command::new(&self.program);
        command.arg(format!("-max_total_time={}", time.as_secs()));
        command.args([format!("-max_len={INPUT_LEN_MAX}"), format!("-timeout={INPUT_SECONDS_MAX}")]);
        command.arg(format!("-artifact_prefix={}/", broken.display()));
        let output = command.arg(found).arg(self.corpus()).output().context("cannot start the fuzzer")?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            bail!(
                "{} found an input that breaks its property; it is in {}:\n{said}",
                self.target,
                broken.display()
            );
        }
        Ok(())
    }

    /// Makes the corpus anew: the inputs that have a name, and few and small ones that reach what these do not.
    fn keep(&self) -> Result<()> {
        let least = self.folder("fuzz-least")?;
        fs::remove_dir_all(&least).with_context(|| format!("cannot remove {}", least.display()))?;
        let least = self.folder("fuzz-least")?;
        let found = self.folder("fuzz-found")?;
        for name in names(&self.corpus())?.iter().filter(|name| is_hash(name)) {
            fs::rename(self.corpus().join(name), found.join(name))?;
        }
        let mut command = Command::new(&self.program);
        command.args(["-set_cover_merge=1", &format!("-max_len={KEPT_LEN_MAX}")]);
        process::output(command.arg(&least).arg(self.corpus()).arg(&found))?;
        let mut kept = Vec::new();
        for name in names(&least)? {
            kept.push((fs::metadata(least.join(&name))?.len(), name));
        }
        kept.sort();
        kept.retain(|(len, name)| *len <= KEPT_LEN_MAX && !self.has_input(&least.join(name)));
        for (_, name) in kept.iter().take(KEPT_MAX) {
            fs::copy(least.join(name), self.corpus().join(name))?;
        }
        Ok(())
    }

    /// Whether the corpus holds these bytes, under whatever name.
    fn has_input(&self, file: &Path) -> bool {
        let is_same = |name: &String| fs::read(self.corpus().join(name)).ok() == fs::read(file).ok();
        names(&self.corpus()).is_ok_and(|names| names.iter().any(is_same))
    }

    fn corpus(&self) -> PathBuf {
        self.workspace.root().join("fuzz/corpus").join(self.target)
    }

    fn folder(&self, kind: &str) -> Result<PathBuf> {
        let folder = self.workspace.target().join(kind).join(self.target);
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        Ok(folder)
    }
}

/// What libFuzzer calls its inputs; what has another name was put there by a person and stays.
fn is_hash(name: &str) -> bool {
    name.len() == 40 && name.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn names(folder: &Path) -> Result<Vec<String>> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    names.collect()
}
