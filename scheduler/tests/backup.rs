//! A backup of a running server, and the cluster that it makes.

mod support;

use std::{fs, os::unix::fs::PermissionsExt as _};

use hextet_api::v1::{self, watch_response::Response};
use scheduler::backup::{self, Incomplete, NewFile};
use support::{FakeNode, TestServer, Watch, subscribe};

#[tokio::test]
async fn a_restored_cluster_goes_on_with_its_nodes_and_clients_list_anew() {
    let dir = tempfile::tempdir().unwrap();
    let server = TestServer::start(dir.path()).await;
    let n1 = FakeNode::join(&server, "n1", 1).await;
    server.apply("blog", 2, "one").await;
    server.apply("blog", 2, "two").await;
    server.running(2).await;
    server.compact(1).await;
    let file = dir.path().join("backup");
    server.back_up(&file).await;
    let (log, pods) = (server.history("").await, server.pods().await);
    let status = server.status().await;
    let address = server.ready.addresses[0];
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    let again = NewFile::create(&file).err().unwrap().to_string();
    assert!(again.contains("is there already"), "{again}");
    server.apply("blog", 2, "after the backup").await;
    server.stop().await;
    let there =
        backup::restore(&file, &dir.path().join("state"), Incomplete::Refuse).unwrap_err().to_string();
    assert!(there.contains("there is a cluster in"), "{there}");

    // Another machine with the same address.
    let other = tempfile::tempdir().unwrap();
    let restored = backup::restore(&file, &other.path().join("state"), Incomplete::Refuse).unwrap();
    assert_eq!(restored.revision, status.revision);
    let server = TestServer::start_at(other.path(), address).await;
    let history = server.history("").await;
    assert_eq!(history[1..], log[..], "the history is there");
    assert!(history[0].message.starts_with("restored from a backup of revision"), "{history:?}");
    let now = server.status().await;
    assert_ne!(now.epoch, status.epoch);
    let resume = v1::Subscribe { epoch: status.epoch, from_revision: status.revision, ..subscribe("blog") };
    let mut watch = Watch::start(server.watcher().await, resume).await;
    assert!(matches!(watch.next().await.unwrap(), Response::Compacted(_)));
    assert_eq!(watch.snapshot().await.endpoints.len(), 2);

    // The node comes back with the certificate that it has.
    let n1 = FakeNode::attach(n1.kill().await).await;
    let told: Vec<String> = n1.told.lock().unwrap().pods.keys().cloned().collect();
    assert_eq!(told, pods.iter().map(|pod| pod.id.clone()).collect::<Vec<_>>());
    server.apply("blog", 3, "on we go").await;
    server.running(3).await;
    // Its history did not reach back to the first version.
    let back = v1::RollbackJobRequest { name: "blog".to_owned(), to: 1, ..Default::default() };
    server.local().await.rollback_job(back).await.unwrap();
    let job = v1::GetJobRequest { name: "blog".to_owned() };
    let job = server.local().await.get_job(job).await.unwrap().into_inner().job.unwrap();
    assert_eq!(
        (job.version, job.equals, job.job.unwrap().groups[0].tasks[0].exec[1].as_str()),
        (4, 1, "one")
    );
    server.stop().await;
}

#[tokio::test]
async fn what_is_not_a_whole_backup_makes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let server = TestServer::start(dir.path()).await;
    server.apply("blog", 1, "one").await;
    let file = dir.path().join("backup");
    server.back_up(&file).await;
    server.stop().await;
    let whole = fs::read(&file).unwrap();
    let state = dir.path().join("restored");
    let try_with = |bytes: &[u8]| {
        let broken = dir.path().join("broken");
        fs::write(&broken, bytes).unwrap();
        let error = backup::restore(&broken, &state, Incomplete::Refuse).map(drop);
        assert!(!state.join("server.redb").exists() || error.is_ok());
        error.map_err(|error| error.to_string())
    };
    for len in (0..whole.len()).step_by(whole.len() / 40) {
        assert!(try_with(&whole[..len]).unwrap_err().contains("is not a whole backup"), "cut off at {len}");
    }
    assert!(try_with(&[&whole[..], b"x"].concat()).is_err());
    for at in (0..whole.len()).step_by(whole.len() / 40) {
        let mut bytes = whole.clone();
        bytes[at] ^= 0xFF;
        assert!(try_with(&bytes).is_err(), "byte {at}");
    }
    assert!(!state.exists(), "not even a folder");
    // After all these, and after one that was ended half-way, it still works.
    fs::create_dir(&state).unwrap();
    fs::write(state.join("server.redb.restoring"), b"half").unwrap();
    try_with(&whole).unwrap();
}
