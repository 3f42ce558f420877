//! Observes and changes the kernel: netlink, nftables, BPF.
//!
//! The shell around `dataplane-core`: [`Dataplane::observe`] reads what the kernel holds that is Hextet's, the
//! core plans, [`Dataplane::apply`] carries the plan out, and [`Dataplane::changes`] says when to look again. It
//! holds no policy and almost no state: killing it at any point loses nothing that the next [`Dataplane::reconcile`]
//! does not find in the kernel.
//!
//! # What is ours
//! Links are Hextet's by their name (`hx` and ten hexadecimal digits) together with an alias, which is the pod's ID;
//! addresses, routes and proxied neighbours by protocol number 118; the nftables table by its name; network
//! namespaces by the link that leads into them or by the state file. Nothing else is ever changed or removed. Where a
//! name is taken by something else, the operation fails and says so.
//!
//! # Threads
//! A [`Dataplane`] belongs to the network namespace of the thread that opens it and must be used on threads that are
//! in the same one. It leaves none of them elsewhere.

pub mod announce;
mod apply;
pub mod bpf;
mod changes;
pub mod echo;
mod features;
mod multicast;
mod neighbours;
mod netlink;
mod netns;
mod nft;
mod observe;
mod source;
mod state;
mod sysctl;
mod uplink;

use std::{io, net::Ipv6Addr, path::PathBuf};

use thiserror::Error;

pub use apply::ApplyError;
pub use bpf::{BpfError, Counter, Flow, PortBlock, Swept, monotonic_ns};
pub use changes::{Author, Changes, ChangesError, Pace, Subject, Trace, Traces};
pub use dataplane_core::{
    Desired, Exit, Filtering, Ipv6Exit, MasqueradeBackend, NdpBackend, Observed, Op, Pod, Uplink, plan,
    plan_teardown, repairs,
};
pub use features::{Features, NoBpf};
pub use neighbours::Neighbours;
pub use netlink::{NetlinkError, Reachability};
pub use nft::NftError;
pub use observe::ObserveError;
pub use state::StateError;
pub use uplink::{UplinkError, UplinkInfo};

use bpf::Bpf;
use netlink::Netlink;
use state::State;

/// Where the dataplane keeps what is not in the kernel's tables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// On a BPF file system: pins of maps and links.
    pub bpf_dir: PathBuf,
    /// Network namespaces of pods; `ip` expects `/run/netns`.
    pub netns_dir: PathBuf,
    /// What must be remembered in this boot, to leave the machine as it was found.
    pub state_dir: PathBuf,
    /// Where `ip` finds names of route protocols.
    pub rt_protos_dir: PathBuf,
}

impl Config {
    /// The folders of a machine that runs one node, with what it must remember in `state_dir`.
    pub fn of_machine(state_dir: PathBuf) -> Self {
        Self {
            bpf_dir: "/sys/fs/bpf/hextet".into(),
            netns_dir: "/run/netns".into(),
            state_dir,
            rt_protos_dir: "/etc/iproute2/rt_protos.d".into(),
        }
    }
}

