//! Frames on a wire: sent as they are, and heard with their VLAN tag.

use std::{
    io, mem,
    net::Ipv6Addr,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    time::{Duration, Instant},
};

use nix::net::if_::if_nametoindex;

use crate::rig::{Lan, patience};

/// A frame that was heard. The tag that the device took off is not among its bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Heard {
    pub(crate) bytes: Vec<u8>,
    pub(crate) tag: Option<u16>,
}

/// An advertisement as it was on the wire, its checksum right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Advertised {
    pub(crate) to_mac: [u8; 6],
    pub(crate) from_mac: [u8; 6],
    pub(crate) source: Ipv6Addr,
    pub(crate) to: Ipv6Addr,
    /// R, S and O.
    pub(crate) flags: u8,
    pub(crate) target: Ipv6Addr,
    /// The target's link-layer option.
    pub(crate) mac: Option<[u8; 6]>,
}

impl Heard {
    pub(crate) fn advertisement(&self) -> Option<Advertised> {
        let b = &self.bytes;
        if b.len() < 78 || b[12..14] != [0x86, 0xdd] || b[20] != 58 || b[54] != 136 {
            return None;
        }
        assert_eq!(b[21], 255, "an advertisement with another hop limit: {b:02x?}");
        assert!(crate::support::icmpv6_sum(b).is_valid(), "a wrong checksum: {b:02x?}");
        let mac = (b.len() >= 86 && b[78..80] == [2, 1]).then(|| b[80..86].try_into().unwrap());
        Some(Advertised {
            to_mac: b[..6].try_into().unwrap(),
            from_mac: b[6..12].try_into().unwrap(),
            source: address(&b[22..38]),
            to: address(&b[38..54]),
            flags: b[58],
            target: address(&b[62..78]),
            mac,
        })
    }

    /// The target of a solicitation, and whether it is from `::`.
    pub(crate) fn solicitation(&self) -> Option<(Ipv6Addr, bool)> {
        let b = &self.bytes;
        let is = b.len() >= 78 && b[12..14] == [0x86, 0xdd] && b[20] == 58 && b[54] == 135;
        is.then(|| (address(&b[62..78]), b[22..38] == [0; 16]))
    }
}

fn address(bytes: &[u8]) -> Ipv6Addr {
    Ipv6Addr::from(<[u8; 16]>::try_from(bytes).unwrap())
}

/// A socket on a machine's `eth0`.
pub(crate) struct Tap {
    socket: OwnedFd,
}

impl Tap {
    pub(crate) fn open(lan: &Lan, machine: &str) -> Tap {
        lan.on(machine, || {
            // SAFETY: takes numbers only.
            let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
            assert!(fd >= 0, "a packet socket: {}", io::Error::last_os_error());
            // SAFETY: the kernel has just made the descriptor, and nobody else knows it.
            let tap = Tap { socket: unsafe { OwnedFd::from_raw_fd(fd) } };
            tap.set(libc::SOL_PACKET, libc::PACKET_IGNORE_OUTGOING, &1);
            tap.set(libc::SOL_PACKET, libc::PACKET_AUXDATA, &1);
            tap.set(libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, &(8 << 20));
            tap.bind(if_nametoindex("eth0").unwrap());
            tap
        })
    }

    fn set(&self, level: i32, name: i32, value: &i32) {
        let length = size_of::<i32>() as libc::socklen_t;
        // SAFETY: `value` is an i32 that lives through the call, and `length` is its size.
        let set = unsafe {
            libc::setsockopt(self.socket.as_raw_fd(), level, name, (&raw const *value).cast(), length)
        };
        assert_eq!(set, 0, "{}", io::Error::last_os_error());
    }

