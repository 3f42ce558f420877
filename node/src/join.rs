//! How a machine becomes a node: with a token, once. Afterwards its identity is in the store.
//!
//! The key and what was drawn are kept before the server is asked, so that a machine that is stopped at any
//! point joins with the same token again.

use std::collections::BTreeSet;

use hextet_address::{ClusterPrefix, GroupId, NodePrefix, SubnetId};
use hextet_api::{
    TAKEN,
    connect::{CredentialsError, EnrollError, Enrolled, Key, Wish, enroll},
    token::{Fingerprint, Role},
};
use rand::Rng;
use thiserror::Error;
use tonic::Code;
use tracing::{info, warn};

use crate::{
    assignment::{ipv4_network, ipv6_network},
    config::{NodeConfig, PodPrefixChoice, host_label},
    desired::Underlay,
    identity::Identity,
    store::{Joining, Store, StoreError},
};

/// Subnet ids that are drawn before the cluster counts as full.
const DRAWS_MAX: u32 = 32;
/// Prefixes of the uplink that the server is told.
const UPLINK_PREFIXES_MAX: usize = 64;

/// Why a machine is no node.
#[derive(Debug, Error)]
pub(crate) enum JoinError {
    /// No token and no identity.
    #[error(
        "this machine has not joined a cluster: run `netctl token --for node` on the server's machine \
         and here the `netctl node --join hx1-...` that it prints"
    )]
    NotJoined,
    /// The token is for somebody else.
    #[error("the token is for a {0}; make one for a node with `netctl token --for node`")]
    Role(Role),
    /// It has an identity of another cluster.
    #[error(
        "this machine is node {name} of the cluster with CA {present}, and the token is of the one with CA {token}; \
         to move it, run `netctl node down` and remove its state folder first; if its own cluster has replaced the CA while it \
         was away, give the token with --rejoin instead of --join"
    )]
    AnotherCluster { name: String, present: Fingerprint, token: Fingerprint },
    /// The server cannot be asked or says no.
    #[error("cannot join")]
    Enroll(#[source] EnrollError),
    /// No key.
    #[error(transparent)]
    Key(#[from] CredentialsError),
    /// Every draw was taken.
    #[error("cannot join: {DRAWS_MAX} subnets were drawn and each is taken; the cluster is full")]
    NoSubnet,
    /// The pods could not be reached.
    #[error(
        "--pod-prefix {prefix}: the uplink {device} has no address in it, so no pod could be reached there; \
         it has addresses in: {has}"
    )]
    NotOfUplink { prefix: NodePrefix, device: String, has: String },
    /// The answer makes no sense.
    #[error("cannot join: the server answered {0}; is it of this version?")]
    Answer(&'static str),
    /// The identity cannot be kept.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Who this machine is since it joined; what it is started with now must fit.
pub(crate) fn known(identity: Identity, config: &NodeConfig) -> Result<Identity, JoinError> {
    let present = identity.credentials.ca_fingerprint();
    if let Some(token) = &config.join {
        if !identity.knows_ca(token.fingerprint) {
            let name = identity.name;
            return Err(JoinError::AnotherCluster { name, present, token: token.fingerprint });
        }
        info!(node = identity.name, "this machine has joined already, the token is not used");
    }
    if let Some(name) = config.name.as_ref().filter(|name| **name != identity.name) {
        warn!(node = identity.name, "a node keeps the name it joined with, --name {name} is ignored");
    }
    let is_lan = !identity.cluster.has_subnet(identity.prefix);
    let fits = match config.pod_prefix {
        PodPrefixChoice::Auto => true,
        PodPrefixChoice::Own => !is_lan,
        PodPrefixChoice::Lan(prefix) => prefix == identity.prefix,
    };
    if !fits {
        let prefix = identity.prefix;
        warn!(node = identity.name, %prefix, "a node keeps the prefix it joined with, --pod-prefix is ignored");
    }
    Ok(identity)
}

/// What a server makes of this machine now.
pub(crate) async fn join(
    store: &Store,
    config: &NodeConfig,
    underlay: &Underlay,
) -> Result<Identity, JoinError> {
    let token = config.join.as_ref().ok_or(JoinError::NotJoined)?;
    if token.role != Role::Node {
        return Err(JoinError::Role(token.role));
    }
    let prefixes = Prefixes::choose(config.pod_prefix, underlay)?;
    let (key, mut joining) = begin(store)?;
    let mut name = config.name.clone().unwrap_or_default();
    for _ in 0..DRAWS_MAX {
        let wish = Wish {
            name: name.clone(),
            subnet_id: joining.subnet_id,
            group_id: joining.group_id,
            pod_prefix: prefixes.lan.map(NodePrefix::network),
            uplink_prefixes: prefixes.uplink.iter().map(|prefix| prefix.network()).collect(),
        };
        match enroll(token, &key, wish).await {
            Ok(enrolled) => return finish(store, &joining, &prefixes, enrolled),
            Err(error) => match remedy(&error, &name) {
                Remedy::AnotherDraw => {
                    joining = draw(&key, &mut rand::rng());
                    store.save_joining(&joining)?;
                }
                Remedy::HostName(host) => name = host,
                Remedy::None => return Err(JoinError::Enroll(error)),
            },
        }
    }
    Err(JoinError::NoSubnet)
}

/// In which /64s the server may place this node's pods besides one of the node's own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Prefixes {
    /// In this one.
    lan: Option<NodePrefix>,
    /// In one of these, if it is the cluster's.
    uplink: BTreeSet<NodePrefix>,
}

