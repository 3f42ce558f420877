//! What a message of the kernel's multicast groups is about, read from its bytes.
//!
//! Only as much is read as is needed to tell whether it can concern something of Hextet's, and who asked the kernel
//! for the change.
//!
//! # Layout
//! Netlink header (`struct nlmsghdr`): length (4), type (2), flags (2), sequence (4), port (4). In a notification the
//! port is that of the socket whose request led to it, or 0 where the kernel does not keep it.

use std::time::Instant;

use super::author::Author;

const HEADER_BYTES: usize = 16;
const ATTRIBUTE_HEADER_BYTES: usize = 4;

const RTM_NEWLINK: u16 = libc::RTM_NEWLINK;
const RTM_DELLINK: u16 = libc::RTM_DELLINK;
const RTM_NEWADDR: u16 = libc::RTM_NEWADDR;
const RTM_DELADDR: u16 = libc::RTM_DELADDR;
const RTM_NEWROUTE: u16 = libc::RTM_NEWROUTE;
const RTM_DELROUTE: u16 = libc::RTM_DELROUTE;
const RTM_NEWNEIGH: u16 = libc::RTM_NEWNEIGH;
const RTM_DELNEIGH: u16 = libc::RTM_DELNEIGH;
const RTM_DELQDISC: u16 = libc::RTM_DELQDISC;
const RTM_NEWTFILTER: u16 = libc::RTM_NEWTFILTER;
const RTM_DELTFILTER: u16 = libc::RTM_DELTFILTER;
const RTM_NEWNETCONF: u16 = libc::RTM_NEWNETCONF;

/// `struct nfgenmsg`: family (1), version (1), resource (2).
const NFGENMSG_BYTES: usize = 4;
/// `NFNL_SUBSYS_NFTABLES`, the upper byte of the type.
const SUBSYS_NFTABLES: u16 = 10;
/// `NFT_MSG_NEWGEN`: the last message of a transaction.
const NFT_MSG_NEWGEN: u16 = 15;
/// `NFTA_TABLE_NAME`, `NFTA_CHAIN_TABLE`, `NFTA_RULE_TABLE` and their like: 1 in every kind of message.
const NFTA_TABLE: u16 = 1;
/// `NFTA_GEN_PROC_PID`, big-endian.
const NFTA_GEN_PROC_PID: u16 = 2;
/// `NFTA_GEN_PROC_NAME`.
const NFTA_GEN_PROC_NAME: u16 = 3;
const OUR_TABLE: &[u8] = b"hextet";

/// A kind of thing in the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Subject {
    /// A device.
    Link,
    /// An address of a device.
    Address,
    /// A route.
    Route,
    /// A neighbour, or a proxied one.
    Neighbour,
    /// A queueing discipline or a filter.
    Filter,
    /// A setting of a device that is written through `/proc/sys`.
    Sysctl,
    /// Something in table `ip hextet`.
    Nftables,
    /// A pin of a BPF link.
    Pin,
    /// The programs of a TCX hook.
    Hook,
}

/// Something was changed that may be Hextet's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trace {
    /// What kind of thing.
    pub subject: Subject,
    /// Who asked for it, when the kernel says so.
    pub author: Option<Author>,
    /// When it was heard of.
    pub at: Instant,
}

/// A message, cut into header and body.
pub(super) struct Message<'a> {
    kind: u16,
    port: u32,
    body: &'a [u8],
}

/// The messages of one datagram; ends at the first that does not fit.
pub(super) fn messages(mut datagram: &[u8]) -> impl Iterator<Item = Message<'_>> {
    std::iter::from_fn(move || {
        let len = u32_at(datagram, 0)? as usize;
        let message = Message {
            kind: u16_at(datagram, 4)?,
            port: u32_at(datagram, 12)?,
            body: datagram.get(HEADER_BYTES..len)?,
        };
        datagram = datagram.get(aligned(len)..).unwrap_or_default();
        Some(message)
    })
}

