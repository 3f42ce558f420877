//! A cluster of nodes that are alike but for their labels, and jobs to put on it.

use std::{
    collections::BTreeMap,
    net::Ipv6Addr,
    time::{Duration, Instant},
};

use hextet_address::{ClusterPrefix, GroupId, SubnetId};
use rand::{SeedableRng as _, rngs::StdRng};
use scheduler_core::{
    change::Revision,
    cluster::Cluster,
    countable::Countables,
    event::{Claim, Enroll, Event, PrefixChoice, Texts},
    job::{Group, Job, Spread, Task},
    node::Hello,
    quantity::{Cpu, Memory, Resources},
    state::State,
    time::WallTime,
    token::{Role, Token},
    transition::{Context, Origin, handle},
};

/// Nodes in one rack.
const RACK: usize = 40;
/// Zones over which the racks are laid.
const ZONES: usize = 3;

pub(crate) struct Fleet {
    pub(crate) state: State,
    rng: StdRng,
}

impl Fleet {
    /// Nodes of 32 CPUs and 64 GiB, 40 in each rack.
    pub(crate) fn new(nodes: usize) -> Fleet {
        Fleet::of(nodes, Resources { cpu: Cpu(32_000), memory: Memory(64 << 30) })
    }

    pub(crate) fn of(nodes: usize, capacity: Resources) -> Fleet {
        let prefix = ClusterPrefix::generate(&mut StdRng::seed_from_u64(2));
        let pod_ipv4 = "10.254.0.0/20".parse().expect("it is a network");
        let cluster = Cluster { prefix, pod_prefix: None, pod_ipv4, id_key: 1, created: WallTime(0) };
        let mut fleet = Fleet::go_on(State::default());
        fleet.event(Event::ClusterCreated(cluster));
        (0..nodes).for_each(|number| drop(fleet.join(number, capacity)));
        fleet
    }

    pub(crate) fn go_on(state: State) -> Fleet {
        Fleet { state, rng: StdRng::seed_from_u64(1) }
    }

    /// Brings `event` about and says how long that took.
    pub(crate) fn event(&mut self, event: Event) -> Duration {
        self.revision(event).1
    }

    /// Brings `event` about; its revision, and how long that took.
    pub(crate) fn revision(&mut self, event: Event) -> (Option<Revision>, Duration) {
        let mut context = Context { wall: WallTime(0), rng: &mut self.rng, is_watched: &|_| false };
        let origin = Origin { changer: "bench".to_owned(), message: String::new() };
        let start = Instant::now();
        let revision = handle(&mut self.state, &event, &origin, &mut context);
        let took = start.elapsed();
        (revision.expect("the cluster takes every event of the benchmark"), took)
    }

    /// A node comes: its revisions.
    pub(crate) fn join(&mut self, number: usize, capacity: Resources) -> Vec<Revision> {
        let name = format!("n{number}");
        let id = u16::try_from(number + 1).expect("fewer nodes than subnets");
        let token = Token { role: Role::Node, name: None, expires: WallTime(1), used_by: None };
        let group_id = GroupId::new(id.into()).expect("it is not zero");
        let claim = Claim { prefix: PrefixChoice::Own, subnet: SubnetId(id), group_id };
        let enroll =
            Enroll { token: name.clone(), name: Some(name.clone()), key: name.clone(), node: Some(claim) };
        let rack = number / RACK;
        let labels = [
            ("rack", format!("r{rack}")),
            ("zone", format!("z{}", rack % ZONES)),
            // As many values as nodes.
            ("machine", format!("m{number}")),
        ];
        let hello = Hello {
            underlay: Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 1, id),
            underlay_v4: None,
            labels: labels.map(|(key, value)| (key.to_owned(), value)).into(),
            capacity,
            countables: Countables::default(),
            agent_version: "bench".to_owned(),
            machine: String::new(),
            hardware: String::new(),
            session: 0,
        };
        let events =
            [Event::CreateToken(name.clone(), token), Event::Enroll(enroll), Event::NodeHello(name, hello)];
        events.into_iter().filter_map(|event| self.revision(event).0).collect()
    }

    /// How many pods have a node.
    pub(crate) fn placed(&self) -> usize {
        self.state.pods().values().filter(|pod| pod.node.is_some()).count()
    }
}

/// A job of one group.
pub(crate) fn job(name: String, count: u32, cpu: u32, spread: Spread) -> Event {
    let task = Task {
        exec: vec!["/bin/server".to_owned(), "--listen=[::]:8080".to_owned()],
        env: BTreeMap::new(),
        cpu: Cpu(cpu),
        memory: Memory(128 << 20),
        resources: Countables::default(),
    };
    let group = Group {
        hooks: BTreeMap::new(),
        count,
        availability: None,
        spread,
        constraints: BTreeMap::new(),
        apart: Vec::new(),
        rollout: None,
        resources: Countables::default(),
        tasks: BTreeMap::from([("server".to_owned(), Box::new(task))]),
    };
    let groups = BTreeMap::from([("web".to_owned(), Box::new(group))]);
    Event::ApplyJob(Job { job: name, groups, ..Job::default() }, Texts::new())
}
