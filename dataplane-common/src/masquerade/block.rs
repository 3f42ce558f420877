//! Port blocks: which outside ports belong to which pod (RFC 6888 REQ-3 and REQ-14, RFC 7422).
//!
//! Outside ports are handed out in blocks of [`BLOCK_PORTS`], the same block for TCP, UDP and ICMP. The
//! privileged ports and those that the host gives to its own sockets (`ip_local_port_range`) are in no block,
//! so that neither takes what the other may want at any moment.
//!
//! The first half of the blocks are *homes*: the pod with the number n has the n-th, for ever and without
//! any table, and nobody else can take a port of it. The second half are *extras*: who needs more takes one,
//! first come and no more than half of all, and keeps it until the agent's sweep finds it empty. An extra is
//! never handed on without the agent, so its log of blocks can say at any later time whose a port was.

use super::{Common, Config};
use crate::ipv4::Address;

/// Ports of a block.
pub const BLOCK_PORTS: u32 = 128;

/// Capacity of the map `NAT_BLOCKS`: all blocks of 65,536 ports.
///
/// Array, 512 x 16 bytes = 8 kB, mapped. Written by `uplink_egress` and the agent's sweep, owners by
/// compare-and-exchange. When no extra is free, a pod has its home only.
pub const BLOCKS_MAX: u32 = 65_536 / BLOCK_PORTS;

/// The first block behind the privileged ports.
const FIRST: u32 = 1_024 / BLOCK_PORTS;

/// The owner of an extra that is free.
pub const BLOCK_FREE: u64 = 0;

/// Value of `NAT_BLOCKS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Block {
    /// Of an extra: whose it is and since when ([`block_owner`]); [`BLOCK_FREE`] if nobody's.
    pub owner: u64,
    /// Of a home: the extra that its pod took last; 0 if none.
    pub latest: u16,
    /// Of a home: how many extras its pod has, as far as is known; the sweep counts anew.
    pub extras: u16,
    /// Of a home: new flows of its pod that found no port or no room.
    pub refused: u32,
}

const _: () = assert!(size_of::<Block>() == 16);

/// The owner of an extra: the pod's address, and the second of CLOCK_MONOTONIC since which it has it.
#[inline(always)]
pub const fn block_owner(inside: Address, since_ns: u64) -> u64 {
    (inside as u64) << 32 | (since_ns / 1_000_000_000) & 0xffff_ffff
}

/// Whose it is, and since which second.
#[inline(always)]
pub const fn block_owner_inside(owner: u64) -> (Address, u32) {
    ((owner >> 32) as u32, owner as u32)
}

/// The block of a port in wire order.
#[inline(always)]
pub fn block_of(port: u16) -> u32 {
    u16::from_be(port) as u32 / BLOCK_PORTS
}

/// The blocks that pods get, counted from the highest down: those above the host's ports, then those below.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pool {
    /// The lowest block above the host's ports; [`BLOCKS_MAX`] if there is none.
    pub upper_first: u16,
    /// The block behind the highest below the host's ports.
    pub lower_end: u16,
    /// How many blocks there are.
    pub blocks: u16,
    /// How many of them are homes: the first ones.
    pub homes: u16,
}

impl Pool {
    /// No port at all.
    pub const EMPTY: Pool = Pool { upper_first: BLOCKS_MAX as u16, lower_end: 0, blocks: 0, homes: 0 };

    /// The pool beside a host that gives `min` to `max` (host order) to its own sockets. A host that leaves no
    /// block has its wish ignored.
    pub fn beside(min: u16, max: u16) -> Pool {
        if min > max {
            return Self::of(FIRST, FIRST);
        }
        let upper_first = (max as u32 + 1).div_ceil(BLOCK_PORTS).max(FIRST);
        let lower_end = (min as u32 / BLOCK_PORTS).max(FIRST);
        match Self::of(upper_first, lower_end) {
            Pool { blocks: 0, .. } => Self::of(FIRST, FIRST),
            pool => pool,
        }
    }

    fn of(upper_first: u32, lower_end: u32) -> Pool {
        let blocks = BLOCKS_MAX - upper_first + lower_end - FIRST;
        Pool {
            upper_first: upper_first as u16,
            lower_end: lower_end as u16,
            blocks: blocks as u16,
            homes: blocks.div_ceil(2) as u16,
        }
    }

    /// The block with the number `n`, from the highest down.
    #[inline(always)]
    pub fn block(&self, n: u32) -> u32 {
        let upper = BLOCKS_MAX - self.upper_first as u32;
        if n < upper { BLOCKS_MAX - 1 - n } else { (self.lower_end as u32 + upper).wrapping_sub(n + 1) }
    }

    /// The number of a block, if pods get it.
    #[inline(always)]
    pub fn number(&self, block: u32) -> Option<u32> {
        if block >= self.upper_first as u32 {
            return Some(BLOCKS_MAX - 1 - block);
        }
        let is_lower = block >= FIRST && block < self.lower_end as u32;
        is_lower.then(|| BLOCKS_MAX - self.upper_first as u32 + self.lower_end as u32 - 1 - block)
    }

    /// Whether pods get the port (wire order).
    #[inline(always)]
    pub fn has(&self, port: u16) -> bool {
        self.number(block_of(port)).is_some()
    }

    /// The home of the pod with the number `n`.
    #[inline(always)]
    pub fn home(&self, n: u32) -> Option<u32> {
        (n < self.homes as u32).then(|| self.block(n))
    }

    /// How many extras a pod with a home may have: half of them (RFC 6888 REQ-4). Pods without a home live on the
    /// rest, and nothing counts theirs.
    #[inline(always)]
    pub fn extras_max(&self) -> u16 {
        (self.blocks - self.homes) / 2
    }

