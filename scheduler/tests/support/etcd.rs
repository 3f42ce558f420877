//! An etcd of a test's own, as a process.

use std::{
    io::{Read as _, Write as _},
    net::TcpListener,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

const START_MAX: Duration = Duration::from_secs(20);

pub(crate) struct EtcdProcess {
    child: Child,
    client: u16,
    peer: u16,
    /// What it is started with besides.
    more: Vec<String>,
    dir: tempfile::TempDir,
}

impl EtcdProcess {
    /// None, and a named skip, when the machine has no etcd.
    pub(crate) fn start(test: &str) -> Option<EtcdProcess> {
        EtcdProcess::start_with(test, &[])
    }

    /// With `more` the client URL is that of `[::1]`, with TLS.
    pub(crate) fn start_with(test: &str, more: &[String]) -> Option<EtcdProcess> {
        let found = std::env::var_os("PATH")
            .is_some_and(|path| std::env::split_paths(&path).any(|folder| folder.join("etcd").exists()));
        if !found {
            println!("SKIP {test}: no etcd here (Debian: etcd-server)");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let (client, peer) = (free_port(), free_port());
        let child = run(dir.path(), client, peer, more);
        let etcd = EtcdProcess { child, client, peer, more: more.to_vec(), dir };
        etcd.wait();
        Some(etcd)
    }

    pub(crate) fn url(&self) -> String {
        format!("etcd://{}:{}", host(&self.more), self.client)
    }

    /// The value of a key, or an empty text.
    #[allow(dead_code, reason = "each test file uses a part")]
    pub(crate) fn get(&self, key: &str) -> String {
        use base64::{Engine as _, prelude::BASE64_STANDARD};
        let body = format!("{{\"key\":\"{}\"}}", BASE64_STANDARD.encode(key));
        let Ok(mut stream) = std::net::TcpStream::connect(("127.0.0.1", self.client)) else {
            return String::new();
        };
        let head = "POST /v3/kv/range HTTP/1.1\r\nHost: etcd\r\nConnection: close\r\n";
        write!(stream, "{head}Content-Length: {}\r\n\r\n{body}", body.len()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let json = answer.find('{').map_or("{}", |start| &answer[start..]);
        let json: serde_json::Value = serde_json::from_str(json.trim()).unwrap();
        let value = json["kvs"][0]["value"].as_str().unwrap_or_default();
        String::from_utf8_lossy(&BASE64_STANDARD.decode(value).unwrap()).into_owned()
    }

    /// Its own snapshot, in a file; false, and a named skip, when the machine has no etcdctl.
    #[allow(dead_code, reason = "each test file uses a part")]
    pub(crate) fn snapshot(&self, file: &Path) -> bool {
        let endpoint = format!("http://127.0.0.1:{}", self.client);
        let mut etcdctl = etcdctl();
        match etcdctl.args(["--endpoints", &endpoint, "snapshot", "save"]).arg(file).output() {
            Ok(made) => {
                assert!(made.status.success(), "{made:?}");
                true
            }
            Err(_) => {
                println!("SKIP: no etcdctl here (Debian: etcd-client)");
                false
            }
        }
    }

    /// Puts a snapshot back in the place of its data, as its documentation says. With the same token it has the same
    /// name afterwards.
    #[allow(dead_code, reason = "each test file uses a part")]
    pub(crate) fn put_back(&mut self, file: &Path, token: &str) {
        self.kill();
        let (data, peer) = (self.dir.path().join("data"), format!("http://127.0.0.1:{}", self.peer));
        std::fs::remove_dir_all(&data).unwrap();
        let mut etcdctl = etcdctl();
        etcdctl.args(["snapshot", "restore"]).arg(file).arg("--data-dir").arg(&data);
        etcdctl.args(["--initial-cluster", &format!("default={peer}"), "--initial-cluster-token", token]);
        let restored = etcdctl.args(["--initial-advertise-peer-urls", &peer]).output().unwrap();
        assert!(restored.status.success(), "{restored:?}");
        self.restart();
    }

    /// As `kill -9` does.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Starts it again with its data.
    pub(crate) fn restart(&mut self) {
        self.child = run(self.dir.path(), self.client, self.peer, &self.more);
        self.wait();
    }

    fn wait(&self) {
        let end = Instant::now() + START_MAX;
        let address = format!("{}:{}", host(&self.more), self.client);
        while std::net::TcpStream::connect(&address).is_err() {
            assert!(Instant::now() < end, "etcd does not start");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for EtcdProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn etcdctl() -> Command {
    let mut etcdctl = Command::new("etcdctl");
    etcdctl.env("ETCDCTL_API", "3");
    etcdctl
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn host(more: &[String]) -> &'static str {
    if more.is_empty() { "127.0.0.1" } else { "[::1]" }
}

fn run(dir: &Path, client: u16, peer: u16, more: &[String]) -> Child {
    let scheme = if more.is_empty() { "http" } else { "https" };
    let client = format!("{scheme}://{}:{client}", host(more));
    let peer = format!("http://127.0.0.1:{peer}");
    let log = std::fs::File::create(dir.join("log")).unwrap();
    Command::new("etcd")
        .arg("--data-dir")
        .arg(dir.join("data"))
        .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
        .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
        .args(["--initial-cluster", &format!("default={peer}")])
        .args(more)
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .unwrap()
}
