//! What the command line tells the agent.

use std::{
    collections::BTreeMap,
    env, fs, io,
    net::Ipv6Addr,
    path::{Path, PathBuf},
    str::FromStr,
    thread,
};

use dataplane_core::{Filtering, Ipv6Exit};
use hextet_address::{AddressError, NodePrefix};
use hextet_api::token::Token;
use hextet_lifecycle::Hook;
use thiserror::Error;

/// Where a node keeps what it has; every command about a node needs them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodePaths {
    /// The store, the pods' logs and their private folders: survives a reboot.
    pub state_dir: PathBuf,
    /// Sockets and what belongs to running processes: on a file system that a reboot empties.
    pub run_dir: PathBuf,
    /// The pins, on a BPF file system.
    pub bpf_dir: PathBuf,
}

/// How to run an agent.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// Where its files are.
    pub paths: NodePaths,
    /// The token to join with; not needed once the node has joined.
    pub join: Option<Token>,
    /// A token with which a node comes back whose cluster has replaced its CA while it was away.
    pub rejoin: Option<Token>,
    /// The node's name; none: the token's, else the host's.
    pub name: Option<String>,
    /// The device to the other nodes; none: that of the default route.
    pub uplink: Option<String>,
    /// The address to which peers send packets for this node's pods; none: the uplink's.
    pub underlay: Option<Ipv6Addr>,
    /// Which /64 the pods get their addresses in; asked for when the node joins, and kept.
    pub pod_prefix: PodPrefixChoice,
    /// Who answers neighbour solicitations.
    pub ndp: NdpChoice,
    /// Who translates the pods' IPv4.
    pub masquerade: MasqueradeChoice,
    /// Who gets in at the outside ports of pods.
    pub filtering: Filtering,
    /// What becomes of the pods' IPv6 to the internet.
    pub ipv6_exit: Ipv6Exit,
    /// Programs that the operator adds to the lifecycle of each pod here.
    pub hooks: BTreeMap<String, Hook>,
    /// For the constraints of jobs.
    pub labels: BTreeMap<String, String>,
    /// What pods may use in all; none: what the machine has.
    pub cpu_millis: Option<u32>,
    /// What pods may use in all; none: what the machine has.
    pub memory_bytes: Option<u64>,
    /// What pods may take of what the user counts, such as `gpu`.
    pub countables: BTreeMap<String, u32>,
}

/// Which /64 the pods of a node get their addresses in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PodPrefixChoice {
    /// The cluster's pod prefix, if the uplink has an address in it, else one of the node's own.
    #[default]
    Auto,
    /// One of the cluster's /48 that is the node's own.
    Own,
    /// That of the LAN.
    Lan(NodePrefix),
}

/// Who answers neighbour solicitations for pods.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NdpChoice {
    /// BPF where the kernel can, else the kernel's proxy.
    #[default]
    Auto,
    /// BPF or nothing.
    Ebpf,
    /// The kernel's `proxy_ndp`.
    Kernel,
}

/// Who translates the pods' IPv4.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MasqueradeChoice {
    /// BPF where the kernel can, else nftables.
    #[default]
    Auto,
    /// BPF or nothing.
    Ebpf,
    /// nftables and connection tracking.
    Nftables,
}

/// A word that names no backend.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{word:?} is not one of {known}")]
pub struct ChoiceError {
    word: String,
    known: &'static str,
}

impl FromStr for PodPrefixChoice {
    type Err = AddressError;

    fn from_str(word: &str) -> Result<Self, AddressError> {
        match word {
            "auto" => Ok(Self::Auto),
            "own" => Ok(Self::Own),
            prefix => prefix.parse().map(Self::Lan),
        }
    }
}

impl FromStr for NdpChoice {
    type Err = ChoiceError;

    fn from_str(word: &str) -> Result<Self, ChoiceError> {
        match word {
            "auto" => Ok(Self::Auto),
            "ebpf" => Ok(Self::Ebpf),
            "kernel" => Ok(Self::Kernel),
            _ => Err(ChoiceError { word: word.into(), known: "auto, ebpf, kernel" }),
        }
    }
}

