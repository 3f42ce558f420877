//! A server that is told to end, while a client holds on to it.

mod support;

use std::time::{Duration, Instant};

use hextet_api::v1;
use support::TestServer;
use tokio::{net::TcpStream, time::sleep};

/// Streams and the last write have 3 s each.
const STOP_MAX: Duration = Duration::from_secs(7);
/// So soon nothing listens any more.
const CLOSED_MAX: Duration = Duration::from_millis(1500);

/// The next start said "address in use" for as long as the reader of a backup did not read.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_hangs_holds_neither_the_address_nor_the_end_up() {
    let dir = tempfile::tempdir().unwrap();
    let server = TestServer::start(dir.path()).await;
    for number in 0..120 {
        let noise: String = (0..60_000).map(|_| rand::random_range('a'..='z')).collect();
        server.apply(&format!("j{number}"), 1, &noise).await;
    }
    let (address, socket) = (server.ready.addresses[0], server.ready.socket.clone());
    // More than fits into what is on its way, and nobody reads it. And one that says nothing at all.
    let mut client = server.local().await;
    let hangs = client.backup(v1::BackupRequest {}).await.unwrap();
    let silent = TcpStream::connect(address).await.unwrap();
    sleep(Duration::from_millis(200)).await;

    let asked = Instant::now();
    let ends = tokio::spawn(server.stop());
    while TcpStream::connect(address).await.is_ok() {
        assert!(asked.elapsed() < CLOSED_MAX, "it still listens");
        sleep(Duration::from_millis(20)).await;
    }
    assert!(!ends.is_finished(), "the client that hangs has its time");
    // Another one on the same address, at once.
    let other = tempfile::tempdir().unwrap();
    let next = TestServer::start_at(other.path(), address).await;
    assert!(asked.elapsed() < STOP_MAX);
    ends.await.unwrap();
    assert!(asked.elapsed() < STOP_MAX, "{:?}", asked.elapsed());
    assert!(!socket.exists() && next.ready.socket.exists());
    next.stop().await;
    drop((hangs, silent));
}
