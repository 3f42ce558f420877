//! A server process whose file was damaged while it was off, and what `netctl` says about it.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

const DEADLINE: Duration = Duration::from_secs(20);

struct Server {
    child: Child,
    dir: PathBuf,
    log: PathBuf,
}

impl Server {
    fn start(dir: &Path) -> Server {
        let log = dir.join("server.log");
        let child = Command::new(env!("CARGO_BIN_EXE_netctl"))
            .args(["server", "--listen", "[::1]:0", "--state-dir"])
            .arg(dir.join("state"))
            .arg("--socket")
            .arg(dir.join("server.sock"))
            .stdout(Stdio::null())
            .stderr(fs::File::create(&log).unwrap())
            .spawn()
            .unwrap();
        let mut server = Server { child, dir: dir.to_owned(), log };
        let begin = Instant::now();
        while !server.lines().iter().any(|line| line.contains("server ready")) {
            assert!(server.child.try_wait().unwrap().is_none(), "it has ended: {:#?}", server.lines());
            assert!(begin.elapsed() < DEADLINE, "{:#?}", server.lines());
            std::thread::sleep(Duration::from_millis(20));
        }
        server
    }

    fn lines(&self) -> Vec<String> {
        BufReader::new(fs::File::open(&self.log).unwrap()).lines().map(Result::unwrap).collect()
    }

    fn run(&self, args: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_netctl"));
        command.args(args).arg("--socket").arg(self.dir.join("server.sock")).output().unwrap()
    }

