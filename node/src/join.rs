//! How a machine becomes a node: with a token, once. Afterwards its identity is in the store.
//!
//! The key and what was drawn are kept before the server is asked, so that a machine that is stopped at any
//! point joins with the same token again.

use hextet_address::{ClusterPrefix, GroupId, NodePrefix, SubnetId};
use hextet_api::{
    TAKEN,
    connect::{CredentialsError, EnrollError, Enrolled, Key, Wish, enroll},
    token::{Fingerprint, Role, Token},
};
use rand::Rng;
use thiserror::Error;
use tonic::Code;
use tracing::{info, warn};

use crate::{
    assignment::{ipv4_network, ipv6_network},
    config::{NodeConfig, host_label},
    identity::Identity,
    store::{Joining, Store, StoreError},
};

/// Subnet ids that are drawn before the cluster counts as full.
const DRAWS_MAX: u32 = 32;

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
         to move it, run `netctl node down` and remove its state folder first"
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
    /// The answer makes no sense.
    #[error("cannot join: the server answered {0}; is it of this version?")]
    Answer(&'static str),
    /// The identity cannot be kept.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Who this machine is: what the store says, or what a server makes of it now.
pub(crate) async fn identity(store: &Store, config: &NodeConfig) -> Result<Identity, JoinError> {
    match (store.identity()?, &config.join) {
        (Some(identity), token) => known(identity, token.as_ref(), config),
        (None, Some(token)) => join(store, token, config).await,
        (None, None) => Err(JoinError::NotJoined),
    }
}

fn known(identity: Identity, token: Option<&Token>, config: &NodeConfig) -> Result<Identity, JoinError> {
    let present = identity.credentials.ca_fingerprint();
    if let Some(token) = token {
        if token.fingerprint != present {
            let name = identity.name;
            return Err(JoinError::AnotherCluster { name, present, token: token.fingerprint });
        }
        info!(node = identity.name, "this machine has joined already, the token is not used");
    }
    if let Some(name) = config.name.as_ref().filter(|name| **name != identity.name) {
        warn!(node = identity.name, "a node keeps the name it joined with, --name {name} is ignored");
    }
    Ok(identity)
}

async fn join(store: &Store, token: &Token, config: &NodeConfig) -> Result<Identity, JoinError> {
    if token.role != Role::Node {
        return Err(JoinError::Role(token.role));
    }
    let (key, mut joining) = begin(store)?;
    let mut name = config.name.clone().unwrap_or_default();
    for _ in 0..DRAWS_MAX {
        let wish = Wish { name: name.clone(), subnet_id: joining.subnet_id, group_id: joining.group_id };
        match enroll(token, &key, wish).await {
            Ok(enrolled) => return finish(store, &joining, enrolled),
            Err(error) => match remedy(&error, &name) {
                Remedy::AnotherSubnet => {
                    joining.subnet_id = SubnetId::random(&mut rand::rng()).0;
                    store.save_joining(&joining)?;
                }
                Remedy::HostName(host) => name = host,
                Remedy::None => return Err(JoinError::Enroll(error)),
            },
        }
    }
    Err(JoinError::NoSubnet)
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
    AnotherSubnet,
    HostName(String),
    None,
}

/// A subnet that is taken is drawn again; a token without a name takes the host's.
fn remedy(error: &EnrollError, name: &str) -> Remedy {
    let EnrollError::Refused { status } = error else { return Remedy::None };
    match status.code() {
        Code::AlreadyExists if status.metadata().get(TAKEN).is_some_and(|taken| taken == "subnet") => {
            Remedy::AnotherSubnet
        }
        Code::InvalidArgument if name.is_empty() => host_label().map_or(Remedy::None, Remedy::HostName),
        _ => Remedy::None,
    }
}

fn finish(store: &Store, joining: &Joining, enrolled: Enrolled) -> Result<Identity, JoinError> {
    let identity = identity_of(joining, enrolled)?;
    store.save_identity(&identity)?;
    info!(node = identity.name, prefix = %identity.prefix, "joined the cluster");
    Ok(identity)
}

fn identity_of(joining: &Joining, enrolled: Enrolled) -> Result<Identity, JoinError> {
    let Enrolled { credentials, response } = enrolled;
    let cluster = response.cluster_prefix.as_ref().and_then(ipv6_network);
    let cluster = cluster.and_then(|network| ClusterPrefix::new(network).ok());
    let cluster = cluster.ok_or(JoinError::Answer("without the cluster's /48"))?;
    let prefix = response.node_prefix.as_ref().and_then(ipv6_network);
    let prefix = prefix.and_then(|network| NodePrefix::new(network).ok());
    let prefix = prefix.ok_or(JoinError::Answer("without the node's /64"))?;
    if prefix != cluster.subnet(SubnetId(joining.subnet_id)) {
        return Err(JoinError::Answer("with another /64 than the one that was drawn"));
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
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::{
        config::{MasqueradeChoice, NdpChoice, NodePaths},
        identity::tests::identity as test_identity,
    };

    fn config(join: Option<Token>) -> NodeConfig {
        NodeConfig {
            paths: NodePaths { state_dir: "/x".into(), run_dir: "/x".into(), bpf_dir: "/x".into() },
            join,
            name: None,
            uplink: None,
            underlay: None,
            ndp: NdpChoice::Auto,
            masquerade: MasqueradeChoice::Auto,
            filtering: dataplane_core::Filtering::default(),
            labels: BTreeMap::new(),
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

    async fn error_of(store: &Store, join: Option<Token>) -> String {
        identity(store, &config(join)).await.unwrap_err().to_string()
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

    #[tokio::test]
    async fn a_node_ignores_a_second_token_of_its_cluster_and_refuses_that_of_another() {
        let (_folder, store) = store();
        store.save_identity(&test_identity()).unwrap();
        let own = test_identity().credentials.ca_fingerprint();
        let again = identity(&store, &config(Some(token(Role::Node, own)))).await.unwrap();
        assert_eq!(again, test_identity());
        let text = error_of(&store, Some(token(Role::Node, Fingerprint([9; 32])))).await;
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
    fn only_a_taken_subnet_is_drawn_again() {
        let refused = |status| EnrollError::Refused { status };
        let taken = |what| {
            let mut status = tonic::Status::already_exists("taken by node `subnet-1`");
            status.metadata_mut().insert(TAKEN, tonic::metadata::MetadataValue::from_static(what));
            refused(status)
        };
        let subnet = taken("subnet");
        assert!(matches!(remedy(&subnet, "n1"), Remedy::AnotherSubnet));
        let name = taken("name");
        assert!(matches!(remedy(&name, "n1"), Remedy::None));
        let clock = refused(tonic::Status::failed_precondition("the clock is 3 h off"));
        assert!(matches!(remedy(&clock, ""), Remedy::None));
    }
}
