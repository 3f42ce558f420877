//! What the kernel and the supervisors should hold, from who the node is and what it was told. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{Ipv4Addr, Ipv6Addr},
    path::PathBuf,
};

use dataplane_core::{Desired, Filtering, Ipv6Exit, Mac, MasqueradeBackend, NdpBackend, Pod, Uplink};
use hextet_address::NodePrefix;
use hextet_api::token::Fingerprint;
use ipnetwork::{Ipv4Network, Ipv6Network};

use crate::{
    assignment::{Assignment, PodRecord, Task},
    config::NodePaths,
    identity::Identity,
    lease_file, pod_ipv4,
    supervisor::spec::{PodSpec, TaskSpec, private_folder},
};

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The device to the other nodes, as it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Underlay {
    pub(crate) device: String,
    /// Where peers send packets for this node.
    pub(crate) address: Ipv6Addr,
    pub(crate) ipv4: Option<Ipv4Addr>,
    /// Prefixes to which the kernel's routes would choose another of its addresses.
    pub(crate) sources: BTreeMap<Ipv4Network, Ipv4Addr>,
    /// The /64s in which it has addresses.
    pub(crate) prefixes: BTreeSet<NodePrefix>,
    /// The global address that pods can leave with.
    pub(crate) global: Option<Ipv6Addr>,
    /// Prefixes of global addresses on its link.
    pub(crate) on_link: BTreeSet<Ipv6Network>,
    /// Its Ethernet address; zero when it has none.
    pub(crate) mac: Mac,
}

/// The backends that were chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Backends {
    pub(crate) ndp: NdpBackend,
    pub(crate) masquerade: MasqueradeBackend,
    pub(crate) filtering: Filtering,
    pub(crate) ipv6_exit: Ipv6Exit,
}

/// What the kernel should hold. `absent` are pods whose kernel objects must go or never came; to `silent` peers there
/// are no routes.
pub(crate) fn desired(
    identity: &Identity,
    assignment: &Assignment,
    underlay: &Underlay,
    backends: Backends,
    absent: impl Fn(&str) -> bool,
    silent: &BTreeSet<String>,
) -> Desired {
    let peers = assignment.peers.iter().filter(|(name, _)| !silent.contains(*name)).map(|(_, peer)| peer);
    // This machine under an earlier name is no peer: there is no route by way of oneself.
    let peers = peers.filter(|peer| peer.underlay != underlay.address);
    let pods = assignment.pods.iter().filter(|(id, pod)| pod.problem.is_none() && !absent(id));
    Desired {
        cluster: identity.cluster.network(),
        node: identity.prefix.network(),
        group: identity.group,
        pod_ipv4: identity.pod_ipv4,
        uplink: Uplink {
            name: underlay.device.clone(),
            ipv4: underlay.ipv4,
            sources: underlay.sources.clone(),
            global: underlay.global,
            on_link: underlay.on_link.clone(),
        },
        peers: peers.map(|peer| (peer.prefix.network(), peer.underlay)).collect(),
        pods: pods
            .filter_map(|(id, pod)| Some((id.clone(), Pod { address: pod.address, ipv4: pod.ipv4? })))
            .collect(),
        ndp: backends.ndp,
        masquerade: backends.masquerade,
        filtering: backends.filtering,
        ipv6_exit: backends.ipv6_exit,
    }
}

/// What the supervisor of a pod should run; none while the pod has no IPv4 address and so no user id.
pub(crate) fn spec(
    identity: &Identity,
    paths: &NodePaths,
    netns: PathBuf,
    id: &str,
    pod: &PodRecord,
) -> Option<PodSpec> {
    let folder = paths.pod_state_dir(id);
    let tasks = pod.tasks.iter().map(|task| TaskSpec {
        name: task.name.clone(),
        exec: task.exec.clone(),
        env: environment(identity, id, pod, task, &private_folder(&folder, &task.name)),
    });
    let spec = PodSpec {
        pod: id.to_owned(),
        fingerprint: String::new(),
        netns: Some(netns),
        uid: Some(pod_ipv4::uid(identity.pod_ipv4, pod.ipv4?)),
        tasks: tasks.collect(),
        folder,
        lease: lease(paths, pod),
    };
    Some(PodSpec { fingerprint: fingerprint(&spec), ..spec })
}

