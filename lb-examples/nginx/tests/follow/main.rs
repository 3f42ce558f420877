//! The program against a server that each test plays by hand: what it asks for, writes and answers.

mod server;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use hextet_api::v1::{
    Ack, Endpoint, EndpointState, Event, Reject, Snapshot, watch_request::Request, watch_response::Response,
};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    time::{Instant, sleep, timeout},
};

use crate::server::{Server, Session};

/// What is waited for comes much sooner, or never.
const DEADLINE: Duration = Duration::from_secs(20);

fn ready(pod: &str, address: &str) -> Endpoint {
    endpoint(pod, address, EndpointState::Ready)
}

fn endpoint(pod: &str, address: &str, state: EndpointState) -> Endpoint {
    Endpoint {
        pod: pod.into(),
        group: "web".into(),
        node: "n1".into(),
        address: address.parse::<std::net::Ipv6Addr>().unwrap().octets().to_vec(),
        state: state.into(),
    }
}

fn snapshot(revision: u64, endpoints: Vec<Endpoint>) -> Response {
    Response::Snapshot(Snapshot { epoch: "e".into(), revision, endpoints, last: true })
}

fn event(revision: u64, upserts: Vec<Endpoint>, removals: &[&str]) -> Response {
    let removals = removals.iter().map(|pod| (*pod).to_owned()).collect();
    Response::Event(Event { revision, upserts, removals })
}

/// A running program; killed with its test.
struct Balancer {
    child: Child,
}

impl Balancer {
    fn start(folder: &Path, args: &[&str]) -> Balancer {
        let child = Command::new(env!("CARGO_BIN_EXE_lb-nginx"))
            .arg("--state-dir")
            .arg(folder.join("state"))
            .args(["--select", "hello/web"])
            .args(args)
            .stdin(Stdio::null())
            .spawn()
            .expect("lb-nginx starts");
        Balancer { child }
    }

    /// Asks it to end, as an init system would.
    fn terminate(&mut self) {
        let done = Command::new("sh")
            .arg("-c")
            .arg(format!("kill {}", self.child.id()))
            .status()
            .expect("sh starts");
        assert!(done.success());
        assert!(self.child.wait().expect("it is our child").success());
    }
}

impl Drop for Balancer {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A balancer that writes a file and runs commands of the shell.
struct External {
    folder: TempDir,
}

impl External {
    fn new() -> External {
        External { folder: tempfile::tempdir().unwrap() }
    }

    fn output(&self) -> PathBuf {
        self.folder.path().join("pods.conf")
    }

    fn start(&self, join: Option<&str>) -> Balancer {
        let output = self.output().display().to_string();
        // Stands for `nginx -t`: a pod with this address is one that nginx cannot read.
        let test = format!("! grep -q fd00::bad {output}");
        let reload = format!("echo >> {}", self.folder.path().join("reloads").display());
        let mut args = vec!["--port", "8080", "--output", &output, "--test", &test, "--reload", &reload];
        args.extend(join.into_iter().flat_map(|token| ["--join", token]));
        Balancer::start(self.folder.path(), &args)
    }

    fn text(&self) -> String {
        fs::read_to_string(self.output()).unwrap()
    }

