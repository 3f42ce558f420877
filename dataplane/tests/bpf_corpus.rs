//! Everything that the fuzzers have found, through the programs as the kernel runs them and through the host's build
//! of the same logic: verdict and bytes are the same.

#[path = "bpf/support.rs"]
mod support;

use std::path::Path;

use dataplane::bpf::{
    Bpf, GuardEntry,
    Program::{self, PodGuard, UplinkEgress, UplinkIngress},
    monotonic_ns,
};
use dataplane_common::{guard, masquerade::fragment::Sent, ndp};
use hextet_properties::{corpus, frame, masquerade, ndp_proxy, pod_guard, tables::HostTables};
use support::*;

/// Test runs come from the loopback.
const IFINDEX: u32 = 1;

/// Long after every flow has ended.
const MUCH_LATER_NS: u64 = 24 * 3_600 * 1_000_000_000;

/// Frames of a corpus as they are and with right checksums, without those too short for the kernel to run.
fn frames(target: &str) -> impl Iterator<Item = (String, Vec<u8>)> {
    let name = |path: &Path| path.file_name().expect("a file has a name").to_string_lossy().into_owned();
    let inputs = corpus(target).into_iter();
    let frames =
        inputs.flat_map(move |(path, bytes)| frame::variants(&bytes).map(|frame| (name(&path), frame)));
    frames.filter(|(_, frame)| frame.len() >= FRAME_BYTES_MIN)
}

/// What the host's build decided, as a program says it.
struct Decided {
    verdict: i32,
    frame: Vec<u8>,
}

fn agree(bpf: &mut Bpf, program: Program, name: &str, sent: &[u8], host: &Decided) {
    let (verdict, frame) = run(bpf, program, sent);
    assert_eq!(verdict, host.verdict, "{name}: the kernel's verdict on {sent:02x?}");
    // Of a packet that is dropped nobody sees the bytes.
    if verdict != DROP {
        let [frame, wanted] = [frame, host.frame.clone()].map(|frame| without_chance(sent, frame));
        assert_eq!(frame, wanted, "{name}: the kernel's bytes of {sent:02x?}");
    }
}

/// A port that is not the pod's own comes from the dice, which are not the same in the kernel: it is left out, with
/// the checksum over it.
fn without_chance(sent: &[u8], mut frame: Vec<u8>) -> Vec<u8> {
    let transport = 14 + usize::from(sent[14] & 15) * 4;
    let places = match sent.get(23) {
        Some(6) => [transport, transport + 16],
        Some(17) => [transport, transport + 6],
        _ => [transport + 4, transport + 2],
    };
    let is_ipv4 = sent[12..14] == [8, 0];
    let port = |frame: &[u8]| frame.get(places[0]..places[0] + 2).map(<[u8]>::to_vec);
    if is_ipv4 && sent[26..30] == masquerade::POD && port(sent) != port(&frame) {
        for at in places {
            frame.iter_mut().skip(at).take(2).for_each(|byte| *byte = 0);
        }
    }
    frame
}

#[test]
fn the_kernels_build_and_the_hosts_agree_on_every_solicitation() {
    if !may_run("corpus ndp_proxy") {
        return;
    }
    let pins = Pins::new("corpus-ndp");
    let mut bpf = pins.open();
    bpf.set_local_pod(ndp_proxy::POD.into(), ndp_proxy::UPLINK).unwrap();
    for (name, sent) in frames("ndp_proxy") {
        let host = match ndp_proxy::judge(&sent) {
            ndp::Verdict::Pass => Decided { verdict: NEXT, frame: sent.clone() },
            ndp::Verdict::Drop(_) => Decided { verdict: DROP, frame: sent.clone() },
            ndp::Verdict::Answer(answer, _) => Decided { verdict: REDIRECT, frame: answer.frame().to_vec() },
        };
        agree(&mut bpf, UplinkIngress, &name, &sent, &host);
    }
}

#[test]
fn the_kernels_build_and_the_hosts_agree_on_every_packet_of_a_pod() {
    if !may_run("corpus pod_guard") {
        return;
    }
    let pins = Pins::new("corpus-guard");
    let mut bpf = pins.open();
    let entry = GuardEntry {
        ipv6: pod_guard::POD.into(),
        ipv4: pod_guard::POD_IPV4.into(),
        pod_ipv4: "10.254.0.0/20".parse().unwrap(),
        pod_mac: pod_guard::POD_MAC,
        host_mac: pod_guard::HOST_MAC,
    };
    bpf.set_guard(IFINDEX, entry).unwrap();
    for (name, sent) in frames("pod_guard") {
        let host = match pod_guard::judge(&sent) {
            guard::Verdict::Pass => Decided { verdict: NEXT, frame: sent.clone() },
            guard::Verdict::Drop(_) => Decided { verdict: DROP, frame: sent.clone() },
            guard::Verdict::Answer(answer) => Decided { verdict: REDIRECT, frame: answer.frame().to_vec() },
        };
        agree(&mut bpf, PodGuard, &name, &sent, &host);
    }
}

#[test]
fn the_kernels_build_and_the_hosts_agree_on_every_translation() {
    // In a network namespace of its own: the sockets of this machine would keep ports.
    alone("corpus-masq", |pins| {
        let mut bpf = pins.open();
        bpf.set_masquerade(Some(&masquerade_to(masquerade::NODE.into()))).unwrap();
        translations(&mut bpf);
    });
}

/// Each frame meets the flows that its property opens, and no others.
fn translations(bpf: &mut Bpf) {
    let mut host = HostTables::default();
    for (program, target) in [(UplinkEgress, "masquerade_egress"), (UplinkIngress, "masquerade_ingress")] {
        for (name, sent) in frames(target) {
            if program == UplinkIngress {
                for opening in masquerade::opening() {
                    both(bpf, &mut host, UplinkEgress, &name, &opening);
                }
            }
            both(bpf, &mut host, program, &name, &sent);
            host.sweep();
            bpf.sweep_flows(monotonic_ns() + MUCH_LATER_NS).unwrap();
        }
    }
}

fn both(bpf: &mut Bpf, host: &mut HostTables, program: Program, name: &str, sent: &[u8]) {
    let mut frame = sent.to_vec();
    // Neighbour discovery comes before the masquerade; no pod is set, so that it leaves all to it.
    let verdict = match program {
        UplinkEgress => host.egress(&mut frame),
        _ => host.ingress(&mut frame),
    };
    let verdict = if verdict == Sent::Drop { DROP } else { NEXT };
    agree(bpf, program, name, sent, &Decided { verdict, frame });
}
