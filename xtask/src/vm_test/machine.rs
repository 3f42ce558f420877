//! Boots a machine, reads what its tests print, and tells how they ended.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc::{self, Receiver, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use super::packages::{Kernel, Qemu};
use crate::{process, stage::Progress, test::tally::Tally};

/// Begins the line that names the binary whose output follows.
pub(super) const BINARY_MARK: &str = "==== ";

/// The variable that makes deadlines of tests longer: an emulated processor is about that much slower.
const TIME_SCALE: &str = "10";

/// Memory of a machine; everything is in its initramfs.
const MEMORY_MIB: &str = "2048";

/// Lines of a failed machine that are shown.
const TAIL_LINES: usize = 300;

/// One machine that will run once.
pub(super) struct Machine<'a> {
    pub(super) qemu: &'a Qemu,
    pub(super) kernel: &'a Kernel,
    pub(super) initramfs: &'a Path,
    pub(super) console: bool,
    /// Time for all tests; a machine that takes longer is ended.
    pub(super) limit: Duration,
}

/// Files beside the initramfs that one run writes.
struct Files {
    console: PathBuf,
    status: PathBuf,
    output: PathBuf,
}

impl Machine<'_> {
    /// Boots, and counts what the tests report. A machine that dies or never ends is an error.
    pub(super) fn run(&self, progress: &Progress) -> Result<Tally> {
        let files = self.files()?;
        let mut command = self.command(&files)?;
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start `{}`", process::text(&command)))?;
        let lines = lines_of(&mut child);
        let mut report = Report::new(self.kernel, File::create(&files.output)?);
        let ended = report.follow(&lines, Instant::now() + self.limit);
        if ended.is_err() {
            _ = child.kill();
        }
        let qemu = child.wait()?;
        let outcome = ended.and_then(|()| self.outcome(&files, qemu, &report.tally));
        if outcome.is_err() || !report.tally.is_good() {
            show_tail(&files.output);
        }
        outcome?;
        progress.say(&format!("kernel {}: {}", self.kernel.release, report.tally));
        Ok(report.tally)
    }

    fn files(&self) -> Result<Files> {
        let beside = |name: &str| self.initramfs.with_file_name(format!("{name}-{}", self.kernel.release));
        let files = Files { console: beside("console"), status: beside("status"), output: beside("output") };
        fs::write(&files.status, "").context("cannot write into target/vm")?;
        fs::write(&files.console, "").context("cannot write into target/vm")?;
        Ok(files)
    }

    fn command(&self, files: &Files) -> Result<Command> {
        let mut command = Command::new(&self.qemu.program);
        if self.qemu.root != Path::new("/") {
            let libraries =
                ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"].map(|dir| self.qemu.root.join(dir));
            command.env("LD_LIBRARY_PATH", std::env::join_paths(libraries)?);
            for firmware in ["usr/share/qemu", "usr/share/seabios"] {
                command.arg("-L").arg(self.qemu.root.join(firmware));
            }
        }
        command.args(["-M", "q35", "-smp", "2", "-m", MEMORY_MIB]).args(accelerator());
        command.args(["-nodefaults", "-no-reboot", "-display", "none"]);
        command.arg("-kernel").arg(self.kernel.image()?).arg("-initrd").arg(self.initramfs);
        command.args(["-append", &kernel_command_line()]);
        command.arg("-serial").arg(format!("file:{}", files.console.display()));
        command.args(["-chardev", "stdio,id=output,signal=off", "-serial", "chardev:output"]);
        command.arg("-serial").arg(format!("file:{}", files.status.display()));
        Ok(command)
    }

    /// Compares the exit status of the tests with what was counted.
    fn outcome(&self, files: &Files, qemu: ExitStatus, tally: &Tally) -> Result<()> {
        if self.console {
            eprintln!("{}", fs::read_to_string(&files.console).unwrap_or_default());
        }
        let status = fs::read_to_string(&files.status)?;
        match status.trim().strip_prefix("status=") {
            Some("0") => Ok(()),
            Some(_) if !tally.is_good() => Ok(()),
            Some(status) => bail!("the tests ended with status {status} and none of them failed"),
            None => {
                show_tail(&files.console);
                bail!("the machine died before the tests came to their end (QEMU: {qemu})")
            }
        }
    }
}

/// Where it is known to help. `/dev/kvm` alone proves nothing: it also opens where the processor has no
/// virtualisation, and then every instruction is interpreted.
fn accelerator() -> [&'static str; 4] {
    let processor = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let able = processor.split_whitespace().any(|flag| flag == "vmx" || flag == "svm");
    if able && fs::OpenOptions::new().write(true).open("/dev/kvm").is_ok() {
        ["-accel", "kvm", "-cpu", "host"]
    } else {
        ["-accel", "tcg,thread=multi", "-cpu", "max"]
    }
}

/// Without what costs seconds of an emulated boot. What the kernel does not know becomes the environment of
/// the first process, and so of the tests.
fn kernel_command_line() -> String {
    format!(
        "console=ttyS0 quiet loglevel=4 panic=-1 mitigations=off cryptomgr.notests \
         initcall_blacklist=crypto_kdf108_init 8250.nr_uarts=3 random.trust_cpu=1 \
         HEXTET_TEST_TIME_SCALE={TIME_SCALE}"
    )
}

/// What the tests print, as it comes.
struct Report {
    binary: String,
    tally: Tally,
    output: File,
}

impl Report {
    fn new(kernel: &Kernel, output: File) -> Self {
        Self { binary: format!("kernel {}", kernel.release), tally: Tally::default(), output }
    }

    fn follow(&mut self, lines: &Receiver<String>, deadline: Instant) -> Result<()> {
        loop {
            match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => self.line(&line)?,
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
                Err(RecvTimeoutError::Timeout) => bail!("the machine was not done in time"),
            }
        }
    }

    fn line(&mut self, line: &str) -> Result<()> {
        writeln!(self.output, "{line}").context("cannot write into target/vm")?;
        if let Some(name) = line.strip_prefix(BINARY_MARK) {
            name.clone_into(&mut self.binary);
            eprintln!("  {name}");
        } else if self.tally.read(&self.binary, line) {
            eprintln!("    {line}");
        }
        Ok(())
    }
}

fn lines_of(child: &mut Child) -> Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    let stdout = child.stdout.take().expect("stdout is piped");
    thread::spawn(move || {
        for line in BufReader::new(stdout).split(b'\n').map_while(Result::ok) {
            let text = String::from_utf8_lossy(&line);
            if sender.send(text.trim_end_matches('\r').to_owned()).is_err() {
                return;
            }
        }
    });
    receiver
}

fn show_tail(path: &Path) {
    let text = String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned();
    let lines: Vec<_> = text.lines().collect();
    eprintln!("---- the last lines of {}", path.display());
    lines[lines.len().saturating_sub(TAIL_LINES)..].iter().for_each(|line| eprintln!("{line}"));
    eprintln!("----");
}
