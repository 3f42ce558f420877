//! The table `inet hextet`, written and read as JSON through the `nft` program.
//!
//! The schema is the `nftables` crate's. Its runner is not used: it loses what `nft` says about a failure.

use std::{io, net::Ipv4Addr, process::Stdio};

use dataplane_core::NftTable;
use ipnetwork::Ipv4Network;
use nftables::{
    batch::Batch,
    expr::{Expression, Meta, MetaKey, NamedExpression, Payload, PayloadField, Prefix},
    schema::{Chain, NfListObject, NfObject, Nftables, Rule, Table},
    stmt::{Match, Operator, Statement},
    types::{NfChainType, NfFamily, NfHook},
};
use thiserror::Error;
use tokio::{io::AsyncWriteExt, process::Command};

const TABLE: &str = "hextet";
const CHAIN: &str = "postrouting";
/// `srcnat`, where source addresses are translated by convention.
const PRIORITY: i32 = 100;

/// Why the table cannot be read or written.
#[derive(Debug, Error)]
pub enum NftError {
    /// The program cannot be started.
    #[error("cannot run nft; is the package nftables installed?")]
    Run(#[source] io::Error),
    /// It ran and refused.
    #[error("nft refuses: {0}")]
    Refused(String),
    /// It answered something that is not its JSON.
    #[error("nft answered something that is not understood")]
    Answer(#[source] serde_json::Error),
}

/// Whether `nft` can talk to the kernel here.
pub(crate) async fn works() -> bool {
    run(&["-j", "list", "tables"], None).await.is_ok()
}

/// What is in the table, if it is there.
pub(crate) async fn read() -> Result<Option<NftTable>, NftError> {
    let answer = match run(&["-j", "list", "table", "inet", TABLE], None).await {
        Err(NftError::Refused(message)) if message.contains("No such file or directory") => return Ok(None),
        answer => answer?,
    };
    let ruleset: Nftables<'_> = serde_json::from_slice(&answer).map_err(NftError::Answer)?;
    Ok(Some(content(&ruleset)))
}

/// Makes the table hold exactly `table`, in one transaction.
pub(crate) async fn set(table: &NftTable) -> Result<(), NftError> {
    let mut batch = Batch::new();
    // Adding first makes deleting succeed when there is no table yet.
    batch.add(NfListObject::Table(own_table()));
    batch.delete(NfListObject::Table(own_table()));
    batch.add(NfListObject::Table(own_table()));
    if let NftTable::Masquerade { uplink, pod_ipv4 } = table {
        batch.add(NfListObject::Chain(chain()));
        batch.add(NfListObject::Rule(rule(uplink, *pod_ipv4)));
    }
    send(batch).await
}

/// Removes the table.
pub(crate) async fn delete() -> Result<(), NftError> {
    let mut batch = Batch::new();
    batch.delete(NfListObject::Table(own_table()));
    send(batch).await
}

async fn send(batch: Batch<'_>) -> Result<(), NftError> {
    let input = serde_json::to_vec(&batch.to_nftables()).map_err(NftError::Answer)?;
    run(&["-j", "-f", "-"], Some(input)).await.map(drop)
}

async fn run(arguments: &[&str], input: Option<Vec<u8>>) -> Result<Vec<u8>, NftError> {
    let mut child = Command::new("nft")
        .args(arguments)
        .stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(NftError::Run)?;
    if let (Some(mut stdin), Some(input)) = (child.stdin.take(), input) {
        stdin.write_all(&input).await.map_err(NftError::Run)?;
    }
    let output = child.wait_with_output().await.map_err(NftError::Run)?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let message = String::from_utf8_lossy(&output.stderr);
    Err(NftError::Refused(message.lines().next().unwrap_or("it gave no reason").to_owned()))
}

fn own_table() -> Table<'static> {
    Table { family: NfFamily::INet, name: TABLE.into(), handle: None }
}

fn chain() -> Chain<'static> {
    Chain {
        family: NfFamily::INet,
        table: TABLE.into(),
        name: CHAIN.into(),
        _type: Some(NfChainType::NAT),
        hook: Some(NfHook::Postrouting),
        prio: Some(PRIORITY),
        ..Chain::default()
    }
}

