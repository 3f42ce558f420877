//! What was changed, by whom, and the way back, over the Unix socket.

mod support;

use hextet_api::v1::{self, watch_response::Response};
use support::{FakeNode, TestServer, Watch, code, subscribe};
use tokio::task::JoinSet;
use tonic::Code;

async fn revisions(server: &TestServer, request: v1::ListRevisionsRequest) -> v1::ListRevisionsResponse {
    server.local().await.list_revisions(request).await.unwrap().into_inner()
}

fn of(key: &str) -> v1::ListRevisionsRequest {
    v1::ListRevisionsRequest { key: key.to_owned(), ..Default::default() }
}

fn by(by: &[&str], not_by: &[&str]) -> Option<v1::ChangerFilter> {
    let texts = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect();
    Some(v1::ChangerFilter { by: texts(by), not_by: texts(not_by) })
}

async fn version(
    server: &TestServer,
    job: &str,
    version: u32,
) -> Result<v1::GetJobVersionResponse, tonic::Status> {
    let request = v1::GetJobVersionRequest { name: job.to_owned(), version };
    Ok(server.local().await.get_job_version(request).await?.into_inner())
}

async fn rollback(server: &TestServer, job: &str, to: u32) -> Result<v1::RollbackJobResponse, tonic::Status> {
    let request = v1::RollbackJobRequest { name: job.to_owned(), to, message: "back".to_owned() };
    Ok(server.local().await.rollback_job(request).await?.into_inner())
}

#[tokio::test]
async fn every_version_is_listed_compared_and_brought_back() {
    let dir = tempfile::tempdir().unwrap();
    let server = TestServer::start(dir.path()).await;
    let _n1 = FakeNode::join(&server, "n1", 1).await;
    for (count, argument) in [(2, "one"), (2, "two"), (1, "two")] {
        server.apply("blog", count, argument).await;
        server.running(count as usize).await;
    }
    let listed = revisions(&server, of("job/blog")).await;
    let told: Vec<(u32, &str, bool)> = listed
        .revisions
        .iter()
        .map(|revision| (revision.objects[0].version, revision.message.as_str(), revision.external))
        .collect();
    assert_eq!(told, [(3, "a test", true), (2, "a test", true), (1, "a test", true)]);
    assert_eq!((listed.next_before, listed.oldest), (0, 1));
    let fields = &listed.revisions[0].objects[0].fields;
    assert_eq!(fields.iter().map(|field| field.field.as_str()).collect::<Vec<_>>(), ["groups.web.count"]);

    let first = version(&server, "blog", 1).await.unwrap();
    assert_eq!(first.job.unwrap().groups[0].tasks[0].exec[1], "one");
    assert_eq!(first.version.unwrap().changer, "user:root");
    let (status, text) = code(version(&server, "blog", 9).await);
    assert_eq!(status, Code::NotFound);
    assert_eq!(text, "job `blog` has no version 9 yet; its newest is 3");
    assert!(code(version(&server, "blag", 1).await).1.contains("there never was a job `blag`"));

    // Back to 1; again, though it is in force; and after it was deleted.
    let (back, again) =
        (rollback(&server, "blog", 1).await.unwrap(), rollback(&server, "blog", 1).await.unwrap());
    assert_eq!((back.version, again.version), (4, 5));
    assert!(again.revision > back.revision);
    server.running(2).await;
    server.delete("blog").await;
    server.pods_when("gone", |pods| pods.is_empty()).await;
    assert!(code(version(&server, "blog", 0).await).1.contains("is deleted"));
    assert_eq!(rollback(&server, "blog", 3).await.unwrap().version, 6);
    server.running(1).await;
    let listed = revisions(&server, of("job/blog")).await.revisions;
    let told: Vec<(u32, u32, i32)> = listed
        .iter()
        .map(|revision| &revision.objects[0])
        .map(|object| (object.version, object.equals, object.fate))
        .collect();
    let (created, changed, removed) = (1, 2, 3);
    assert_eq!(told[..4], [(6, 3, created), (0, 0, removed), (5, 1, changed), (4, 1, changed)]);
    let jobs = server.local().await.list_jobs(v1::ListJobsRequest {}).await.unwrap().into_inner().jobs;
    assert_eq!((jobs[0].version, jobs[0].equals), (6, 3));
    server.stop().await;
}

