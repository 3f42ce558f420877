//! The dataplane against this kernel: makes pods, looks at them with `ip`, breaks things, takes all down.
//!
//! Each test has namespaces of its own. Without root every test is skipped and says so.

#[path = "bpf/detach.rs"]
mod detach;
mod kernel_support;

use std::{
    fs,
    time::{Duration, Instant},
};

use dataplane::{
    Changes, Config, Dataplane, Desired, MasqueradeBackend, NdpBackend, Subject, Trace, bpf::Bpf,
};
use detach::detach;
use kernel_support::{Lan, chain, ip, is_root, pings, reconcile, run, skip, snapshot, text, wait_until};
use tokio::time::timeout;

#[test]
fn pods_are_reached_and_teardown_leaves_the_machine_as_found() {
    if !is_root() {
        return;
    }
    let lan = Lan::new();
    let before = snapshot(&lan.node);
    lan.as_node(async || {
        let mut dataplane = Dataplane::open(lan.config()).await.unwrap();
        let desired = lan.desired(2);
        reconcile(&mut dataplane, &desired).await;
        assert_eq!(reconcile(&mut dataplane, &desired).await, "", "second reconciliation");

        let mut restarted = Dataplane::open(lan.config()).await.unwrap();
        assert_eq!(reconcile(&mut restarted, &desired).await, "", "after a restart");
    });

    let (one, two) = (lan.pod(1), lan.pod(2));
    let (first, second) = ("fd00:1:2:a:1:0:ab:cdef", "fd00:1:2:a:2:0:ab:cdef");
    assert!(pings(&one, second), "pod to pod");
    assert!(pings(&two, first), "pod to pod, back");
    assert!(pings(&lan.host, first), "LAN host to pod, by neighbour discovery");
    assert!(pings(&one, "192.0.2.100"), "pod to an IPv4 host that has no route back to it");
    assert!(!pings(&one, "fd00:1:2:a:9:0:ab:cdef"), "nobody has this address");

    let routes = ip(&lan.node, &["-6", "route", "show", "proto", "118"]).to_string();
    assert!(routes.contains("fd00:1:2:b::/64") && routes.contains("2001:db8:1::12"), "{routes}");

    lan.as_node(async || {
        let mut dataplane = Dataplane::open(lan.config()).await.unwrap();
        let failures = dataplane.teardown().await.unwrap();
        assert!(failures.is_empty(), "{failures:?}");
        assert!(dataplane.teardown().await.unwrap().is_empty(), "second teardown");
    });
    assert_eq!(snapshot(&lan.node), before);
    assert!(!fs::exists(format!("/run/netns/{one}")).unwrap());
    assert!(!fs::exists(lan.state_dir().join("dataplane.json")).unwrap());
    assert!(!fs::exists(lan.config().rt_protos_dir).unwrap());
}

//= RFC 4861 7.2.8/join
#[test]
fn bpf_backends_do_the_same_and_leave_no_pin() {
    if !is_root() {
        return;
    }
    let lan = Lan::new();
    let before = snapshot(&lan.node);
    let (kernel, ebpf) = (lan.desired(2), with_bpf(lan.desired(2)));
    let config = lan.bpf_config();
    let usable = lan.as_node(async || {
        let mut dataplane = Dataplane::open(config.clone()).await.unwrap();
        if !Bpf::probe().sched_cls {
            skip("this kernel or this process has no BPF programs for tc");
            return false;
        }
        assert_eq!(dataplane.features().bpf, Ok(()));
        reconcile(&mut dataplane, &ebpf).await;
        assert_eq!(reconcile(&mut dataplane, &ebpf).await, "", "second reconciliation");
        let mut restarted = Dataplane::open(config.clone()).await.unwrap();
        assert_eq!(reconcile(&mut restarted, &ebpf).await, "", "after a restart");

        // Without proxied neighbours nothing but the address keeps the group joined.
        run("ip", &["-n", &lan.node, "addr", "del", "ff02::1:ffab:cdef/128", "dev", "eth0"]);
        let repaired = reconcile(&mut dataplane, &ebpf).await;
        assert_eq!(repaired, "addr replace ff02::1:ffab:cdef/128 dev eth0 autojoin proto 118\n");
        true
    });
    if !usable {
        return;
    }
    assert_all_reachable(&lan);
    lan.as_node(async || {
        let mut dataplane = Dataplane::open(config.clone()).await.unwrap();
        reconcile(&mut dataplane, &kernel).await;
        assert_eq!(reconcile(&mut dataplane, &kernel).await, "", "after the change to kernel backends");
        assert_all_reachable(&lan);
        reconcile(&mut dataplane, &ebpf).await;
        assert_eq!(reconcile(&mut dataplane, &ebpf).await, "", "after the change back");
        assert_all_reachable(&lan);
        run("ip", &["-n", &lan.node, "link", "del", "hx0001000000"]);
        reconcile(&mut dataplane, &ebpf).await;
        assert_eq!(reconcile(&mut dataplane, &ebpf).await, "", "after a link was lost");
        assert_all_reachable(&lan);
        let failures = dataplane.teardown().await.unwrap();
        assert!(failures.is_empty(), "{failures:?}");
    });
    assert_eq!(snapshot(&lan.node), before);
    assert!(!fs::exists(&config.bpf_dir).unwrap(), "pins are left");
}

