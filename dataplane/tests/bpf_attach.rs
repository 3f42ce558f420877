//! Programs on real interfaces: attached, found again, replaced, collected, taken down; by TCX and by clsact.

#[path = "bpf/support.rs"]
mod support;

use std::{
    net::UdpSocket,
    path::PathBuf,
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use aya::programs::{
    LinkOrder, SchedClassifier, TcAttachType,
    links::FdLink,
    tc::{NlOptions, TcAttachOptions},
};
use dataplane::bpf::{
    Attachment, Bpf, BpfError, BpfOptions, Hook, Program,
    Program::{PodGuard, UplinkBackstop, UplinkEgress, UplinkIngress},
};
use nix::{
    net::if_::if_nametoindex,
    sys::{
        pthread::{pthread_kill, pthread_self},
        signal::Signal,
    },
};
use support::*;
use tokio::signal::unix::{SignalKind, signal};

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status().expect("iproute2 is installed");
    assert!(status.success(), "ip {arguments}");
}

/// What `tc` prints.
fn tc(arguments: &str) -> String {
    let output = Command::new("tc").args(arguments.split(' ')).output().expect("iproute2 is installed");
    assert!(output.status.success(), "tc {arguments}");
    String::from_utf8(output.stdout).expect("tc prints text")
}

/// Runs the test in a network namespace of its own with the interfaces hxA-a and hxA-b.
fn alone(test: &str, body: impl FnOnce(&Pins) + Send) {
    support::alone(test, |pins| {
        add_interfaces();
        body(pins);
    });
}

fn add_interfaces() {
    ip("link add hxA-a type veth peer name hxA-b");
    ip("link set hxA-a up");
    ip("link set hxA-b up");
}

fn hooks(test: &str) -> Vec<Hook> {
    if Bpf::probe().tcx {
        return vec![Hook::Tcx, Hook::Clsact];
    }
    eprintln!("skipped: {test} by TCX: this kernel has none");
    vec![Hook::Clsact]
}

fn open(pins: &Pins, hook: Hook) -> Bpf {
    pins.open_with(&BpfOptions { hook: Some(hook), ..BpfOptions::default() })
}

fn attach(bpf: &mut Bpf, program: Program, ifname: &str) {
    let ifindex = if_nametoindex(ifname).expect("the interface exists");
    bpf.attach(program, ifindex, ifname).unwrap_or_else(|e| panic!("{}", chain(&e)));
}

fn found(bpf: &Bpf) -> Vec<(Program, String)> {
    let attached = bpf.attached().unwrap_or_else(|e| panic!("{}", chain(&e)));
    attached
        .into_iter()
        .map(|Attachment { program, ifname, ifindex }| {
            assert_eq!(if_nametoindex(ifname.as_str()), Ok(ifindex));
            (program, ifname)
        })
        .collect()
}

fn on(program: Program, ifname: &str) -> (Program, String) {
    (program, ifname.to_owned())
}

#[test]
fn programs_outlive_the_agent_and_are_found_again() {
    for hook in hooks("attach survives") {
        alone("attach-survives", |pins| {
            let mut bpf = open(pins, hook);
            assert_eq!(found(&bpf), []);
            let all = [on(UplinkIngress, "hxA-a"), on(UplinkEgress, "hxA-a"), on(PodGuard, "hxA-b")];
            for (program, ifname) in &all {
                attach(&mut bpf, *program, ifname);
            }
            assert_eq!(found(&bpf), all, "{hook:?}");
            bpf.set_local_pod("fd00::5".parse().unwrap(), [2; 6]).unwrap();
            drop(bpf);
            let mut bpf = open(pins, hook);
            assert_eq!(found(&bpf), all, "{hook:?}: after the agent's end");
            assert_eq!(bpf.local_pods().unwrap().len(), 1, "the maps are adopted");
            for (program, ifname) in &all {
                attach(&mut bpf, *program, ifname);
            }
            assert_eq!(found(&bpf), all, "{hook:?}: attaching again changes nothing");
            bpf.detach(UplinkIngress, "hxA-a").unwrap();
            bpf.detach(UplinkIngress, "hxA-a").unwrap();
            assert_eq!(found(&bpf), all[1..], "{hook:?}");
        });
    }
}

