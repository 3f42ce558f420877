//! An upgrade from layout 1 of the maps: flows go on at their outside ports, and programs are replaced in their places.

#[path = "bpf/support.rs"]
mod support;

use std::{fs, io, net::Ipv4Addr, path::Path, process::Command};

use aya::programs::{LinkOrder, SchedClassifier, TcAttachType, links::FdLink, tc::TcAttachOptions};
use dataplane::bpf::{
    Bpf, BpfOptions, Hook,
    Program::{self, UplinkBackstop, UplinkEgress, UplinkIngress},
    monotonic_ns,
};
use dataplane_common::masquerade::owner;
use nix::net::if_::if_nametoindex;
use support::*;

const NODE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 11);
const POD: Ipv4Addr = Ipv4Addr::new(10, 254, 0, 5);
const REMOTE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 2);
const TCP: u8 = 6;
const UDP: u8 = 17;
const ACK: u8 = 0x10;
/// Layout 1 kept a pod's own port, whatever it was.
const PORT: u16 = 40_000;
/// Replied and established (`State` of layout 1, which is that of today).
const ESTABLISHED: u8 = 0x03;

/// A map as layout 1 had it, pinned. aya makes maps only of an object.
struct OldMap {
    fd: libc::c_int,
    value_bytes: usize,
}

#[repr(C)]
struct CreateAttr {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    rest: [u64; 14],
}

#[repr(C)]
struct ElementAttr {
    map_fd: u64,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
struct PinAttr {
    path: u64,
    fd: u32,
    flags: u32,
}

fn bpf<T>(command: libc::c_long, attr: &T) -> libc::c_long {
    // SAFETY: `attr` is what the command reads, with zeros behind, and what it points to lives through the call.
    let done = unsafe { libc::syscall(libc::SYS_bpf, command, attr as *const T, size_of::<T>()) };
    assert!(done >= 0, "bpf({command}): {}", io::Error::last_os_error());
    done
}

impl OldMap {
    fn pinned(pin: &Path, map_type: u32, key_bytes: u32, value_bytes: u32, capacity: u32) -> OldMap {
        const CREATE: libc::c_long = 0;
        const PIN: libc::c_long = 6;
        let (key_size, value_size) = (key_bytes, value_bytes);
        let fd =
            bpf(CREATE, &CreateAttr { map_type, key_size, value_size, max_entries: capacity, rest: [0; 14] })
                as libc::c_int;
        let path = std::ffi::CString::new(pin.to_str().unwrap()).unwrap();
        bpf(PIN, &PinAttr { path: path.as_ptr() as u64, fd: fd as u32, flags: 0 });
        OldMap { fd, value_bytes: value_bytes as usize }
    }