    fn reloads(&self) -> usize {
        fs::read_to_string(self.folder.path().join("reloads")).unwrap().lines().count()
    }
}

async fn answer(session: &mut Session) -> Request {
    let answer = timeout(DEADLINE, session.answers.recv()).await.expect("an answer comes");
    answer.expect("the stream is open").request.expect("the answer says something")
}

async fn acknowledged(session: &mut Session, revision: u64) {
    loop {
        match answer(session).await {
            Request::Ack(Ack { revision: done }) if done == revision => return,
            Request::Ack(Ack { revision: done }) if done < revision => {}
            other => panic!("{revision} is not acknowledged but answered with {other:?}"),
        }
    }
}

#[tokio::test]
async fn a_group_is_followed() {
    let mut server = Server::start().await;
    let external = External::new();
    let _balancer = external.start(Some(&server.token()));
    let mut session = server.session().await;
    assert_eq!((session.subscribe.job.as_str(), session.subscribe.group.as_str()), ("hello", "web"));
    assert_eq!((session.subscribe.epoch.as_str(), session.subscribe.from_revision), ("", 0));

    session.send(snapshot(5, vec![ready("a", "fd00::a"), ready("b", "fd00::b")])).await;
    acknowledged(&mut session, 5).await;
    assert!(external.text().contains("server [fd00::a]:8080;") && external.text().contains("[fd00::b]"));

    let leaving = endpoint("a", "fd00::a", EndpointState::Terminating);
    session.send(event(6, vec![leaving, ready("c", "fd00::c")], &[])).await;
    acknowledged(&mut session, 6).await;
    assert!(!external.text().contains("[fd00::a]") && external.text().contains("[fd00::c]"));

    session.send(event(7, vec![], &["a", "b", "c"])).await;
    acknowledged(&mut session, 7).await;
    assert!(external.text().contains("return 503") && !external.text().contains("upstream"));
}

#[tokio::test]
async fn changes_that_come_together_are_one_reload() {
    let mut server = Server::start().await;
    let external = External::new();
    let _balancer = external.start(Some(&server.token()));
    let mut session = server.session().await;
    session.send(snapshot(1, vec![])).await;
    acknowledged(&mut session, 1).await;
    let before = external.reloads();
    let started = Instant::now();
    for revision in 2..=60 {
        session.send(event(revision, vec![ready("a", &format!("fd00::{revision:x}"))], &[])).await;
    }
    acknowledged(&mut session, 60).await;
    let possible = 2 + started.elapsed().as_millis() as usize / 100;
    let reloads = external.reloads() - before;
    assert!((1..=possible.min(58)).contains(&reloads), "{reloads} reloads for 59 changes");
    assert!(external.text().contains("[fd00::3c]"));
}

#[tokio::test]
async fn what_nginx_cannot_read_is_rejected_and_the_file_stays() {
    let mut server = Server::start().await;
    let external = External::new();
    let _balancer = external.start(Some(&server.token()));
    let mut session = server.session().await;
    session.send(snapshot(5, vec![ready("a", "fd00::a")])).await;
    acknowledged(&mut session, 5).await;
    let before = external.text();

    session.send(event(6, vec![ready("bad", "fd00::bad")], &[])).await;
    let Request::Reject(Reject { revision, reason }) = answer(&mut session).await else {
        panic!("it is not rejected")
    };
    assert_eq!(revision, 6);
    assert!(reason.contains("does not accept"), "{reason}");
    assert_eq!(external.text(), before);

    // The server asks again from what is in effect.
    drop(session);
    let mut session = server.session().await;
    assert_eq!(session.subscribe.from_revision, 5);
    session.send(event(7, vec![ready("b", "fd00::b")], &[])).await;
    acknowledged(&mut session, 7).await;
    assert!(external.text().contains("[fd00::b]"));
}

#[tokio::test]
async fn a_restart_resumes_with_the_last_known_pods() {
    let mut server = Server::start().await;
    let external = External::new();
    let balancer = external.start(Some(&server.token()));
    let mut session = server.session().await;
    session.send(snapshot(5, vec![ready("a", "fd00::a")])).await;
    acknowledged(&mut session, 5).await;
    drop((balancer, session));

    // Somebody lost the file meanwhile; nobody has to ask the server for it.
    fs::remove_file(external.output()).unwrap();
    let _balancer = external.start(None);
    let mut session = server.session().await;
    assert_eq!((session.subscribe.epoch.as_str(), session.subscribe.from_revision), ("e", 5));
    assert!(external.text().contains("[fd00::a]"));
    session.send(event(9, vec![], &["a"])).await;
    acknowledged(&mut session, 9).await;
    assert_eq!(server.enrollments(), 1, "a token is used once");
}

#[tokio::test]
async fn without_a_token_there_is_a_hint() {
    let external = External::new();
    let output = external.output().display().to_string();
    let run = Command::new(env!("CARGO_BIN_EXE_lb-nginx"))
        .args([
            "--select",
            "hello/web",
            "--port",
            "8080",
            "--test",
            "true",
            "--reload",
            "true",
            "--output",
            &output,
        ])
        .arg("--state-dir")
        .arg(external.folder.path().join("state"))
        .output()
        .unwrap();
    assert_eq!(run.status.code(), Some(1));
    let said = String::from_utf8(run.stderr).unwrap();
    assert!(said.contains("netctl token --for lb --select hello/web"), "{said}");
}

/// A pod: answers every request with one line.
async fn pod() -> u16 {
    let listener = TcpListener::bind("[::1]:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut request = [0; 4096];
                let _ = stream.read(&mut request).await;
                let answer = "HTTP/1.1 200 OK\r\nContent-Length: 4\r\nConnection: close\r\n\r\npod\n";
                let _ = stream.write_all(answer.as_bytes()).await;
            });
        }
    });
    port
}

async fn get(port: u16) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await?;
    stream.write_all(b"GET / HTTP/1.0\r\nHost: x\r\n\r\n").await?;
    let mut text = String::new();
    stream.read_to_string(&mut text).await?;
    Ok(text)
}

/// Waits for nginx's first answer.
async fn first_answer(port: u16) -> String {
    let deadline = Instant::now() + DEADLINE;
    loop {
        match get(port).await {
            Ok(text) => return text,
            Err(error) if Instant::now() > deadline => panic!("nginx does not answer: {error}"),
            Err(_) => sleep(Duration::from_millis(10)).await,
        }
    }
}

#[tokio::test]
async fn a_real_nginx_serves_on_while_the_program_is_away() {
    if Command::new("nginx").arg("-v").stderr(Stdio::null()).status().is_err() {
        eprintln!("skipped: nginx is not installed (apt-get install nginx)");
        return;
    }
    let pod_port = pod().await.to_string();
    let port = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
    let listen = format!("127.0.0.1:{port}");
    let mut server = Server::start().await;
    let token = server.token();
    let folder = tempfile::tempdir().unwrap();
    let args = ["--port", &pod_port, "--listen", &listen, "--nginx", "--join", &token];

    let mut balancer = Balancer::start(folder.path(), &args);
    let mut session = server.session().await;
    assert!(first_answer(port).await.contains("no pod of hello/web is ready"));
    session.send(snapshot(5, vec![ready("a", "::1")])).await;
    acknowledged(&mut session, 5).await;
    assert!(get(port).await.unwrap().ends_with("pod\n"), "an acknowledged pod gets requests");

    balancer.child.kill().unwrap();
    balancer.child.wait().unwrap();
    drop(session);
    assert!(get(port).await.unwrap().ends_with("pod\n"), "nginx does not need the program");

    let mut balancer = Balancer::start(folder.path(), &args);
    let mut session = server.session().await;
    assert_eq!(session.subscribe.from_revision, 5);
    session.send(event(6, vec![endpoint("a", "::1", EndpointState::Terminating)], &[])).await;
    acknowledged(&mut session, 6).await;
    assert!(get(port).await.unwrap().contains("503"), "an acknowledged leaving pod gets none");

    balancer.terminate();
    let deadline = Instant::now() + DEADLINE;
    while get(port).await.is_ok() {
        assert!(Instant::now() < deadline, "nginx is left behind");
        sleep(Duration::from_millis(10)).await;
    }
}