#[tokio::test]
async fn a_rollout_names_any_version_of_the_history() {
    let dir = tempfile::tempdir().unwrap();
    let server = TestServer::start(dir.path()).await;
    let n1 = FakeNode::join(&server, "n1", 1).await;
    for argument in ["one", "two", "three"] {
        server.apply("blog", 2, argument).await;
    }
    server.running(2).await;
    // No pod runs version 1 any more, and version 3 is in force.
    let rolled = |previous, next| {
        let mut job = server.job("blog", 2, "four");
        let rollout = v1::Rollout { previous, next, percent_next: 50, ..Default::default() };
        job.groups[0].rollout = Some(rollout);
        job
    };
    let plan = v1::PlanJobsRequest { jobs: vec![rolled(3, 1)] };
    let plan = server.local().await.plan_jobs(plan).await.unwrap().into_inner();
    assert_eq!(plan.jobs[0].to_version, 4);
    assert_eq!(server.apply_job(rolled(3, 1)).await.unwrap().version, 4);
    server.pods_when("one of each", |pods| versions(pods) == [1, 3]).await;
    // The text with the rollout is a version that one goes back to, when the texts it names are no longer kept.
    server.apply("blog", 2, "five").await;
    server.pods_when("all new", |pods| versions(pods) == [5, 5]).await;
    assert_eq!(rollback(&server, "blog", 4).await.unwrap().version, 6);
    server.pods_when("one of each", |pods| versions(pods) == [1, 3]).await;

    let (status, text) = code(server.apply_job(rolled(3, 9)).await);
    assert_eq!(status, Code::FailedPrecondition);
    assert!(text.contains("has no version 9 with this group; `netctl history job/blog`"), "{text}");
    // Also one that nothing runs and that the log has forgotten.
    server.compact(1).await;
    assert_eq!(server.apply_job(rolled(3, 2)).await.unwrap().version, 7);

    // A version that was on its way to itself is gone back to all the way.
    assert_eq!(server.apply_job(rolled(3, 8)).await.unwrap().version, 8);
    server.apply("blog", 2, "six").await;
    assert_eq!(rollback(&server, "blog", 8).await.unwrap().version, 10);
    let back = version(&server, "blog", 10).await.unwrap();
    assert_eq!(back.version.unwrap().equals, 8);
    let group = &back.job.unwrap().groups[0];
    assert_eq!((group.rollout, group.tasks[0].exec[1].as_str()), (None, "four"));
    server.stop().await;
    drop(n1);
}

#[tokio::test]
async fn everybody_who_applies_is_told_the_version_that_they_made() {
    let dir = tempfile::tempdir().unwrap();
    let server = TestServer::start(dir.path()).await;
    let mut applying = JoinSet::new();
    for number in 0..30 {
        let (name, mut client) = (format!("n{number}"), server.local().await);
        let job = Some(server.job("blog", 2, &name));
        let request = v1::ApplyJobRequest { job, message: name.clone(), if_version: None };
        applying.spawn(async move { (name, client.apply_job(request).await.unwrap().into_inner()) });
    }
    for (name, applied) in applying.join_all().await {
        let text = version(&server, "blog", applied.version).await.unwrap();
        assert_eq!(text.job.unwrap().groups[0].tasks[0].exec[1], name);
        assert_eq!(text.version.unwrap().revision, applied.revision);
        assert_eq!(
            (applied.pods_waiting, applied.first_waits_for.is_empty()),
            (2, false),
            "there is no node"
        );
    }
    server.stop().await;
}