    fn bind(&self, index: u32) {
        // SAFETY: every field is a number or an array of them, for which zero is a value.
        let mut address: libc::sockaddr_ll = unsafe { mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
        address.sll_ifindex = index as i32;
        let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        // SAFETY: `address` is a whole sockaddr_ll, `length` its size, and it lives through the call.
        let bound = unsafe { libc::bind(self.socket.as_raw_fd(), (&raw const address).cast(), length) };
        assert_eq!(bound, 0, "{}", io::Error::last_os_error());
    }

    pub(crate) fn send(&self, frame: &[u8]) {
        let sent =
            nix::sys::socket::send(self.socket.as_raw_fd(), frame, nix::sys::socket::MsgFlags::empty());
        sent.expect("a frame can be sent");
    }

    /// Sends a frame with a VLAN tag: priority, drop eligibility and VID as in the header.
    pub(crate) fn send_tagged(&self, frame: &[u8], tag: u16) {
        let tagged = [&frame[..12], &[0x81, 0], &tag.to_be_bytes(), &frame[12..]].concat();
        self.send(&tagged);
    }

    /// The next frame before `deadline`.
    pub(crate) fn next(&self, deadline: Instant) -> Option<Heard> {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut ready = [libc::pollfd { fd: self.socket.as_raw_fd(), events: libc::POLLIN, revents: 0 }];
        // SAFETY: one entry, as said.
        if unsafe { libc::poll(ready.as_mut_ptr(), 1, left.as_millis() as i32) } <= 0 {
            return None;
        }
        Some(self.receive())
    }

    fn receive(&self) -> Heard {
        let mut bytes = vec![0_u8; 2048];
        // As many as an auxiliary message takes, aligned for its header.
        let mut control = [0_u64; 16];
        let mut iov = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
        // SAFETY: every field is a number or a pointer, for which zero is a value.
        let mut message: libc::msghdr = unsafe { mem::zeroed() };
        message.msg_iov = &raw mut iov;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = size_of_val(&control);
        // SAFETY: the message points to buffers of the lengths that it says, which live through the call.
        let length = unsafe { libc::recvmsg(self.socket.as_raw_fd(), &raw mut message, 0) };
        assert!(length >= 0, "{}", io::Error::last_os_error());
        bytes.truncate(length as usize);
        // SAFETY: the kernel has filled in the message and its control buffer, which is still there.
        let tag = unsafe { tag(&message) };
        Heard { bytes, tag }
    }

    /// What `wanted` finds in a frame, waiting for it.
    pub(crate) fn find<T>(&self, what: &str, mut wanted: impl FnMut(&Heard) -> Option<T>) -> T {
        let deadline = Instant::now() + patience();
        while let Some(heard) = self.next(deadline) {
            if let Some(found) = wanted(&heard) {
                return found;
            }
        }
        panic!("not within {:?}: {what}", patience());
    }

    /// What `wanted` finds in the frames of this time.
    pub(crate) fn all<T>(&self, time: Duration, mut wanted: impl FnMut(&Heard) -> Option<T>) -> Vec<T> {
        let deadline = Instant::now() + time;
        std::iter::from_fn(|| self.next(deadline)).filter_map(|heard| wanted(&heard)).collect()
    }

    /// Forgets what was heard so far.
    pub(crate) fn clear(&self) {
        while self.next(Instant::now()).is_some() {}
    }
}

/// # Safety
/// `message` must have been filled in by `recvmsg`, and its control buffer must be there.
unsafe fn tag(message: &libc::msghdr) -> Option<u16> {
    // SAFETY: as the caller says.
    let header = unsafe { libc::CMSG_FIRSTHDR(&raw const *message) };
    // SAFETY: the macro gives a null pointer or a header in the control buffer.
    let header_at = unsafe { header.as_ref() }?;
    if header_at.cmsg_level != libc::SOL_PACKET || header_at.cmsg_type != libc::PACKET_AUXDATA {
        return None;
    }
    // SAFETY: the data of such a message is a tpacket_auxdata, perhaps unaligned.
    let data: libc::tpacket_auxdata =
        unsafe { libc::CMSG_DATA(header).cast::<libc::tpacket_auxdata>().read_unaligned() };
    (data.tp_status & libc::TP_STATUS_VLAN_VALID != 0).then_some(data.tp_vlan_tci)
}