fn with_bpf(desired: Desired) -> Desired {
    Desired { ndp: NdpBackend::Ebpf, masquerade: MasqueradeBackend::Ebpf, ..desired }
}

/// From a neighbour cache that knows nothing, so that discovery is asked each time.
fn assert_all_reachable(lan: &Lan) {
    run("ip", &["-n", &lan.host, "neigh", "flush", "all"]);
    assert!(pings(&lan.pod(1), "fd00:1:2:a:2:0:ab:cdef"), "pod to pod");
    assert!(pings(&lan.host, "fd00:1:2:a:1:0:ab:cdef"), "LAN host to pod, by neighbour discovery");
    assert!(pings(&lan.pod(1), "192.0.2.100"), "pod to an IPv4 host that has no route back to it");
}

#[test]
fn what_others_break_is_repaired_and_nothing_else_touched() {
    if !is_root() {
        return;
    }
    let lan = Lan::new();
    lan.as_node(async || {
        let mut dataplane = Dataplane::open(lan.config()).await.unwrap();
        let desired = lan.desired(2);
        reconcile(&mut dataplane, &desired).await;
        let pod = lan.pod(1);

        run("ip", &["-n", &lan.node, "-6", "route", "del", "fd00:1:2:a:1:0:ab:cdef"]);
        run("ip", &["-n", &lan.node, "-6", "route", "del", "fd00:1:2:b::/64"]);
        run("ip", &["-n", &lan.node, "neigh", "del", "10.254.0.2", "dev", "hx0001000000"]);
        run("ip", &["-n", &pod, "addr", "del", "fd00:1:2:a:1:0:ab:cdef/128", "dev", "eth0"]);
        run("ip", &["-n", &pod, "-6", "route", "del", "default"]);
        run("nsenter", &[&format!("--net=/run/netns/{}", lan.node), "nft", "flush", "ruleset"]);
        let repaired = reconcile(&mut dataplane, &desired).await;
        assert_eq!(
            repaired,
            format!(
                "route add fd00:1:2:b::/64 via 2001:db8:1::12 dev eth0 proto hextet metric 1024\n\
                 nft table ip hextet oifname eth0 ip saddr 10.254.0.0/20 masquerade, oifname != hx* ip saddr 10.254.0.0/20 drop\n\
                 nft table ip6 hextet oifname eth0 ip6 saddr fd00:1:2:a::/64 ip6 daddr != 2001:db8:1::/64 masquerade\n\
                 -n {pod} addr replace fd00:1:2:a:1:0:ab:cdef/128 dev eth0 nodad proto 118\n\
                 -n {pod} route add default via fe80::1 dev eth0 proto hextet metric 1024\n\
                 neigh replace 10.254.0.2 lladdr 02:00:01:00:00:00 dev hx0001000000 nud permanent\n\
                 route add fd00:1:2:a:1:0:ab:cdef/128 dev hx0001000000 proto hextet metric 1024\n"
            )
        );
        assert_eq!(reconcile(&mut dataplane, &desired).await, "");
        assert!(pings(&lan.pod(2), "fd00:1:2:a:1:0:ab:cdef"));

        // A link that goes down takes routes, neighbours and its address with it.
        run("ip", &["-n", &lan.node, "link", "set", "hx0002000000", "down"]);
        reconcile(&mut dataplane, &desired).await;
        assert_eq!(reconcile(&mut dataplane, &desired).await, "");
        run("ip", &["-n", &lan.node, "link", "del", "hx0001000000"]);
        reconcile(&mut dataplane, &desired).await;
        assert_eq!(reconcile(&mut dataplane, &desired).await, "");
        assert!(pings(&lan.pod(1), "fd00:1:2:a:2:0:ab:cdef"));

        run("ip", &["netns", "del", &pod]);
        reconcile(&mut dataplane, &desired).await;
        assert_eq!(reconcile(&mut dataplane, &desired).await, "");
        assert!(pings(&lan.pod(2), "fd00:1:2:a:1:0:ab:cdef"));
    });
}