#[tokio::test]
async fn what_came_and_went_differs_from_nothing_however_many_there_were() {
    let dir = tempfile::tempdir().unwrap();
    let server = TestServer::start(dir.path()).await;
    let before = server.revision().await;
    server.apply("many", 10_000, "x").await;
    server.delete("many").await;
    let diff = v1::DiffRevisionsRequest { since_revision: before, ..Default::default() };
    let answer = server.local().await.diff_revisions(diff.clone()).await.unwrap().into_inner();
    let keys: Vec<&str> = answer.objects.iter().map(|object| object.key.as_str()).collect();
    assert_eq!((keys, answer.complete), (vec![], true));
    server.apply("many", 10_000, "x").await;
    let (status, text) = code(server.local().await.diff_revisions(diff).await);
    assert_eq!(status, Code::ResourceExhausted);
    assert!(text.starts_with("more has changed than one answer holds"), "{text}");
    server.stop().await;
}

fn versions(pods: &[v1::Pod]) -> Vec<u32> {
    let mut versions: Vec<u32> = pods.iter().map(|pod| pod.job_version).collect();
    versions.sort_unstable();
    versions
}

#[tokio::test]
async fn people_and_the_cluster_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let server = TestServer::start(dir.path()).await;
    let _n1 = FakeNode::join(&server, "n1", 1).await;
    let before = server.revision().await;
    server.apply("blog", 2, "one").await;
    let pods = server.running(2).await;
    server.apply("blog", 3, "one").await;
    server.running(3).await;

    let all = revisions(&server, v1::ListRevisionsRequest { limit: 1000, ..of("") }).await.revisions;
    let request = v1::ListRevisionsRequest { changers: by(&["user:*"], &[]), ..of("") };
    let people = revisions(&server, request).await.revisions;
    assert!(people.iter().all(|revision| revision.external) && people.len() < all.len());
    let request = v1::ListRevisionsRequest { changers: by(&[], &["user:*"]), ..of("") };
    let others = revisions(&server, request).await.revisions;
    assert_eq!(others.len() + people.len(), all.len());
    let pod = revisions(&server, of(&format!("pod/{}", pods[0].id))).await.revisions;
    let changers: Vec<&str> = pod.iter().map(|revision| revision.changer.as_str()).collect();
    assert_eq!(changers, ["node:n1", "user:root"]);

    // Page by page it is the same.
    let (mut paged, mut next) = (vec![], 0);
    loop {
        let request = v1::ListRevisionsRequest { limit: 2, before: next, ..of("") };
        let page = revisions(&server, request).await;
        paged.extend(page.revisions);
        next = page.next_before;
        if next == 0 {
            break;
        }
    }
    assert_eq!(paged, all);

    let diff = |changers| v1::DiffRevisionsRequest { since_unix_ms: 0, changers, since_revision: before };
    let mut client = server.local().await;
    let whole = client.diff_revisions(diff(None)).await.unwrap().into_inner();
    assert!(whole.complete);
    assert_eq!((whole.first_revision, whole.last_revision), (before + 1, server.revision().await));
    let keys: Vec<&str> = whole.objects.iter().map(|object| object.key.as_str()).collect();
    assert_eq!((keys[0], keys.len()), ("job/blog", 4));
    let nodes = client.diff_revisions(diff(by(&["node:*"], &[]))).await.unwrap().into_inner();
    let fields = |object: &v1::ObjectChange| -> Vec<String> {
        object.fields.iter().map(|field| field.field.clone()).collect()
    };
    assert!(nodes.objects.iter().all(|object| fields(object) == ["message", "phase"]), "{:?}", nodes.objects);
    let (status, _) = code(client.list_revisions(of("pods/x")).await);
    assert_eq!(status, Code::InvalidArgument);
    server.stop().await;
}