impl Prefixes {
    fn choose(choice: PodPrefixChoice, underlay: &Underlay) -> Result<Prefixes, JoinError> {
        match choice {
            PodPrefixChoice::Auto => Ok(Prefixes { lan: None, uplink: some(&underlay.prefixes) }),
            PodPrefixChoice::Own => Ok(Prefixes::default()),
            PodPrefixChoice::Lan(prefix) if underlay.prefixes.contains(&prefix) => {
                Ok(Prefixes { lan: Some(prefix), uplink: BTreeSet::new() })
            }
            PodPrefixChoice::Lan(prefix) => Err(JoinError::NotOfUplink {
                prefix,
                device: underlay.device.clone(),
                has: underlay.prefixes.iter().map(NodePrefix::to_string).collect::<Vec<_>>().join(", "),
            }),
        }
    }

    /// Whether the server may answer with this one that is not a subnet of the cluster.
    fn allow(&self, prefix: NodePrefix) -> bool {
        self.lan == Some(prefix) || self.uplink.contains(&prefix)
    }
}

fn some(prefixes: &BTreeSet<NodePrefix>) -> BTreeSet<NodePrefix> {
    prefixes.iter().copied().take(UPLINK_PREFIXES_MAX).collect()
}

/// The key and the draw of an attempt that was interrupted, or new ones, kept before they are used.
fn begin(store: &Store) -> Result<(Key, Joining), JoinError> {
    if let Some(joining) = store.joining()? {
        return Ok((Key::from_pkcs8_der(joining.key_pkcs8_der.clone())?, joining));
    }
    let key = Key::generate()?;
    let joining = draw(&key, &mut rand::rng());
    store.save_joining(&joining)?;
    Ok((key, joining))
}

fn draw(key: &Key, rng: &mut impl Rng) -> Joining {
    Joining {
        key_pkcs8_der: key.pkcs8_der().to_vec(),
        subnet_id: SubnetId::random(rng).0,
        group_id: GroupId::random(rng).bits(),
    }
}

enum Remedy {
    AnotherDraw,
    HostName(String),
    None,
}

/// A subnet or group that is taken is drawn again; a token without a name takes the host's.
fn remedy(error: &EnrollError, name: &str) -> Remedy {
    let EnrollError::Refused { status } = error else { return Remedy::None };
    match status.code() {
        Code::AlreadyExists
            if status.metadata().get(TAKEN).is_some_and(|taken| taken == "subnet" || taken == "group") =>
        {
            Remedy::AnotherDraw
        }
        Code::InvalidArgument if name.is_empty() => host_label().map_or(Remedy::None, Remedy::HostName),
        _ => Remedy::None,
    }
}

