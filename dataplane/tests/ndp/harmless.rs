//! What answering for pods costs the node and the others on it: nothing.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::Ipv6Addr,
    path::{Path, PathBuf},
};

use dataplane::NdpBackend;

use crate::{
    GROUP_MAC, ask,
    rig::*,
    support::{Random, icmpv6, link_layer, solicitation},
    tap::Tap,
};

/// Solicitations from as many askers: more than the kernel's neighbour table takes (`gc_thresh3`, 1,024).
const FLOOD: usize = 20_000;
/// After so many, a good one must be answered.
const BETWEEN: usize = 500;

/// RFC 6583: whatever strangers ask, for whatever.
//= RFC 6583 7.1/priority
pub(crate) fn a_flood_fills_no_table_and_answers_go_on(backend: NdpBackend) {
    let lan = Lan::new();
    let node = Node::start(&lan, Role { announces: false, ..Role::new("a", backend) });
    let pods: Vec<_> = (1..=3).map(pod).collect();
    node.reconcile(&pods);
    let tap = Tap::open(&lan, "host");
    let before = lan.neighbours("a");
    flood(&tap, |random| pod(0x1000 + (random.next() & 0xfff) as u16));
    let unknown = lan.neighbours("a");
    assert!(unknown <= before + 4, "{before} entries became {unknown} by what nobody has");
    flood(&tap, |random| pods[random.below(3)]);
    let local = lan.neighbours("a");
    eprintln!(
        "{backend}: {before} neighbour entries before, {unknown} after unknown targets, {local} after pods"
    );
    match backend {
        NdpBackend::Ebpf => {
            assert!(local <= before + 4, "{before} entries became {local} by questions for pods");
            assert!(node.count("answered") >= FLOOD as u64, "{:?}", node.counters());
        }
        // It makes an entry for each asker, which is what this test is to find.
        NdpBackend::Kernel => assert!(local > before + 100, "{before} entries became only {local}"),
    }
}

fn flood(tap: &Tap, target: impl Fn(&mut Random) -> Ipv6Addr) {
    let mut random = Random(0x6583);
    for n in 0..FLOOD {
        let asker = random.next().to_be_bytes();
        let mac = [2, 0x66, asker[0], asker[1], asker[2], asker[3]];
        let source = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0x6666, asker[4].into(), asker[5].into(), n as u16);
        let message = solicitation(target(&mut random), &link_layer(1, mac));
        tap.send(&icmpv6((GROUP_MAC, mac), source, group(), 255, &message));
        if n % BETWEEN == 0 {
            still_answers(tap);
        }
    }
    still_answers(tap);
}

/// A host asks until it is answered, as hosts do.
fn still_answers(tap: &Tap) {
    until("an answer under the flood", || {
        tap.send(&ask(pod(1)));
        let deadline = std::time::Instant::now() + std::time::Duration::from_millis(500);
        std::iter::from_fn(|| tap.next(deadline))
            .filter_map(|heard| heard.advertisement())
            .any(|advertised| advertised.to == host() && advertised.target == pod(1))
            .then_some(())
    });
}

pub(crate) fn no_setting_of_others_is_changed(backend: NdpBackend) {
    let lan = Lan::new();
    let node = Node::start(&lan, Role::new("a", backend));
    let before = lan.on("a", settings);
    node.reconcile(&[pod(1)]);
    let after = lan.on("a", settings);
    let changed: BTreeSet<String> = before
        .iter()
        .filter(|(key, value)| after.get(*key) != Some(value))
        .map(|(key, _)| key.clone())
        .collect();
    assert_eq!(changed, expected(backend, before.contains_key("ipv6/conf/eth0/force_forwarding")));
    node.teardown();
    assert_eq!(lan.on("a", settings), before, "put back");
}

/// As docs/map-layout.md says.
fn expected(backend: NdpBackend, force_forwarding: bool) -> BTreeSet<String> {
    let mut keys = vec!["ipv4/conf/eth0/forwarding"];
    if force_forwarding {
        keys.push("ipv6/conf/eth0/force_forwarding");
    } else {
        // The kernel writes it through to every device.
        keys.extend(["ipv6/conf/all/forwarding", "ipv6/conf/default/forwarding", "ipv6/conf/lo/forwarding"]);
    }
    if !force_forwarding || backend == NdpBackend::Kernel {
        keys.extend(["ipv6/conf/eth0/forwarding", "ipv6/conf/eth0/accept_ra"]);
    }
    if backend == NdpBackend::Kernel {
        keys.extend(["ipv6/conf/all/proxy_ndp", "ipv6/conf/eth0/proxy_ndp", "ipv6/neigh/eth0/proxy_delay"]);
    }
    keys.into_iter().map(str::to_owned).collect()
}

/// Everything below /proc/sys/net that can be read, but for what belongs to pods' links and what moves by itself.
fn settings() -> BTreeMap<String, String> {
    let top = Path::new("/proc/sys/net");
    let mut found = BTreeMap::new();
    let mut folders = vec![top.to_owned()];
    while let Some(folder) = folders.pop() {
        for path in entries(&folder) {
            if path.is_dir() {
                folders.push(path);
            } else if let Ok(value) = fs::read_to_string(&path) {
                let key = path.strip_prefix(top).unwrap().to_string_lossy().into_owned();
                found.insert(key, value);
            }
        }
    }
    found.retain(|key, _| !key.contains("/hx") && !key.ends_with("nf_conntrack_count"));
    found
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    fs::read_dir(folder).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path())).collect()
}
