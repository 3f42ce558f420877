//! Carries out operations, one after the other.
//!
//! After a failure it goes on, except with what else would be made for the same pod: a pod that is not complete
//! must not become reachable. Removals are always tried.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use dataplane_core::{Action, Guard, Op, Place};
use thiserror::Error;

use crate::{
    BpfError, Dataplane, NftError, NoBpf, StateError,
    bpf::{Bpf, GuardEntry},
    netlink::{Netlink, NetlinkError, index_of},
    netns, nft, observe, sysctl,
};

/// Why an operation was not done.
#[derive(Debug, Error)]
pub enum ApplyError {
    /// The kernel's network tables.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// Something of that name is there and not Hextet's.
    #[error("{what} is already there and was not made by Hextet: rename or remove it")]
    NotOurs {
        /// What is in the way.
        what: String,
    },
    /// A namespace cannot be made, entered or removed.
    #[error("cannot work with network namespace {}", path.display())]
    Netns {
        /// Its file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A sysctl cannot be set.
    #[error("cannot set sysctl {key}")]
    Sysctl {
        /// The key.
        key: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file cannot be written or removed.
    #[error("cannot write {}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The nftables table.
    #[error(transparent)]
    Nft(#[from] NftError),
    /// A BPF program or map.
    #[error(transparent)]
    Bpf(#[from] BpfError),
    /// BPF is wanted and cannot be used.
    #[error("BPF cannot be used here: {0}")]
    NoBpf(String),
    /// What must be remembered first could not be.
    #[error("what was there before cannot be remembered: {0}")]
    State(String),
    /// An earlier operation of the same pod failed.
    #[error("skipped, because an earlier operation for pod {0} failed")]
    Skipped(String),
}

type Failure = (Op, ApplyError);

impl Dataplane {
    /// Carries out `ops` in order and returns what failed or was skipped.
    pub async fn apply(&mut self, ops: &[Op]) -> Vec<Failure> {
        if let Err(error) = self.remember(ops) {
            let reason = crate::features::chain(&error);
            return ops.iter().map(|op| (op.clone(), ApplyError::State(reason.clone()))).collect();
        }
        let mut failures = Vec::new();
        let mut broken_pods = BTreeSet::new();
        for visit in ops.chunk_by(same_visit) {
            let failed = self.apply_visit(visit, &broken_pods).await;
            broken_pods.extend(failed.iter().filter_map(|(op, _)| op.pod.clone()));
            failures.extend(failed);
        }
        self.state.save_later();
        failures
    }

    async fn apply_visit(&mut self, ops: &[Op], broken_pods: &BTreeSet<String>) -> Vec<Failure> {
        let first = &ops[0];
        if let Some(pod) = first.pod.as_ref().filter(|pod| !first.removes() && broken_pods.contains(*pod)) {
            return ops.iter().map(|op| (op.clone(), ApplyError::Skipped(pod.clone()))).collect();
        }
        match (&first.pod, first.place) {
            (Some(pod), Place::Pod) => self.apply_inside(pod, ops).await,
            _ => match self.apply_on_host(first).await {
                Ok(()) => Vec::new(),
                Err(error) => vec![(first.clone(), error)],
            },
        }
    }

    /// All that must be remembered about the state before `ops`, in one write before the first of them.
    fn remember(&mut self, ops: &[Op]) -> Result<(), StateError> {
        for op in ops {
            match (&op.action, &op.pod) {
                (Action::NetnsAdd, Some(pod)) => self.remember_namespace(pod),
                (Action::SysctlSet { key, .. }, None) => self.remember_sysctl(key),
                (Action::ProtocolRegister, _) => self.remember_folder(self.config.rt_protos_dir.clone()),
                _ => {}
            }
        }
        self.state.save()
    }

    /// Unless something else is there: then the operation will fail, and the thing must not become ours.
    fn remember_namespace(&mut self, pod: &str) {
        self.remember_folder(self.config.netns_dir.clone());
        if netns::path(&self.config.netns_dir, pod).is_ok_and(|path| !path.exists()) {
            self.state.facts.namespaces.insert(pod.to_owned());
        }
    }

    fn remember_sysctl(&mut self, key: &str) {
        let with_it = if key == "net/ipv6/conf/all/forwarding" {
            sysctl::ipv6_forwarding_keys().unwrap_or_default()
        } else {
            Vec::new()
        };
        for key in with_it.into_iter().chain([key.to_owned()]) {
            if let Some(value) = sysctl::read(&key) {
                self.state.facts.sysctls.entry(key).or_insert(value);
            }
        }
    }

    fn remember_folder(&mut self, folder: PathBuf) {
        if !folder.exists() {
            self.state.facts.folders.insert(folder);
        }
    }

    async fn apply_on_host(&mut self, op: &Op) -> Result<(), ApplyError> {
        let pod = op.pod.as_deref().unwrap_or_default();
        match &op.action {
            Action::ProtocolRegister => self.register_protocol(),
            Action::ProtocolUnregister => remove_file(&self.protocol_file()),
            Action::SysctlSet { key, value } => set_sysctl(key, value),
            Action::SysctlRestore { key, value } => self.restore_sysctl(key, value),
            Action::NetnsAdd => self.add_netns(pod).await,
            Action::NetnsDelete => self.delete_netns(pod),
            Action::LinkAdd { dev, host_mac, pod_mac, mtu_bytes } => {
                let netns = self.open_netns(pod)?;
                let added = self.netlink.add_veth(dev, *host_mac, *pod_mac, *mtu_bytes, netns).await;
                added.map_err(|error| taken(error, || format!("device {dev}, or eth0 in namespace {pod},")))
            }
            Action::NftSet(table) => Ok(nft::set(table).await?),
            Action::NftDelete => Ok(nft::delete().await?),
            Action::NftExitSet(table) => Ok(nft::exit::set(table).await?),
            Action::NftExitDelete => Ok(nft::exit::delete().await?),
            Action::Attach { .. }
            | Action::Detach { .. }
            | Action::NdpSet { .. }
            | Action::NdpDelete { .. }
            | Action::GuardSet { .. }
            | Action::GuardDelete { .. }
            | Action::MasqueradeSet(_)
            | Action::MasqueradeDelete => apply_bpf(self.bpf()?, &op.action),
            Action::Unpin => self.unpin(),
            action => apply_netlink(&self.netlink, action).await,
        }
    }

    async fn apply_inside(&self, pod: &str, ops: &[Op]) -> Vec<Failure> {
        let all_fail = |source: io::Error, path: PathBuf| {
            let error = ApplyError::Netns { path, source };
            let rest = ops[1..].iter().map(|op| (op.clone(), ApplyError::Skipped(pod.to_owned())));
            std::iter::once((ops[0].clone(), error)).chain(rest).collect()
        };
        let path = match netns::path(&self.config.netns_dir, pod) {
            Ok(path) => path,
            Err(error) => return all_fail(error, self.config.netns_dir.clone()),
        };
        let own = ops.to_vec();
        let visit = netns::visit(vec![path.clone()], async move |_| apply_all_inside(&own).await);
        let visited = visit.await.and_then(|mut visits| visits.remove(0));
        visited.unwrap_or_else(|error| all_fail(error, path))
    }

    fn register_protocol(&self) -> Result<(), ApplyError> {
        let path = self.protocol_file();
        if path.exists() {
            return Err(ApplyError::NotOurs { what: path.display().to_string() });
        }
        fs::create_dir_all(&self.config.rt_protos_dir)
            .and_then(|()| fs::write(&path, observe::protocol_file_content()))
            .map_err(|source| ApplyError::File { path, source })
    }

    /// A device that has gone took its sysctls along.
    fn restore_sysctl(&mut self, key: &str, value: &str) -> Result<(), ApplyError> {
        if sysctl::exists(key) {
            set_sysctl(key, value)?;
        }
        self.state.facts.sysctls.remove(key);
        Ok(())
    }

    async fn add_netns(&self, pod: &str) -> Result<(), ApplyError> {
        let path = self.netns_path(pod)?;
        if !self.state.facts.namespaces.contains(pod) {
            return Err(ApplyError::NotOurs { what: path.display().to_string() });
        }
        let made = async {
            fs::create_dir_all(&self.config.netns_dir)?;
            netns::add(path.clone()).await
        };
        made.await.map_err(|source| ApplyError::Netns { path: path.clone(), source })
    }

    fn delete_netns(&mut self, pod: &str) -> Result<(), ApplyError> {
        let path = self.netns_path(pod)?;
        netns::delete(&path).map_err(|source| ApplyError::Netns { path, source })?;
        self.state.facts.namespaces.remove(pod);
        Ok(())
    }

    fn open_netns(&self, pod: &str) -> Result<File, ApplyError> {
        let path = self.netns_path(pod)?;
        File::open(&path).map_err(|source| ApplyError::Netns { path, source })
    }

    fn netns_path(&self, pod: &str) -> Result<PathBuf, ApplyError> {
        let dir = &self.config.netns_dir;
        netns::path(dir, pod).map_err(|source| ApplyError::Netns { path: dir.clone(), source })
    }

    fn bpf(&mut self) -> Result<&mut Bpf, ApplyError> {
        let reason = self.features.bpf.as_ref().err().map(NoBpf::to_string).unwrap_or_default();
        self.bpf.as_mut().ok_or(ApplyError::NoBpf(reason))
    }

    fn unpin(&mut self) -> Result<(), ApplyError> {
        self.bpf = None;
        self.features.bpf = Err(NoBpf { reason: "it was taken down".to_owned(), unmounted: false });
        let mut errors = Bpf::teardown(&self.config.bpf_dir);
        errors.drain(..).next().map_or(Ok(()), |error| Err(error.into()))
    }
}

/// Consecutive operations inside of one pod share a visit to its namespace.
fn same_visit(a: &Op, b: &Op) -> bool {
    a.place == Place::Pod && b.place == Place::Pod && a.pod == b.pod
}

/// Up to the first failure: what follows depends on it.
async fn apply_all_inside(ops: &[Op]) -> Vec<Failure> {
    let mut failures = Vec::new();
    let netlink = match Netlink::open() {
        Ok(netlink) => netlink,
        Err(error) => {
            let error = NetlinkError::Broken(error.to_string());
            return vec![(ops[0].clone(), error.into())];
        }
    };
    for op in ops {
        if failures.is_empty() {
            failures.extend(apply_one_inside(&netlink, op).await.err().map(|error| (op.clone(), error)));
        } else {
            let pod = op.pod.clone().unwrap_or_default();
            failures.push((op.clone(), ApplyError::Skipped(pod)));
        }
    }
    failures
}

async fn apply_one_inside(netlink: &Netlink, op: &Op) -> Result<(), ApplyError> {
    match &op.action {
        Action::SysctlSet { key, value } => set_sysctl(key, value),
        action => apply_netlink(netlink, action).await,
    }
}

/// What is done over netlink, the same way in the node's namespace and in a pod's.
async fn apply_netlink(netlink: &Netlink, action: &Action) -> Result<(), ApplyError> {
    match action {
        Action::LinkSet { dev, link } => netlink.set_link(dev, link).await?,
        Action::LinkDelete { dev } => gone_is_fine(netlink.delete_link(dev).await)?,
        Action::LoopbackUp => netlink.set_loopback_up().await?,
        Action::AddressAdd(address) => netlink.add_address(address).await?,
        Action::AddressDelete(address) => gone_is_fine(netlink.delete_address(address).await)?,
        Action::RouteAdd(route) => {
            let added = netlink.add_route(route).await;
            return added.map_err(|error| taken(error, || format!("a route to {}", route.destination)));
        }
        Action::RouteReplace(route) => netlink.replace_route(route).await?,
        Action::RouteDelete(route) => gone_is_fine(netlink.delete_route(route).await)?,
        Action::NeighbourSet(neighbour) => netlink.set_neighbour(neighbour).await?,
        Action::NeighbourDelete(neighbour) => gone_is_fine(netlink.delete_neighbour(neighbour).await)?,
        Action::ProxyAdd { dev, address } => netlink.add_proxy(dev, *address).await?,
        Action::ProxyDelete { dev, address } => gone_is_fine(netlink.delete_proxy(dev, *address).await)?,
        other => unreachable!("{other:?} is not done over netlink"),
    }
    Ok(())
}

fn apply_bpf(bpf: &mut Bpf, action: &Action) -> Result<(), ApplyError> {
    match action {
        Action::Attach { program, dev } => bpf.attach(*program, index_of(dev)?, dev)?,
        Action::Detach { program, dev } => bpf.detach(*program, dev)?,
        Action::NdpSet { address, mac } => bpf.set_local_pod(*address, mac.0)?,
        Action::NdpDelete { address } => bpf.remove_local_pod(*address)?,
        Action::GuardSet { dev, guard } => bpf.set_guard(index_of(dev)?, guard_entry(guard))?,
        Action::GuardDelete { dev } => bpf.remove_guard(guarded_index(dev)?)?,
        Action::MasqueradeSet(masquerade) => bpf.set_masquerade(Some(masquerade))?,
        Action::MasqueradeDelete => bpf.set_masquerade(None)?,
        other => unreachable!("{other:?} is not done with BPF"),
    }
    Ok(())
}

/// A device that has gone is written `if` and its index.
fn guarded_index(dev: &str) -> Result<u32, NetlinkError> {
    match index_of(dev) {
        Err(error) => dev.strip_prefix("if").and_then(|index| index.parse().ok()).ok_or(error),
        index => index,
    }
}

fn guard_entry(guard: &Guard) -> GuardEntry {
    GuardEntry {
        ipv6: guard.ipv6,
        ipv4: guard.ipv4,
        pod_ipv4: guard.pod_ipv4,
        pod_mac: guard.pod_mac.0,
        host_mac: guard.host_mac.0,
    }
}

/// Says what is in the way, when something is.
fn taken(error: NetlinkError, what: impl FnOnce() -> String) -> ApplyError {
    match error.errno() {
        Some(libc::EEXIST) => ApplyError::NotOurs { what: what() },
        _ => error.into(),
    }
}

/// Removing what somebody else removed in the meantime has succeeded.
fn gone_is_fine(result: Result<(), NetlinkError>) -> Result<(), NetlinkError> {
    match result {
        Err(NetlinkError::NoDevice(_)) => Ok(()),
        Err(error)
            if matches!(
                error.errno(),
                Some(libc::ESRCH | libc::ENOENT | libc::ENODEV | libc::EADDRNOTAVAIL)
            ) =>
        {
            Ok(())
        }
        result => result,
    }
}

fn set_sysctl(key: &str, value: &str) -> Result<(), ApplyError> {
    sysctl::write(key, value).map_err(|source| ApplyError::Sysctl { key: key.to_owned(), source })
}

fn remove_file(path: &Path) -> Result<(), ApplyError> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(ApplyError::File { path: path.to_owned(), source })
        }
        _ => Ok(()),
    }
}