#[test]
fn uplink_that_lost_everything_is_set_up_again() {
    if !is_root() {
        return;
    }
    let lan = Lan::new();
    lan.as_node(async || {
        let mut dataplane = Dataplane::open(lan.config()).await.unwrap();
        let desired = lan.desired(1);
        reconcile(&mut dataplane, &desired).await;
        run("ip", &["-n", &lan.node, "link", "set", "eth0", "down"]);
        let failed = dataplane.reconcile(&desired).await.unwrap();
        assert!(
            !failed.failures.is_empty(),
            "a route over a dead uplink cannot be added: {}",
            text(&failed.ops)
        );
        run("ip", &["-n", &lan.node, "link", "set", "eth0", "up"]);
        run("ip", &["-n", &lan.node, "addr", "replace", "2001:db8:1::11/64", "dev", "eth0", "nodad"]);
        reconcile(&mut dataplane, &desired).await;
        assert_eq!(reconcile(&mut dataplane, &desired).await, "");
        wait_until("LAN host reaches the pod again", || pings(&lan.host, "fd00:1:2:a:1:0:ab:cdef"));
    });
}

#[test]
fn peer_that_moves_is_replaced_and_pods_that_leave_are_gone() {
    if !is_root() {
        return;
    }
    let lan = Lan::new();
    lan.as_node(async || {
        let mut dataplane = Dataplane::open(lan.config()).await.unwrap();
        reconcile(&mut dataplane, &lan.desired(2)).await;
        let mut desired = lan.desired(1);
        desired.peers.values_mut().for_each(|hop| *hop = "2001:db8:1::99".parse().unwrap());
        let ops = reconcile(&mut dataplane, &desired).await;
        let pod = lan.pod(2);
        assert!(ops.contains("route replace fd00:1:2:b::/64 via 2001:db8:1::99"), "{ops}");
        assert!(ops.ends_with("metric 1024\n") && ops.contains(&format!("netns del {pod}\n")), "{ops}");
        assert!(!fs::exists(format!("/run/netns/{pod}")).unwrap());
        assert_eq!(reconcile(&mut dataplane, &desired).await, "");
    });
}

#[test]
fn agent_killed_half_way_is_continued() {
    if !is_root() {
        return;
    }
    let lan = Lan::new();
    let desired = lan.desired(1);
    lan.as_node(async || {
        // What is left of an agent that is killed after each number of operations.
        let all = plan_of(&lan, &desired).await.len();
        for killed_after in (0..all).step_by(3) {
            let mut killed = Dataplane::open(lan.config()).await.unwrap();
            let ops = dataplane::plan(&desired, &killed.observe(&desired).await.unwrap());
            killed.apply(&ops[..killed_after.min(ops.len())]).await;
            drop(killed);

            let mut dataplane = Dataplane::open(lan.config()).await.unwrap();
            reconcile(&mut dataplane, &desired).await;
            assert_eq!(reconcile(&mut dataplane, &desired).await, "", "killed after {killed_after}");
            assert!(dataplane.teardown().await.unwrap().is_empty());
        }

        // Between a file for the namespace and the namespace itself, and between a link and its alias.
        let mut dataplane = Dataplane::open(lan.config()).await.unwrap();
        reconcile(&mut dataplane, &desired).await;
        run("ip", &["-n", &lan.node, "link", "set", "hx0001000000", "alias", ""]);
        let ops = reconcile(&mut dataplane, &desired).await;
        assert!(ops.starts_with("link set hx0001000000") && ops.lines().count() == 1, "{ops}");
        run("umount", &[&format!("/run/netns/{}", lan.pod(1))]);
        reconcile(&mut dataplane, &desired).await;
        assert_eq!(reconcile(&mut dataplane, &desired).await, "");
    });
}