#[tokio::test]
async fn a_job_of_a_hundred_pods_is_placed_by_one_revision_and_reported_by_few() {
    let dir = tempfile::tempdir().unwrap();
    let server = TestServer::start(dir.path()).await;
    let _nodes = (FakeNode::join(&server, "n1", 1).await, FakeNode::join(&server, "n2", 2).await);
    let before = server.revision().await;
    let placed = server.apply("blog", 100, "one").await;
    assert_eq!(placed.revision, before + 1);
    server.running(100).await;
    let after = server.revision().await;
    assert!(
        after - placed.revision <= 4,
        "{} revisions for the reports of two nodes",
        after - placed.revision
    );
    let revision =
        &revisions(&server, v1::ListRevisionsRequest { before: placed.revision + 1, limit: 1, ..of("") })
            .await
            .revisions[0];
    assert_eq!((revision.objects.len(), revision.objects_total), (50, 101));
    server.stop().await;
}

#[tokio::test]
async fn a_plan_changes_nothing_and_the_apply_does_what_it_said() {
    let dir = tempfile::tempdir().unwrap();
    let server = TestServer::start(dir.path()).await;
    let _nodes = (FakeNode::join(&server, "n1", 1).await, FakeNode::join(&server, "n2", 2).await);
    server.apply("blog", 2, "one").await;
    server.running(2).await;
    let before = server.revision().await;
    let jobs = vec![server.job("blog", 4, "two")];
    let planned = server.local().await.plan_jobs(v1::PlanJobsRequest { jobs }).await.unwrap().into_inner();
    assert_eq!((server.revision().await, planned.revision), (before, before), "nothing is changed");
    let plan = &planned.jobs[0];
    assert_eq!((plan.from_version, plan.to_version, plan.pods_total), (1, 2, 4));
    let fates = |fate: v1::PodFate| plan.pods.iter().filter(|pod| pod.fate() == fate).count();
    assert_eq!((fates(v1::PodFate::Placed), fates(v1::PodFate::Restarted)), (2, 2));

    server.apply("blog", 4, "two").await;
    let is: Vec<(String, String)> = server.pods().await.into_iter().map(|pod| (pod.id, pod.node)).collect();
    let said: Vec<(String, String)> =
        plan.pods.iter().map(|pod| (pod.pod.clone(), pod.node.clone())).collect();
    assert_eq!(is, said);
    server.stop().await;
}

/// A crash loop of some pods filled the log, and there was no way back from the version that had caused it.
#[tokio::test]
async fn versions_outlive_the_log_that_they_were_made_in() {
    let dir = tempfile::tempdir().unwrap();
    let server = TestServer::start(dir.path()).await;
    for argument in ["one", "two", "three"] {
        server.apply("blog", 1, argument).await;
    }
    let before = revisions(&server, of("job/blog")).await;
    server.delete("blog").await;
    let answer = server.compact(1).await;
    let last = server.revision().await;
    assert_eq!((answer.oldest, answer.removed, answer.lost.len()), (last, last - 1, 0));

    let second = version(&server, "blog", 2).await.unwrap();
    assert_eq!(second.job.unwrap().groups[0].tasks[0].exec[1], "two");
    let told = second.version.unwrap();
    assert_eq!((told.revision, told.changer.as_str()), (before.revisions[1].revision, "user:root"));
    assert_eq!(told.message, "a test");
    let listed = revisions(&server, of("job/blog")).await;
    assert_eq!(listed.revisions[1..], before.revisions[..], "versions are in the history of their job");
    assert_eq!((listed.oldest, listed.next_before), (last, 0));
    assert_eq!(listed.oldest_unix_ms, listed.revisions[0].time_unix_ms);
    // Page by page, and by whom.
    let page = |before| v1::ListRevisionsRequest { limit: 2, before, ..of("job/blog") };
    let first = revisions(&server, page(0)).await;
    let next = revisions(&server, page(first.next_before)).await;
    assert_eq!([first.revisions, next.revisions].concat(), listed.revisions);
    assert_eq!(next.next_before, 0);
    let changers = by(&["user:nobody"], &[]);
    let nobody = v1::ListRevisionsRequest { changers, ..of("job/blog") };
    assert_eq!(revisions(&server, nobody).await.revisions, []);
    assert_eq!(rollback(&server, "blog", 1).await.unwrap().version, 4);
    server.stop().await;

    let server = TestServer::start(dir.path()).await;
    assert_eq!(rollback(&server, "blog", 2).await.unwrap().version, 5);
    server.stop().await;
}

