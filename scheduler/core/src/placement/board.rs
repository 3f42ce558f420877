//! A placement in the making: nodes in pools, of which only as many are looked at as are needed.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap},
    iter::Peekable,
};

use super::{Candidate, Demand, obstacle};
use crate::{job::Spread, node::Node, state::Seat};

/// The nodes for a demand.
pub struct Pools<'a> {
    known: Vec<Pool<'a>>,
    /// Those without pods of the group, by their bound.
    others: Peekable<Box<dyn Iterator<Item = Pool<'a>> + 'a>>,
}

/// Nodes that have one value of the label that pods are spread over, or all of them when there is none.
pub struct Pool<'a> {
    /// How many pods of the group are there.
    pods: u64,
    /// No node of it is better.
    bound: Rank<'a>,
    /// Nodes that were looked at, the best on top.
    known: BinaryHeap<Reverse<Ranked<'a>>>,
    /// The others, the best first: without pods of the group, and without failures. One of them at a time is in
    /// `known`, and the next is not better.
    others: Box<dyn Iterator<Item = Candidate<'a>> + 'a>,
}

/// Less is better.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Rank<'a>(u64, u64, Turn<'a>);

/// Of nodes that are equally good.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Turn<'a> {
    ByName(&'a str),
    Backwards(Reverse<&'a str>),
}

struct Ranked<'a> {
    rank: Rank<'a>,
    candidate: Candidate<'a>,
    /// It came from `others`, and no pod went there yet.
    is_new: bool,
}

pub(super) struct Board<'d, 'a> {
    demand: Demand<'d>,
    pools: Vec<Pool<'a>>,
    /// Pools that were not looked at.
    others: Peekable<Box<dyn Iterator<Item = Pool<'a>> + 'a>>,
    /// The best of each pool that has one: pods, rank, which pool. All but that of the pool that was chosen last can
    /// only have become worse since: that is found out when one is on top.
    heads: BinaryHeap<Reverse<Head<'a>>>,
}

type Head<'a> = (u64, Rank<'a>, usize);

/// The value of the label that pods are spread over.
fn value<'a>(demand: &Demand<'_>, node: &'a Node) -> Option<&'a str> {
    match demand.spread {
        Spread::Label(label) => node.label(label),
        Spread::Node | Spread::Pack => None,
    }
}

impl<'a> Pools<'a> {
    /// Those of `known`, and `others` in which the group has neither pods nor failures, that with the least used
    /// node first.
    pub(super) fn new(known: Vec<Pool<'a>>, others: impl Iterator<Item = Pool<'a>> + 'a) -> Pools<'a> {
        let others: Box<dyn Iterator<Item = _>> = Box::new(others);
        Pools { known, others: others.peekable() }
    }

    /// All of `candidates`.
    #[must_use]
    pub fn of(demand: &Demand<'_>, candidates: Vec<Candidate<'a>>) -> Pools<'a> {
        let pools = by_value(demand, candidates).into_values();
        let pools = pools.map(|known| Pool::new(demand, known, std::iter::empty()));
        Pools::new(pools.collect(), std::iter::empty())
    }
}

/// Candidates by their value of the label that pods are spread over.
pub(super) fn by_value<'a>(
    demand: &Demand<'_>,
    candidates: Vec<Candidate<'a>>,
) -> BTreeMap<Option<String>, Vec<Candidate<'a>>> {
    let mut values: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for candidate in candidates {
        let value = value(demand, candidate.node).map(str::to_owned);
        values.entry(value).or_default().push(candidate);
    }
    values
}

