//! Two network namespaces with a link between them: one for a server, one for a node. Gone when dropped.

use std::{
    process::{Command, Output, id},
    sync::atomic::{AtomicU32, Ordering},
};

static COUNT: AtomicU32 = AtomicU32::new(0);

pub(crate) const SERVER_ADDRESS: &str = "2001:db8:7::1";
pub(crate) const NODE_ADDRESS: &str = "2001:db8:7::2";

/// The two namespaces.
pub(crate) struct Net {
    pub(crate) server: String,
    pub(crate) node: String,
}

impl Net {
    pub(crate) fn new() -> Net {
        let name = format!("hxnode-{}-{}", id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let net = Net { server: format!("{name}-s"), node: format!("{name}-n") };
        let (server, node) = (&net.server, &net.node);
        ip(&["netns", "add", server]);
        ip(&["netns", "add", node]);
        ip(&["-n", server, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", node]);
        for (name, host) in [(server, "1"), (node, "2")] {
            ip(&["-n", name, "link", "set", "lo", "up"]);
            // No link-local address, so that nothing comes by itself later.
            ip(&["-n", name, "link", "set", "eth0", "addrgenmode", "none"]);
            ip(&["-n", name, "addr", "add", &format!("2001:db8:7::{host}/64"), "dev", "eth0", "nodad"]);
            ip(&["-n", name, "addr", "add", &format!("192.0.2.{host}/24"), "dev", "eth0"]);
            ip(&["-n", name, "link", "set", "eth0", "up"]);
        }
        net
    }

    /// The server's machine takes an address without asking and tells the link, with this MAC address.
    pub(crate) fn claim(&self, address: &str, mac: &str) {
        let notify = "net.ipv6.conf.eth0.ndisc_notify=1";
        let set = in_netns(&self.server, "sysctl").args(["-qw", notify]).output().unwrap();
        assert!(set.status.success(), "{}", text(&set));
        self.take(address);
        ip(&["-n", &self.server, "link", "set", "eth0", "address", mac]);
    }

    /// It takes an address without asking, and says so only when it is asked.
    pub(crate) fn take(&self, address: &str) {
        ip(&["-n", &self.server, "addr", "add", &format!("{address}/128"), "dev", "eth0", "nodad"]);
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        for name in [&self.server, &self.node] {
            let _ = Command::new("ip").args(["netns", "del", name]).output();
        }
    }
}

/// Runs `ip`, which must succeed; what it printed.
pub(crate) fn ip(arguments: &[&str]) -> String {
    let output = Command::new("ip").args(arguments).output().unwrap();
    assert!(output.status.success(), "ip {arguments:?}: {}", text(&output));
    String::from_utf8(output.stdout).unwrap()
}

/// A command in a namespace, of which the caller sees the true process id.
pub(crate) fn in_netns(name: &str, program: &str) -> Command {
    let mut command = Command::new("nsenter");
    command.arg(format!("--net=/run/netns/{name}")).arg(program);
    command
}

pub(crate) fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}