#[tokio::test]
async fn what_is_lost_is_said_before_and_a_watcher_that_was_away_gets_a_snapshot() {
    let dir = tempfile::tempdir().unwrap();
    let server = TestServer::start(dir.path()).await;
    let kept = scheduler_core::version::VERSIONS_MAX;
    for number in 0..kept + 4 {
        server.apply("blog", 1, &format!("n{number}")).await;
    }
    server.apply("other", 1, "one").await;
    // So far the log has them all.
    assert_eq!(version(&server, "blog", 1).await.unwrap().version.unwrap().message, "a test");
    let last = server.revision().await;
    let dry_run = v1::CompactHistoryRequest { keep_revisions: 2, dry_run: true, ..Default::default() };
    let would = server.local().await.compact_history(dry_run).await.unwrap().into_inner();
    assert_eq!((would.oldest, would.removed), (last - 1, last - 2));
    assert_eq!(would.lost, ["blog: versions 1 to 4"]);
    assert!(version(&server, "blog", 1).await.is_ok(), "nothing is forgotten yet");
    let answer = server.compact(2).await;
    assert_eq!(v1::CompactHistoryResponse { bytes: would.bytes, ..answer.clone() }, would);
    assert!(answer.bytes < would.bytes);
    let (status, text) = code(version(&server, "blog", 1).await);
    assert_eq!(status, Code::NotFound);
    let expected = format!(
        "version 1 of job `blog` is forgotten: of a job the newest 100 are kept, up to 256 KiB, and what the history \
         holds, which begins with revision {}; it has versions 5 to 104",
        last - 1
    );
    assert_eq!(text, expected);
    assert!(rollback(&server, "blog", 1).await.is_err());
    assert_eq!(rollback(&server, "blog", 5).await.unwrap().version, 105);

    let epoch = server.local().await.get_status(v1::GetStatusRequest {}).await.unwrap().into_inner().epoch;
    let from = |from_revision| v1::Subscribe { epoch: epoch.clone(), from_revision, ..subscribe("blog") };
    let mut away = Watch::start(server.watcher().await, from(1)).await;
    assert!(
        matches!(away.next().await.unwrap(), Response::Compacted(compacted) if compacted.oldest_revision == last - 1)
    );
    assert!(away.snapshot().await.last);
    let mut near = Watch::start(server.watcher().await, from(last - 2)).await;
    assert!(matches!(near.next().await.unwrap(), Response::Bookmark(_)), "it resumes");
    server.stop().await;
}

#[tokio::test]
async fn an_apply_can_say_which_version_it_goes_on_from() {
    let dir = tempfile::tempdir().unwrap();
    let server = TestServer::start(dir.path()).await;
    let mut client = server.local().await;
    let mut at = async |if_version, argument| {
        let job = Some(server.job("blog", 1, argument));
        let request = v1::ApplyJobRequest { job, if_version, ..Default::default() };
        client.apply_job(request).await.map(|answer| answer.into_inner().version)
    };
    assert_eq!(at(Some(0), "one").await.unwrap(), 1);
    assert_eq!(at(Some(1), "two").await.unwrap(), 2);
    let (status, text) = code(at(Some(1), "three").await);
    assert_eq!(status, Code::FailedPrecondition);
    assert!(text.starts_with("job `blog` is at version 2, and not at version 1"), "{text}");
    assert_eq!(at(None, "three").await.unwrap(), 3);
    server.stop().await;
}
