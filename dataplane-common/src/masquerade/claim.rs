//! Claims an outside port for an inside one.

use super::{
    Config, Family, HostSocket, Inserted, Mapping, MappingKey, OWNER_FREE, PROBES_MAX, SessionKey, Tables,
    block::{acquire, block_of, home_entry, some_port},
    is_owned_by, owner, owner_inside, port_index,
    session::reclaimable,
};
use crate::{counter::Counter, ipv4};

/// A mapping without a session is one that is being made, unless it is older than this.
const MAKING_NS: u64 = 1_000_000_000;

/// A new flow, with all that a claim asks for.
pub(super) struct NewFlow<'a, F: Family> {
    pub(super) key: &'a SessionKey<F>,
    /// The remote's port, of UDP too.
    pub(super) remote_port: u16,
    /// The address that it leaves with.
    pub(super) outside: F::Address,
    pub(super) now_ns: u64,
}

impl<F: Family> NewFlow<'_, F> {
    /// The socket of the host that would have the flow's replies if it left from `port`.
    #[inline(always)]
    fn host_socket(&self, port: u16) -> HostSocket<F> {
        HostSocket {
            protocol: self.key.protocol,
            address: self.outside,
            port,
            remote: self.key.remote,
            remote_port: self.remote_port,
        }
    }
}

/// The outside port that the inside port has already, for another remote. An error if the host has a socket
/// for that remote at this very port.
#[inline(always)]
pub(super) fn shared_port<F: Family, T: Tables<F>>(
    tables: &mut T,
    flow: &NewFlow<'_, F>,
) -> Option<Result<u16, Counter>> {
    let mapping = tables.mapping(&flow.key.mapping())?;
    mapping.shared = 1;
    let port = mapping.outside_port;
    Some(if tables.host_has(&flow.host_socket(port)) { Err(Counter::EgressDropHost) } else { Ok(port) })
}

/// Claims an outside port and maps the inside port to it.
#[inline(always)]
pub(super) fn map_port<F: Family, T: Tables<F>>(
    tables: &mut T,
    config: &Config,
    flow: &NewFlow<'_, F>,
) -> Result<u16, Counter> {
    let key = flow.key;
    let me = owner(key.inside, key.inside_port, tables.random() as u16);
    let outside_port = claim(tables, config, flow, me)?;
    let mapping = Mapping {
        created_ns: flow.now_ns,
        remote: key.remote,
        remote_port: key.remote_port,
        outside_port,
        shared: 0,
        zero: 0,
        pad: F::PAD,
    };
    match tables.insert_mapping(&key.mapping(), &mapping) {
        Inserted::Done => Ok(outside_port),
        // Another CPU was first with another remote of the same inside port: its port is the one.
        Inserted::Exists | Inserted::Full => {
            tables.claim_port(port_index::<F>(key.protocol, outside_port), me, OWNER_FREE);
            shared_port(tables, flow).unwrap_or(Err(Counter::EgressDropTable))
        }
    }
}

/// The probe with which the pod's home has been looked at enough.
const LAST_AT_HOME: u32 = 3;

/// Where a probe looks for a port.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    /// The inside port itself.
    Same,
    /// The pod's home.
    Home,
    /// The extra that the pod took last.
    Latest,
    /// Any extra: a free one becomes the pod's.
    Extra,
}

impl Place {
    #[inline(always)]
    fn of(probe: u32) -> Place {
        match probe {
            0 => Place::Same,
            1..=LAST_AT_HOME => Place::Home,
            _ => match probe & 3 {
                0 => Place::Latest,
                1 | 2 => Place::Extra,
                _ => Place::Home,
            },
        }
    }
}

/// Tries the inside port itself, then ports of the pod's blocks by chance; in the second half also those of
/// connections that were closed a moment ago.
#[inline(always)]
fn claim<F: Family, T: Tables<F>>(
    tables: &mut T,
    config: &Config,
    flow: &NewFlow<'_, F>,
    me: u64,
) -> Result<u16, Counter> {
    // The end is looked for at the end: Linux 6.1 wants a loop to be closed by a jump, and the compiler enters a
    // `for` in its middle and closes it by falling through.
    let mut probe = 0;
    loop {
        let found = candidate(tables, config, flow, Place::of(probe));
        if let Some(port) = found
            && try_claim(tables, flow, me, port, probe)
        {
            return Ok(port);
        }
        probe += 1;
        if probe >= PROBES_MAX {
            break;
        }
    }
    if let Some(home) = home_entry(tables, config, flow.key.inside) {
        home.refused = home.refused.wrapping_add(1);
    }
    Err(Counter::EgressDropPorts)
}

/// A port of a block of the pod's.
#[inline(always)]
fn candidate<F: Family, T: Tables<F>>(
    tables: &mut T,
    config: &Config,
    flow: &NewFlow<'_, F>,
    place: Place,
) -> Option<u16> {
    let SessionKey { inside, inside_port, protocol, .. } = *flow.key;
    let random = tables.random();
    let block = match place {
        Place::Same => block_of(inside_port),
        Place::Home => config.pool.home(config.pod_number(inside))?,
        Place::Latest => {
            home_entry(tables, config, inside).map(|home| home.latest as u32).filter(|b| *b != 0)?
        }
        Place::Extra => config.pool.some_extra(random)?,
    };
    if !acquire(tables, config, block, inside, flow.now_ns) {
        return None;
    }
    Some(match place {
        Place::Same => inside_port,
        // The high bits have chosen the block.
        _ => some_port(block, random, inside_port, protocol == ipv4::UDP),
    })
}

#[inline(always)]
fn try_claim<F: Family, T: Tables<F>>(
    tables: &mut T,
    flow: &NewFlow<'_, F>,
    me: u64,
    port: u16,
    probe: u32,
) -> bool {
    let key = flow.key;
    let index = port_index::<F>(key.protocol, port);
    let current = tables.port(index);
    if current == OWNER_FREE || is_owned_by(current, key.inside, key.inside_port) {
        return !tables.host_has(&flow.host_socket(port)) && tables.claim_port(index, current, me);
    }
    // To look at whose a port is takes two look-ups. Before it is needed, it is done once, in the home.
    let pressed = probe >= PROBES_MAX / 2;
    if !pressed && probe != LAST_AT_HOME {
        return false;
    }
    let Some(ended) = ended(tables, key.protocol, port, current, flow.now_ns, pressed) else { return false };
    if tables.host_has(&flow.host_socket(port)) || !tables.claim_port(index, current, me) {
        return false;
    }
    tables.remove_mapping(&ended.mapping());
    tables.remove_session(&ended);
    tables.count(Counter::EgressReclaimed);
    true
}

/// The only session of the port's owner, if it has ended.
#[inline(always)]
fn ended<F: Family, T: Tables<F>>(
    tables: &mut T,
    protocol: u8,
    port: u16,
    current: u64,
    now_ns: u64,
    pressed: bool,
) -> Option<SessionKey<F>> {
    let (inside, inside_port) = owner_inside(current);
    let mapping = *tables.mapping(&MappingKey { inside, inside_port, protocol, zero: 0 })?;
    if mapping.shared != 0 || mapping.outside_port != port {
        return None;
    }
    let key = SessionKey {
        remote: mapping.remote,
        inside,
        inside_port,
        remote_port: mapping.remote_port,
        protocol,
        zero: [0; 3],
        pad: F::PAD,
    };
    let ended = match tables.session(&key) {
        Some(session) => reclaimable(now_ns, &key, session, pressed),
        None => now_ns.saturating_sub(mapping.created_ns) > MAKING_NS,
    };
    ended.then_some(key)
}
