//! Whether an address answers over whatever routes lead to it: ICMPv6 echo (RFC 4443 section 4).
//!
//! The answer comes from the kernel that has the address, whatever its processes do. That none comes proves little: a router
//! between may be gone, or a firewall may drop it.

use std::{
    io,
    net::{Ipv6Addr, SocketAddrV6},
    os::fd::{AsRawFd as _, OwnedFd},
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn6, connect, recv, send, socket,
    },
};
use tokio::time::sleep;

const ECHO_REQUEST: u8 = 128;
const ECHO_REPLY: u8 = 129;
const HEADER_BYTES: usize = 8;
const NONCE_BYTES: usize = 8;
const MESSAGE_BYTES: usize = HEADER_BYTES + NONCE_BYTES;
/// A lost packet is not a lost node: it is asked so often.
const REQUESTS: u8 = 3;
/// After each it is looked so often whether an answer has come, ...
const LOOKS: u32 = 4;
/// ... after waiting for so long.
const LOOK_AFTER: Duration = Duration::from_millis(33);
/// Messages read in one look, so that a flood does not keep it for ever.
const MESSAGES_MAX: usize = 32;

/// Whether `address` answers: at once when it does, after 400 ms when it does not.
///
/// # Errors
/// The kernel has no more sockets, or the caller may not have raw ones.
pub async fn answers(address: Ipv6Addr) -> io::Result<bool> {
    let nonce: [u8; NONCE_BYTES] = rand::random();
    let socket = open()?;
    // The kernel passes on what comes from this address alone.
    if connect(socket.as_raw_fd(), &SockaddrIn6::from(SocketAddrV6::new(address, 0, 0, 0))).is_err() {
        return Ok(false);
    }
    for number in 0..REQUESTS {
        // Without a route now, there may be one for the next.
        let _ = send(socket.as_raw_fd(), &request(number, nonce), MsgFlags::empty());
        for _ in 0..LOOKS {
            sleep(LOOK_AFTER).await;
            if has_answer(&socket, nonce) {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

fn open() -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    Ok(socket(AddressFamily::Inet6, SockType::Raw, flags, SockProtocol::IcmpV6)?)
}

/// The kernel writes the checksum (RFC 3542 section 3.1).
fn request(number: u8, nonce: [u8; NONCE_BYTES]) -> [u8; MESSAGE_BYTES] {
    let mut message = [0; MESSAGE_BYTES];
    message[0] = ECHO_REQUEST;
    message[7] = number;
    message[HEADER_BYTES..].copy_from_slice(&nonce);
    message
}

fn has_answer(socket: &OwnedFd, nonce: [u8; NONCE_BYTES]) -> bool {
    let mut message = [0; 128];
    for _ in 0..MESSAGES_MAX {
        match recv(socket.as_raw_fd(), &mut message, MsgFlags::empty()) {
            Ok(length) if is_answer(&message[..length], nonce) => return true,
            Ok(_) | Err(Errno::ECONNREFUSED | Errno::EHOSTUNREACH | Errno::ENETUNREACH | Errno::EINTR) => {}
            Err(_) => return false,
        }
    }
    false
}

fn is_answer(message: &[u8], nonce: [u8; NONCE_BYTES]) -> bool {
    message.first() == Some(&ECHO_REPLY) && message.get(HEADER_BYTES..) == Some(nonce.as_slice())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_answer_with_what_was_asked_counts() {
        let nonce = [7; NONCE_BYTES];
        let asked = request(1, nonce);
        assert!(!is_answer(&asked, nonce), "its own question");
        let mut answer = asked;
        answer[0] = ECHO_REPLY;
        assert!(is_answer(&answer, nonce));
        assert!(!is_answer(&answer, [8; NONCE_BYTES]), "to somebody else");
        assert!(!is_answer(&answer[..4], nonce));
        assert!(!is_answer(&[], nonce));
    }

    #[tokio::test]
    async fn this_machine_answers_itself_and_an_address_that_nobody_has_does_not() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: raw sockets need root");
            return;
        }
        assert!(answers(Ipv6Addr::LOCALHOST).await.unwrap());
        assert!(!answers("2001:db8:dead::1".parse().unwrap()).await.unwrap());
    }
}
