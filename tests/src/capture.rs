//! Seeing what crosses an interface: tcpdump's packets as bytes.

use std::io::Read;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::command::{Run, wait_within};
use crate::netns::NetNs;
use crate::wait::{wait_for, wait_until};

/// The most bytes that one capture keeps.
const KEPT_MAX: usize = 64 << 20;

const ETHERNET_LEN: usize = 14;
const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const IPV6_LEN: usize = 40;
/// Linux's "cooked" captures and others are not read: every interface here is an Ethernet.
const LINKTYPE_ETHERNET: u32 = 1;

/// A capture that runs on one interface.
#[derive(Debug)]
pub struct Capture {
    child: Child,
    bytes: Arc<Mutex<Vec<u8>>>,
    at: String,
}

impl Capture {
    /// Starts to capture what matches `filter` (tcpdump's language) and waits until it does.
    ///
    /// # Errors
    /// With what tcpdump said.
    pub fn start(place: &NetNs, link: &str, filter: &str) -> Result<Self> {
        let mut command = Command::new("tcpdump");
        command.args([
            "-i",
            link,
            "-n",
            "-U",
            "--immediate-mode",
            "-s",
            "0",
            "-Z",
            "root",
            "-w",
            "-",
            filter,
        ]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = place.spawn(&mut command)?;
        let bytes = collect(child.stdout.take());
        let words = collect(child.stderr.take());
        let mut capture = Self { child, bytes, at: format!("{} {link}", place.name()) };
        let listens = || String::from_utf8_lossy(&words.lock().expect(NO_PANIC)).contains("listening on");
        let said = || String::from_utf8_lossy(&words.lock().expect(NO_PANIC)).trim().to_owned();
        wait_until(Duration::from_secs(10), "tcpdump listens", || {
            listens() || capture.child.try_wait().is_ok_and(|status| status.is_some())
        })?;
        if !listens() {
            bail!("tcpdump on {} said: {}", capture.at, said());
        }
        Ok(capture)
    }

    /// What was captured so far.
    ///
    /// # Errors
    /// When it is not a capture of an Ethernet.
    pub fn packets(&self) -> Result<Vec<Packet>> {
        parse(&self.bytes.lock().expect(NO_PANIC)).with_context(|| format!("capture on {}", self.at))
    }

    /// Waits until there are `count` packets that `wanted` accepts, and gives all of them.
    ///
    /// # Errors
    /// When they do not come in time.
    pub fn wait_packets(
        &self,
        limit: Duration,
        count: usize,
        wanted: impl Fn(&Packet) -> bool,
    ) -> Result<Vec<Packet>> {
        let what = format!("{count} packets on {}", self.at);
        let (_, packets) = wait_for(limit, &what, || {
            let all = self.packets().map_err(|e| format!("{e:#}"))?;
            let seen = all.len();
            let good: Vec<Packet> = all.into_iter().filter(&wanted).collect();
            if good.len() >= count { Ok(good) } else { Err(format!("{} of {seen} seen", good.len())) }
        })?;
        Ok(packets)
    }

    /// What was captured so far in tcpdump's words, without times.
    ///
    /// # Errors
    /// When tcpdump cannot read it.
    pub fn text(&self) -> Result<String> {
        let bytes = self.bytes.lock().expect(NO_PANIC).clone();
        Run::new(&["tcpdump", "-n", "-t", "-r", "-"]).stdin(bytes).success()
    }

    /// Ends it and gives all packets.
    ///
    /// # Errors
    /// When it is not a capture of an Ethernet.
    pub fn finish(mut self) -> Result<Vec<Packet>> {
        kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGINT).ok();
        wait_within(&mut self.child, Duration::from_secs(5)).ok();
        self.packets()
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

const NO_PANIC: &str = "no thread panics while it holds this lock";

/// One Ethernet frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    /// All of its bytes.
    pub bytes: Vec<u8>,
}

impl Packet {
    /// Source and destination, when it is IPv6.
    pub fn ipv6(&self) -> Option<(Ipv6Addr, Ipv6Addr)> {
        let header = self.ipv6_packet()?;
        let address = |at: usize| -> Ipv6Addr {
            <[u8; 16]>::try_from(&header[at..at + 16]).expect("16 bytes were cut").into()
        };
        Some((address(8), address(24)))
    }

    /// Source and destination, when it is IPv4.
    pub fn ipv4(&self) -> Option<(Ipv4Addr, Ipv4Addr)> {
        let header = self.network_packet(ETHERTYPE_IPV4, 20)?;
        let address = |at: usize| -> Ipv4Addr {
            <[u8; 4]>::try_from(&header[at..at + 4]).expect("4 bytes were cut").into()
        };
        Some((address(12), address(16)))
    }