/// An agent that started while a child of it ended once fell back to the kernel's backends: the verifier gives
/// up when a signal is there for the thread that loads.
#[test]
fn signals_do_not_end_the_loading_of_programs() {
    alone("attach-signals", |pins| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let _handled = runtime.block_on(async { signal(SignalKind::user_defined1()).expect("a handler") });
        let (loader, loaded) = (pthread_self(), AtomicBool::new(false));
        thread::scope(|scope| {
            scope.spawn(|| {
                while !loaded.load(Ordering::Acquire) {
                    pthread_kill(loader, Signal::SIGUSR1).expect("the thread that loads is waited for");
                    thread::sleep(Duration::from_millis(5));
                }
            });
            let opened = Bpf::open(pins.path());
            loaded.store(true, Ordering::Release);
            assert!(opened.is_ok(), "{}", chain(&opened.err().expect("it failed")));
        });
    });
}

/// The tables would be two otherwise: those of the programs, and those that the agent writes.
#[test]
fn programs_whose_maps_were_unpinned_are_attached_anew() {
    alone("attach-unpinned", |pins| {
        if !Bpf::probe().tcx {
            return eprintln!("skipped: attach unpinned: this kernel has no TCX");
        }
        let mut bpf = open(pins, Hook::Tcx);
        attach(&mut bpf, UplinkIngress, "hxA-a");
        attach(&mut bpf, PodGuard, "hxA-b");
        drop(bpf);
        std::fs::remove_file(layout(pins).join("NDP_PODS")).unwrap();
        let mut bpf = open(pins, Hook::Tcx);
        assert_eq!(found(&bpf), [on(PodGuard, "hxA-b")], "which has no such map");
        attach(&mut bpf, UplinkIngress, "hxA-a");
        assert_eq!(found(&bpf), [on(UplinkIngress, "hxA-a"), on(PodGuard, "hxA-b")]);
    });
}

fn layout(pins: &Pins) -> PathBuf {
    pins.path().join(format!("v{}", dataplane_common::LAYOUT_VERSION))
}

/// What the backstop sees must be translated already, whoever was attached first.
#[test]
fn the_backstop_comes_behind_the_translation_also_when_that_is_attached_anew() {
    // Filters have their order by priority.
    if hooks("attach order")[0] != Hook::Tcx {
        return;
    }
    alone("attach-order", |pins| {
        let mut bpf = open(pins, Hook::Tcx);
        let order = || -> Vec<String> {
            let (_, programs) = SchedClassifier::query_tcx("hxA-a", TcAttachType::Egress).unwrap();
            programs.iter().map(|info| info.name_as_str().unwrap().to_owned()).collect()
        };
        attach(&mut bpf, UplinkEgress, "hxA-a");
        attach(&mut bpf, UplinkBackstop, "hxA-a");
        let wanted = order();
        assert!(
            wanted[0].starts_with("uplink_egress") && wanted[1].starts_with("uplink_backstop"),
            "{wanted:?}"
        );
        bpf.detach(UplinkEgress, "hxA-a").unwrap();
        // The kernel ends a link a moment after its last reference has gone.
        let deadline = Instant::now() + Duration::from_secs(10);
        while order() != wanted[1..] {
            assert!(Instant::now() < deadline, "still there: {:?}", order());
            thread::yield_now();
        }
        attach(&mut bpf, UplinkEgress, "hxA-a");
        assert_eq!(order(), wanted);
    });
}

#[test]
fn another_builds_program_is_not_ours_and_is_replaced() {
    if hooks("attach replaces")[0] != Hook::Tcx {
        return;
    }
    alone("attach-replaces", |pins| {
        let mut bpf = open(pins, Hook::Tcx);
        // A program of other instructions under the pin of uplink_ingress is what an older build leaves behind.
        let older: &mut SchedClassifier = bpf.object().program_mut("pod_guard").unwrap().try_into().unwrap();
        let order = TcAttachOptions::TcxOrder(LinkOrder::default());
        let id = older.attach_with_options("hxA-a", TcAttachType::Ingress, order).unwrap();
        let link: FdLink = older.take_link(id).unwrap().try_into().unwrap();
        let pin = layout(pins).join("link-hxA-a-uplink_ingress");
        link.pin(&pin).unwrap();
        assert_eq!(found(&bpf), []);
        attach(&mut bpf, UplinkIngress, "hxA-a");
        assert_eq!(found(&bpf), [on(UplinkIngress, "hxA-a")]);
        let (_, programs) = SchedClassifier::query_tcx("hxA-a", TcAttachType::Ingress).unwrap();
        let names: Vec<_> = programs.iter().filter_map(|p| p.name_as_str().map(str::to_owned)).collect();
        assert_eq!(names, ["uplink_ingress"], "replaced in its place");
    });
}