    /// What a command prints on stdout; it must succeed.
    fn shown(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(output.status.success(), "{args:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// What a command says on stderr; it must fail.
    fn refused(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {output:?}");
        String::from_utf8(output.stderr).unwrap()
    }

    fn apply(&self, job: &str, count: u32) -> Vec<String> {
        let file = self.dir.join("job.yaml");
        let text =
            format!("job: {job}\ngroups: {{web: {{count: {count}, tasks: {{t: {{exec: [/bin/true]}}}}}}}}\n");
        fs::write(&file, text).unwrap();
        ["apply", "-f", file.to_str().unwrap()].map(str::to_owned).to_vec()
    }

    fn end(mut self) {
        Command::new("kill").arg(self.child.id().to_string()).status().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // One that has ended needs no killing.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn applied(server: &Server, job: &str, count: u32) {
    let args = server.apply(job, count);
    server.shown(&args.iter().map(String::as_str).collect::<Vec<_>>());
}

/// Turns a bit in every place of the file that has this text.
fn hurt(file: &Path, text: &str) -> Vec<u8> {
    let mut bytes = fs::read(file).unwrap();
    let places: Vec<usize> =
        (0..bytes.len() - text.len()).filter(|at| bytes[*at..].starts_with(text.as_bytes())).collect();
    assert!(!places.is_empty(), "{text} is nowhere");
    places.into_iter().for_each(|at| bytes[at] ^= 0x04);
    fs::write(file, &bytes).unwrap();
    bytes
}

/// `netctl server restore` into a new folder.
fn restore(backup: &Path, dir: &Path, more: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_netctl"));
    command.args(["server", "restore"]).arg(backup).arg("--state-dir").arg(dir.join("state"));
    command.args(more).output().unwrap()
}

#[test]
fn a_server_with_a_damaged_file_says_so_shows_what_is_true_and_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("state/server.redb");
    let server = Server::start(dir.path());
    applied(&server, "blog", 2);
    applied(&server, "shop", 1);
    let good = server.shown(&["server", "status"]);
    assert!(good.ends_with("store     good\n"), "{good}");
    let list = |server: &Server, what: &str| -> serde_json::Value {
        serde_json::from_str(&server.shown(&[what, "-o", "json"])).unwrap()
    };
    let (jobs, pods, history) = (list(&server, "jobs"), list(&server, "pods"), list(&server, "history"));
    server.end();

    // The history has all of it: everything is shown, and the file is damaged nevertheless.
    let bytes = hurt(&file, "job/blog");
    let before = fs::metadata(&file).unwrap();
    let server = Server::start(dir.path());
    let said = server.lines().join("\n");
    assert!(said.contains("the store is damaged: current: the page at byte"), "{said}");
    assert!(said.contains("is damaged and is only read"), "{said}");
    assert_eq!(
        [list(&server, "jobs"), list(&server, "pods"), list(&server, "history")],
        [jobs, pods, history]
    );
    let status = server.run(&["server", "status"]);
    assert_eq!(status.status.code(), Some(1));
    let status = String::from_utf8(status.stdout).unwrap();
    assert!(status.contains("store     DAMAGED, only read\n  current: the page at byte"), "{status}");
    let args = server.apply("blog", 3);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    for args in [&args[..], &["token", "--for", "node"], &["rm", "shop"], &["compact", "--keep", "1"]] {
        let text = server.refused(args);
        assert!(
            text.contains("is damaged and is only read") && text.contains("netctl server restore"),
            "{text}"
        );
    }
    let backup = dir.path().join("part.backup");
    let made = server.shown(&["server", "backup", backup.to_str().unwrap()]);
    assert!(made.contains("is INCOMPLETE") && made.contains("  damaged: current: the page"), "{made}");
    server.end();
    let after = fs::metadata(&file).unwrap();
    assert!(fs::read(&file).unwrap() == bytes, "the file was changed");
    assert_eq!((before.mtime_nsec(), before.ino()), (after.mtime_nsec(), after.ino()));

    // What there is makes a cluster again, when somebody says so.
    let other = tempfile::tempdir().unwrap();
    let refused = String::from_utf8(restore(&backup, other.path(), &[]).stderr).unwrap();
    assert!(refused.contains("is not a whole backup") && refused.contains("--incomplete"), "{refused}");
    assert!(refused.contains("the history has") && !refused.contains('?'), "{refused}");
    let restored = restore(&backup, other.path(), &["--incomplete"]);
    assert!(restored.status.success(), "{restored:?}");
    let restored = String::from_utf8(restored.stdout).unwrap();
    assert!(!restored.contains("missing"), "the history had the job: {restored}");
    let server = Server::start(other.path());
    assert!(server.shown(&["server", "status"]).contains("store     good\nrestored  from a backup"));
    assert_eq!(list(&server, "pods").as_array().unwrap().len(), 3);
    applied(&server, "blog", 3);
    assert_eq!(list(&server, "pods").as_array().unwrap().len(), 4);
}

#[test]
fn what_even_the_history_does_not_know_is_said_to_be_unreadable() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("state/server.redb");
    let server = Server::start(dir.path());
    applied(&server, "blog", 2);
    applied(&server, "shop", 1);
    server.shown(&["compact", "--keep", "1"]);
    server.end();
    let bytes = hurt(&file, "job/blog");
    let server = Server::start(dir.path());
    for list in ["jobs", "pods", "nodes"] {
        let output = server.run(&[list]);
        let (out, err) =
            (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
        assert!(output.status.success() && out.contains("unreadable"), "{list}: {out}{err}");
        assert!(err.contains("the server's store is damaged, not everything can be read"), "{list}: {err}");
    }
    // The last change is all that is known.
    assert!(server.shown(&["jobs"]).contains("shop"));
    let missing = server.refused(&["why", "pod/blog-web-00000"]);
    assert!(missing.contains("it may be there and unreadable"), "{missing}");
    let status = String::from_utf8(server.run(&["server", "status"]).stdout).unwrap();
    assert!(status.contains("cluster   unreadable"), "{status}");
    let backup = dir.path().join("part.backup");
    server.shown(&["server", "backup", backup.to_str().unwrap()]);
    server.end();
    assert!(fs::read(&file).unwrap() == bytes, "the file was changed");
    let other = tempfile::tempdir().unwrap();
    let output = restore(&backup, other.path(), &["--incomplete"]);
    let refused = String::from_utf8(output.stderr).unwrap();
    assert!(refused.contains("lacks the record `cluster`"), "{refused}");
    assert!(!other.path().join("state/server.redb").exists());
}