async fn plan_of(lan: &Lan, desired: &Desired) -> Vec<dataplane::Op> {
    let mut dataplane = Dataplane::open(lan.config()).await.unwrap();
    dataplane::plan(desired, &dataplane.observe(desired).await.unwrap())
}

#[test]
fn what_is_not_ours_is_reported_and_not_touched() {
    if !is_root() {
        return;
    }
    let lan = Lan::new();
    let theirs = lan.pod(2);
    run("ip", &["-n", &lan.node, "link", "add", "hx0001000000", "type", "veth", "peer", "name", "other"]);
    run("ip", &["netns", "add", &theirs]);
    run(
        "ip",
        &["-n", &lan.node, "-6", "route", "add", "fd00:1:2:b::/64", "via", "2001:db8:1::100", "dev", "eth0"],
    );
    let before = [ip(&lan.node, &["link", "show", "hx0001000000"]), ip(&lan.node, &["-6", "route"])];
    lan.as_node(async || {
        let mut dataplane = Dataplane::open(lan.config()).await.unwrap();
        let reconciled = dataplane.reconcile(&lan.desired(3)).await.unwrap();
        let failures: Vec<_> =
            reconciled.failures.iter().map(|(op, error)| format!("{op}: {}", chain(error))).collect();
        for (op, reason) in [
            ("link add hx0001000000", "device hx0001000000, or eth0 in namespace"),
            ("netns add", "was not made by Hextet"),
            ("route add fd00:1:2:b::/64", "a route to fd00:1:2:b::/64 is already there"),
        ] {
            let said = failures.iter().any(|line| line.starts_with(op) && line.contains(reason));
            assert!(said, "{op}: {failures:#?}");
        }
        assert!(pings(&lan.host, "fd00:1:2:a:3:0:ab:cdef"), "the third pod is not held up by the others");
        let half_made = ip(&lan.node, &["-6", "route", "show", "fd00:1:2:a:1:0:ab:cdef"]);
        assert_eq!(half_made, serde_json::json!([]), "no route to a pod that is not complete");
        assert!(dataplane.teardown().await.unwrap().is_empty());
    });
    let after = [ip(&lan.node, &["link", "show", "hx0001000000"]), ip(&lan.node, &["-6", "route"])];
    assert_eq!(after, before);
    assert!(fs::exists(format!("/run/netns/{theirs}")).unwrap());
}

#[test]
fn nodes_that_share_the_namespace_folder_leave_each_other_alone() {
    if !is_root() {
        return;
    }
    let (one, two) = (Lan::new(), Lan::new());
    one.as_node(async || {
        let mut dataplane = Dataplane::open(one.config()).await.unwrap();
        reconcile(&mut dataplane, &one.desired(1)).await;
    });
    two.as_node(async || {
        let mut dataplane = Dataplane::open(two.config()).await.unwrap();
        reconcile(&mut dataplane, &two.desired(1)).await;
        assert!(dataplane.teardown().await.unwrap().is_empty());
    });
    one.as_node(async || {
        let mut dataplane = Dataplane::open(one.config()).await.unwrap();
        assert_eq!(reconcile(&mut dataplane, &one.desired(1)).await, "");
    });
    assert!(!fs::exists(format!("/run/netns/{}", two.pod(1))).unwrap());
}