    fn set(&self, key: &[u8], value: &[u8]) {
        const UPDATE: libc::c_long = 2;
        assert_eq!(value.len(), self.value_bytes);
        let (key, value) = (key.as_ptr() as u64, value.as_ptr() as u64);
        bpf(UPDATE, &ElementAttr { map_fd: self.fd as u64, key, value, flags: 0 });
    }
}

impl Drop for OldMap {
    fn drop(&mut self) {
        // SAFETY: the descriptor is this value's own.
        unsafe { libc::close(self.fd) };
    }
}

const HASH: u32 = 1;
const ARRAY: u32 = 2;

/// What an agent with layout 1 leaves behind: one TCP and one UDP flow.
fn leave_layout_1(pins: &Path) {
    fs::create_dir_all(pins).unwrap();
    let config = OldMap::pinned(&pins.join("MASQUERADE"), ARRAY, 4, 20, 1);
    config.set(
        &[0; 4],
        &[&NODE.octets()[..], &[10, 254, 0, 0, 255, 255, 240, 0], &[0; 4], &[1, 0, 0, 0]].concat(),
    );
    let sessions = OldMap::pinned(&pins.join("NAT_SESSIONS"), HASH, 16, 16, 64);
    let mappings = OldMap::pinned(&pins.join("NAT_MAPPINGS"), HASH, 8, 24, 64);
    let ports = OldMap::pinned(&pins.join("NAT_PORTS"), ARRAY, 4, 8, 3 * 65_536);
    for (protocol, table, remote_port, state) in [(TCP, 0, 80_u16, ESTABLISHED), (UDP, 1, 7, 0)] {
        let (port, now) = (PORT.to_be_bytes(), monotonic_ns().to_ne_bytes());
        let key =
            [&POD.octets()[..], &REMOTE.octets(), &port, &remote_port.to_be_bytes(), &[protocol, 0, 0, 0]];
        sessions.set(&key.concat(), &[&now[..], &port, &[state, 0, 0, 0, 0, 0]].concat());
        let mapping = [&now[..], &REMOTE.octets(), &remote_port.to_be_bytes(), &port, &[0; 8]];
        mappings.set(&[&POD.octets()[..], &port, &[protocol, 0]].concat(), &mapping.concat());
        let index = table << 16 | u32::from(PORT);
        let owner = owner(u32::from_ne_bytes(POD.octets()), u16::from_ne_bytes(port), 0x1234);
        ports.set(&index.to_ne_bytes(), &owner.to_ne_bytes());
    }
}

/// Runs the test in a network namespace of its own with the interface hxC-a.
fn alone(test: &str, body: impl FnOnce(&Pins) + Send) {
    support::alone(test, |pins| {
        let added = Command::new("ip").args("link add hxC-a type veth peer name hxC-b".split(' ')).status();
        assert!(added.expect("iproute2 is installed").success());
        body(pins);
    });
}

#[test]
fn flows_of_the_layout_before_go_on() {
    alone("carry-flows", |pins| {
        let old = pins.path().join("v1");
        leave_layout_1(&old);
        let mut bpf = pins.open();
        bpf.set_masquerade(Some(&masquerade_to(NODE))).unwrap();
        let answer = ipv4(TCP, (REMOTE, 80), (NODE, PORT), Transport::Tcp(ACK));
        let delivered = ipv4(TCP, (REMOTE, 80), (POD, PORT), Transport::Tcp(ACK));
        assert_eq!(run(&mut bpf, UplinkIngress, &answer), (NEXT, delivered), "{:?}", pins.counters());
        let sent = ipv4(UDP, (POD, PORT), (REMOTE, 7), Transport::Udp);
        let translated = ipv4(UDP, (NODE, PORT), (REMOTE, 7), Transport::Udp);
        assert_eq!(run(&mut bpf, UplinkEgress, &sent), (NEXT, translated));
        // Endpoint-independent still: another remote sees the same port.
        let (_, other) = run(&mut bpf, UplinkEgress, &ipv4(UDP, (POD, PORT), (NODE, 9), Transport::Udp));
        assert_eq!(other[34..36], PORT.to_be_bytes());
        let states: Vec<_> = Bpf::flows(pins.path()).unwrap().iter().map(|flow| flow.state).collect();
        assert!(states.contains(&Some("established")), "{states:?}");
        assert_eq!(bpf.sweep_flows(monotonic_ns()).unwrap().freed, 0, "nothing of that is an orphan");
        bpf.end_other_layouts().unwrap();
        assert!(!old.exists());
        assert_eq!(run(&mut bpf, UplinkIngress, &answer).1[30..34], POD.octets());
    });
}

/// The names of the programs at the egress of hxC-a, in their order.
fn at_egress() -> Vec<String> {
    let (_, programs) = SchedClassifier::query_tcx("hxC-a", TcAttachType::Egress).unwrap();
    programs.iter().map(|info| info.name_as_str().unwrap().to_owned()).collect()
}

fn attach(bpf: &mut Bpf, program: Program) {
    bpf.attach(program, if_nametoindex("hxC-a").unwrap(), "hxC-a").unwrap();
}

#[test]
fn a_program_of_the_layout_before_is_replaced_in_its_place() {
    if !Bpf::probe().tcx {
        eprintln!("SKIPPED carry-programs: no TCX here; filters are replaced by their names");
        return;
    }
    alone("carry-programs", |pins| {
        let old = pins.path().join("v1");
        leave_layout_1(&old);
        let options = BpfOptions { hook: Some(Hook::Tcx), ..BpfOptions::default() };
        let mut bpf = pins.open_with(&options);
        // What hangs there is another program under the same pin.
        let older: &mut SchedClassifier = bpf.object().program_mut("pod_guard").unwrap().try_into().unwrap();
        let order = TcAttachOptions::TcxOrder(LinkOrder::default());
        let id = older.attach_with_options("hxC-a", TcAttachType::Egress, order).unwrap();
        let link: FdLink = older.take_link(id).unwrap().try_into().unwrap();
        link.pin(old.join("link-hxC-a-uplink_egress")).unwrap();
        assert_eq!(at_egress(), ["pod_guard"]);
        attach(&mut bpf, UplinkEgress);
        assert_eq!(at_egress(), ["uplink_egress"], "one step, nothing beside it");
        attach(&mut bpf, UplinkBackstop);
        bpf.end_other_layouts().unwrap();
        assert!(!old.exists());
        assert_eq!(at_egress(), ["uplink_egress", "uplink_backstop"]);
        assert_eq!(bpf.attached().unwrap().len(), 2);
    });
}