impl<'a> Pool<'a> {
    /// Of the nodes in `known`, and in `others` in the order of the state (backwards, to pack) those on which the
    /// group has neither pods nor failures.
    pub(super) fn new(
        demand: &Demand<'_>,
        known: Vec<Candidate<'a>>,
        others: impl Iterator<Item = Candidate<'a>> + 'a,
    ) -> Pool<'a> {
        let pods = known.iter().map(|candidate| u64::from(candidate.group_pods)).sum();
        let known = known.into_iter().map(|candidate| Reverse(Ranked::new(demand, candidate, false)));
        Pool { pods, bound: Rank::BEST, known: known.collect(), others: Box::new(others) }
    }

    /// Of nodes on which the group has neither pods nor failures; `first` is the least used, whether it fits or not.
    pub(super) fn untouched(first: &'a Seat, others: impl Iterator<Item = Candidate<'a>> + 'a) -> Pool<'a> {
        let bound = Rank(0, first.usage.share(&first.node), Turn::ByName(&first.node.name));
        Pool { pods: 0, bound, known: BinaryHeap::new(), others: Box::new(others) }
    }

    /// Looks at the next of the others.
    fn look(&mut self, demand: &Demand<'_>) {
        if let Some(next) = self.others.find(|candidate| obstacle(demand, candidate).is_none()) {
            self.known.push(Reverse(Ranked::new(demand, next, true)));
        }
    }

    fn pop(&mut self, demand: &Demand<'_>) -> Option<Candidate<'a>> {
        let Reverse(top) = self.known.pop()?;
        if top.is_new {
            self.look(demand);
        }
        Some(top.candidate)
    }

    /// The rank of the best, without those in front of it that do not fit any more.
    fn head(&mut self, demand: &Demand<'_>) -> Option<Rank<'a>> {
        loop {
            let Reverse(top) = self.known.peek()?;
            if obstacle(demand, &top.candidate).is_none() {
                return Some(Rank::of(demand, &top.candidate));
            }
            self.pop(demand);
        }
    }
}

impl<'d, 'a> Board<'d, 'a> {
    pub(super) fn new(demand: Demand<'d>, pools: Pools<'a>) -> Board<'d, 'a> {
        let mut board = Board { demand, pools: Vec::new(), others: pools.others, heads: BinaryHeap::new() };
        pools.known.into_iter().for_each(|pool| board.open(pool));
        board
    }

    fn open(&mut self, mut pool: Pool<'a>) {
        pool.look(&self.demand);
        self.pools.push(pool);
        self.push(self.pools.len() - 1);
    }

    fn push(&mut self, at: usize) {
        let head = self.head(at);
        self.heads.extend(head.map(Reverse));
    }

    fn head(&mut self, at: usize) -> Option<Head<'a>> {
        let pool = &mut self.pools[at];
        Some((pool.pods, pool.head(&self.demand)?, at))
    }

    /// Opens the pools that might be better than all that are open.
    fn open_better(&mut self) {
        let is_better = |pool: &Pool<'_>, heads: &BinaryHeap<Reverse<Head<'_>>>| {
            heads.peek().is_none_or(|Reverse((pods, rank, _))| (pool.pods, &pool.bound) < (*pods, rank))
        };
        while let Some(pool) = self.others.next_if(|pool| is_better(pool, &self.heads)) {
            self.open(pool);
        }
    }

    /// The node for the next pod.
    pub(super) fn next(&mut self) -> Option<String> {
        loop {
            self.open_better();
            let Reverse(head) = self.heads.pop()?;
            let at = head.2;
            match self.head(at) {
                Some(now) if now == head => return self.take(at),
                Some(now) => self.heads.push(Reverse(now)),
                None => {}
            }
        }
    }

    fn take(&mut self, at: usize) -> Option<String> {
        let mut candidate = self.pools[at].pop(&self.demand)?;
        let node = candidate.node;
        candidate.take(&self.demand);
        for occupied in self.demand.occupied.iter_mut().filter(|occupied| occupied.own) {
            occupied.values.insert(node.label(&occupied.by).map(str::to_owned));
        }
        let pool = &mut self.pools[at];
        pool.pods += 1;
        pool.known.push(Reverse(Ranked::new(&self.demand, candidate, false)));
        self.push(at);
        Some(node.name.clone())
    }
}

impl<'a> Rank<'a> {
    const BEST: Rank<'static> = Rank(0, 0, Turn::ByName(""));

    fn of(demand: &Demand<'_>, candidate: &Candidate<'a>) -> Rank<'a> {
        let (name, used) = (candidate.node.name.as_str(), candidate.usage.share(candidate.node));
        let (pods, failures) = (u64::from(candidate.group_pods), u64::from(candidate.failures));
        match demand.spread {
            Spread::Node | Spread::Label(_) => Rank(pods + failures, used, Turn::ByName(name)),
            Spread::Pack => {
                // Few failures, then many pods: 32 bits are enough for each.
                let first = failures << 32 | (u64::from(u32::MAX) - pods);
                Rank(first, u64::MAX - used, Turn::Backwards(Reverse(name)))
            }
        }
    }
}

impl<'a> Ranked<'a> {
    fn new(demand: &Demand<'_>, candidate: Candidate<'a>, is_new: bool) -> Ranked<'a> {
        Ranked { rank: Rank::of(demand, &candidate), candidate, is_new }
    }
}

impl PartialEq for Ranked<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.rank == other.rank
    }
}

impl Eq for Ranked<'_> {}

impl PartialOrd for Ranked<'_> {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Ranked<'_> {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.rank.cmp(&other.rank)
    }
}