fn rule<'a>(uplink: &str, pod_ipv4: Ipv4Network) -> Rule<'a> {
    let expressions = vec![
        equals(
            NamedExpression::Meta(Meta { key: MetaKey::Oifname }),
            Expression::String(uplink.to_owned().into()),
        ),
        equals(
            NamedExpression::Payload(Payload::PayloadField(PayloadField {
                protocol: "ip".into(),
                field: "saddr".into(),
            })),
            Expression::Named(NamedExpression::Prefix(Prefix {
                addr: Box::new(Expression::String(pod_ipv4.network().to_string().into())),
                len: pod_ipv4.prefix().into(),
            })),
        ),
        Statement::Masquerade(None),
    ];
    Rule {
        family: NfFamily::INet,
        table: TABLE.into(),
        chain: CHAIN.into(),
        expr: expressions.into(),
        ..Rule::default()
    }
}

fn equals<'a>(left: NamedExpression<'a>, right: Expression<'a>) -> Statement<'a> {
    Statement::Match(Match { left: Expression::Named(left), right, op: Operator::EQ })
}

/// Reads back what [`set`] writes; anything else is [`NftTable::Other`].
fn content(ruleset: &Nftables<'_>) -> NftTable {
    let mut chains = 0;
    let mut rules = Vec::new();
    for object in ruleset.objects.iter() {
        match object {
            NfObject::ListObject(NfListObject::MetainfoObject(_) | NfListObject::Table(_)) => {}
            NfObject::ListObject(NfListObject::Chain(found)) if is_own_chain(found) => chains += 1,
            NfObject::ListObject(NfListObject::Rule(rule)) => rules.push(rule),
            _ => return NftTable::Other,
        }
    }
    match (chains, rules.as_slice()) {
        (1, [only]) => masquerade(only).unwrap_or(NftTable::Other),
        _ => NftTable::Other,
    }
}

fn is_own_chain(found: &Chain<'_>) -> bool {
    let own = chain();
    (found._type, found.hook, found.prio) == (own._type, own.hook, own.prio)
}

/// The rule's two variables, when it is the rule that [`rule`] makes of them.
fn masquerade(found: &Rule<'_>) -> Option<NftTable> {
    let [Statement::Match(oifname), Statement::Match(saddr), _] = &*found.expr else { return None };
    let Expression::String(uplink) = &oifname.right else { return None };
    let Expression::Named(NamedExpression::Prefix(prefix)) = &saddr.right else { return None };
    let Expression::String(address) = &*prefix.addr else { return None };
    let address: Ipv4Addr = address.parse().ok()?;
    let pod_ipv4 = Ipv4Network::new(address, u8::try_from(prefix.len).ok()?).ok()?;
    let same = rule(uplink, pod_ipv4).expr == found.expr;
    same.then(|| NftTable::Masquerade { uplink: uplink.to_string(), pod_ipv4 })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As nftables 1.0.6 answers `nft -j list table inet hextet`.
    fn listing(extra: &str) -> String {
        let rule = r#"{"rule": {"family": "inet", "table": "hextet", "chain": "postrouting", "handle": 2, "expr": [
            {"match": {"op": "==", "left": {"meta": {"key": "oifname"}}, "right": "eth0"}},
            {"match": {"op": "==", "left": {"payload": {"protocol": "ip", "field": "saddr"}},
                       "right": {"prefix": {"addr": "10.254.0.0", "len": 20}}}},
            EXTRA {"masquerade": null}]}}"#;
        let rule = rule.replace("EXTRA", extra);
        format!(
            r#"{{"nftables": [{{"metainfo": {{"version": "1.0.6", "release_name": "x", "json_schema_version": 1}}}},
            {{"table": {{"family": "inet", "name": "hextet", "handle": 1}}}},
            {{"chain": {{"family": "inet", "table": "hextet", "name": "postrouting", "handle": 1, "type": "nat",
                       "hook": "postrouting", "prio": 100, "policy": "accept"}}}}, {rule}]}}"#
        )
    }

    fn parsed(json: &str) -> NftTable {
        content(&serde_json::from_str(json).unwrap())
    }

    #[test]
    fn own_rule_is_recognised() {
        let expected =
            NftTable::Masquerade { uplink: "eth0".to_owned(), pod_ipv4: "10.254.0.0/20".parse().unwrap() };
        assert_eq!(parsed(&listing("")), expected);
    }

    #[test]
    fn changed_rule_is_not_taken_for_ours() {
        assert_eq!(parsed(&listing(r#"{"counter": {"packets": 0, "bytes": 0}},"#)), NftTable::Other);
    }

    #[test]
    fn empty_table_is_not_taken_for_ours() {
        let json = r#"{"nftables": [{"table": {"family": "inet", "name": "hextet", "handle": 1}}]}"#;
        assert_eq!(parsed(json), NftTable::Other);
    }
}