fn fingerprint(spec: &PodSpec) -> String {
    let text = serde_json::to_vec(spec).expect("a spec holds only strings and numbers");
    Fingerprint::of(&text).to_string()
}

/// The task's own variables over the defaults, and Hextet's over both.
fn environment(
    identity: &Identity,
    id: &str,
    pod: &PodRecord,
    task: &Task,
    folder: &std::path::Path,
) -> BTreeMap<String, String> {
    let folder = folder.to_string_lossy();
    let defaults = [("PATH", PATH), ("HOME", &*folder), ("TMPDIR", &*folder)];
    let address = pod.address.to_string();
    let ours = [
        ("HEXTET_JOB", pod.job.as_str()),
        ("HEXTET_GROUP", &pod.group),
        ("HEXTET_POD", id),
        ("HEXTET_NODE", &identity.name),
        ("HEXTET_TASK", &task.name),
        ("HEXTET_ADDRESS", &address),
    ];
    let owned = |(key, value): (&str, &str)| (key.to_owned(), value.to_owned());
    let mut all: BTreeMap<String, String> = defaults.map(owned).into();
    all.extend(task.env.clone());
    all.extend(ours.map(owned));
    all.extend(pod.singleton.map(|serial| ("HEXTET_FENCING_TOKEN".to_owned(), serial.to_string())));
    all
}

/// The lease without which nothing of the pod may run; none for most.
pub(crate) fn lease(paths: &NodePaths, pod: &PodRecord) -> Option<PathBuf> {
    pod.singleton.map(|_| paths.run_dir.join(lease_file::LEASE_FILE))
}

/// What a hook of a pod is told: its own variables over the defaults, and Hextet's over both.
pub(crate) fn hook_environment(
    identity: &Identity,
    id: &str,
    pod: &PodRecord,
    hook: &str,
    own: &BTreeMap<String, String>,
) -> BTreeMap<String, String> {
    let address = pod.address.to_string();
    let ours = [
        ("HEXTET_JOB", pod.job.as_str()),
        ("HEXTET_GROUP", &pod.group),
        ("HEXTET_POD", id),
        ("HEXTET_NODE", &identity.name),
        ("HEXTET_HOOK", hook),
        ("HEXTET_ADDRESS", &address),
    ];
    let token = pod.singleton.map(|serial| ("HEXTET_FENCING_TOKEN".to_owned(), serial.to_string()));
    let mut all = BTreeMap::from([("PATH".to_owned(), PATH.to_owned())]);
    all.extend(own.clone());
    all.extend(ours.map(|(key, value)| (key.to_owned(), value.to_owned())));
    all.extend(token);
    all
}

#[cfg(test)]
mod tests {
    use expect_test::expect;
    use hextet_api::v1;

    use super::*;
    use crate::{
        assignment::{
            merge,
            tests::{address, pod},
        },
        identity::tests::identity,
    };

    fn assigned(pods: Vec<v1::PodAssignment>) -> Assignment {
        let message = v1::Assignment { full: true, pods, ..v1::Assignment::default() };
        merge(&identity(), &Assignment::default(), message).next
    }

    fn build(assignment: &Assignment, absent: impl Fn(&str) -> bool) -> Desired {
        let underlay = Underlay {
            device: "eth0".into(),
            address: "2001:db8:1::11".parse().unwrap(),
            ipv4: Some("192.0.2.11".parse().unwrap()),
            sources: BTreeMap::new(),
            prefixes: BTreeSet::new(),
            global: None,
            on_link: BTreeSet::new(),
            mac: Mac([0; 6]),
        };
        let backends = Backends {
            ndp: NdpBackend::Ebpf,
            masquerade: MasqueradeBackend::Nftables,
            filtering: Filtering::default(),
            ipv6_exit: Ipv6Exit::default(),
        };
        desired(&identity(), assignment, &underlay, backends, absent, &BTreeSet::from(["n9".to_owned()]))
    }

    fn paths() -> NodePaths {
        NodePaths { state_dir: "/state".into(), run_dir: "/run/x".into(), bpf_dir: "/bpf".into() }
    }

