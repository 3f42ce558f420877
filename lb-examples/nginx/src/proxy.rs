//! nginx: a configuration is written, tested and brought into effect, or the one before it stays.
//!
//! Two forms. A *managed* nginx is started by this program, with all its files in the state directory; it is
//! not its child, so that it serves on when this program is killed, and is found again by its pid file. An
//! *external* nginx is somebody else's: this program writes one file and runs two commands.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context as _, bail};
use tokio::{
    process::Command,
    time::{Instant, sleep, timeout},
};
use tracing::{info, warn};

use crate::state::{StateDir, replace};

/// How long a command of nginx may take.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a managed nginx may take to have new workers after a reload.
const RELOAD_TIMEOUT: Duration = Duration::from_secs(10);

const POLL: Duration = Duration::from_millis(5);

/// The most of a command's output that is repeated in an error.
const OUTPUT_LEN_MAX: usize = 500;

/// The nginx that is kept up to date.
#[derive(Debug)]
pub(crate) struct Proxy {
    /// The file that is written.
    output: PathBuf,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    External { test: String, reload: String },
    Managed { program: PathBuf, folder: PathBuf },
}

impl Proxy {
    pub(crate) fn external(output: PathBuf, test: String, reload: String) -> Proxy {
        Proxy { output, kind: Kind::External { test, reload } }
    }

    pub(crate) fn managed(program: PathBuf, state: &StateDir) -> anyhow::Result<Proxy> {
        let folder = state.file("nginx");
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let output = folder.join("pods.conf");
        let conf = folder.join("nginx.conf");
        replace(&conf, main_conf(&folder).as_bytes())
            .with_context(|| format!("cannot write {}", conf.display()))?;
        Ok(Proxy { output, kind: Kind::Managed { program, folder } })
    }

    /// Brings `text` into effect. When it returns `Ok`, new connections go by it.
    ///
    /// # Errors
    /// nginx cannot read it or cannot be told; the file that was there is back.
    pub(crate) async fn apply(&self, text: &str) -> anyhow::Result<()> {
        let before = read_if_any(&self.output).with_context(|| cannot("read", &self.output))?;
        let same = before.as_deref() == Some(text.as_bytes());
        if same && self.is_running() {
            return Ok(());
        }
        replace(&self.output, text.as_bytes()).with_context(|| cannot("write", &self.output))?;
        if let Err(error) = self.test().await {
            self.put_back(before.as_deref());
            return Err(error.context("nginx does not accept the configuration"));
        }
        if let Err(error) = self.reload().await {
            self.put_back(before.as_deref());
            return Err(error.context("nginx does not take up the configuration"));
        }
        Ok(())
    }

    /// Starts a managed nginx that has ended.
    pub(crate) async fn keep_running(&self) {
        if self.is_running() {
            return;
        }
        warn!("nginx is not running: starting it");
        if let Err(error) = self.reload().await {
            warn!("cannot start nginx: {error:#}");
        }
    }

    /// Ends a managed nginx once its requests are answered.
    pub(crate) async fn stop(&self) {
        let Kind::Managed { .. } = self.kind else { return };
        if !self.is_running() {
            return;
        }
        match self.nginx(&["-s", "quit"]).await {
            Ok(()) => info!("nginx was told to end"),
            Err(error) => warn!("cannot end nginx: {error:#}"),
        }
    }

    async fn test(&self) -> anyhow::Result<()> {
        match &self.kind {
            Kind::External { test, .. } => shell(test).await,
            Kind::Managed { .. } => self.nginx(&["-t", "-q"]).await,
        }
    }

    async fn reload(&self) -> anyhow::Result<()> {
        match &self.kind {
            Kind::External { reload, .. } => shell(reload).await,
            Kind::Managed { folder, .. } => match master(folder) {
                Some(pid) => {
                    let before = workers(pid);
                    self.nginx(&["-s", "reload"]).await?;
                    new_workers(pid, &before).await
                }
                None => self.nginx(&[]).await,
            },
        }
    }

    async fn nginx(&self, args: &[&str]) -> anyhow::Result<()> {
        let Kind::Managed { program, folder } = &self.kind else { return Ok(()) };
        let mut command = Command::new(program);
        // Until the configuration is read, errors would go to a log that may not be there.
        command.arg("-e").arg(folder.join("error.log"));
        command.arg("-p").arg(folder).arg("-c").arg(folder.join("nginx.conf")).args(args);
        finish(command, &program.display().to_string()).await
    }

    /// An external nginx is its owner's to run.
    fn is_running(&self) -> bool {
        match &self.kind {
            Kind::External { .. } => true,
            Kind::Managed { folder, .. } => master(folder).is_some(),
        }
    }

    fn put_back(&self, before: Option<&[u8]>) {
        let done = match before {
            Some(bytes) => replace(&self.output, bytes),
            None => fs::remove_file(&self.output),
        };
        if let Err(error) = done {
            warn!("cannot put back {}: {error}", self.output.display());
        }
    }
}