fn finish(
    store: &Store,
    joining: &Joining,
    prefixes: &Prefixes,
    enrolled: Enrolled,
) -> Result<Identity, JoinError> {
    let identity = identity_of(joining, prefixes, enrolled)?;
    store.save_identity(&identity)?;
    info!(node = identity.name, prefix = %identity.prefix, "joined the cluster");
    Ok(identity)
}

fn identity_of(joining: &Joining, prefixes: &Prefixes, enrolled: Enrolled) -> Result<Identity, JoinError> {
    let Enrolled { credentials, response } = enrolled;
    let cluster = response.cluster_prefix.as_ref().and_then(ipv6_network);
    let cluster = cluster.and_then(|network| ClusterPrefix::new(network).ok());
    let cluster = cluster.ok_or(JoinError::Answer("without the cluster's /48"))?;
    let prefix = response.node_prefix.as_ref().and_then(ipv6_network);
    let prefix = prefix.and_then(|network| NodePrefix::new(network).ok());
    let prefix = prefix.ok_or(JoinError::Answer("without the node's /64"))?;
    let of_lan = !cluster.has_subnet(prefix) && prefixes.allow(prefix);
    if !of_lan && (prefixes.lan.is_some() || prefix != cluster.subnet(SubnetId(joining.subnet_id))) {
        return Err(JoinError::Answer("with a /64 that was not asked for"));
    }
    let pod_ipv4 = response.pod_ipv4.as_ref().and_then(ipv4_network);
    let group = GroupId::new(joining.group_id).map_err(|_| JoinError::Answer("to a reserved group"))?;
    Ok(Identity {
        name: response.name,
        epoch: response.epoch,
        cluster,
        prefix,
        group,
        pod_ipv4: pod_ipv4.ok_or(JoinError::Answer("without the pods' IPv4 range"))?,
        credentials,
        previous: None,
        former_cas: vec![],
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use hextet_api::{token::Token, v1};
    use ipnetwork::Ipv6Network;

    use super::*;
    use crate::{
        config::{MasqueradeChoice, NdpChoice, NodePaths},
        identity::tests::identity as test_identity,
    };

    fn config(join: Option<Token>) -> NodeConfig {
        NodeConfig {
            paths: NodePaths { state_dir: "/x".into(), run_dir: "/x".into(), bpf_dir: "/x".into() },
            join,
            rejoin: None,
            name: None,
            uplink: None,
            underlay: None,
            pod_prefix: PodPrefixChoice::Auto,
            ndp: NdpChoice::Auto,
            masquerade: MasqueradeChoice::Auto,
            filtering: dataplane_core::Filtering::default(),
            ipv6_exit: dataplane_core::Ipv6Exit::default(),
            hooks: BTreeMap::new(),
            labels: BTreeMap::new(),
            countables: BTreeMap::new(),
            cpu_millis: None,
            memory_bytes: None,
        }
    }

    fn token(role: Role, fingerprint: Fingerprint) -> Token {
        Token { role, fingerprint, secret: [1; 16], servers: vec!["[::1]:1".into()] }
    }

    fn store() -> (tempfile::TempDir, Store) {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("node.redb")).unwrap();
        (folder, store)
    }

    fn underlay() -> Underlay {
        Underlay {
            device: "eth0".into(),
            address: "2001:db8:1::11".parse().unwrap(),
            ipv4: None,
            global: None,
            on_link: BTreeSet::new(),
            mac: dataplane_core::Mac([0; 6]),
            sources: BTreeMap::new(),
            prefixes: ["fd00:a::/64", "2001:db8:1::/64"].map(|text| text.parse().unwrap()).into(),
        }
    }

    async fn error_of(store: &Store, token: Option<Token>) -> String {
        join(store, &config(token), &underlay()).await.unwrap_err().to_string()
    }

    #[tokio::test]
    async fn without_token_and_identity_the_way_to_a_token_is_told() {
        let (_folder, store) = store();
        assert!(error_of(&store, None).await.contains("netctl token --for node"));
    }

    #[tokio::test]
    async fn a_token_for_a_user_is_refused_before_it_is_used() {
        let (_folder, store) = store();
        let text = error_of(&store, Some(token(Role::User, Fingerprint([0; 32])))).await;
        assert!(text.starts_with("the token is for a user"), "{text}");
        assert_eq!(store.joining().unwrap(), None);
    }

    #[test]
    fn a_node_ignores_a_second_token_of_its_cluster_and_refuses_that_of_another() {
        let own = test_identity().credentials.ca_fingerprint();
        let again = known(test_identity(), &config(Some(token(Role::Node, own)))).unwrap();
        assert_eq!(again, test_identity());
        let other = config(Some(token(Role::Node, Fingerprint([9; 32]))));
        let text = known(test_identity(), &other).unwrap_err().to_string();
        assert!(text.contains("netctl node down") && text.contains("remove its state folder"), "{text}");
    }

    #[tokio::test]
    async fn the_key_of_an_attempt_that_failed_is_used_again() {
        let (_folder, store) = store();
        let join = || Some(token(Role::Node, Fingerprint([0; 32])));
        assert_eq!(error_of(&store, join()).await, "cannot join");
        let first = store.joining().unwrap().unwrap();
        assert_eq!(error_of(&store, join()).await, "cannot join");
        assert_eq!(store.joining().unwrap(), Some(first));
    }

    #[test]
    fn pods_are_placed_where_the_node_said_and_nowhere_else() {
        let (own, lan) = ("fd00:1:2:7::/64", "2001:db8:1::/64");
        let choices = ["auto", "own", lan].map(|word| word.parse().unwrap());
        let answers = [own, lan, "fd00:a::/64", "2001:db8:9::/64", "fd00:1:2:8::/64"];
        let accepted = choices.map(|choice| {
            let prefixes = Prefixes::choose(choice, &underlay()).unwrap();
            answers.map(|answer| placed(&prefixes, answer).is_ok())
        });
        let expected = [
            [true, true, true, false, false],
            [true, false, false, false, false],
            [false, true, false, false, false],
        ];
        assert_eq!(accepted, expected);
    }

    /// The server's answer to a node that drew subnet 7.
    fn placed(prefixes: &Prefixes, prefix: &str) -> Result<Identity, JoinError> {
        let network = |text: &str| Some(v1::Ipv6Prefix::from(text.parse::<Ipv6Network>().unwrap()));
        let response = v1::EnrollResponse {
            cluster_prefix: network("fd00:1:2::/48"),
            node_prefix: network(prefix),
            pod_ipv4: Some(v1::Ipv4Prefix { address: vec![10, 254, 0, 0], length_bits: 20 }),
            ..v1::EnrollResponse::default()
        };
        let joining = Joining { key_pkcs8_der: vec![], subnet_id: 7, group_id: 9 };
        identity_of(&joining, prefixes, Enrolled { credentials: test_identity().credentials, response })
    }

    #[test]
    fn a_prefix_that_the_uplink_does_not_have_is_refused_with_those_that_it_has() {
        let wrong = PodPrefixChoice::Lan("2001:db8:9::/64".parse().unwrap());
        let text = Prefixes::choose(wrong, &underlay()).unwrap_err().to_string();
        assert!(text.contains("the uplink eth0 has no address in it"), "{text}");
        assert!(text.ends_with("it has addresses in: 2001:db8:1::/64, fd00:a::/64"), "{text}");
    }

    #[test]
    fn only_what_was_drawn_is_drawn_again() {
        let refused = |status| EnrollError::Refused { status };
        let taken = |what| {
            let mut status = tonic::Status::already_exists("taken by node `subnet-1`");
            status.metadata_mut().insert(TAKEN, tonic::metadata::MetadataValue::from_static(what));
            refused(status)
        };
        for drawn in ["subnet", "group"] {
            let drawn = taken(drawn);
            assert!(matches!(remedy(&drawn, "n1"), Remedy::AnotherDraw));
        }
        let name = taken("name");
        assert!(matches!(remedy(&name, "n1"), Remedy::None));
        let clock = refused(tonic::Status::failed_precondition("the clock is 3 h off"));
        assert!(matches!(remedy(&clock, ""), Remedy::None));
    }
}
