//! What the programs log reaches the agent's log at TRACE, and costs nothing below.

#[path = "bpf/support.rs"]
mod support;

use std::{
    io,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use dataplane::bpf::{Bpf, Program::UplinkIngress};
use support::*;
use tracing::Level;

const PATIENCE: Duration = Duration::from_secs(10);

/// A log in memory.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Lines {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

fn provoke(bpf: &mut Bpf) {
    let pod = "fd12::aaaa:bbbb:cc12:3456".parse().unwrap();
    bpf.set_local_pod(pod, [2; 6]).unwrap();
    let host = "fd12::64".parse().unwrap();
    let frame = icmpv6(([2; 6], [4; 6]), host, pod, 255, &solicitation(pod, &[]));
    assert_eq!(run(bpf, UplinkIngress, &frame).0, REDIRECT);
}

/// Runs the program twice with a log of the level: with one agent, and with one that adopts its maps.
fn log_at(level: Level, test: &str, until: impl Fn(&str) -> bool) -> String {
    let lines = Lines::default();
    let writer = lines.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_ansi(false)
        .with_max_level(level)
        .with_writer(move || writer.clone())
        .finish();
    let pins = Pins::new(test);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    tracing::subscriber::with_default(subscriber, || {
        runtime.block_on(async {
            drop(pins.open());
            let mut bpf = pins.open();
            bpf.spawn_logger().unwrap_or_else(|e| panic!("{}", chain(&e)));
            provoke(&mut bpf);
            let deadline = Instant::now() + PATIENCE;
            while !until(&lines.text()) {
                assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {}", lines.text());
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        });
    });
    lines.text()
}

#[test]
fn an_answer_is_logged_at_trace_with_its_addresses() {
    if !may_run("log at trace") {
        return;
    }
    let text = log_at(Level::TRACE, "log-trace", |text| text.contains("ndp_proxy: "));
    assert!(text.contains("TRACE dataplane::bpf"), "{text}");
    assert!(text.contains("fd12::aaaa:bbbb:cc12:3456 is here, to fd12::64"), "{text}");
}

#[test]
fn nothing_is_logged_at_debug() {
    if !may_run("log at debug") {
        return;
    }
    let started = Instant::now();
    let text = log_at(Level::DEBUG, "log-debug", |_| started.elapsed() > Duration::from_millis(500));
    assert!(!text.contains("ndp_proxy: "), "{text}");
}