#[test]
fn changes_on_the_node_and_inside_of_pods_are_announced_and_traffic_is_not() {
    if !is_root() {
        return;
    }
    let lan = Lan::new();
    lan.as_node(async || {
        let mut dataplane = Dataplane::open(lan.config()).await.unwrap();
        let desired = lan.desired(1);
        reconcile(&mut dataplane, &desired).await;
        let pod = lan.pod(1);
        assert!(pings(&pod, "2001:db8:1::100") || pings(&lan.host, "fd00:1:2:a:1:0:ab:cdef"));

        let mut changes = dataplane.changes().unwrap();
        // Links that have just come up go on talking of themselves for a while.
        while timeout(Duration::from_millis(300), changes.changed()).await.is_ok() {}
        changes.traces().take();
        assert!(pings(&lan.host, "fd00:1:2:a:1:0:ab:cdef"));
        let quiet = timeout(Duration::from_millis(300), changes.changed()).await;
        let heard = changes.traces().take();
        // The tests beside this one remove namespaces of theirs from the folder that all share.
        let is_theirs = heard.iter().all(|trace| trace.subject == Subject::Pin);
        assert!(quiet.is_err() || is_theirs, "traffic alone changes nothing: {heard:?}");

        let node = format!("--net=/run/netns/{}", lan.node);
        let (sysctl, link) = ("/proc/sys/net", "hx0001000000");
        let write = |key: &str, value: &str| format!("echo {value} > {sysctl}/{key}");
        let ipv4 = [write("ipv4/ip_forward", "1"), write("ipv4/ip_forward", "0")].join("; ");
        let breaks: [(Subject, &[&str]); 9] = [
            (Subject::Route, &["ip", "-n", &lan.node, "-6", "route", "del", "fd00:1:2:a:1:0:ab:cdef"]),
            (Subject::Route, &["ip", "-n", &lan.node, "-6", "route", "flush", "proto", "118"]),
            (Subject::Neighbour, &["ip", "-n", &lan.node, "neigh", "del", "10.254.0.2", "dev", link]),
            (
                Subject::Address,
                &["ip", "-n", &pod, "addr", "del", "fd00:1:2:a:1:0:ab:cdef/128", "dev", "eth0"],
            ),
            (Subject::Link, &["ip", "-n", &lan.node, "link", "set", link, "down"]),
            (Subject::Nftables, &["nsenter", &node, "nft", "flush", "ruleset"]),
            (Subject::Sysctl, &["nsenter", &node, "sh", "-c", &ipv4]),
            (Subject::Sysctl, &["nsenter", &node, "sh", "-c", &write("ipv6/conf/all/forwarding", "0")]),
            (Subject::Sysctl, &["nsenter", &node, "sh", "-c", &write("ipv6/conf/eth0/proxy_ndp", "0")]),
        ];
        for (subject, command) in breaks {
            reconcile(&mut dataplane, &desired).await;
            while timeout(Duration::from_millis(300), changes.changed()).await.is_ok() {}
            changes.traces().take();
            run(command[0], &command[1..]);
            let traces = hear(&mut changes, subject).await;
            if subject == Subject::Nftables {
                let author = traces.iter().find_map(|trace| trace.author.clone()).unwrap();
                assert_eq!(author.name.as_deref(), Some("nft"));
            }
            assert_ne!(reconcile(&mut dataplane, &desired).await, "", "{command:?}");
            // The repair itself is a change, too.
            timeout(Duration::from_secs(5), changes.changed()).await.unwrap();
        }
    });
}

#[test]
fn programs_that_others_take_off_are_announced() {
    if !is_root() {
        return;
    }
    let lan = Lan::new();
    let desired = with_bpf(lan.desired(1));
    let config = lan.bpf_config();
    lan.as_node(async || {
        let mut dataplane = Dataplane::open(config.clone()).await.unwrap();
        if !Bpf::probe().sched_cls {
            skip("this kernel or this process has no BPF programs for tc");
            return;
        }
        reconcile(&mut dataplane, &desired).await;
        reconcile(&mut dataplane, &desired).await;
        let mut changes = dataplane.changes().unwrap();
        let pin = |program: &str, link: &str| {
            let mut layouts = fs::read_dir(&config.bpf_dir).unwrap();
            layouts.next().unwrap().unwrap().path().join(format!("link-{link}-{program}"))
        };
        let is_tcx = Bpf::probe().tcx;
        let node = format!("--net=/run/netns/{}", lan.node);
        let mut breaks: Vec<(Subject, Box<dyn Fn()>)> = Vec::new();
        if is_tcx {
            for (program, link) in
                [("uplink_ingress", "eth0"), ("uplink_egress", "eth0"), ("pod_guard", "hx0001000000")]
            {
                breaks.push((Subject::Pin, Box::new(move || fs::remove_file(pin(program, link)).unwrap())));
                breaks.push((Subject::Hook, Box::new(move || detach(&pin(program, link)))));
            }
        } else {
            breaks.push((
                Subject::Filter,
                Box::new(move || {
                    drop(run("nsenter", &[&node, "tc", "qdisc", "del", "dev", "eth0", "clsact"]))
                }),
            ));
        }
        for (subject, take_off) in breaks {
            while timeout(Duration::from_millis(300), changes.changed()).await.is_ok() {}
            changes.traces().take();
            take_off();
            hear(&mut changes, subject).await;
            let repaired = reconcile(&mut dataplane, &desired).await;
            assert!(repaired.starts_with("bpf attach "), "{subject:?}: {repaired}");
            reconcile(&mut dataplane, &desired).await;
        }
        assert!(dataplane.teardown().await.unwrap().is_empty());
    });
}

