//! The sockets on the uplink. One sends frames, one hears advertisements. One hears probes and is there only while it
//! must: what hears before the programs on the uplink do sees every packet.

use std::{
    io, mem,
    net::Ipv6Addr,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

use dataplane_common::ndp::{NEIGHBOUR_ADVERTISEMENT, claim};
use dataplane_core::{
    Mac,
    announce::{Claim, ClaimKind},
};
use libc::{c_int, sock_filter};
use tokio::io::{Interest, unix::AsyncFd};

/// Longer messages are cut: their options are not looked at.
const MESSAGE_BYTES: usize = 512;

/// Messages taken at once, so that a flood does not keep the task from sending.
const MESSAGES_MAX: usize = 32;

pub(super) struct Sockets {
    index: u32,
    /// Of no protocol, so that it hears nothing.
    frames: OwnedFd,
    advertisements: AsyncFd<OwnedFd>,
    probes: Option<AsyncFd<OwnedFd>>,
}

impl Sockets {
    pub(super) fn open(device: &str, index: u32) -> io::Result<Sockets> {
        let frames = socket(libc::AF_PACKET, 0)?;
        bind(&frames, index, 0)?;
        let advertisements = socket(libc::AF_INET6, libc::IPPROTO_ICMPV6)?;
        filter(&advertisements, &HOP_LIMIT_255)?;
        set(&advertisements, libc::SOL_ICMPV6, ICMP6_FILTER, &only(NEIGHBOUR_ADVERTISEMENT))?;
        nix::sys::socket::setsockopt(
            &advertisements,
            nix::sys::socket::sockopt::BindToDevice,
            &device.into(),
        )?;
        Ok(Sockets { index, frames, advertisements: register(advertisements)?, probes: None })
    }

    pub(super) fn send(&self, frame: &[u8]) -> io::Result<()> {
        nix::sys::socket::send(self.frames.as_raw_fd(), frame, nix::sys::socket::MsgFlags::MSG_DONTWAIT)?;
        Ok(())
    }

    /// Whether [`Sockets::claims`] hears others' probes, too.
    pub(super) fn hear_probes(&mut self, hear: bool) -> io::Result<()> {
        match (hear, &self.probes) {
            (true, None) => self.probes = Some(probes(self.index)?),
            (false, Some(_)) => self.probes = None,
            _ => {}
        }
        Ok(())
    }

    /// What others claim, at least one message.
    ///
    /// Cancelling loses nothing.
    pub(super) async fn claims(&self) -> io::Result<Vec<Claim>> {
        let probes = async {
            match &self.probes {
                Some(socket) => read(socket, probe).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            claims = probes => claims,
            claims = read(&self.advertisements, advertisement) => claims,
        }
    }
}

/// Only a socket for all protocols hears what a program on the uplink will answer itself.
fn probes(index: u32) -> io::Result<AsyncFd<OwnedFd>> {
    let socket = socket(libc::AF_PACKET, 0)?;
    filter(&socket, &PROBES)?;
    set(&socket, libc::SOL_PACKET, libc::PACKET_IGNORE_OUTGOING, &1)?;
    bind(&socket, index, libc::ETH_P_ALL as u16)?;
    register(socket)
}

fn probe(frame: &[u8]) -> Option<Claim> {
    let probe = claim::Probe::read(frame)?;
    Some(Claim {
        address: Ipv6Addr::from(probe.target.octets()),
        mac: Mac(probe.mac),
        kind: ClaimKind::Probe(probe.nonce),
    })
}

fn advertisement(message: &[u8]) -> Option<Claim> {
    let (target, mac) = claim::advertised(message)?;
    let address = Ipv6Addr::from(target.octets());
    Some(Claim { address, mac: Mac(mac), kind: ClaimKind::Advertisement })
}

/// Waits for messages and reads those that are there.
async fn read(socket: &AsyncFd<OwnedFd>, claim: fn(&[u8]) -> Option<Claim>) -> io::Result<Vec<Claim>> {
    let mut ready = socket.readable().await?;
    let mut claims = Vec::new();
    for _ in 0..MESSAGES_MAX {
        let mut message = [0; MESSAGE_BYTES];
        match ready.try_io(|socket| Ok(nix::unistd::read(socket.get_ref(), &mut message)?)) {
            Ok(Ok(n)) => claims.extend(claim(&message[..n])),
            // It has been down, and says so once.
            Ok(Err(error)) if error.raw_os_error() == Some(libc::ENETDOWN) => {}
            Ok(Err(error)) => return Err(error),
            Err(_would_block) => break,
        }
    }
    Ok(claims)
}

/// `SOL_ICMPV6` option of RFC 3542 section 3.2.
const ICMP6_FILTER: c_int = 1;

/// A filter that blocks every ICMPv6 type but one.
fn only(kind: u8) -> [u32; 8] {
    let mut blocked = [u32::MAX; 8];
    blocked[usize::from(kind >> 5)] &= !(1 << (kind & 31));
    blocked
}

const LOAD_WORD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const LOAD_HALF: u16 = (libc::BPF_LD | libc::BPF_H | libc::BPF_ABS) as u16;
const LOAD_BYTE: u16 = (libc::BPF_LD | libc::BPF_B | libc::BPF_ABS) as u16;
const JUMP_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
const ACCEPT: sock_filter = op(RETURN, u32::MAX);
const REJECT: sock_filter = op(RETURN, 0);

const fn op(code: u16, k: u32) -> sock_filter {
    sock_filter { code, jt: 0, jf: 0, k }
}

/// Goes on if equal, else over `skip` instructions.
const fn equal(k: u32, skip: u8) -> sock_filter {
    sock_filter { code: JUMP_EQUAL, jt: 0, jf: skip, k }
}

/// Untagged frames with a neighbour solicitation from `::`.
const PROBES: [sock_filter; 18] = [
    op(LOAD_WORD, (libc::SKF_AD_OFF + libc::SKF_AD_VLAN_TAG_PRESENT) as u32),
    equal(0, 15),
    op(LOAD_HALF, 12),
    equal(0x86dd, 13),
    op(LOAD_BYTE, 20),
    equal(58, 11),
    op(LOAD_BYTE, 54),
    equal(135, 9),
    op(LOAD_WORD, 22),
    equal(0, 7),
    op(LOAD_WORD, 26),
    equal(0, 5),
    op(LOAD_WORD, 30),
    equal(0, 3),
    op(LOAD_WORD, 34),
    equal(0, 1),
    ACCEPT,
    REJECT,
];

/// Packets that no router has forwarded (RFC 4861 section 7.1.2).
const HOP_LIMIT_255: [sock_filter; 4] =
    [op(LOAD_BYTE, (libc::SKF_NET_OFF + 7) as u32), equal(255, 1), ACCEPT, REJECT];

fn socket(family: c_int, protocol: c_int) -> io::Result<OwnedFd> {
    let kind = libc::SOCK_RAW | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: takes numbers only.
    let fd = unsafe { libc::socket(family, kind, protocol) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made the descriptor, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn register(socket: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the `AsyncFd` owns the descriptor, and nothing takes it out again, so that it is open as long as it is
    // registered.
    Ok(unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) }?)
}

fn filter(socket: &OwnedFd, program: &[sock_filter]) -> io::Result<()> {
    // The kernel reads the instructions and writes none.
    let filter = program.as_ptr().cast_mut();
    let program = libc::sock_fprog { len: program.len() as u16, filter };
    set(socket, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &program)
}

fn set<T>(socket: &OwnedFd, level: c_int, name: c_int, value: &T) -> io::Result<()> {
    let length = size_of::<T>() as libc::socklen_t;
    // SAFETY: `value` is valid for its own length throughout the call, and so is what a `sock_fprog` points to.
    let set =
        unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const *value).cast(), length) };
    if set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Binds a packet socket to a device; of protocol 0 it hears nothing.
fn bind(socket: &OwnedFd, index: u32, protocol: u16) -> io::Result<()> {
    // SAFETY: every field is a number or an array of them, for which zero is a value.
    let mut address: libc::sockaddr_ll = unsafe { mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = protocol.to_be();
    address.sll_ifindex = index.cast_signed();
    let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: `address` is a whole sockaddr_ll, `length` its size, and it lives through the call.
    let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) };
    if bound == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
