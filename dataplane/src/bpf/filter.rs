//! tc filters and qdiscs over netlink, as far as programs on clsact need them: what aya does not read.
//!
//! Messages are built and taken apart by hand: a header, a `tcmsg`, attributes.
//! ```text
//! nlmsghdr: | length 4 | type 2 | flags 2 | sequence 4 | port 4 |
//! tcmsg:    | family 1, pad 3 | ifindex 4 | handle 4 | parent 4 | info 4 |
//! rtattr:   | length 2 | type 2 | value, padded to 4 |
//! ```

use std::{collections::BTreeSet, io};

use aya::programs::TcAttachType;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

const HEADER_BYTES: usize = 16;
const TCMSG_BYTES: usize = 20;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const RTM_NEWQDISC: u16 = 36;
const RTM_DELQDISC: u16 = 37;
const RTM_GETQDISC: u16 = 38;
const RTM_NEWTFILTER: u16 = 44;
const RTM_DELTFILTER: u16 = 45;
const RTM_GETTFILTER: u16 = 46;

const NLM_F_REQUEST: u16 = 0x001;
const NLM_F_ACK: u16 = 0x004;
const NLM_F_DUMP: u16 = 0x300;

const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_BPF_NAME: u16 = 7;
const TCA_BPF_TAG: u16 = 10;

/// `TC_H_CLSACT`: parent of the qdisc, and the major number of its hooks.
const CLSACT: u32 = 0xffff_fff1;
const CLSACT_MAJOR: u32 = 0xffff_0000;
const MIN_INGRESS: u32 = 0xfff2;
const MIN_EGRESS: u32 = 0xfff3;

/// Answers read to one request at most: a dump of an interface's filters is far shorter.
const DATAGRAMS_MAX: usize = 10_000;

/// A filter of kind bpf.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Filter {
    pub(super) parent: u32,
    pub(super) priority: u16,
    pub(super) handle: u32,
    /// Priority and protocol, as netlink says them.
    info: u32,
    /// What whoever attached it called it.
    pub(super) name: String,
    /// The tag of its program, as aya says it.
    pub(super) tag: Option<u64>,
}

/// The filters of kind bpf on a hook of the interface.
pub(super) fn list(ifindex: u32, hook: TcAttachType) -> io::Result<Vec<Filter>> {
    let parent = match hook {
        TcAttachType::Egress => CLSACT_MAJOR | MIN_EGRESS,
        _ => CLSACT_MAJOR | MIN_INGRESS,
    };
    let request = Request { kind: RTM_GETTFILTER, flags: NLM_F_DUMP, ifindex, handle: 0, parent, info: 0 };
    let messages = match request.send() {
        // No clsact qdisc: then there are no filters.
        Err(e) if matches!(e.raw_os_error(), Some(libc::EINVAL | libc::ENODEV | libc::ENOENT)) => {
            return Ok(Vec::new());
        }
        other => other?,
    };
    Ok(messages.iter().filter(|m| m.kind == RTM_NEWTFILTER).filter_map(Message::filter).collect())
}

/// Removes a filter; fine when it has gone.
pub(super) fn remove(ifindex: u32, filter: &Filter) -> io::Result<()> {
    let Filter { parent, handle, info, .. } = *filter;
    let request = Request { kind: RTM_DELTFILTER, flags: NLM_F_ACK, ifindex, handle, parent, info };
    match request.send() {
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        other => other.map(drop),
    }
}

/// The interfaces that have a clsact qdisc, in one request: the kernel lists the qdiscs of all anyway.
pub(super) fn with_clsact() -> io::Result<BTreeSet<u32>> {
    let request =
        Request { kind: RTM_GETQDISC, flags: NLM_F_DUMP, ifindex: 0, handle: 0, parent: 0, info: 0 };
    let messages = request.send()?;
    let clsact =
        messages.iter().filter(|m| m.kind == RTM_NEWQDISC && m.attribute(TCA_KIND) == Some(b"clsact\0"));
    Ok(clsact.filter_map(Message::ifindex).collect())
}

/// Whether the interface has a clsact qdisc.
pub(super) fn has_clsact(ifindex: u32) -> io::Result<bool> {
    Ok(with_clsact()?.contains(&ifindex))
}

/// Whether no filter is left on either hook, of whatever kind.
pub(super) fn is_empty(ifindex: u32) -> io::Result<bool> {
    for parent in [CLSACT_MAJOR | MIN_INGRESS, CLSACT_MAJOR | MIN_EGRESS] {
        let request =
            Request { kind: RTM_GETTFILTER, flags: NLM_F_DUMP, ifindex, handle: 0, parent, info: 0 };
        if request.send()?.iter().any(|m| m.kind == RTM_NEWTFILTER) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Removes the clsact qdisc.
pub(super) fn remove_clsact(ifindex: u32) -> io::Result<()> {
    let request = Request {
        kind: RTM_DELQDISC,
        flags: NLM_F_ACK,
        ifindex,
        handle: CLSACT_MAJOR,
        parent: CLSACT,
        info: 0,
    };
    request.send().map(drop)
}

struct Request {
    kind: u16,
    flags: u16,
    ifindex: u32,
    handle: u32,
    parent: u32,
    info: u32,
}

impl Request {
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER_BYTES + TCMSG_BYTES);
        bytes.extend(((HEADER_BYTES + TCMSG_BYTES) as u32).to_ne_bytes());
        bytes.extend(self.kind.to_ne_bytes());
        bytes.extend((NLM_F_REQUEST | self.flags).to_ne_bytes());
        bytes.extend([0; 12]);
        for word in [self.ifindex, self.handle, self.parent, self.info] {
            bytes.extend(word.to_ne_bytes());
        }
        bytes
    }

    /// Sends the request and reads until its end.
    fn send(&self) -> io::Result<Vec<Message>> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        socket.send(&self.bytes(), 0)?;
        let mut messages = Vec::new();
        for _ in 0..DATAGRAMS_MAX {
            let (datagram, _) = socket.recv_from_full()?;
            for message in split(&datagram) {
                match message.kind {
                    NLMSG_DONE => return Ok(messages),
                    NLMSG_ERROR => return message.error().map(|()| messages),
                    _ => messages.push(message),
                }
            }
        }
        Err(io::Error::other("netlink answers without end"))
    }
}