/// Waits for a change of the subject. Tests beside this one change the folder of namespaces, which is a change to everybody.
async fn hear(changes: &mut Changes, subject: Subject) -> Vec<Trace> {
    let mut traces = Vec::new();
    let wait = async {
        while !traces.iter().any(|trace: &Trace| trace.subject == subject) {
            changes.changed().await;
            traces.extend(changes.traces().take());
        }
    };
    let is_heard = timeout(Duration::from_secs(5), wait).await.is_ok();
    assert!(is_heard, "{subject:?}: {traces:?}");
    traces
}

#[test]
fn uplink_is_found_by_the_default_route() {
    if !is_root() {
        return;
    }
    let lan = Lan::new();
    lan.as_node(async || {
        let dataplane = Dataplane::open(lan.config()).await.unwrap();
        let uplink = dataplane.default_uplink().await.unwrap();
        assert_eq!(uplink.name, "eth0");
        assert_eq!(uplink.ipv6, Some("2001:db8:1::11".parse().unwrap()));
        assert_eq!(uplink.ipv4, Some("192.0.2.11".parse().unwrap()));
        assert_eq!(uplink.mtu_bytes, 1500);
        assert_eq!(dataplane.uplink("eth0").await.unwrap(), uplink);
        let missing = dataplane.uplink("eth9").await.unwrap_err().to_string();
        assert_eq!(missing, "there is no device eth9: name one that `ip link` shows with --uplink");
        run("ip", &["-n", &lan.node, "-6", "route", "del", "default"]);
        assert_eq!(dataplane.default_uplink().await.unwrap().name, "eth0", "by the IPv4 route");
        run("ip", &["-n", &lan.node, "route", "del", "default"]);
        assert!(dataplane.default_uplink().await.unwrap_err().to_string().contains("--uplink"));
    });
}

/// Prints how long things take; what is checked is only that many pods work at all.
#[test]
fn hundred_pods_are_made_seen_and_removed() {
    if !is_root() {
        return;
    }
    let lan = Lan::new();
    hundred_pods(&lan, "kernel", lan.config(), &lan.desired(100));
    if Bpf::probe().sched_cls {
        hundred_pods(&lan, "bpf", lan.bpf_config(), &with_bpf(lan.desired(100)));
    } else {
        skip("the half with BPF: this kernel or this process has no BPF programs for tc");
    }
}

fn hundred_pods(lan: &Lan, backends: &str, config: Config, desired: &Desired) {
    lan.as_node(async || {
        let mut dataplane = Dataplane::open(config).await.unwrap();
        let started = Instant::now();
        reconcile(&mut dataplane, desired).await;
        eprintln!("100 pods made in {:?} ({backends})", started.elapsed());
        let started = Instant::now();
        assert_eq!(reconcile(&mut dataplane, desired).await, "");
        eprintln!("100 pods seen in {:?} ({backends})", started.elapsed());
        assert!(pings(&lan.pod(100), "fd00:1:2:a:1:0:ab:cdef"));
        let started = Instant::now();
        assert!(dataplane.teardown().await.unwrap().is_empty());
        eprintln!("100 pods removed in {:?} ({backends})", started.elapsed());
    });
}