#[test]
fn pins_of_vanished_interfaces_are_collected_and_the_name_may_come_back() {
    for hook in hooks("attach stale") {
        alone("attach-stale", |pins| {
            let mut bpf = open(pins, hook);
            attach(&mut bpf, PodGuard, "hxA-a");
            ip("link del hxA-a");
            assert_eq!(found(&bpf), []);
            add_interfaces();
            assert_eq!(found(&bpf), [], "{hook:?}: an interface of the same name is another");
            attach(&mut bpf, PodGuard, "hxA-a");
            assert_eq!(found(&bpf), [on(PodGuard, "hxA-a")]);
            ip("link del hxA-a");
            drop(bpf);
            let _bpf = open(pins, hook);
            let left: Vec<_> = std::fs::read_dir(layout(pins))
                .unwrap()
                .map(|e| e.unwrap().file_name().into_string().unwrap())
                .filter(|name| name.contains("hxA-a"))
                .collect();
            assert!(left.is_empty(), "{hook:?}: {left:?}");
        });
    }
}

#[test]
fn taking_down_leaves_the_interface_as_it_was() {
    for hook in hooks("attach teardown") {
        alone("attach-teardown", |pins| {
            let mut bpf = open(pins, hook);
            for program in [UplinkIngress, UplinkEgress] {
                attach(&mut bpf, program, "hxA-a");
            }
            drop(bpf);
            let errors = Bpf::teardown(pins.path());
            assert!(errors.is_empty(), "{hook:?}: {errors:?}");
            assert!(!pins.path().exists());
            assert!(!tc("qdisc show dev hxA-a").contains("clsact"), "{hook:?}");
            if hook == Hook::Tcx {
                let (_, programs) = SchedClassifier::query_tcx("hxA-a", TcAttachType::Ingress).unwrap();
                assert!(programs.is_empty());
            }
            assert_eq!(Bpf::counters(pins.path()).unwrap(), []);
        });
    }
}

#[test]
fn filters_and_qdiscs_of_others_stay() {
    alone("attach-foreign", |pins| {
        let mut bpf = open(pins, Hook::Clsact);
        tc("qdisc add dev hxA-a clsact");
        let theirs: &mut SchedClassifier =
            bpf.object().program_mut("uplink_ingress").unwrap().try_into().unwrap();
        let options = TcAttachOptions::Netlink(NlOptions { priority: 77, ..NlOptions::default() });
        let id = theirs.attach_with_options("hxA-a", TcAttachType::Ingress, options).unwrap();
        std::mem::forget(theirs.take_link(id).unwrap());
        assert_eq!(found(&bpf), [], "the priority is not ours");
        attach(&mut bpf, UplinkIngress, "hxA-a");
        let filters = tc("filter show dev hxA-a ingress");
        assert!(filters.contains("pref 77 ") && filters.contains("pref 4678 "), "{filters}");
        drop(bpf);
        assert!(Bpf::teardown(pins.path()).is_empty());
        let filters = tc("filter show dev hxA-a ingress");
        assert!(filters.contains("pref 77 ") && !filters.contains("pref 4678 "), "{filters}");
    });
}

/// Programs of others before and behind ours see every packet, whatever happens to ours.
#[test]
fn programs_of_others_run_through_every_life_of_ours() {
    for hook in hooks("attach beside others") {
        alone("attach-beside", |pins| {
            quiet();
            let (first, last) = (Pins::new("attach-first"), Pins::new("attach-last"));
            let mut others = [first.open(), last.open()];
            for direction in [TcAttachType::Ingress, TcAttachType::Egress] {
                attach_foreign(&mut others[0], hook, direction, 77);
            }
            let mut bpf = open(pins, hook);
            attach_both(&mut bpf);
            for direction in [TcAttachType::Ingress, TcAttachType::Egress] {
                attach_foreign(&mut others[1], hook, direction, 50_000);
            }
            let all = [&first, &last, pins];
            assert_eq!(seen(&all), [Seen::All, Seen::All, Seen::All], "{hook:?}: attached");

            drop(bpf);
            assert_eq!(seen(&all), [Seen::All, Seen::All, Seen::All], "{hook:?}: the agent is dead");
            let mut bpf = open(pins, hook);
            attach_both(&mut bpf);
            assert_eq!(seen(&all), [Seen::All, Seen::All, Seen::All], "{hook:?}: it is started again");

            take_off(pins, hook);
            // The kernel ends a link some time after its last pin has gone.
            let deadline = Instant::now() + Duration::from_secs(10);
            while seen(&[pins]) != [Seen::Nothing] {
                assert!(Instant::now() < deadline, "{hook:?}: ours still run");
            }
            assert_eq!(seen(&all), [Seen::All, Seen::All, Seen::Nothing], "{hook:?}: ours are taken off");
            attach_both(&mut bpf);
            assert_eq!(seen(&all), [Seen::All, Seen::All, Seen::All], "{hook:?}: and are put back");

            drop(bpf);
            let errors = Bpf::teardown(pins.path());
            assert!(errors.is_empty(), "{hook:?}: {errors:?}");
            assert_eq!(seen(&[&first, &last]), [Seen::All, Seen::All], "{hook:?}: the node is down");
        });
    }
}