impl Message<'_> {
    /// What it is about, when that may be Hextet's or the uplink's. Messages of the routing groups.
    pub(super) fn subject(&self) -> Option<Subject> {
        let (subject, matters) = match self.kind {
            RTM_NEWLINK | RTM_DELLINK => (Subject::Link, true),
            RTM_NEWADDR | RTM_DELADDR => (Subject::Address, true),
            RTM_NEWROUTE | RTM_DELROUTE => (Subject::Route, self.is_own_or_default_route()),
            RTM_NEWNEIGH => (Subject::Neighbour, self.is_ip() && self.is_kept_neighbour()),
            RTM_DELNEIGH => (Subject::Neighbour, self.is_ip()),
            RTM_DELQDISC | RTM_NEWTFILTER | RTM_DELTFILTER => (Subject::Filter, true),
            RTM_NEWNETCONF => (Subject::Sysctl, self.is_ip()),
            _ => return None,
        };
        matters.then_some(subject)
    }

    /// The port of the socket that asked for it.
    pub(super) fn port(&self) -> Option<u32> {
        (self.port != 0).then_some(self.port)
    }

    /// A routing daemon may change thousands of its own routes a second.
    ///
    /// `struct rtmsg`: family, length of the destination, of the source, tos, table, protocol.
    fn is_own_or_default_route(&self) -> bool {
        self.body.get(5) == Some(&dataplane_core::PROTOCOL) || self.body.get(1) == Some(&0)
    }

    /// Neighbours come and go with traffic: only permanent ones and proxied ones are anybody's wish.
    ///
    /// `struct ndmsg`: family (1), padding (3), interface (4), state (2), flags (1), type (1).
    fn is_kept_neighbour(&self) -> bool {
        const NUD_PERMANENT: u16 = 0x80;
        const NTF_PROXY: u8 = 0x08;
        u16_at(self.body, 8).is_some_and(|state| state & NUD_PERMANENT != 0)
            || self.body.get(10).is_some_and(|flags| flags & NTF_PROXY != 0)
    }

    /// Not an entry of a bridge, nor of MPLS: the first byte of the body is the family.
    fn is_ip(&self) -> bool {
        const FAMILIES: [u8; 2] = [libc::AF_INET as u8, libc::AF_INET6 as u8];
        self.body.first().is_some_and(|family| FAMILIES.contains(family))
    }

    /// Whether it is about an object in table `hextet`, of whatever family.
    pub(super) fn is_in_our_table(&self) -> bool {
        let is_object = self.nftables_kind().is_some_and(|kind| kind != NFT_MSG_NEWGEN);
        is_object && self.attribute(NFTA_TABLE).is_some_and(|name| until_nul(name) == OUR_TABLE)
    }

    /// Who made the transaction, when this is the message that ends it: process and, in what the kernel kept of
    /// it, name.
    pub(super) fn transaction(&self) -> Option<(u32, String)> {
        if self.nftables_kind()? != NFT_MSG_NEWGEN {
            return None;
        }
        let pid = self.attribute(NFTA_GEN_PROC_PID)?;
        let name = until_nul(self.attribute(NFTA_GEN_PROC_NAME)?);
        Some((u32::from_be_bytes(pid.try_into().ok()?), String::from_utf8_lossy(name).into_owned()))
    }

    fn nftables_kind(&self) -> Option<u16> {
        (self.kind >> 8 == SUBSYS_NFTABLES).then_some(self.kind & 0xff)
    }

    /// The value of the first attribute of that type after a `struct nfgenmsg`.
    fn attribute(&self, wanted: u16) -> Option<&[u8]> {
        /// Flags beside the type: nested, network byte order.
        const TYPE_MASK: u16 = 0x3fff;
        let mut rest = self.body.get(NFGENMSG_BYTES..)?;
        loop {
            let len = usize::from(u16_at(rest, 0)?);
            let value = rest.get(ATTRIBUTE_HEADER_BYTES..len)?;
            if u16_at(rest, 2)? & TYPE_MASK == wanted {
                return Some(value);
            }
            rest = rest.get(aligned(len)..)?;
        }
    }
}

fn aligned(len: usize) -> usize {
    (len.max(1) + 3) & !3
}

