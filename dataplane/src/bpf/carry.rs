//! An upgrade to a build with another layout of the maps: the masquerade's flows are carried over, and each program
//! takes the place of its older build in one step.
//!
//! The older maps are read while the older programs still run, once before and once after the change of
//! programs: a flow that began in between is found by the second reading. What the agent itself writes
//! (pods, guards, configuration) it writes anew.
//!
//! Only the layout before this one is read. Older programs than that are replaced too, and their flows end.

use std::{fs, io, os::fd::AsFd as _, path::Path};

use aya::{
    Ebpf, Pod,
    maps::{Array, Map, MapData, MapError},
};
use dataplane_common::{
    ipv4,
    masquerade::{
        Family as _, Ipv4, Mapping, MappingKey, OWNER_FREE, PORTS_MAX, Session, SessionKey, State, port_index,
    },
};

use super::{
    BpfError, batch,
    flows::{self, Maps},
    pins,
    settings::{failed, hash_mut},
};

const BPF_NOEXIST: u64 = 1;
/// The maps of IPv4, the only ones that layout 1 had.
const SESSIONS: &str = <Ipv4 as Maps>::SESSIONS;
const MAPPINGS: &str = <Ipv4 as Maps>::MAPPINGS;
const DNS: u16 = 53_u16.to_be();

/// The maps of layout 1, as far as they are read.
mod v1 {
    /// Value of `MASQUERADE`.
    #[repr(C)]
    #[derive(Clone, Copy)]
    pub(super) struct Config {
        pub(super) node: u32,
        pub(super) unread: [u32; 4],
    }

    /// Key of `NAT_SESSIONS`, with the remote's port for UDP too.
    #[repr(C)]
    #[derive(Clone, Copy)]
    pub(super) struct SessionKey {
        pub(super) inside: u32,
        pub(super) remote: u32,
        pub(super) inside_port: u16,
        pub(super) remote_port: u16,
        pub(super) protocol: u8,
        pub(super) zero: [u8; 3],
    }

    /// Value of `NAT_SESSIONS`.
    #[repr(C)]
    #[derive(Clone, Copy)]
    pub(super) struct Session {
        pub(super) last_seen_ns: u64,
        pub(super) outside_port: u16,
        pub(super) state: u8,
        pub(super) zero: [u8; 5],
    }

    // SAFETY: `repr(C)` over integers and arrays of them, without padding, and every bit pattern is a value.
    unsafe impl aya::Pod for Config {}
    // SAFETY: as above.
    unsafe impl aya::Pod for SessionKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Session {}

    const _: () = assert!(size_of::<Config>() == 20);
    const _: () = assert!(size_of::<SessionKey>() == 16 && size_of::<Session>() == 16);
}

/// Copies the flows of an older layout under `dir` that are not here yet. Returns how many.
pub(super) fn flows(dir: &Path, object: &mut Ebpf) -> Result<usize, BpfError> {
    let older = dir.join("v1");
    if !older.join(SESSIONS).exists() {
        return Ok(0);
    }
    let node = config(&older)?.node;
    let ports = flows::words(object, flows::PORTS, PORTS_MAX)?;
    let sessions = entries::<v1::SessionKey, v1::Session>(&older, SESSIONS)?;
    let mappings = entries::<MappingKey, Mapping>(&older, MAPPINGS)?;
    let owners = port_owners(&older, &mappings)?;
    for (index, owner) in owners {
        ports.replace(index, OWNER_FREE, owner);
    }
    for (key, mapping) in mappings {
        let remote_port = if key.protocol == ipv4::TCP { mapping.remote_port } else { 0 };
        insert(object, MAPPINGS, &key, &Mapping { remote_port, ..mapping })?;
    }
    let mut carried = 0;
    for (key, session) in sessions {
        let (key, session) = session_of_v1(key, session, node);
        carried += usize::from(insert(object, SESSIONS, &key, &session)?);
    }
    Ok(carried)
}

