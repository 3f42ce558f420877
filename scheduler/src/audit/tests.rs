//! What a line of the audit holds.

use scheduler_core::{
    change::Revision,
    event::{Enrolled, Refusal},
    time::WallTime,
    token::{Role, Token},
};

use super::*;

fn call(path: &str) -> Call {
    let caller = Identity::Enrolled {
        enrolled: Enrolled::from_uri("hextet:viewer/bob").unwrap(),
        key: "k".into(),
        ends: WallTime(0),
    };
    Call { caller, from: "[2001:db8::7]:1234".into(), path: path.into() }
}

fn lines(dir: &Path) -> Vec<serde_json::Value> {
    let text = std::fs::read_to_string(dir.join(FILE)).unwrap_or_default();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[tokio::test]
async fn a_change_says_who_from_where_what_and_what_came_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let audit = Audit::open(dir.path(), Clock::start());
    let work = async {
        asked(&Event::DeleteJob("hello".into()));
        let (changer, message, changes) = (String::new(), String::new(), Vec::new());
        let made = Revision { revision: 7, time: WallTime(0), changer, message, changes };
        answered(&Ok(Committed { revision: 7, made: Some(made.into()) }));
    };
    audit.follow(call("/hextet.v1.Cluster/DeleteJob"), work, |()| Status::ok("")).await;
    let failing = async { asked(&Event::DeleteJob("none".into())) };
    let refusal = Refusal::NoJob("none".into()).to_string();
    audit.follow(call("/hextet.v1.Cluster/DeleteJob"), failing, |()| Status::not_found(&refusal)).await;
    let lines = lines(dir.path());
    assert_eq!(lines[0]["caller"], "hextet:viewer/bob");
    assert_eq!(lines[0]["role"], "viewer");
    assert_eq!(lines[0]["from"], "[2001:db8::7]:1234");
    assert_eq!(lines[0]["method"], "hextet.v1.Cluster/DeleteJob");
    assert_eq!(lines[0]["subjects"][0], "job/hello");
    assert_eq!((&lines[0]["outcome"], &lines[0]["revision"]), (&"done".into(), &7.into()));
    assert!(lines[0]["time"].as_str().unwrap().ends_with('Z'));
    assert_eq!((&lines[1]["outcome"], &lines[1]["reason"]), (&"failed".into(), &refusal.into()));
    assert_eq!(lines[1].get("revision"), None);
}

/// The write may come about all the same; the log of revisions knows.
#[tokio::test]
async fn a_caller_that_does_not_wait_leaves_a_line() {
    let dir = tempfile::tempdir().unwrap();
    let audit = Audit::open(dir.path(), Clock::start());
    let work = async {
        asked(&Event::DeleteNode("n1".into()));
        std::future::pending::<()>().await;
    };
    let follow = audit.follow(call("/x/Y"), work, |()| Status::ok(""));
    assert!(tokio::time::timeout(std::time::Duration::from_millis(1), follow).await.is_err());
    let lines = lines(dir.path());
    assert_eq!((lines.len(), &lines[0]["outcome"]), (1, &"unknown".into()));
    assert_eq!(lines[0]["subjects"][0], "node/n1");
}

/// They were lost, and half a line stayed, with which `jq` ended.
#[test]
fn lines_wait_for_room_in_their_order_and_those_beyond_are_counted() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(FILE);
    std::os::unix::fs::symlink("/dev/full", &path).unwrap();
    let audit = Audit::open(dir.path(), Clock::start());
    let done = |number: usize| audit.finished(&call(&format!("/x/{number}")), "done", "");
    (0..WAITING_MAX + 3).for_each(done);
    std::fs::remove_file(&path).unwrap();
    done(WAITING_MAX + 3);
    let lines = lines(dir.path());
    assert_eq!(lines.len(), WAITING_MAX + 1);
    assert!((0..WAITING_MAX).all(|number| lines[number]["method"] == format!("x/{number}")));
    assert_eq!(lines[WAITING_MAX]["unwritten"], 3);
}

#[test]
fn a_flood_of_refusals_is_bounded_and_counted() {
    let dir = tempfile::tempdir().unwrap();
    let audit = Audit::open(dir.path(), Clock::start());
    (0..1000).for_each(|_| audit.refused(&call(&"/".repeat(10_000)), "this needs the role admin"));
    let written = lines(dir.path());
    // A slow machine may take a second or two.
    assert!((100..110).contains(&written.len()), "{}", written.len());
    assert_eq!(written[0]["reason"], "this needs the role admin");
}

#[test]
fn what_an_event_holds_is_not_told() {
    let token = Token { role: Role::Admin, name: Some("eve".into()), expires: WallTime(0), used_by: None };
    assert_eq!(subject(&Event::CreateToken("secret-hash".into(), token)), "token for admin eve");
    assert_eq!(subject(&Event::Drained(vec![])), "Drained");
}