    /// A machine that joined again under another name was its own next hop, which the kernel refuses.
    #[test]
    fn this_machine_under_an_earlier_name_is_no_peer() {
        let peer = |name: &str, subnet: u8, host: u8| {
            let octets = |last| [0x20, 1, 0x0d, 0xb8, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, last];
            let mut prefix = identity().cluster.network().network().octets();
            prefix[7] = subnet;
            v1::Peer {
                name: name.into(),
                prefix: Some(v1::Ipv6Prefix { address: prefix.to_vec(), length_bits: 64 }),
                underlay: octets(host).to_vec(),
                lost: false,
                left: vec![],
            }
        };
        // That the test's node hears nothing from n9, see `build`.
        let peers = vec![peer("earlier", 0xee, 0x11), peer("n2", 0xdd, 0x12), peer("n9", 0xcc, 0x19)];
        let message = v1::Assignment { full: true, peers, ..v1::Assignment::default() };
        let assignment = merge(&identity(), &Assignment::default(), message).next;
        assert_eq!(assignment.peers.len(), 3);
        let desired = build(&assignment, |_| false);
        let hops: Vec<String> = desired.peers.values().map(ToString::to_string).collect();
        assert_eq!(hops, ["2001:db8:1::12"]);
    }

    #[test]
    fn a_pod_is_desired_with_both_its_addresses() {
        let desired = build(&assigned(vec![pod("a", 1)]), |_| false);
        assert_eq!(desired.pods["a"].address, address(1));
        assert_eq!(desired.pods["a"].ipv4.to_string(), "10.254.0.1");
        assert_eq!(desired.uplink.name, "eth0");
        assert_eq!((desired.ndp, desired.masquerade), (NdpBackend::Ebpf, MasqueradeBackend::Nftables));
    }

    #[test]
    fn pods_with_a_problem_or_on_their_way_out_are_not_desired() {
        let mut wrong = pod("wrong", 1);
        wrong.tasks.clear();
        let assignment = assigned(vec![wrong, pod("leaving", 2), pod("fine", 3)]);
        let desired = build(&assignment, |id| id == "leaving");
        assert_eq!(desired.pods.keys().collect::<Vec<_>>(), ["fine"]);
    }

    #[test]
    fn the_spec_holds_the_whole_environment() {
        let mut assignment = assigned(vec![pod("a", 1)]);
        let record = assignment.pods.get_mut("a").unwrap();
        record.tasks[0].env = BTreeMap::from([
            ("GREETING".into(), "hello".into()),
            ("HEXTET_POD".into(), "forged".into()),
            ("PATH".into(), "/opt/bin".into()),
        ]);
        let spec = spec(&identity(), &paths(), "/run/netns/a".into(), "a", record).unwrap();
        assert_eq!(spec.uid, Some(1_879_048_193));
        expect![[r#"
            {
                "GREETING": "hello",
                "HEXTET_ADDRESS": "fd00:1:2:a:0:1:bcc:ddee",
                "HEXTET_GROUP": "web",
                "HEXTET_JOB": "hello",
                "HEXTET_NODE": "n1",
                "HEXTET_POD": "a",
                "HEXTET_TASK": "server",
                "HOME": "/state/pods/a/server",
                "PATH": "/opt/bin",
                "TMPDIR": "/state/pods/a/server",
            }
        "#]]
        .assert_debug_eq(&spec.tasks[0].env);
    }

    #[test]
    fn the_fingerprint_names_the_content() {
        let mut record = assigned(vec![pod("a", 1)]).pods["a"].clone();
        let build = |record: &PodRecord| {
            spec(&identity(), &paths(), "/run/netns/a".into(), "a", record).unwrap().fingerprint
        };
        let before = build(&record);
        record.job_version += 1;
        assert_eq!(build(&record), before, "a version that changes no task restarts nothing");
        record.tasks[0].exec.push("-v".into());
        assert_ne!(build(&record), before);
    }

    #[test]
    fn without_an_ipv4_address_there_is_no_spec() {
        let record = PodRecord { ipv4: None, ..assigned(vec![pod("a", 1)]).pods["a"].clone() };
        assert_eq!(spec(&identity(), &paths(), "/run/netns/a".into(), "a", &record), None);
    }
}