    /// The IPv6 packet without what a hop may change: the link layer and the hop limit.
    pub fn unchanging(&self) -> Option<Vec<u8>> {
        let mut packet = self.ipv6_packet()?.to_vec();
        packet[7] = 0;
        Some(packet)
    }

    /// The hop limit.
    pub fn hop_limit(&self) -> Option<u8> {
        Some(self.ipv6_packet()?[7])
    }

    /// The type of an ICMPv6 message that follows the IPv6 header at once.
    pub fn icmpv6_type(&self) -> Option<u8> {
        let packet = self.ipv6_packet()?;
        (packet[6] == 58).then(|| packet.get(IPV6_LEN).copied()).flatten()
    }

    fn ipv6_packet(&self) -> Option<&[u8]> {
        let packet = self.network_packet(ETHERTYPE_IPV6, IPV6_LEN)?;
        let len = IPV6_LEN + usize::from(u16::from_be_bytes([packet[4], packet[5]]));
        // A short frame is padded by Ethernet.
        Some(packet.get(..len).unwrap_or(packet))
    }

    fn network_packet(&self, ethertype: u16, len_min: usize) -> Option<&[u8]> {
        let kind = u16::from_be_bytes([*self.bytes.get(12)?, *self.bytes.get(13)?]);
        let packet = self.bytes.get(ETHERNET_LEN..)?;
        (kind == ethertype && packet.len() >= len_min).then_some(packet)
    }
}

/// Reads the pcap format (draft-ietf-opsawg-pcap) as far as it has come.
fn parse(bytes: &[u8]) -> Result<Vec<Packet>> {
    let mut packets = Vec::new();
    if bytes.len() < 24 {
        return Ok(packets);
    }
    let word = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().expect("4 bytes were cut"));
    if word(0) != 0xa1b2_c3d4 {
        bail!("not a pcap stream of this machine");
    }
    if word(20) != LINKTYPE_ETHERNET {
        bail!("link type {} is not Ethernet", word(20));
    }
    let mut at = 24;
    while at + 16 <= bytes.len() {
        let len = word(at + 8) as usize;
        let Some(frame) = bytes.get(at + 16..at + 16 + len) else { break };
        packets.push(Packet { bytes: frame.to_vec() });
        at += 16 + len;
    }
    Ok(packets)
}

fn collect(stream: Option<impl Read + Send + 'static>) -> Arc<Mutex<Vec<u8>>> {
    let bytes = Arc::new(Mutex::new(Vec::new()));
    let sink = Arc::clone(&bytes);
    std::thread::spawn(move || {
        let Some(mut stream) = stream else { return };
        let mut chunk = vec![0; 64 << 10];
        while let Ok(len @ 1..) = stream.read(&mut chunk) {
            let mut sink = sink.lock().expect(NO_PANIC);
            if sink.len() + len > KEPT_MAX {
                return;
            }
            sink.extend_from_slice(&chunk[..len]);
        }
    });
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(frames: &[&[u8]]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for word in [0xa1b2_c3d4_u32, 0x0004_0002, 0, 0, 262_144, LINKTYPE_ETHERNET] {
            bytes.extend(word.to_ne_bytes());
        }
        for frame in frames {
            for word in [1, 2, frame.len() as u32, frame.len() as u32] {
                bytes.extend(word.to_ne_bytes());
            }
            bytes.extend(*frame);
        }
        bytes
    }

    #[test]
    fn a_stream_that_ends_inside_a_packet_gives_those_before() {
        let mut bytes = stream(&[&[1; 20], &[2; 30]]);
        bytes.truncate(bytes.len() - 1);
        assert_eq!(parse(&bytes).unwrap(), [Packet { bytes: vec![1; 20] }]);
    }

    #[test]
    fn every_cut_of_a_stream_is_read_without_panic() {
        let bytes = stream(&[&[1; 20], &[2; 30]]);
        for len in 0..=bytes.len() {
            parse(&bytes[..len]).unwrap();
        }
    }

    #[test]
    fn only_the_hop_limit_and_the_link_layer_may_change() {
        let mut frame = vec![0; ETHERNET_LEN];
        frame[12..14].copy_from_slice(&ETHERTYPE_IPV6.to_be_bytes());
        let mut ipv6 = vec![0; IPV6_LEN + 4];
        ipv6[5] = 4;
        ipv6[7] = 64;
        frame.extend(&ipv6);
        let sent = Packet { bytes: frame.clone() };
        frame[0] = 9;
        frame[ETHERNET_LEN + 7] = 63;
        frame.extend([0; 6]);
        let got = Packet { bytes: frame.clone() };
        assert_eq!(sent.unchanging(), got.unchanging());
        frame[ETHERNET_LEN + IPV6_LEN] = 1;
        assert_ne!(sent.unchanging(), Packet { bytes: frame }.unchanging());
    }
}
