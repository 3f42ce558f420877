//! LAN mode on a testbed: the router advertises the LAN's prefix, the client makes its own address of it, and
//! the cluster begins with it. Nothing else is configured on either.

use std::collections::BTreeMap;
use std::net::Ipv6Addr;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::cluster::netctl_run;
use crate::process::Daemon;
use crate::testbed::{Testbed, program};
use crate::topology;
use crate::wait::wait_for;

/// How long a host may take to have an address of the LAN and a router.
const CONFIGURED: Duration = Duration::from_secs(20);

/// In which /64 a node's pods get their addresses when it is not said: `--pod-prefix`.
pub type Choices = BTreeMap<u8, String>;

/// A router sends advertisements every few seconds, so that hosts that come later need not ask.
fn radvd_conf() -> String {
    format!(
        "interface eth0 {{\n  AdvSendAdvert on;\n  MinRtrAdvInterval 3;\n  MaxRtrAdvInterval 4;\n  AdvDefaultLifetime 1800;\n  \
         prefix {} {{ AdvOnLink on; AdvAutonomous on; }};\n  \
         prefix {} {{ AdvOnLink on; AdvAutonomous on; }};\n}};\n",
        topology::lan_prefix(),
        topology::LAN_ULA
    )
}

impl Testbed {
    /// The router's `radvd`.
    pub fn radvd(&self) -> Daemon {
        Daemon::new("radvd", self.netns("router"), &self.dir.join("router"))
    }

    /// Starts `radvd` and waits until client and nodes have addresses of both prefixes and a way out.
    pub(crate) fn start_lan(&self) -> Result<()> {
        let radvd = self.radvd();
        if radvd.pid().is_none() {
            let dir = self.dir.join("router");
            std::fs::create_dir_all(&dir)?;
            let conf = dir.join("radvd.conf");
            std::fs::write(&conf, radvd_conf())
                .with_context(|| format!("cannot write {}", conf.display()))?;
            let path = program("radvd").context("radvd is not installed: apt-get install radvd")?;
            let mut command = Command::new(path);
            command.args(["--nodaemon", "--logmethod", "stderr", "--debug", "1", "--config"]).arg(&conf);
            // Not Daemon's own, which holds the number and nothing else.
            command.arg("--pidfile").arg(dir.join("radvd.lock"));
            radvd.start(command)?;
        }
        let hosts = self.nodes().into_iter().chain(["client".to_owned()]);
        for host in hosts {
            wait_for(CONFIGURED, &format!("{host} has learned IPv6"), || self.has_learned(&host))
                .with_context(|| format!("radvd said: {}", radvd.log()))?;
        }
        Ok(())
    }

    /// Says what it has when that is not all.
    fn has_learned(&self, host: &str) -> std::result::Result<(), String> {
        let made = self.slaac_addresses(host).map_err(|e| format!("{e:#}"))?;
        let routes = self.run_in(host, &["ip", "-6", "route", "show", "default"]).success();
        let routes = routes.map_err(|e| format!("{e:#}"))?;
        let all = made.len() == 2 && routes.contains("proto ra");
        if all { Ok(()) } else { Err(format!("its addresses: {made:?}, its routes: {routes:?}")) }
    }

    /// The global address that a LAN host made of what the router advertises.
    ///
    /// # Errors
    /// When it has none.
    pub fn slaac_address(&self, place: &str) -> Result<Ipv6Addr> {
        let made = self.slaac_addresses(place)?;
        let global = made.iter().find(|address| !address.is_unique_local());
        global.copied().with_context(|| format!("{place} has made no global address, but {made:?}"))
    }

    /// All addresses that it made.
    fn slaac_addresses(&self, place: &str) -> Result<Vec<Ipv6Addr>> {
        #[derive(Deserialize)]
        struct Link {
            addr_info: Vec<Info>,
        }
        #[derive(Deserialize)]
        struct Info {
            local: Ipv6Addr,
            #[serde(default)]
            dynamic: bool,
        }
        let shown = self.run_in(place, &["ip", "-j", "-6", "addr", "show", "dev", "eth0"]).success()?;
        let links: Vec<Link> = serde_json::from_str(&shown).context("`ip -j addr` is not understood")?;
        let made = links.iter().flat_map(|link| &link.addr_info).filter(|info| info.dynamic);
        Ok(made.map(|info| info.local).collect())
    }

    /// Begins the cluster with the LAN's prefix, unless it has begun.
    pub(crate) fn init_cluster(&self) -> Result<()> {
        let state = self.dir.join("server");
        if state.exists() {
            return Ok(());
        }
        let state = state.to_string_lossy().into_owned();
        let prefix = topology::lan_prefix();
        let words = ["cluster", "init", "--pod-prefix", &prefix, "--state-dir", &state];
        netctl_run(&self.dir, &words)?.success().map(drop)
    }
}
