//! A cluster without a store or a clock, for scripts and simulations.

use std::{collections::BTreeMap, net::Ipv6Addr};

use hextet_address::{ClusterPrefix, GroupId, SubnetId};
use rand::{SeedableRng as _, rngs::StdRng};
use scheduler_core::{
    change::Revision,
    cluster::Cluster,
    countable::Countables,
    event::{Claim, Enroll, Event, PrefixChoice, Refusal},
    node::Hello,
    pod::Pod,
    quantity::Resources,
    state::State,
    time::WallTime,
    token::{Role, Token},
    transition::{Context, Origin, handle},
};

/// The cluster's pod prefix.
pub(crate) const LAN: &str = "2001:db8:1::/64";

pub(crate) struct World {
    pub(crate) state: State,
    pub(crate) rng: StdRng,
    pub(crate) wall: WallTime,
    pub(crate) watched: bool,
    /// What the next node that joins has a number of.
    pub(crate) countables: Countables,
    nodes_made: u16,
    /// What agents say of when they started.
    #[allow(dead_code, reason = "each test binary has a copy of this module")]
    pub session: u64,
}

impl World {
    pub(crate) fn new(seed: u64) -> World {
        let mut rng = StdRng::seed_from_u64(seed);
        let prefix = ClusterPrefix::generate(&mut rng);
        let pod_ipv4 = "10.254.0.0/20".parse().unwrap();
        let pod_prefix = Some(LAN.parse().unwrap());
        let cluster = Cluster { prefix, pod_prefix, pod_ipv4, id_key: seed, created: WallTime(0) };
        let (state, countables) = (State::default(), Countables::default());
        let mut world =
            World { state, rng, wall: WallTime(0), watched: false, countables, nodes_made: 0, session: 0 };
        world.event("scheduler", Event::ClusterCreated(cluster)).unwrap();
        world
    }

    pub(crate) fn event(&mut self, changer: &str, event: Event) -> Result<Option<Revision>, Refusal> {
        let watched = self.watched;
        let is_watched = |_: &Pod| watched;
        let mut context = Context { wall: self.wall, rng: &mut self.rng, is_watched: &is_watched };
        let origin = Origin { changer: changer.to_owned(), message: String::new() };
        handle(&mut self.state, &event, &origin, &mut context)
    }

    /// What the next node claims when it does not choose where its pods get their addresses.
    pub(crate) fn next_claim(&self) -> Claim {
        let number = self.nodes_made + 1;
        Claim {
            prefix: PrefixChoice::OfUplink(vec![LAN.parse().unwrap()]),
            subnet: SubnetId(number),
            group_id: GroupId::new(number.into()).unwrap(),
        }
    }

    /// A node gets a token, a certificate for this claim, and attaches.
    pub(crate) fn join_with(
        &mut self,
        name: &str,
        capacity: Resources,
        labels: BTreeMap<String, String>,
        claim: Claim,
    ) -> Result<Option<Revision>, Refusal> {
        self.enroll_with(name, claim)?;
        self.attach(name, capacity, labels)
    }

    /// A node gets a token and a certificate for this claim.
    pub(crate) fn enroll_with(&mut self, name: &str, claim: Claim) -> Result<Option<Revision>, Refusal> {
        self.nodes_made += 1;
        let number = self.nodes_made;
        let expires = WallTime(self.wall.0 + 1000);
        let token = Token { role: Role::Node, name: None, expires, used_by: None };
        let id = format!("token-{number}");
        self.event("user:root", Event::CreateToken(id.clone(), token))?;
        let key = format!("key-{number}");
        let enroll = Enroll { token: id, name: Some(name.to_owned()), key, node: Some(claim) };
        self.event(&format!("node:{name}"), Event::Enroll(enroll))
    }

    /// The node that was enrolled last attaches.
    pub(crate) fn attach(
        &mut self,
        name: &str,
        capacity: Resources,
        labels: BTreeMap<String, String>,
    ) -> Result<Option<Revision>, Refusal> {
        let number = self.nodes_made;
        let underlay = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, number);
        let agent_version = "test".to_owned();
        let countables = std::mem::take(&mut self.countables);
        let (machine, hardware, session) = (String::new(), String::new(), self.session);
        let hello = Hello {
            underlay,
            underlay_v4: None,
            labels,
            capacity,
            countables,
            agent_version,
            machine,
            hardware,
            session,
        };
        self.event(&format!("node:{name}"), Event::NodeHello(name.to_owned(), hello))
    }
}