/// UDP had a session for each port of a remote; now all of them are one.
fn session_of_v1(key: v1::SessionKey, session: v1::Session, node: u32) -> (SessionKey, Session) {
    let v1::SessionKey { inside, remote, inside_port, remote_port, protocol, .. } = key;
    let v1::Session { last_seen_ns, outside_port, .. } = session;
    let is_dns = protocol == ipv4::UDP && remote_port == DNS;
    let state = if is_dns { State::DNS } else { State(session.state) };
    let remote_port = if protocol == ipv4::TCP { remote_port } else { 0 };
    let (zero, pad) = ([0; 3], Ipv4::PAD);
    (
        SessionKey { remote, inside, inside_port, remote_port, protocol, zero, pad },
        Session { last_seen_ns, outside: node, outside_port, state, zero: 0, pad },
    )
}

/// Ends what is left of other layouts under `dir`, once this one's programs are where they belong. Filters have
/// been replaced in their places; that a qdisc was made here is noted here from now on.
pub(super) fn end_others(dir: &Path) -> Result<(), BpfError> {
    for other in pins::others(dir) {
        let failed = |action| {
            let path = other.clone();
            move |source| BpfError::Path { action, path, source }
        };
        for ifname in pins::marked_qdiscs(&other).map_err(failed("read"))? {
            let mark = pins::qdisc_mark(&pins::layout(dir), &ifname);
            fs::create_dir(mark).or_else(is_there).map_err(failed("move the marks of"))?;
        }
        pins::remove(&other)?;
        tracing::info!(layout = %other.display(), "maps of another build removed");
    }
    Ok(())
}

fn is_there(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::AlreadyExists { Ok(()) } else { Err(error) }
}

fn config(older: &Path) -> Result<v1::Config, BpfError> {
    const MASQUERADE: &str = "MASQUERADE";
    let array: Array<_, v1::Config> =
        Array::try_from(Map::Array(open(older, MASQUERADE)?)).map_err(failed("open", MASQUERADE))?;
    array.get(&0, 0).map_err(failed("read", MASQUERADE))
}

/// The owners of the ports that are mapped.
fn port_owners(older: &Path, mappings: &[(MappingKey, Mapping)]) -> Result<Vec<(u32, u64)>, BpfError> {
    let array: Array<_, u64> =
        Array::try_from(Map::Array(open(older, flows::PORTS)?)).map_err(failed("open", flows::PORTS))?;
    let indices =
        mappings.iter().map(|(key, mapping)| port_index::<Ipv4>(key.protocol, mapping.outside_port));
    indices
        .map(|index| Ok((index, array.get(&index, 0).map_err(failed("read", flows::PORTS))?)))
        .filter(|owner| !matches!(owner, Ok((_, OWNER_FREE))))
        .collect()
}

fn open(older: &Path, name: &'static str) -> Result<MapData, BpfError> {
    MapData::from_pin(older.join(name)).map_err(failed("open", name))
}

/// The sizes of keys and values are those of the folder's layout.
fn entries<K: Pod, V: Pod>(older: &Path, name: &'static str) -> Result<Vec<(K, V)>, BpfError> {
    let data = open(older, name)?;
    batch::entries(data.fd().as_fd()).map_err(|e| failed("read", name)(MapError::IoError(e)))
}

/// Whether it was not there before. A table that is full keeps what it has.
fn insert<K: Pod, V: Pod>(
    object: &mut Ebpf,
    name: &'static str,
    key: &K,
    value: &V,
) -> Result<bool, BpfError> {
    match hash_mut::<K, V>(object, name)?.insert(key, value, BPF_NOEXIST) {
        Ok(()) => Ok(true),
        Err(MapError::SyscallError(call))
            if matches!(call.io_error.raw_os_error(), Some(libc::EEXIST | libc::E2BIG)) =>
        {
            Ok(false)
        }
        Err(error) => Err(failed("write", name)(error)),
    }
}
