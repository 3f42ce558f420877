//! What the BPF tests share: a folder for pins, running a program on bytes, frames.
#![allow(dead_code, reason = "each test target uses a part")]

use std::{
    collections::BTreeMap,
    fs,
    net::{Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
    process::Command,
    thread,
};

use aya::programs::{SchedClassifier, TestRun as _, TestRunOptions};
use dataplane::{
    Filtering,
    bpf::{Bpf, BpfOptions, Masquerade, Program},
};
use dataplane_common::{
    checksum::{Sum, sum_bytes},
    masquerade::{Config, Family, Pool, block::BLOCK_PORTS, fragment::Sent, memory::Memory},
};
use nix::sched::{CloneFlags, unshare};

#[path = "bpffs.rs"]
mod bpffs;

use bpffs::{BPFFS, mount_bpffs};

/// Verdict: on to the kernel.
pub(crate) const NEXT: i32 = -1;
/// Verdict: dropped.
pub(crate) const DROP: i32 = 2;
/// Verdict: sent out of an interface.
pub(crate) const REDIRECT: i32 = 7;

/// Recent kernels run no program on less than Ethernet and IPv6 headers. What is shorter is left to the unit
/// tests of `dataplane-common`.
pub(crate) const FRAME_BYTES_MIN: usize = 54;

/// Whether the test may load programs; if not, says which test is skipped and why.
pub(crate) fn may_run(test: &str) -> bool {
    let status = fs::read_to_string("/proc/self/status").expect("procfs is mounted");
    let effective = status.lines().find_map(|l| l.strip_prefix("CapEff:\t")).expect("there is a CapEff line");
    let capabilities = u64::from_str_radix(effective.trim(), 16).expect("CapEff is hexadecimal");
    const CAP_NET_ADMIN: u64 = 1 << 12;
    const CAP_SYS_ADMIN: u64 = 1 << 21;
    let may = capabilities & CAP_NET_ADMIN != 0 && capabilities & CAP_SYS_ADMIN != 0;
    if !may {
        eprintln!("skipped: {test}: needs root (CAP_NET_ADMIN, CAP_SYS_ADMIN) to load BPF programs");
    }
    may
}

/// A folder for the pins of one test, gone with it.
pub(crate) struct Pins(PathBuf);

impl Pins {
    pub(crate) fn new(test: &str) -> Pins {
        mount_bpffs();
        let dir = Path::new(BPFFS).join(format!("hxA-{}-{test}", std::process::id()));
        fs::create_dir_all(&dir).expect("a folder on the BPF file system");
        Pins(dir)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    pub(crate) fn open(&self) -> Bpf {
        Bpf::open(&self.0).unwrap_or_else(|e| panic!("{}", chain(&e)))
    }

    pub(crate) fn open_with(&self, options: &BpfOptions) -> Bpf {
        Bpf::open_with(&self.0, options).unwrap_or_else(|e| panic!("{}", chain(&e)))
    }

    /// The counters that are not zero.
    pub(crate) fn counters(&self) -> BTreeMap<(&'static str, &'static str), u64> {
        let counters = Bpf::counters(&self.0).expect("the counters are pinned");
        counters.into_iter().filter(|c| c.count != 0).map(|c| ((c.part, c.name), c.count)).collect()
    }

    pub(crate) fn count(&self, part: &str, name: &str) -> u64 {
        let counters = Bpf::counters(&self.0).expect("the counters are pinned");
        let found = counters.iter().find(|c| c.part == part && c.name == name);
        found.unwrap_or_else(|| panic!("{part} has no counter {name}")).count
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        for error in Bpf::teardown(&self.0) {
            eprintln!("while cleaning up: {}", chain(&error));
        }
    }
}

/// Runs the test in a network namespace of its own: its sockets and interfaces are nobody else's.
pub(crate) fn alone(test: &str, body: impl FnOnce(&Pins) + Send) {
    if !may_run(test) {
        return;
    }
    thread::scope(|scope| {
        let run = || {
            unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace");
            body(&Pins::new(test));
        };
        if let Err(panic) = scope.spawn(run).join() {
            std::panic::resume_unwind(panic);
        }
    });
}

/// Sets an interface up.
pub(crate) fn up(ifname: &str) {
    let status = Command::new("ip").args(["link", "set", ifname, "up"]).status();
    assert!(status.expect("iproute2 is installed").success());
}

/// A masquerade of 10.254.0.0/20 to the node's address, with what is usual.
pub(crate) fn masquerade_to(node: Ipv4Addr) -> Masquerade {
    Masquerade {
        node_ipv4: Some(node),
        sources: BTreeMap::new(),
        pod_ipv4: "10.254.0.0/20".parse().expect("it is a network"),
        filtering: Filtering::AddressDependent,
        exit: None,
    }
}

/// A port of the home of pod 10.254.0.`pod`, which the pod keeps when it uses it itself.
pub(crate) fn home(pod: u32, n: u16) -> u16 {
    let first = Pool::beside(32_768, 60_999).home(pod).expect("the pool has a home for it") * BLOCK_PORTS;
    first as u16 + n
}

/// Has the kernel and the host's build of the same logic translate 20,000 frames: they do the same with each.
pub(crate) fn agree_on_20_000<F: Family>(
    bpf: &mut Bpf,
    host: &mut Memory<F>,
    config: &Config,
    seed: u64,
    mutated: fn(&mut Random) -> (Program, Vec<u8>),
) {
    let mut random = Random(seed);
    let (mut translated, mut dropped) = (0, 0);
    for i in 0..20_000 {
        let (program, frame) = mutated(&mut random);
        let (verdict, got) = run(bpf, program, &frame);
        let mut want = frame.clone();
        let sent = match program {
            Program::UplinkEgress => host.egress(&mut want, config),
            _ => host.ingress(&mut want, config),
        };
        let want_verdict = verdict_of(sent, host);
        assert_eq!((verdict, &got), (want_verdict, &want), "seed {seed:#x}, {i}: {program} {frame:02x?}");
        translated += u32::from(want != frame);
        dropped += u32::from(want_verdict == DROP);
    }
    assert!(translated > 1_000 && dropped > 1_000, "{translated} translated, {dropped} dropped");
}

/// What the kernel says of a packet that the host's build judged. What is released goes to the loopback there, where
/// nobody wants it.
fn verdict_of<F: Family>(sent: Sent<F>, host: &mut Memory<F>) -> i32 {
    match sent {
        Sent::Next => NEXT,
        Sent::Drop => DROP,
        Sent::Release(key) => {
            host.release(key);
            NEXT
        }
    }
}

/// The error and its causes in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// Runs a program on a frame: verdict and frame afterwards.
pub(crate) fn run(bpf: &mut Bpf, program: Program, frame: &[u8]) -> (i32, Vec<u8>) {
    let classifier: &mut SchedClassifier = bpf
        .object()
        .program_mut(program.as_str())
        .expect("the object has the program")
        .try_into()
        .expect("it is a classifier");
    let mut out = vec![0; frame.len() + 512];
    let result = classifier
        .test_run(TestRunOptions { data_in: Some(frame), data_out: Some(&mut out), ..Default::default() })
        .unwrap_or_else(|e| panic!("{program} on {frame:02x?}: {}", chain(&e)));
    out.truncate(result.data_size_out as usize);
    (result.return_value as i32, out)
}

/// Ethernet, IPv6 and ICMPv6 with a right checksum.
pub(crate) fn icmpv6(
    macs: ([u8; 6], [u8; 6]),
    source: Ipv6Addr,
    destination: Ipv6Addr,
    hop_limit: u8,
    message: &[u8],
) -> Vec<u8> {
    let mut frame = ipv6(macs, source, destination, 58, hop_limit, message);
    fix_icmpv6(&mut frame);
    frame
}

/// Ethernet and IPv6 around a payload.
pub(crate) fn ipv6(
    (to, from): ([u8; 6], [u8; 6]),
    source: Ipv6Addr,
    destination: Ipv6Addr,
    next_header: u8,
    hop_limit: u8,
    payload: &[u8],
) -> Vec<u8> {
    let mut frame = [to, from].concat();
    frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
    frame.extend((payload.len() as u16).to_be_bytes());
    frame.extend([next_header, hop_limit]);
    frame.extend(source.octets());
    frame.extend(destination.octets());
    frame.extend(payload);
    frame
}

/// The sum over pseudo header and message: all ones when the checksum is right.
pub(crate) fn icmpv6_sum(frame: &[u8]) -> Sum {
    sum_bytes(&frame[22..]).add32((frame.len() as u32 - 54).to_be()).add16(58_u16.to_be())
}

/// Puts the right checksum into an ICMPv6 frame.
pub(crate) fn fix_icmpv6(frame: &mut [u8]) {
    frame[56..58].fill(0);
    let checksum = icmpv6_sum(frame).checksum();
    frame[56..58].copy_from_slice(&checksum.to_ne_bytes());
}

/// A neighbour solicitation's message.
pub(crate) fn solicitation(target: Ipv6Addr, options: &[u8]) -> Vec<u8> {
    let mut message = vec![135, 0, 0, 0, 0, 0, 0, 0];
    message.extend(target.octets());
    message.extend(options);
    message
}

/// A link-layer address option: 1 is the source's, 2 the target's.
pub(crate) fn link_layer(kind: u8, mac: [u8; 6]) -> Vec<u8> {
    let mut option = vec![kind, 1];
    option.extend(mac);
    option
}

/// A transport header with right ports and checksum, in IPv4, in Ethernet.
pub(crate) fn ipv4(
    protocol: u8,
    source: (Ipv4Addr, u16),
    destination: (Ipv4Addr, u16),
    rest: Transport,
) -> Vec<u8> {
    let ((from, from_port), (to, to_port)) = (source, destination);
    let transport = match rest {
        Transport::Tcp(flags) => {
            let mut t = [from_port.to_be_bytes(), to_port.to_be_bytes()].concat();
            t.extend([0, 0, 0, 1, 0, 0, 0, 0, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
            t.extend(b"data");
            t
        }
        Transport::Udp => {
            let mut t = [from_port.to_be_bytes(), to_port.to_be_bytes()].concat();
            t.extend([0, 12, 0, 0]);
            t.extend(b"data");
            t
        }
        Transport::Icmp(kind, id) => {
            let mut t = vec![kind, 0, 0, 0];
            t.extend(id.to_be_bytes());
            t.extend([0, 1]);
            t.extend(b"data");
            t
        }
        Transport::Raw(bytes) => bytes,
    };
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0];
    frame.extend([0x45, 0]);
    frame.extend((20 + transport.len() as u16).to_be_bytes());
    frame.extend([0x12, 0x34, 0x40, 0, 64, protocol, 0, 0]);
    frame.extend(from.octets());
    frame.extend(to.octets());
    frame.extend(transport);
    fix_ipv4(&mut frame);
    frame
}

/// What an IPv4 frame carries.
#[derive(Clone, Debug)]
pub(crate) enum Transport {
    /// TCP with flags and four bytes of data.
    Tcp(u8),
    /// UDP with four bytes of data.
    Udp,
    /// ICMP of a type, with an identifier.
    Icmp(u8, u16),
    /// These bytes.
    Raw(Vec<u8>),
}

/// Puts the right checksums into an IPv4 frame without options.
pub(crate) fn fix_ipv4(frame: &mut [u8]) {
    frame[24..26].fill(0);
    let checksum = sum_bytes(&frame[14..34]).checksum();
    frame[24..26].copy_from_slice(&checksum.to_ne_bytes());
    let offset = match frame[23] {
        6 => 34 + 16,
        17 => 34 + 6,
        1 => 34 + 2,
        _ => return,
    };
    if frame.len() < offset + 2 {
        return;
    }
    frame[offset..offset + 2].fill(0);
    let mut sum = transport_sum(frame).checksum();
    if frame[23] == 17 && sum == 0 {
        sum = 0xffff;
    }
    frame[offset..offset + 2].copy_from_slice(&sum.to_ne_bytes());
}

/// The sum over pseudo header (none for ICMP) and transport.
pub(crate) fn transport_sum(frame: &[u8]) -> Sum {
    let sum = sum_bytes(&frame[34..]);
    if frame[23] == 1 {
        return sum;
    }
    let word = |i: usize| u32::from_ne_bytes(frame[i..i + 4].try_into().expect("four bytes"));
    sum.add32(word(26))
        .add32(word(30))
        .add16(u16::from(frame[23]).to_be())
        .add16((frame.len() as u16 - 34).to_be())
}

/// A small generator of the same numbers on every run.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        // SplitMix64.
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
}
