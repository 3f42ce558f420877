//! Many packets with one system call: `sendmmsg` and `recvmmsg`, and a socket for whole frames. The only
//! unsafe code of this program.

use std::{
    io, mem,
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
    ptr,
};

use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};

/// Packets per system call.
pub(crate) const BATCH: usize = 64;

/// Bytes that are kept of a received packet; the rest of a longer one is cut off.
const ROOM: usize = 256;

/// Packets that are sent again and again, in order.
pub(crate) struct Sender {
    /// Never changed once `headers` points into it.
    _packets: Vec<Vec<u8>>,
    /// Never moved: `headers` points into it.
    _parts: Box<[libc::iovec]>,
    headers: Box<[libc::mmsghdr]>,
    next: usize,
}

impl Sender {
    /// Will send `packets` in turn on a socket that knows where to.
    pub(crate) fn new(packets: Vec<Vec<u8>>) -> Self {
        let mut packets = packets;
        let part = |packet: &mut Vec<u8>| libc::iovec {
            iov_base: packet.as_mut_ptr().cast(),
            iov_len: packet.len(),
        };
        let mut parts: Box<[libc::iovec]> = packets.iter_mut().map(part).collect();
        let headers = parts.iter_mut().map(header).collect();
        Self { _packets: packets, _parts: parts, headers, next: 0 }
    }

    /// Sends up to [`BATCH`] packets and says how many the kernel took.
    pub(crate) fn send(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let end = (self.next + BATCH).min(self.headers.len());
        let headers = &mut self.headers[self.next..end];
        let count = u32::try_from(headers.len()).expect("a batch is small");
        // SAFETY: `headers` is a live slice of `count` headers; each points to one iovec of `_parts`, which
        // points into one vector of `_packets`. Both live as long as `self` and are never changed or moved:
        // they are private, boxed, and no method touches them. The kernel only reads the packets.
        let sent = unsafe { libc::sendmmsg(socket.as_raw_fd(), headers.as_mut_ptr(), count, 0) };
        let sent = usize::try_from(sent).map_err(|_| io::Error::last_os_error())?;
        self.next = if self.next + sent >= self.headers.len() { 0 } else { self.next + sent };
        Ok(sent)
    }
}

/// Room for packets that are received.
pub(crate) struct Receiver {
    room: Box<[[u8; ROOM]]>,
    /// Never moved: `headers` points into it.
    _parts: Box<[libc::iovec]>,
    headers: Box<[libc::mmsghdr]>,
}

impl Receiver {
    /// Room for one batch.
    pub(crate) fn new() -> Self {
        let mut room = vec![[0; ROOM]; BATCH].into_boxed_slice();
        let part = |room: &mut [u8; ROOM]| libc::iovec { iov_base: room.as_mut_ptr().cast(), iov_len: ROOM };
        let mut parts: Box<[libc::iovec]> = room.iter_mut().map(part).collect();
        let headers = parts.iter_mut().map(header).collect();
        Self { room, _parts: parts, headers }
    }

    /// Waits for at least one packet, as long as the socket's own limit allows, and gives what is there.
    pub(crate) fn receive(&mut self, socket: BorrowedFd<'_>) -> io::Result<impl Iterator<Item = &[u8]>> {
        let count = u32::try_from(self.headers.len()).expect("a batch is small");
        let headers = self.headers.as_mut_ptr();
        // SAFETY: `headers` points to `count` live headers; each points to one iovec of `_parts`, which gives
        // the kernel one array of `room` to write into. `&mut self` excludes every reader of `room` meanwhile.
        // A null timeout is allowed.
        let received = unsafe {
            libc::recvmmsg(socket.as_raw_fd(), headers, count, libc::MSG_WAITFORONE, ptr::null_mut())
        };
        let received = usize::try_from(received).map_err(|_| io::Error::last_os_error())?;
        let lengths = self.headers[..received].iter().map(|header| (header.msg_len as usize).min(ROOM));
        Ok(self.room.iter().zip(lengths).map(|(room, length)| &room[..length]))
    }
}

/// A socket for whole IPv6 frames on one interface of the calling thread's namespace.
pub(crate) fn packet_socket(link: &str) -> io::Result<OwnedFd> {
    let fd = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::EthIpv6)?;
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: (libc::ETH_P_IPV6 as u16).to_be(),
        sll_ifindex: nix::net::if_::if_nametoindex(link)?.cast_signed(),
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: `address` is a whole sockaddr_ll that lives through the call, and `length` is its size.
    let bound = unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), length) };
    if bound < 0 { Err(io::Error::last_os_error()) } else { Ok(fd) }
}

fn header(part: &mut libc::iovec) -> libc::mmsghdr {
    // SAFETY: a `mmsghdr` is integers and pointers, for all of which zero is a value: no name, no control data.
    let mut header: libc::mmsghdr = unsafe { mem::zeroed() };
    header.msg_hdr.msg_iov = part;
    header.msg_hdr.msg_iovlen = 1;
    header
}

#[cfg(test)]
mod tests {
    use std::{net::UdpSocket, os::fd::AsFd};

    use super::*;

    #[test]
    fn packets_arrive_in_turn_and_begin_anew() {
        let to = UdpSocket::bind("127.0.0.1:0").unwrap();
        let from = UdpSocket::bind("127.0.0.1:0").unwrap();
        from.connect(to.local_addr().unwrap()).unwrap();
        let mut sender = Sender::new(vec![b"one".to_vec(), b"two".to_vec()]);
        assert_eq!(sender.send(from.as_fd()).unwrap(), 2);
        assert_eq!(sender.send(from.as_fd()).unwrap(), 2);
        let mut receiver = Receiver::new();
        let got: Vec<Vec<u8>> = receiver.receive(to.as_fd()).unwrap().map(<[u8]>::to_vec).collect();
        assert_eq!(got, [b"one", b"two", b"one", b"two"]);
    }
}