    /// An extra by chance.
    #[inline(always)]
    pub(super) fn some_extra(&self, random: u32) -> Option<u32> {
        let extras = (self.blocks - self.homes) as u64;
        (extras != 0).then(|| self.block(self.homes as u32 + ((random as u64 * extras) >> 32) as u32))
    }
}

/// A port of the block, of the parity of `like` (RFC 4787 REQ-4) if `parity`. All in wire order.
#[inline(always)]
pub(super) fn some_port(block: u32, random: u32, like: u16, parity: bool) -> u16 {
    let port = block * BLOCK_PORTS + random % BLOCK_PORTS;
    let port = if parity { port & !1 | u16::from_be(like) as u32 & 1 } else { port };
    (port as u16).to_be()
}

/// Whether the pod may take ports of the block, which is made its own if it is a free extra.
#[inline(always)]
pub(super) fn acquire<T: Common>(
    tables: &mut T,
    config: &Config,
    block: u32,
    inside: Address,
    now_ns: u64,
) -> bool {
    let number = config.pod_number(inside);
    match config.pool.number(block) {
        None => false,
        Some(home) if home < config.pool.homes as u32 => home == number,
        Some(_) => acquire_extra(tables, config, block, inside, now_ns),
    }
}

#[inline(always)]
fn acquire_extra<T: Common>(
    tables: &mut T,
    config: &Config,
    block: u32,
    inside: Address,
    now_ns: u64,
) -> bool {
    let Some(owner) = tables.block(block).map(|block| block.owner) else { return false };
    if owner != BLOCK_FREE {
        return block_owner_inside(owner).0 == inside;
    }
    let max = config.pool.extras_max();
    if home_entry(tables, config, inside).is_some_and(|home| home.extras >= max)
        || !tables.claim_block(block, BLOCK_FREE, block_owner(inside, now_ns))
    {
        return false;
    }
    if let Some(home) = home_entry(tables, config, inside) {
        (home.latest, home.extras) = (block as u16, home.extras + 1);
    }
    true
}

/// The entry of a pod's home.
#[inline(always)]
pub(super) fn home_entry<'a, T: Common>(
    tables: &'a mut T,
    config: &Config,
    inside: Address,
) -> Option<&'a mut Block> {
    tables.block(config.pool.home(config.pod_number(inside))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn ports(pool: &Pool) -> BTreeSet<u16> {
        (0..=u16::MAX).filter(|port| pool.has(port.to_be())).collect()
    }

    #[test]
    fn the_pool_spares_the_hosts_ports_and_the_privileged_ones() {
        let all = ports(&Pool::beside(32_768, 60_999));
        assert!(all.iter().all(|p| *p >= 1024 && !(32_768..=60_999).contains(p)));
        assert!(all.contains(&1024) && all.contains(&32_767) && all.contains(&65_535));
        assert!(!all.contains(&61_000) && all.contains(&61_056), "whole blocks only");
        assert_eq!(all.len(), (248 + 35) * 128);
    }

    #[test]
    fn a_host_that_takes_all_is_ignored_and_one_that_takes_nothing_spares_nothing() {
        assert_eq!(ports(&Pool::beside(0, 65_535)).len(), 65_536 - 1024);
        assert_eq!(ports(&Pool::beside(1_024, 65_535)).len(), 65_536 - 1024);
        assert_eq!(ports(&Pool::beside(5_000, 4_000)).len(), 65_536 - 1024);
    }

    #[test]
    fn a_host_with_ports_at_one_end_leaves_the_other() {
        assert_eq!(ports(&Pool::beside(1_024, 4_999)).first(), Some(&5_120));
        let all = ports(&Pool::beside(20_000, 65_535));
        assert_eq!((all.first(), all.last()), (Some(&1_024), Some(&19_967)));
    }

    #[test]
    fn numbers_and_blocks_are_one_to_one() {
        for (min, max) in [(32_768, 60_999), (1_024, 4_999), (20_000, 65_535), (1, 0)] {
            let pool = Pool::beside(min, max);
            let blocks: BTreeSet<u32> = (0..pool.blocks as u32).map(|n| pool.block(n)).collect();
            assert_eq!(blocks.len(), pool.blocks as usize);
            for n in 0..pool.blocks as u32 {
                assert_eq!(pool.number(pool.block(n)), Some(n));
            }
            assert_eq!((0..BLOCKS_MAX).filter(|b| pool.number(*b).is_some()).count(), blocks.len());
        }
    }

    #[test]
    fn half_of_the_blocks_are_homes() {
        let pool = Pool::beside(32_768, 60_999);
        assert_eq!((pool.blocks, pool.homes), (283, 142));
        assert_eq!((pool.home(0), pool.home(34), pool.home(35)), (Some(511), Some(477), Some(255)));
        assert_eq!(pool.home(142), None);
        let extras: BTreeSet<u32> =
            (0..=u16::MAX).filter_map(|i| pool.some_extra((i as u32) << 16 | 0xffff)).collect();
        assert_eq!(extras.len(), 141);
        assert!(extras.iter().all(|block| pool.number(*block).is_some_and(|n| n >= 142)));
    }

    #[test]
    fn a_port_is_of_its_block_and_of_the_wanted_parity() {
        for random in 0..1000 {
            let port = some_port(9, random, 5001_u16.to_be(), true);
            assert_eq!((block_of(port), u16::from_be(port) % 2), (9, 1));
            assert_eq!(block_of(some_port(511, random, 0, false)), 511);
        }
    }

    #[test]
    fn an_owner_tells_the_pod_and_the_second() {
        let owner = block_owner(0x0500_fe0a, 77_999_999_999);
        assert_eq!(block_owner_inside(owner), (0x0500_fe0a, 77));
        assert_ne!(owner, BLOCK_FREE);
    }
}