/// A message: its type and what follows the header.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Message {
    kind: u16,
    body: Vec<u8>,
}

fn split(mut datagram: &[u8]) -> Vec<Message> {
    let mut messages = Vec::new();
    while let (Some(length), Some(kind)) = (u32_at(datagram, 0), u16_at(datagram, 4)) {
        let length = length as usize;
        let Some(body) = datagram.get(HEADER_BYTES..length) else { break };
        messages.push(Message { kind, body: body.to_owned() });
        datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    messages
}

impl Message {
    fn error(&self) -> io::Result<()> {
        match u32_at(&self.body, 0).map(|code| code as i32) {
            Some(0) => Ok(()),
            Some(code) => Err(io::Error::from_raw_os_error(code.saturating_neg())),
            None => Err(io::Error::other("netlink answers with a short error")),
        }
    }

    fn ifindex(&self) -> Option<u32> {
        u32_at(&self.body, 4)
    }

    fn attribute(&self, kind: u16) -> Option<&[u8]> {
        attribute(self.body.get(TCMSG_BYTES..)?, kind)
    }

    /// A filter of kind bpf that has a program.
    fn filter(&self) -> Option<Filter> {
        if self.attribute(TCA_KIND)? != b"bpf\0" {
            return None;
        }
        let options = self.attribute(TCA_OPTIONS)?;
        let name = attribute(options, TCA_BPF_NAME)?;
        let info = u32_at(&self.body, 16)?;
        Some(Filter {
            handle: u32_at(&self.body, 8)?,
            parent: u32_at(&self.body, 12)?,
            priority: (info >> 16) as u16,
            info,
            name: String::from_utf8_lossy(name.strip_suffix(b"\0").unwrap_or(name)).into_owned(),
            tag: attribute(options, TCA_BPF_TAG).and_then(|t| Some(u64::from_be_bytes(t.try_into().ok()?))),
        })
    }
}

fn attribute(mut attributes: &[u8], kind: u16) -> Option<&[u8]> {
    const ATTRIBUTE_BYTES: usize = 4;
    loop {
        let length = u16_at(attributes, 0)? as usize;
        let value = attributes.get(ATTRIBUTE_BYTES..length)?;
        if u16_at(attributes, 2)? == kind {
            return Some(value);
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    }
}

fn u16_at(bytes: &[u8], offset: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(offset..offset + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(offset..offset + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attr(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(((4 + value.len()) as u16).to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn filter_message() -> Vec<u8> {
        let mut options = attr(TCA_BPF_NAME, b"uplink_ingress\0");
        options.extend(attr(TCA_BPF_TAG, &[1, 2, 3, 4, 5, 6, 7, 8]));
        let mut body = vec![0, 0, 0, 0];
        for word in [7_u32, 1, CLSACT_MAJOR | MIN_INGRESS, 4_678 << 16 | 0x0300] {
            body.extend(word.to_ne_bytes());
        }
        body.extend(attr(TCA_KIND, b"bpf\0"));
        body.extend(attr(TCA_OPTIONS, &options));
        let mut bytes = ((HEADER_BYTES + body.len()) as u32).to_ne_bytes().to_vec();
        bytes.extend(RTM_NEWTFILTER.to_ne_bytes());
        bytes.extend([0; 10]);
        bytes.extend(body);
        bytes
    }

    #[test]
    fn a_filter_is_read_from_its_attributes() {
        let mut datagram = filter_message();
        datagram.extend(filter_message());
        let messages = split(&datagram);
        assert_eq!(messages.len(), 2);
        let filter = messages[1].filter().unwrap();
        assert_eq!((filter.name.as_str(), filter.priority, filter.handle), ("uplink_ingress", 4_678, 1));
        assert_eq!(filter.tag, Some(0x0102_0304_0506_0708));
        assert_eq!(messages[1].ifindex(), Some(7));
    }

    #[test]
    fn every_truncation_is_taken() {
        let whole = filter_message();
        for n in 0..whole.len() {
            assert_eq!(split(&whole[..n]), [], "{n} bytes");
            // The same cut inside a message whose length says that it is whole.
            let mut cut = whole[..n].to_vec();
            if n >= HEADER_BYTES {
                cut[..4].copy_from_slice(&(n as u32).to_ne_bytes());
                for message in split(&cut) {
                    let _ = message.filter();
                }
            }
        }
    }

    #[test]
    fn lengths_of_zero_end_the_walk() {
        assert_eq!(split(&[0; 64]), []);
        assert_eq!(attribute(&[0; 64], 1), None);
    }
}
