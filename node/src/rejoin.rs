//! How a node comes back whose cluster has replaced its CA while it was away: with a new token, and its own key.
//!
//! It keeps its name, its /64 and its pods: the server knows the key. The identity is changed when the server has said yes,
//! in one write: whenever the node is stopped, the token and the key are good for another try.

use hextet_address::{ClusterPrefix, NodePrefix};
use hextet_api::{
    TAKEN,
    connect::{Credentials, EnrollError, Enrolled, Key, Wish, enroll},
    token::{Role, Token},
};
use tracing::info;

use crate::{assignment::ipv6_network, identity::Identity, join::JoinError, store::Store};

/// Another certificate for the key that this node has.
pub(crate) async fn rejoin(store: &Store, identity: Identity, token: &Token) -> Result<Identity, JoinError> {
    if token.role != Role::Node {
        return Err(JoinError::Role(token.role));
    }
    if identity.knows_ca(token.fingerprint) {
        info!(node = identity.name, "this machine knows the CA of the token, which is not used");
        return Ok(identity);
    }
    let enrolled = match enroll_with(token, &identity, &identity.credentials).await {
        // The server may have been put back from a backup that knows the key before the present one.
        Err(error)
            if let Some(previous) = &identity.previous
                && is_name_taken(&error) =>
        {
            enroll_with(token, &identity, previous).await
        }
        enrolled => enrolled,
    };
    let next = readmitted(identity, enrolled.map_err(JoinError::Enroll)?)?;
    store.save_identity(&next)?;
    info!(node = next.name, prefix = %next.prefix, "the node has a certificate of its cluster's new CA");
    Ok(next)
}

async fn enroll_with(
    token: &Token,
    identity: &Identity,
    credentials: &Credentials,
) -> Result<Enrolled, EnrollError> {
    let key = Key::from_pkcs8_der(credentials.key_pkcs8_der.clone())?;
    enroll(token, &key, wish(identity)).await
}

/// What it has: a server that knows the node gives it just that.
fn wish(identity: &Identity) -> Wish {
    let network = identity.prefix.network();
    let is_own = identity.cluster.has_subnet(identity.prefix);
    Wish {
        name: identity.name.clone(),
        subnet_id: network.ip().segments()[3],
        group_id: identity.group.bits(),
        pod_prefix: (!is_own).then_some(network),
        uplink_prefixes: vec![],
    }
}

fn is_name_taken(error: &EnrollError) -> bool {
    let EnrollError::Refused { status } = error else { return false };
    status.metadata().get(TAKEN).is_some_and(|taken| taken == "name")
}

fn readmitted(identity: Identity, enrolled: Enrolled) -> Result<Identity, JoinError> {
    let Enrolled { credentials, response } = enrolled;
    let cluster = response.cluster_prefix.as_ref().and_then(ipv6_network);
    let prefix = response.node_prefix.as_ref().and_then(ipv6_network);
    let is_same = cluster.and_then(|network| ClusterPrefix::new(network).ok()) == Some(identity.cluster)
        && prefix.and_then(|network| NodePrefix::new(network).ok()) == Some(identity.prefix);
    if !is_same {
        return Err(JoinError::Answer("as another cluster does: it has another prefix"));
    }
    let mut next = identity;
    let former = std::mem::replace(&mut next.credentials, credentials);
    next.remember_ca(former.ca_fingerprint());
    next.previous = Some(former);
    Ok(next)
}

#[cfg(test)]
mod tests {
    use hextet_api::{token::Fingerprint, v1};

    use super::*;
    use crate::identity::tests::identity;

    fn enrolled(cluster: &str, prefix: &str) -> Enrolled {
        let network =
            |text: &str| Some(v1::Ipv6Prefix::from(text.parse::<ipnetwork::Ipv6Network>().unwrap()));
        let response = v1::EnrollResponse {
            cluster_prefix: network(cluster),
            node_prefix: network(prefix),
            ..v1::EnrollResponse::default()
        };
        let credentials = Credentials { ca_der: vec![9], ..identity().credentials };
        Enrolled { credentials, response }
    }

    #[test]
    fn a_node_asks_for_what_it_has_and_keeps_it() {
        let wish = wish(&identity());
        assert_eq!((wish.name.as_str(), wish.subnet_id, wish.group_id), ("n1", 0xa, 0xcc_ddee));
        assert_eq!(wish.pod_prefix, None);
        let next = readmitted(identity(), enrolled("fd00:1:2::/48", "fd00:1:2:a::/64")).unwrap();
        assert_eq!((next.credentials.ca_der.clone(), &next.prefix), (vec![9], &identity().prefix));
        assert_eq!(next.previous, Some(identity().credentials));
        assert!(
            next.knows_ca(identity().credentials.ca_fingerprint()) && next.knows_ca(Fingerprint::of(&[9]))
        );
    }

    #[test]
    fn another_cluster_does_not_take_a_node_over() {
        for (cluster, prefix) in [("fd00:9:9::/48", "fd00:9:9:a::/64"), ("fd00:1:2::/48", "fd00:1:2:b::/64")]
        {
            let error = readmitted(identity(), enrolled(cluster, prefix)).unwrap_err().to_string();
            assert!(error.contains("as another cluster does"), "{error}");
        }
    }

    #[tokio::test]
    async fn a_token_of_the_ca_that_a_node_has_is_not_needed() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("node.redb")).unwrap();
        let token = |fingerprint| Token { role: Role::Node, fingerprint, secret: [0; 16], servers: vec![] };
        let own = token(identity().credentials.ca_fingerprint());
        assert_eq!(rejoin(&store, identity(), &own).await.unwrap(), identity());
        let wrong = Token { role: Role::Viewer, ..token(Fingerprint([7; 32])) };
        assert!(
            rejoin(&store, identity(), &wrong).await.unwrap_err().to_string().contains("is for a viewer")
        );
    }
}