/// Sent in each direction between two looks.
const FRAMES: u64 = 50;

/// Nothing but the test sends on these interfaces, and what it sends needs no answer.
fn quiet() {
    let off = "for f in /proc/sys/net/ipv6/conf/*/disable_ipv6; do echo 1 > $f; done";
    assert!(Command::new("sh").args(["-c", off]).status().unwrap().success());
    for (ifname, network) in [("hxA-a", "192.0.2"), ("hxA-b", "198.51.100")] {
        ip(&format!("addr add {network}.1/24 dev {ifname}"));
        ip(&format!("neigh add {network}.9 lladdr 02:00:00:00:00:09 dev {ifname} nud permanent"));
    }
}

fn attach_both(bpf: &mut Bpf) {
    attach(bpf, UplinkIngress, "hxA-a");
    attach(bpf, UplinkEgress, "hxA-a");
}

/// A program that passes everything, and counts it, as somebody else would attach it.
fn attach_foreign(bpf: &mut Bpf, hook: Hook, direction: TcAttachType, priority: u16) {
    let theirs: &mut SchedClassifier =
        bpf.object().program_mut("uplink_ingress").unwrap().try_into().unwrap();
    let options = match hook {
        Hook::Tcx => TcAttachOptions::TcxOrder(LinkOrder::default()),
        Hook::Clsact => {
            // Only the first finds none.
            let _ = Command::new("tc").args(["qdisc", "add", "dev", "hxA-a", "clsact"]).output();
            TcAttachOptions::Netlink(NlOptions { priority, ..NlOptions::default() })
        }
    };
    let id = theirs.attach_with_options("hxA-a", direction, options).unwrap();
    std::mem::forget(theirs.take_link(id).unwrap());
}

/// As somebody does who does not know them.
fn take_off(pins: &Pins, hook: Hook) {
    match hook {
        Hook::Tcx => {
            for program in ["uplink_ingress", "uplink_egress"] {
                let layout = std::fs::read_dir(pins.path()).unwrap().next().unwrap().unwrap().path();
                std::fs::remove_file(layout.join(format!("link-hxA-a-{program}"))).unwrap();
            }
        }
        Hook::Clsact => {
            tc("filter del dev hxA-a ingress pref 4678");
            tc("filter del dev hxA-a egress pref 4678");
        }
    }
}

/// Sends [`FRAMES`] in and as many out, and says whether the programs of each folder have seen all of them, or none.
fn seen(all: &[&Pins]) -> Vec<Seen> {
    let counts = || all.iter().map(|pins| pins.counters().values().sum::<u64>()).collect::<Vec<_>>();
    let before = counts();
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    for _ in 0..FRAMES {
        // Out of hxA-b is into hxA-a.
        for to in ["192.0.2.9:9", "198.51.100.9:9"] {
            socket.send_to(b"?", to).unwrap();
        }
    }
    let grown = counts().into_iter().zip(before).map(|(after, before)| after - before);
    grown
        .map(|grown| match grown {
            0 => Seen::Nothing,
            grown if grown >= 2 * FRAMES => Seen::All,
            grown => Seen::Some(grown),
        })
        .collect()
}

#[derive(Debug, PartialEq, Eq)]
enum Seen {
    All,
    Some(u64),
    Nothing,
}

#[test]
fn a_folder_on_another_file_system_is_refused_with_the_way_out() {
    let dir = tempfile::tempdir().unwrap();
    let error = Bpf::open(&dir.path().join("pins")).err().expect("a temporary folder is on no bpffs");
    assert!(matches!(error, BpfError::NoBpfFs(_)));
    assert!(error.to_string().ends_with("mount -t bpf bpf /sys/fs/bpf"), "{error}");
    assert!(!dir.path().join("pins").exists(), "no half-made state");
}

#[test]
fn an_interface_that_is_not_there_is_named() {
    alone("attach-none", |pins| {
        let mut bpf = pins.open();
        let error = bpf.attach(UplinkIngress, 999, "hxA-none").unwrap_err();
        assert!(chain(&error).starts_with("cannot attach uplink_ingress on hxA-none: "), "{}", chain(&error));
        assert!(bpf.detach(UplinkIngress, "hxA-none").is_ok());
    });
}
