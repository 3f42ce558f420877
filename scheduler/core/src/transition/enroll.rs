//! Tokens are made and used; nodes get their name and subnet.

use std::sync::Arc;

use hextet_address::{ClusterPrefix, GroupId, NodePrefix};

use crate::{
    change::{Key, Value},
    cluster::Cluster,
    draft::Draft,
    event::{Claim, Enroll, PrefixChoice, Refusal},
    name::{self, NODE_NAME_LEN_MAX, NameError},
    node::Node,
    time::WallTime,
    token::{Role, TOKENS_MAX, Token, TokenError},
    transition::{Step, renew},
};

pub(super) fn create_token(
    draft: &mut Draft<'_>,
    id: &str,
    token: &Token,
    now: WallTime,
) -> Result<Step, Refusal> {
    if let Some(name) = &token.name {
        name::check(name, NODE_NAME_LEN_MAX)?;
    } else if token.role != Role::Node {
        return Err(NameError::Empty.into());
    }
    forget_old_tokens(draft, now);
    if draft.tokens().len() >= TOKENS_MAX {
        return Err(Refusal::TooManyTokens(draft.tokens().len()));
    }
    draft.put(Key::Token(id.to_owned()), Some(Value::Token(Arc::new(token.clone()))));
    let whom = token.name.as_deref().map(|name| format!(" {name}")).unwrap_or_default();
    Ok(Step { message: format!("token made for {}{whom}", token.role.word()), replan: false })
}

pub(super) fn enroll(draft: &mut Draft<'_>, enroll: &Enroll, now: WallTime) -> Result<Step, Refusal> {
    let token = draft.tokens().get(&enroll.token).cloned().ok_or(TokenError::Unknown)?;
    token.check(&enroll.key, now)?;
    let name = chosen_name(&token, enroll.name.as_deref())?;
    if token.used_by.is_none() {
        check_key(draft, &name, enroll)?;
    }
    match (&token.role, &enroll.node) {
        (Role::Node, Some(claim)) => join(draft, &name, &enroll.key, claim, now)?,
        (Role::Node, None) => return Err(Refusal::Claim),
        (role, Some(_)) => return Err(TokenError::Role(role.word()).into()),
        (_, None) => {}
    }
    let message = format!("{} {name} enrolled", token.role.word());
    let used = Token { name: Some(name), used_by: Some(enroll.key.clone()), ..Token::clone(&token) };
    draft.put(Key::Token(enroll.token.clone()), Some(Value::Token(Arc::new(used))));
    Ok(Step { message, replan: false })
}

/// A key is that of one node under one name. Who enrolls again with a key must not have replaced it.
fn check_key(draft: &Draft<'_>, name: &str, enroll: &Enroll) -> Result<(), Refusal> {
    let own = draft.nodes().values().find(|node| node.key == enroll.key);
    match own {
        Some(node) if node.name == name && enroll.node.is_some() => Ok(()),
        _ => renew::check_unused(draft, &enroll.key),
    }
}

fn chosen_name(token: &Token, wanted: Option<&str>) -> Result<String, Refusal> {
    let name = match (token.name.as_deref(), wanted) {
        (Some(name), Some(wanted)) if name != wanted => return Err(TokenError::Name.into()),
        (Some(name), _) | (None, Some(name)) => name,
        (None, None) => return Err(NameError::Empty.into()),
    };
    name::check(name, NODE_NAME_LEN_MAX)?;
    Ok(name.to_owned())
}

/// Claims name, prefix and group. The same key under the same name gets what it had.
fn join(draft: &mut Draft<'_>, name: &str, key: &str, claim: &Claim, now: WallTime) -> Result<(), Refusal> {
    let ca = draft.authorities().map(|authorities| authorities.issuing.clone());
    if let Some(node) = draft.nodes().get(name).cloned() {
        if node.key != key {
            return Err(Refusal::NameTaken(name.to_owned()));
        }
        draft.put_node(Node { ca, ..Node::clone(&node) });
        return Ok(());
    }
    let cluster = draft.cluster().ok_or(Refusal::Claim)?;
    let prefix = prefix(cluster, claim)?;
    check_free(draft, cluster.prefix, prefix, claim.group_id)?;
    draft.put_node(Node { ca, ..Node::joined(name, key, prefix, claim.group_id, now) });
    Ok(())
}

/// Where a node's pods get their addresses.
fn prefix(cluster: &Cluster, claim: &Claim) -> Result<NodePrefix, Refusal> {
    let lan = match &claim.prefix {
        PrefixChoice::Own => None,
        PrefixChoice::Lan(prefix) => Some(*prefix),
        PrefixChoice::OfUplink(prefixes) => cluster.pod_prefix.filter(|prefix| prefixes.contains(prefix)),
    };
    match lan {
        Some(prefix) => check_lan(cluster.prefix, prefix).map(|()| prefix),
        None => Ok(cluster.prefix.subnet(claim.subnet)),
    }
}

/// A LAN's prefix is the LAN's: nobody could tell addresses of the LAN from a node's subnet of the same number.
pub(super) fn check_lan(cluster: ClusterPrefix, prefix: NodePrefix) -> Result<(), Refusal> {
    if cluster.has_subnet(prefix) { Err(Refusal::PodPrefix { prefix, cluster }) } else { Ok(()) }
}

/// A /64 of the cluster's has one node. A group has one node wherever it is: nodes of one LAN share all the
/// other bits by which they could be told apart.
fn check_free(
    draft: &Draft<'_>,
    cluster: ClusterPrefix,
    prefix: NodePrefix,
    group: GroupId,
) -> Result<(), Refusal> {
    let mut nodes = draft.nodes().values();
    if let Some(other) = nodes.find(|node| cluster.has_subnet(prefix) && node.prefix == prefix) {
        return Err(Refusal::SubnetTaken { prefix, node: other.name.clone() });
    }
    if let Some(other) = draft.nodes().values().find(|node| node.group_id == group) {
        return Err(Refusal::GroupTaken { group, node: other.name.clone() });
    }
    Ok(())
}

fn forget_old_tokens(draft: &mut Draft<'_>, now: WallTime) {
    let old = draft.tokens().iter().filter(|(_, token)| now >= token.expires);
    let old: Vec<_> = old.map(|(id, _)| id.clone()).collect();
    old.into_iter().for_each(|id| draft.put(Key::Token(id), None));
}
