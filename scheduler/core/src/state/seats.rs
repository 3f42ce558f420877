//! Nodes in the order in which placement looks at them, in chunks that know the most room that they have: those
//! without enough are passed over as a whole.

use std::sync::Arc;

use super::seat::{Seat, Usage};
use crate::{node::Node, quantity::Resources};

/// The most nodes in a chunk; with one more it becomes two.
const CHUNK_LEN_MAX: usize = 64;
/// A chunk with fewer nodes joins its neighbour where that has room.
const CHUNK_LEN_MIN: usize = 16;

/// Nodes and what is asked of them, the least used first; nodes that are used alike by name.
#[derive(Clone, Debug, Default)]
pub struct Seats(Arc<Vec<Arc<Chunk>>>);

/// Some of them, one after the other; never none.
#[derive(Clone, Debug, Default)]
struct Chunk {
    entries: Vec<Entry>,
    /// Of CPU and of memory the most that is free on one of its nodes.
    room: Resources,
}

#[derive(Clone, Debug)]
struct Entry {
    /// [`Usage::share`], by which they are ordered.
    share: u64,
    free: Resources,
    seat: Seat,
}

impl Seats {
    /// All of them.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &Seat> {
        self.0.iter().flat_map(|chunk| &chunk.entries).map(|entry| &entry.seat)
    }

    /// Those that take pods and have this much CPU and memory free.
    pub fn with_room(&self, needs: Resources) -> impl DoubleEndedIterator<Item = &Seat> {
        let chunks = self.0.iter().filter(move |chunk| covers(chunk.room, needs));
        let entries = chunks.flat_map(|chunk| &chunk.entries);
        entries.filter(move |entry| covers(entry.free, needs)).map(|entry| &entry.seat)
    }

    /// Share and name of the least used.
    pub(super) fn first(&self) -> Option<(u64, String)> {
        let (share, name) = self.0.first()?.entries.first()?.key();
        Some((share, name.to_owned()))
    }

    pub(super) fn get(&self, node: &Node, usage: &Usage) -> Option<&Seat> {
        let (chunk, at) = self.find((usage.share(node), &node.name)).ok()?;
        Some(&self.0[chunk].entries[at].seat)
    }

    pub(super) fn insert(&mut self, node: &Arc<Node>, usage: Usage) {
        let seat = Seat { node: node.clone(), usage };
        let entry = Entry { share: seat.usage.share(node), free: seat.free(), seat };
        if self.0.is_empty() {
            Arc::make_mut(&mut self.0).push(Arc::default());
        }
        match self.find(entry.key()) {
            Ok((chunk, at)) => self.change(chunk, |entries| entries[at] = entry),
            Err((chunk, at)) => {
                self.change(chunk, |entries| entries.insert(at, entry));
                self.split(chunk);
            }
        }
    }

    pub(super) fn remove(&mut self, node: &Node, usage: &Usage) {
        let Ok((chunk, at)) = self.find((usage.share(node), &node.name)) else { return };
        self.change(chunk, |entries| drop(entries.remove(at)));
        self.join(chunk);
    }

    /// The chunk and the place in it where the key is, or would be.
    fn find(&self, key: (u64, &str)) -> Result<(usize, usize), (usize, usize)> {
        let after =
            self.0.partition_point(|chunk| chunk.entries.first().is_some_and(|first| first.key() <= key));
        let chunk = after.saturating_sub(1);
        let Some(found) = self.0.get(chunk) else { return Err((0, 0)) };
        let at = found.entries.binary_search_by(|entry| entry.key().cmp(&key));
        at.map(|at| (chunk, at)).map_err(|at| (chunk, at))
    }

    fn change(&mut self, chunk: usize, change: impl FnOnce(&mut Vec<Entry>)) {
        let chunk = Arc::make_mut(&mut Arc::make_mut(&mut self.0)[chunk]);
        change(&mut chunk.entries);
        chunk.measure();
    }

    fn split(&mut self, chunk: usize) {
        if self.0[chunk].entries.len() <= CHUNK_LEN_MAX {
            return;
        }
        let first = Arc::make_mut(&mut Arc::make_mut(&mut self.0)[chunk]);
        let mut second = Chunk { entries: first.entries.split_off(CHUNK_LEN_MAX / 2), ..Chunk::default() };
        first.measure();
        second.measure();
        Arc::make_mut(&mut self.0).insert(chunk + 1, Arc::new(second));
    }

    fn join(&mut self, chunk: usize) {
        let len = self.0[chunk].entries.len();
        if len == 0 {
            Arc::make_mut(&mut self.0).remove(chunk);
            return;
        }
        let Some(next) = self.0.get(chunk + 1) else { return };
        if len < CHUNK_LEN_MIN && len + next.entries.len() <= CHUNK_LEN_MAX {
            let next = Arc::make_mut(&mut self.0).remove(chunk + 1);
            self.change(chunk, |entries| entries.extend(next.entries.iter().cloned()));
        }
    }
}

/// How they are cut into chunks is of no importance.
impl PartialEq for Seats {
    fn eq(&self, other: &Seats) -> bool {
        self.iter().eq(other.iter())
    }
}

impl Eq for Seats {}

impl Chunk {
    fn measure(&mut self) {
        self.room = self.entries.iter().fold(Resources::default(), |most, entry| Resources {
            cpu: most.cpu.max(entry.free.cpu),
            memory: most.memory.max(entry.free.memory),
        });
    }
}

impl Entry {
    fn key(&self) -> (u64, &str) {
        (self.share, &self.seat.node.name)
    }
}

fn covers(free: Resources, needs: Resources) -> bool {
    free.cpu >= needs.cpu && free.memory >= needs.memory
}

#[cfg(test)]
mod tests;