fn cannot(what: &str, path: &Path) -> String {
    format!("cannot {what} {}", path.display())
}

/// The whole configuration of a managed nginx but the pods.
fn main_conf(folder: &Path) -> String {
    let folder = folder.display();
    format!(
        "# Written by lb-nginx at its start.
worker_processes auto;
worker_shutdown_timeout 60s;
pid {folder}/nginx.pid;
error_log {folder}/error.log warn;
events {{
    worker_connections 4096;
}}
http {{
    access_log off;
    server_tokens off;
    client_body_temp_path {folder}/client_body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    include {folder}/pods.conf;
}}
"
    )
}

fn read_if_any(path: &Path) -> io::Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

async fn shell(line: &str) -> anyhow::Result<()> {
    let mut command = Command::new("/bin/sh");
    command.arg("-c").arg(line);
    finish(command, line).await
}

/// Runs a command to its end; its output is part of the error.
async fn finish(mut command: Command, name: &str) -> anyhow::Result<()> {
    command.stdin(Stdio::null()).kill_on_drop(true);
    let output = timeout(COMMAND_TIMEOUT, command.output())
        .await
        .with_context(|| format!("`{name}` did not end within {} s", COMMAND_TIMEOUT.as_secs()))?
        .with_context(|| format!("cannot run `{name}`"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said: String = said.trim().chars().take(OUTPUT_LEN_MAX).collect();
    bail!("`{name}` ended with {}: {said}", output.status)
}

/// The process id of a managed nginx that runs.
fn master(folder: &Path) -> Option<u32> {
    let pid: u32 = fs::read_to_string(folder.join("nginx.pid")).ok()?.trim().parse().ok()?;
    let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    // The pid may be another program's by now; that one would not name our folder.
    let ours = folder.to_str()?.as_bytes();
    let names_folder = command.windows(ours.len()).any(|window| window == ours);
    (command.starts_with(b"nginx: master") && names_folder).then_some(pid)
}

/// The workers that take connections.
fn workers(master: u32) -> BTreeSet<u32> {
    let children = fs::read_to_string(format!("/proc/{master}/task/{master}/children")).unwrap_or_default();
    let serves = |pid: &u32| {
        let title = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        title.starts_with("nginx: worker process") && !title.contains("shutting down")
    };
    children.split_whitespace().filter_map(|pid| pid.parse().ok()).filter(serves).collect()
}

/// Waits until none of the workers from before takes connections.
///
/// `nginx -s reload` returns when the signal is sent. A pod that is acknowledged as gone must get no new
/// connection, so the workers with the old configuration have to be on their way out.
async fn new_workers(master: u32, before: &BTreeSet<u32>) -> anyhow::Result<()> {
    let deadline = Instant::now() + RELOAD_TIMEOUT;
    loop {
        let now = workers(master);
        if now.is_disjoint(before) && (!now.is_empty() || before.is_empty()) {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!("it kept its old workers for {} s: see its error.log", RELOAD_TIMEOUT.as_secs());
        }
        sleep(POLL).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn external(folder: &Path, test: &str, reload: &str) -> Proxy {
        Proxy::external(folder.join("pods.conf"), test.into(), reload.into())
    }

    #[tokio::test]
    async fn a_configuration_that_fails_its_test_is_put_back() {
        let folder = tempfile::tempdir().unwrap();
        let reloads = folder.path().join("reloads");
        let reload = format!("echo >> {}", reloads.display());
        let test = format!("! grep bad {}/pods.conf", folder.path().display());
        let proxy = external(folder.path(), &test, &reload);

        let error = proxy.apply("bad").await.unwrap_err();
        assert!(format!("{error:#}").contains("does not accept"), "{error:#}");
        assert!(!folder.path().join("pods.conf").exists(), "there was none before");

        proxy.apply("good").await.unwrap();
        proxy.apply("bad").await.unwrap_err();
        assert_eq!(fs::read_to_string(folder.path().join("pods.conf")).unwrap(), "good");
        assert_eq!(fs::read_to_string(&reloads).unwrap().len(), 1);
    }

    #[tokio::test]
    async fn what_is_in_effect_is_not_reloaded() {
        let folder = tempfile::tempdir().unwrap();
        let reloads = folder.path().join("reloads");
        let proxy = external(folder.path(), "true", &format!("echo >> {}", reloads.display()));
        proxy.apply("good").await.unwrap();
        proxy.apply("good").await.unwrap();
        assert_eq!(fs::read_to_string(&reloads).unwrap().len(), 1);
    }

    #[tokio::test]
    async fn a_failed_reload_says_what_the_command_said() {
        let folder = tempfile::tempdir().unwrap();
        let proxy = external(folder.path(), "true", "echo no such nginx >&2; exit 3");
        let error = format!("{:#}", proxy.apply("good").await.unwrap_err());
        assert!(error.contains("no such nginx") && error.contains("exit status: 3"), "{error}");
        assert!(!folder.path().join("pods.conf").exists());
    }
}
