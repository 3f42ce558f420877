//! How machines come into the cluster: with a token, a certificate and numbers of their own.

use std::{collections::BTreeMap, net::Ipv6Addr};

use hextet_address::{GroupId, SubnetId};
use hextet_api::connect::Credentials;
use rand::Rng as _;
use scheduler_core::{
    cluster::Cluster,
    countable::Countables,
    event::{Claim, Enroll, Event, PrefixChoice},
    node::{Hello, Node},
    quantity::{Cpu, Memory, Resources},
    time::WallTime,
    token::{Role, Token},
};

use crate::{identity::Identity, machine::Machine, server::Server, shared::Shared};

/// The /64 that some nodes share.
pub(crate) const LAN: &str = "2001:db8:1::/64";

/// A machine with a certificate, as it is before its agent first starts.
pub(crate) fn found(number: usize, cluster: &Cluster, server: &mut Server, shared: &mut Shared) -> Machine {
    let id = u16::try_from(number + 1).expect("few nodes");
    enrol(number, id, format!("token-{number}")).into_iter().for_each(|event| server.found(event, shared));
    let name = name(number);
    let identity = identity(&name, &server.disk.state().nodes()[&name], cluster);
    Machine::new(number, identity, hello(number, id, shared), shared)
}

/// What brings a machine in anew whose node was deleted. `asked` tells the tries apart.
pub(crate) fn events(number: usize, asked: u64, shared: &mut Shared) -> [Event; 2] {
    let id = shared.rng.random_range(100..u16::MAX);
    enrol(number, id, format!("token-{number}-{asked}"))
}

/// All that brings a machine in and lets it say who it is.
pub(crate) fn all_events(number: usize, shared: &mut Shared) -> Vec<Event> {
    let id = u16::try_from(number + 1).expect("few nodes");
    let hello = Event::NodeHello(name(number), hello(number, id, shared));
    enrol(number, id, format!("token-{number}")).into_iter().chain([hello]).collect()
}

fn name(number: usize) -> String {
    format!("n{number}")
}

fn enrol(number: usize, id: u16, token: String) -> [Event; 2] {
    let group = GroupId::new(id.into()).expect("a small number");
    // Some on the LAN, some with a /64 of their own.
    let prefix = if number.is_multiple_of(2) {
        PrefixChoice::Own
    } else {
        PrefixChoice::Lan(LAN.parse().expect("a prefix"))
    };
    let claim = Claim { prefix, subnet: SubnetId(id), group_id: group };
    let role = Token { role: Role::Node, name: None, expires: WallTime(u64::MAX), used_by: None };
    let key = format!("key of {token}");
    let enroll = Enroll { token: token.clone(), name: Some(name(number)), key, node: Some(claim) };
    [Event::CreateToken(token, role), Event::Enroll(enroll)]
}

/// What the machine of `node` keeps of having joined.
pub(crate) fn identity(name: &str, node: &Node, cluster: &Cluster) -> Identity {
    let name = name.to_owned();
    Identity {
        name: name.clone(),
        epoch: String::new(),
        cluster: cluster.prefix,
        prefix: node.prefix,
        group: node.group_id,
        pod_ipv4: cluster.pod_ipv4,
        previous: None,
        former_cas: vec![],
        credentials: Credentials {
            name,
            servers: vec![],
            ca_der: vec![],
            certificate_der: vec![],
            key_pkcs8_der: vec![],
        },
    }
}

fn hello(number: usize, id: u16, shared: &mut Shared) -> Hello {
    Hello {
        underlay: Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, id),
        underlay_v4: None,
        labels: labels(number),
        capacity: Resources { cpu: Cpu(1000 * shared.rng.random_range(1..=3)), memory: Memory(1 << 30) },
        countables: Countables((number % 2 == 1).then(|| ("gpu".to_owned(), 2)).into_iter().collect()),
        agent_version: "simulated".to_owned(),
        machine: String::new(),
        hardware: String::new(),
        session: 0,
    }
}

fn labels(number: usize) -> BTreeMap<String, String> {
    let disk = ["fast", "slow"][number % 2].to_owned();
    // One has no zone.
    let zone = ["a", "b", "b", "c"].get(number % 5).map(|zone| ("zone".to_owned(), (*zone).to_owned()));
    std::iter::once(("disk".to_owned(), disk)).chain(zone).collect()
}