fn until_nul(text: &[u8]) -> &[u8] {
    text.split(|byte| *byte == 0).next().unwrap_or_default()
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u16, port: u32, body: &[u8]) -> Vec<u8> {
        let len = HEADER_BYTES + body.len();
        let mut bytes = (len as u32).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend([0; 6]);
        bytes.extend(port.to_ne_bytes());
        bytes.extend(body);
        bytes.resize(aligned(len), 0);
        bytes
    }

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let len = ATTRIBUTE_HEADER_BYTES + value.len();
        let mut bytes = [(len as u16).to_ne_bytes(), kind.to_ne_bytes()].concat();
        bytes.extend(value);
        bytes.resize(aligned(len), 0);
        bytes
    }

    fn nftables(kind: u16, attributes: &[Vec<u8>]) -> Vec<u8> {
        message(SUBSYS_NFTABLES << 8 | kind, 0, &[vec![1, 0, 0, 0], attributes.concat()].concat())
    }

    fn subject(datagram: &[u8]) -> Option<Subject> {
        messages(datagram).next().unwrap().subject()
    }

    /// Family, length of the destination and protocol of a route.
    fn route(kind: u16, len: u8, protocol: u8) -> Vec<u8> {
        message(kind, 0, &[10, len, 0, 0, 254, protocol, 0, 1, 0, 0, 0, 0])
    }

    #[test]
    fn routes_matter_when_they_are_ours_or_lead_out() {
        assert_eq!(subject(&route(RTM_DELROUTE, 64, dataplane_core::PROTOCOL)), Some(Subject::Route));
        assert_eq!(subject(&route(RTM_NEWROUTE, 0, 9)), Some(Subject::Route));
        assert_eq!(subject(&route(RTM_NEWROUTE, 64, 186)), None, "a routing daemon's");
    }

    #[test]
    fn neighbours_of_traffic_do_not_matter() {
        let neighbour = |family: u8, state: u8, flags: u8| {
            message(RTM_NEWNEIGH, 0, &[family, 0, 0, 0, 2, 0, 0, 0, state, 0, flags, 0])
        };
        assert_eq!(subject(&neighbour(10, 0x80, 0)), Some(Subject::Neighbour), "permanent");
        assert_eq!(subject(&neighbour(10, 0, 8)), Some(Subject::Neighbour), "proxied");
        assert_eq!(subject(&neighbour(10, 2, 0)), None, "reachable");
        assert_eq!(subject(&neighbour(7, 0x80, 0)), None, "of a bridge");
    }

    #[test]
    fn who_asked_is_the_port_of_the_socket() {
        let sent =
            [message(RTM_DELLINK, 4711, &[0; 16]), message(RTM_NEWNETCONF, 0, &[10, 0, 0, 0])].concat();
        let heard: Vec<_> = messages(&sent).map(|message| (message.subject(), message.port())).collect();
        assert_eq!(heard, [(Some(Subject::Link), Some(4711)), (Some(Subject::Sysctl), None)]);
    }

    #[test]
    fn a_transaction_tells_process_and_name() {
        let sent = [
            nftables(2, &[attribute(1, b"hextet\0")]),
            nftables(2, &[attribute(1, b"hextet2\0")]),
            nftables(
                NFT_MSG_NEWGEN,
                &[attribute(1, &[0; 4]), attribute(2, &[0, 0, 1, 2]), attribute(3, b"nft\0")],
            ),
        ]
        .concat();
        let ours: Vec<_> = messages(&sent).map(|message| message.is_in_our_table()).collect();
        assert_eq!(ours, [true, false, false]);
        assert_eq!(messages(&sent).last().unwrap().transaction(), Some((258, "nft".to_owned())));
    }

    #[test]
    fn every_cut_of_a_datagram_is_read_without_panic() {
        let whole = [
            route(RTM_DELROUTE, 64, 118),
            nftables(NFT_MSG_NEWGEN, &[attribute(2, &[0, 0, 1, 2]), attribute(3, b"nft\0")]),
        ]
        .concat();
        for len in 0..whole.len() {
            for message in messages(&whole[..len]) {
                message.subject();
                message.transaction();
                message.is_in_our_table();
            }
        }
        // A length of 0 must not be read for ever.
        assert_eq!(messages(&[0; 64]).count(), 0);
    }
}
