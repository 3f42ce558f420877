//! How a scenario runs: skipped by name when the machine lacks something, on a testbed of its own, its
//! checks in order, with a report when one fails.

use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Instant;

use anyhow::{Context, Result};

use crate::progress::{Progress, write_now};
use crate::testbed::{Options, Testbed, lacks, program};
use crate::topology::Prefix;

/// What a scenario needs beside root and namespaces.
#[derive(Clone, Copy, Debug, Default)]
pub struct Needs {
    /// Programs on the search path, with the package that has each.
    pub programs: &'static [(&'static str, &'static str)],
}

/// `ping`.
pub const PING: (&str, &str) = ("ping", "iputils-ping");
/// `tcpdump`.
pub const TCPDUMP: (&str, &str) = ("tcpdump", "tcpdump");
/// `curl`.
pub const CURL: (&str, &str) = ("curl", "curl");
/// `faketime`.
pub const FAKETIME: (&str, &str) = ("faketime", "faketime");
/// `iperf3`.
pub const IPERF: (&str, &str) = ("iperf3", "iperf3");
/// `radvd`.
pub const RADVD: (&str, &str) = ("radvd", "radvd");
/// `nginx`.
pub const NGINX: (&str, &str) = ("nginx", "nginx-light");
/// `nft`.
pub const NFT: (&str, &str) = ("nft", "nftables");
/// `busybox`, with the applets of Debian's static build.
pub const BUSYBOX: (&str, &str) = ("busybox", "busybox-static");

/// Runs `body` on a testbed of its own and takes that down, whatever happens.
///
/// # Panics
/// When `body` fails: the report of the testbed is printed first.
pub fn scenario(name: &str, needs: Needs, options: Options, body: impl FnOnce(&Testbed) -> Result<()>) {
    if skipped(name, needs, options.cluster) {
        return;
    }
    write_now(&format!("scenario {name}\n"));
    let prefix = fresh_prefix();
    let testbed = match Testbed::up(prefix.clone(), options, Progress::Quiet) {
        Ok(testbed) => testbed.down_on_drop(),
        Err(e) => {
            // What came up so far tells why the rest did not.
            let half = Testbed::open(prefix).map(Testbed::down_on_drop);
            panic!("{name}: the testbed did not come up: {e:#} ({})", half.is_ok());
        }
    };
    if let Err(e) = body(&testbed) {
        panic!("{name}: {e:#}");
    }
}

/// Says `SKIP <name>: needs ...` and true when this machine cannot run the scenario.
pub fn skipped(name: &str, needs: Needs, cluster: bool) -> bool {
    let missing = needs.programs.iter().find(|(name, _)| program(name).is_none());
    let reason = lacks(cluster).or_else(|| {
        missing.map(|(name, package)| format!("the program `{name}` (apt-get install {package})"))
    });
    match reason {
        Some(reason) => {
            skip(name, &reason);
            true
        }
        None => false,
    }
}

/// Says that a scenario was not run; summaries count these lines as skipped tests.
pub fn skip(name: &str, reason: &str) {
    write_now(&format!("SKIP {name}: needs {reason}\n"));
}

/// Does one check of a scenario and says how it went.
///
/// # Errors
/// Those of the check, with its name.
pub fn check<T>(what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let start = Instant::now();
    let result = work().with_context(|| what.to_owned());
    let state = if result.is_ok() { "ok  " } else { "FAIL" };
    write_now(&format!("  {state} {what} ({:.1} s)\n", start.elapsed().as_secs_f64()));
    result
}

/// A prefix that no other testbed of this machine has: ours by process and count.
///
/// # Panics
/// After 26 testbeds in one process.
pub fn fresh_prefix() -> Prefix {
    static COUNT: AtomicU8 = AtomicU8::new(0);
    let letter = b'a' + COUNT.fetch_add(1, Ordering::SeqCst);
    assert!(letter <= b'z', "a test process brings up at most 26 testbeds");
    let text = format!("hxt{}{}", std::process::id(), char::from(letter));
    Prefix::new(&text).expect("letters and digits, short")
}