impl FromStr for MasqueradeChoice {
    type Err = ChoiceError;

    fn from_str(word: &str) -> Result<Self, ChoiceError> {
        match word {
            "auto" => Ok(Self::Auto),
            "ebpf" => Ok(Self::Ebpf),
            "nftables" => Ok(Self::Nftables),
            _ => Err(ChoiceError { word: word.into(), known: "auto, ebpf, nftables" }),
        }
    }
}

impl NodePaths {
    /// The same with absolute paths: supervisors work in another folder.
    pub(crate) fn absolute(&self) -> io::Result<NodePaths> {
        Ok(NodePaths {
            state_dir: std::path::absolute(&self.state_dir)?,
            run_dir: std::path::absolute(&self.run_dir)?,
            bpf_dir: std::path::absolute(&self.bpf_dir)?,
        })
    }

    pub(crate) fn store(&self) -> PathBuf {
        self.state_dir.join("node.redb")
    }

    /// Of each pod a folder, and of each of its hooks; `.node` for those that follow events on the whole node.
    pub(crate) fn hooks_dir(&self) -> PathBuf {
        self.state_dir.join("hooks")
    }

    pub(crate) fn pods_run_dir(&self) -> PathBuf {
        self.run_dir.join("pods")
    }

    pub(crate) fn pod_run_dir(&self, pod: &str) -> PathBuf {
        self.pods_run_dir().join(pod)
    }

    pub(crate) fn pods_state_dir(&self) -> PathBuf {
        self.state_dir.join("pods")
    }

    pub(crate) fn pod_state_dir(&self, pod: &str) -> PathBuf {
        self.pods_state_dir().join(pod)
    }
}

/// Thousandths of a CPU that this process may use.
pub(crate) fn machine_cpu_millis() -> u32 {
    let cpus = thread::available_parallelism().map_or(1, usize::from);
    u32::try_from(cpus).unwrap_or(u32::MAX).saturating_mul(1000)
}

/// The machine's memory; 0 when the kernel does not say.
pub(crate) fn machine_memory_bytes() -> u64 {
    fs::read_to_string("/proc/meminfo").ok().and_then(|text| mem_total_bytes(&text)).unwrap_or(0)
}

/// Reads proc_meminfo(5).
fn mem_total_bytes(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// The program that supervises a pod, from which the caller was started too.
///
/// When that file was replaced or deleted, what runs is still there as `/proc/self/exe`.
pub(crate) fn supervisor_program() -> PathBuf {
    let own = env::current_exe().unwrap_or_default();
    if own.is_file() { own } else { Path::new("/proc/self/exe").to_owned() }
}

/// A name for this machine: the first label of its host name, made an RFC 1123 label.
pub(crate) fn host_label() -> Option<String> {
    let name = nix::unistd::gethostname().ok()?.into_string().ok()?;
    label(&name)
}

fn label(host_name: &str) -> Option<String> {
    let first = host_name.split('.').next()?.to_ascii_lowercase();
    let kept: String = first.chars().filter(|c| c.is_ascii_alphanumeric() || *c == '-').take(32).collect();
    let trimmed = kept.trim_matches('-');
    (!trimmed.is_empty()).then(|| trimmed.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_name_becomes_a_label() {
        assert_eq!(label("Rack_1-N2.example.org").as_deref(), Some("rack1-n2"));
        assert_eq!(label("-.x"), None);
        assert_eq!(label(&"a".repeat(60)).map(|name| name.len()), Some(32));
    }

    #[test]
    fn memory_is_read_in_bytes() {
        assert_eq!(mem_total_bytes("MemTotal:       16 kB\nMemFree: 1 kB\n"), Some(16384));
        assert_eq!(mem_total_bytes("MemTotal: 16\n"), None);
        assert!(machine_memory_bytes() > 1 << 20);
    }

    #[test]
    fn an_unknown_backend_names_the_known_ones() {
        let error = "iptables".parse::<MasqueradeChoice>().unwrap_err();
        assert_eq!(error.to_string(), "\"iptables\" is not one of auto, ebpf, nftables");
    }
}
