//! The load balancer example on the router, and asking it who answers.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};

use crate::probe::{HELLO_PORT, request};
use crate::process::Daemon;
use crate::testbed::{Testbed, program_beside_us};
use crate::topology::Place;
use crate::wait::{scaled, wait_for};

/// The port on the router.
pub const PORT: u16 = 80;
/// How long one request through it may take.
const REQUEST_LIMIT: Duration = Duration::from_secs(3);

/// nginx and lb-nginx on the router, for the pods of `hello/web`.
#[derive(Clone, Debug)]
pub struct Balancer<'a> {
    testbed: &'a Testbed,
    daemon: Daemon,
}

impl<'a> Balancer<'a> {
    /// The balancer of a testbed; it does not run yet.
    pub fn new(testbed: &'a Testbed) -> Self {
        let daemon = Daemon::new("lb-nginx", testbed.netns("router"), &testbed.dir().join("router"));
        Self { testbed, daemon }
    }

    /// Starts it with a token of its own, and nginx with it.
    ///
    /// # Errors
    /// When there is no token or it cannot be started.
    pub fn join(&self) -> Result<()> {
        let args = ["token", "--for", "lb", "--name", "edge", "--select", "hello/web"];
        let token = self.testbed.netctl(&args)?.success()?;
        self.start_with(&["--join", token.trim()])
    }

    /// Starts it again.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(&self) -> Result<()> {
        self.start_with(&[])
    }

    /// Its process.
    pub fn daemon(&self) -> &Daemon {
        &self.daemon
    }

    /// Where clients find it.
    pub fn address(&self) -> SocketAddr {
        let router: Ipv4Addr = Place::Router.addresses().expect("the router has addresses").v4;
        (router, PORT).into()
    }

    /// Asks it `count` times, as the LAN client does, and gives the pods that answered.
    ///
    /// # Errors
    /// When a request fails.
    pub fn pods(&self, count: usize) -> Result<BTreeSet<String>> {
        let to = self.address();
        let ask = || (0..count).map(|_| request(to, scaled(REQUEST_LIMIT))).collect::<Result<Vec<_>, _>>();
        let answers = self.testbed.netns("client").run(ask)?.context("a request to the balancer failed")?;
        answers.iter().map(|answer| pod_in(answer)).collect()
    }

    /// Waits until exactly `wanted` answer; gives the time that it took.
    ///
    /// # Errors
    /// When others answer, or some do not, until `limit`.
    pub fn wait_pods(&self, wanted: &BTreeSet<String>, limit: Duration) -> Result<Duration> {
        let count = 4 * wanted.len().max(1);
        let (took, ()) =
            wait_for(limit, &format!("the balancer serves {wanted:?}"), || match self.pods(count) {
                Ok(pods) if pods == *wanted => Ok(()),
                Ok(pods) => Err(format!("it serves {pods:?}")),
                Err(e) => Err(format!("{e:#}")),
            })?;
        Ok(took)
    }

    /// Waits until `count` pods, whichever, answer in turns; gives the time since `start`.
    ///
    /// # Errors
    /// When it is another number until `limit`.
    pub fn wait_count(&self, count: usize, start: Instant, limit: Duration) -> Result<Duration> {
        let asked = 4 * count.max(1);
        wait_for(limit, &format!("the balancer serves {count} pods"), || match self.pods(asked) {
            Ok(pods) if pods.len() == count => Ok(()),
            Ok(pods) => Err(format!("it serves {}", pods.len())),
            Err(e) => Err(format!("{e:#}")),
        })?;
        Ok(start.elapsed())
    }

    /// Does `work` while a client asks without pause; gives the pods that answered, in their order.
    ///
    /// # Errors
    /// When a request fails, or `work` does.
    pub fn under_load(&self, work: impl FnOnce() -> Result<()>) -> Result<Vec<String>> {
        let done = AtomicBool::new(false);
        let (to, limit) = (self.address(), scaled(REQUEST_LIMIT));
        let client = self.testbed.netns("client");
        let ask = || {
            let mut answers = Vec::new();
            while !done.load(Ordering::SeqCst) {
                let answer =
                    request(to, limit).with_context(|| format!("request {} failed", answers.len()))?;
                answers.push(pod_in(&answer)?);
            }
            Ok::<Vec<String>, anyhow::Error>(answers)
        };
        let answers = std::thread::scope(|scope| {
            let asking = scope.spawn(|| client.run(ask));
            let worked = work();
            done.store(true, Ordering::SeqCst);
            let answers = asking.join().map_err(|_| anyhow!("the client panicked"))??;
            worked.and(answers)
        })?;
        ensure!(answers.len() > 10, "the client asked only {} times", answers.len());
        Ok(answers)
    }

    fn start_with(&self, more: &[&str]) -> Result<()> {
        let mut command = Command::new(program_beside_us("lb-nginx")?);
        command.args(more).arg("--state-dir").arg(self.testbed.dir().join("router/lb"));
        command.args(["--select", "hello/web", "--port", &HELLO_PORT.to_string()]);
        command.args(["--listen", &PORT.to_string(), "--nginx"]);
        self.daemon.start(command)?;
        Ok(())
    }
}

/// The pod's name in `hello from POD on NODE at ADDRESS`.
fn pod_in(answer: &str) -> Result<String> {
    match answer.strip_prefix("hello from ").and_then(|rest| rest.split(' ').next()) {
        Some(pod) => Ok(pod.to_owned()),
        None => bail!("not a hello: {answer:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pod_is_in_its_answer() {
        assert_eq!(pod_in("hello from hello-web-a1 on n1 at fd00::1").unwrap(), "hello-web-a1");
        assert!(pod_in("503").is_err());
    }
}