/// Why the kernel cannot be worked with at all.
#[derive(Debug, Error)]
pub enum OpenError {
    /// An ordinary user.
    #[error("may not change the network: run as root")]
    NotRoot,
    /// No netlink socket.
    #[error("cannot open a netlink socket")]
    Netlink(#[source] io::Error),
    /// The state file cannot be used.
    #[error(transparent)]
    State(#[from] StateError),
}

/// What a reconciliation did.
#[derive(Debug)]
pub struct Reconciled {
    /// What the kernel held before.
    pub observed: Observed,
    /// The plan.
    pub ops: Vec<Op>,
    /// What of it failed or was skipped.
    pub failures: Vec<(Op, ApplyError)>,
}

/// The node's kernel.
pub struct Dataplane {
    config: Config,
    netlink: Netlink,
    bpf: Option<Bpf>,
    features: Features,
    state: State,
    /// What hangs where, for who watches the hooks.
    watched: changes::Watched,
}

impl Dataplane {
    /// Opens the kernel of the calling thread's network namespace and adopts what an earlier agent left there.
    ///
    /// BPF that cannot be used is no error: [`Features::bpf`] says why, and operations that need it fail.
    ///
    /// # Errors
    /// [`OpenError`] when there is no point in going on.
    pub async fn open(config: Config) -> Result<Self, OpenError> {
        if !nix::unistd::geteuid().is_root() {
            return Err(OpenError::NotRoot);
        }
        let netlink = Netlink::open().map_err(OpenError::Netlink)?;
        let state = State::load(&config.state_dir)?;
        let opened = Bpf::open(&config.bpf_dir);
        let features = Features::probe(opened.as_ref().err()).await;
        let mut dataplane =
            Self { config, netlink, bpf: opened.ok(), features, state, watched: changes::Watched::default() };
        dataplane.forward_program_logs();
        Ok(dataplane)
    }

    fn forward_program_logs(&mut self) {
        if let Some(Err(error)) = self.bpf.as_mut().map(Bpf::spawn_logger) {
            tracing::warn!(error = &error as &dyn std::error::Error, "no log of the BPF programs");
        }
    }

    /// What this kernel offers, found out by trying.
    pub fn features(&self) -> &Features {
        &self.features
    }

    /// Reads the kernel, plans and applies.
    ///
    /// # Errors
    /// [`ObserveError`] when the kernel cannot be read; then nothing was changed.
    pub async fn reconcile(&mut self, desired: &Desired) -> Result<Reconciled, ObserveError> {
        let observed = self.observe(desired).await?;
        let ops = plan(desired, &observed);
        let failures = self.apply(&ops).await;
        if failures.is_empty()
            && let Some(Err(error)) = self.bpf.as_mut().map(Bpf::end_other_layouts)
        {
            tracing::warn!(error = features::chain(&error), "an older build's maps stay");
        }
        Ok(Reconciled { observed, ops, failures })
    }

    /// Removes everything that is Hextet's and puts the sysctls back. Goes on after a failure and returns all.
    ///
    /// # Errors
    /// [`ObserveError`] when the kernel cannot be read; then nothing was changed.
    pub async fn teardown(&mut self) -> Result<Vec<(Op, ApplyError)>, ObserveError> {
        let ops = plan_teardown(&self.observe_all().await?);
        let failures = self.apply(&ops).await;
        if failures.is_empty() {
            self.remove_state()?;
        }
        Ok(failures)
    }

    /// Makes the kernel ask a neighbour whether it is there, instead of trusting what it last heard. It is told
    /// nothing new; without an answer it forgets the neighbour, and who sends to it gets an ICMP error.
    ///
    /// # Errors
    /// [`NetlinkError`] when there is no such device, or the kernel refuses.
    pub async fn probe_neighbour(&self, dev: &str, address: Ipv6Addr) -> Result<(), NetlinkError> {
        self.netlink.probe_neighbour(dev, address).await
    }

    /// What the kernel knows of these neighbours on a device; nothing when that has no carrier.
    ///
    /// # Errors
    /// As [`Dataplane::probe_neighbour`].
    pub async fn reachability(
        &self,
        dev: &str,
        addresses: &[Ipv6Addr],
    ) -> Result<Option<Vec<Reachability>>, NetlinkError> {
        let known = self.netlink.reachability(dev).await?;
        if !self.netlink.has_carrier(dev).await? {
            return Ok(None);
        }
        let of = |address| known.get(address).copied().unwrap_or(Reachability::Unreachable);
        Ok(Some(addresses.iter().map(of).collect()))
    }

    /// Frees masquerade flows that have expired and says how many, and who has which ports.
    ///
    /// # Errors
    /// [`BpfError`] when a map cannot be read.
    pub fn sweep_flows(&mut self) -> Result<Swept, BpfError> {
        match &mut self.bpf {
            Some(bpf) => bpf.sweep_flows(bpf::monotonic_ns()),
            None => Ok(Swept::default()),
        }
    }

    /// The programs' counters, from the pins: needs no agent.
    ///
    /// # Errors
    /// [`BpfError`] when pins are there and cannot be read.
    pub fn counters(bpf_dir: &std::path::Path) -> Result<Vec<Counter>, BpfError> {
        Bpf::counters(bpf_dir)
    }

    /// Removes the folders that were made and the state file. A folder that others use by now stays.
    fn remove_state(&mut self) -> Result<(), StateError> {
        self.remove_empty_namespace_files();
        for folder in std::mem::take(&mut self.state.facts.folders) {
            if let Err(error) = std::fs::remove_dir(&folder) {
                tracing::debug!(folder = %folder.display(), %error, "folder stays");
            }
        }
        self.state.remove()
    }

    /// Files of namespaces that were never mounted, because an agent was killed in between.
    fn remove_empty_namespace_files(&self) {
        for id in &self.state.facts.namespaces {
            let path = netns::path(&self.config.netns_dir, id);
            if let Err(error) = path.and_then(|path| netns::delete(&path)) {
                tracing::warn!(%id, %error, "file of a namespace stays");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_send<T: Send>(_: &T) {}

    /// An agent runs these on any thread of its runtime.
    #[expect(dead_code, reason = "that it compiles is the test")]
    fn futures_can_be_spawned(dataplane: &mut Dataplane, desired: &Desired, changes: &mut Changes) {
        is_send(&dataplane.reconcile(desired));
        is_send(&dataplane.teardown());
        is_send(&dataplane.default_uplink());
        is_send(&changes.changed());
    }
}
