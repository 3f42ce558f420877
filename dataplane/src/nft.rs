//! The table `ip hextet`, and in [`exit`] the table `ip6 hextet`, written and read as JSON through the `nft` program.
//!
//! The schema is the `nftables` crate's. Its runner is not used: it loses what `nft` says about a failure. The
//! family is `ip`, not `inet`: a chain of `inet` would have every IPv6 packet between pods pass by it.

pub(crate) mod exit;

use std::{collections::BTreeSet, io, process::Stdio};

use dataplane_core::NftTable;
use ipnetwork::Ipv4Network;
use nftables::{
    batch::Batch,
    expr::{Expression, Meta, MetaKey, NamedExpression, Payload, PayloadField, Prefix},
    schema::{Chain, NfListObject, NfObject, Nftables, Rule, Table},
    stmt::{AnonymousCounter, Counter, Match, Operator, Statement},
    types::{NfChainType, NfFamily, NfHook},
};
use thiserror::Error;
use tokio::{io::AsyncWriteExt, process::Command};

const TABLE: &str = "hextet";
/// What pods' host sides are called.
const PODS: &str = "hx*";

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
    list("ip", content).await
}

/// What `content` makes of the table of a family, if it is there.
async fn list<T>(family: &str, content: impl Fn(&Nftables<'_>) -> T) -> Result<Option<T>, NftError> {
    let answer = match run(&["-j", "list", "table", family, TABLE], None).await {
        Err(NftError::Refused(message)) if message.contains("No such file or directory") => return Ok(None),
        answer => answer?,
    };
    let ruleset: Nftables<'_> = serde_json::from_slice(&answer).map_err(NftError::Answer)?;
    Ok(Some(content(&ruleset)))
}

/// Makes the table hold exactly `table`, in one transaction.
pub(crate) async fn set(table: &NftTable) -> Result<(), NftError> {
    replace(NfFamily::IP, chains(table)).await
}

async fn replace(family: NfFamily, chains: Vec<(Chain<'static>, Rule<'static>)>) -> Result<(), NftError> {
    let mut batch = Batch::new();
    // Adding first makes deleting succeed when there is no table yet.
    batch.add(NfListObject::Table(own_table(family)));
    batch.delete(NfListObject::Table(own_table(family)));
    batch.add(NfListObject::Table(own_table(family)));
    for (chain, rule) in chains {
        batch.add(NfListObject::Chain(chain));
        batch.add(NfListObject::Rule(rule));
    }
    send(batch).await
}

/// Removes the table.
pub(crate) async fn delete() -> Result<(), NftError> {
    remove(NfFamily::IP).await
}

async fn remove(family: NfFamily) -> Result<(), NftError> {
    let mut batch = Batch::new();
    batch.delete(NfListObject::Table(own_table(family)));
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

fn own_table(family: NfFamily) -> Table<'static> {
    Table { family, name: TABLE.into(), handle: None }
}

/// The chains of the table, with the one rule of each.
fn chains(table: &NftTable) -> Vec<(Chain<'static>, Rule<'static>)> {
    match table {
        NftTable::Masquerade { uplink, pod_ipv4 } => vec![
            (chain(NfFamily::IP, "postrouting"), masquerade(uplink, *pod_ipv4)),
            (chain(NfFamily::IP, "backstop"), backstop(None, *pod_ipv4)),
        ],
        NftTable::Backstop { uplink, pod_ipv4 } => {
            vec![(chain(NfFamily::IP, "backstop"), backstop(uplink.as_deref(), *pod_ipv4))]
        }
        NftTable::Other => Vec::new(),
    }
}

/// `postrouting` is where source addresses are translated by convention; `backstop` is behind it.
fn chain(family: NfFamily, name: &'static str) -> Chain<'static> {
    let (kind, priority) = match name {
        "postrouting" => (NfChainType::NAT, 100),
        _ => (NfChainType::Filter, 200),
    };
    Chain {
        family,
        table: TABLE.into(),
        name: name.into(),
        _type: Some(kind),
        hook: Some(NfHook::Postrouting),
        prio: Some(priority),
        ..Chain::default()
    }
}

fn masquerade(uplink: &str, pod_ipv4: Ipv4Network) -> Rule<'static> {
    let out = oifname(Operator::EQ, uplink);
    rule(NfFamily::IP, "postrouting", vec![out, from(pod_ipv4), Statement::Masquerade(None)])
}

fn backstop(translated_at: Option<&str>, pod_ipv4: Ipv4Network) -> Rule<'static> {
    let devices = std::iter::once(PODS).chain(translated_at);
    let mut statements: Vec<_> = devices.map(|device| oifname(Operator::NEQ, device)).collect();
    statements.push(from(pod_ipv4));
    statements.extend(count_and_drop());
    rule(NfFamily::IP, "backstop", statements)
}

fn count_and_drop() -> [Statement<'static>; 2] {
    let counter = Statement::Counter(Counter::Anonymous(Some(AnonymousCounter::default())));
    [counter, Statement::Drop(None)]
}

fn rule(family: NfFamily, chain: &'static str, statements: Vec<Statement<'static>>) -> Rule<'static> {
    Rule { family, table: TABLE.into(), chain: chain.into(), expr: statements.into(), ..Rule::default() }
}

fn oifname(op: Operator, device: &str) -> Statement<'static> {
    let left = Expression::Named(NamedExpression::Meta(Meta { key: MetaKey::Oifname }));
    Statement::Match(Match { left, right: Expression::String(device.to_owned().into()), op })
}

fn from(pod_ipv4: Ipv4Network) -> Statement<'static> {
    let field = PayloadField { protocol: "ip".into(), field: "saddr".into() };
    let prefix = Prefix {
        addr: Box::new(Expression::String(pod_ipv4.network().to_string().into())),
        len: pod_ipv4.prefix().into(),
    };
    Statement::Match(Match {
        left: Expression::Named(NamedExpression::Payload(Payload::PayloadField(field))),
        right: Expression::Named(NamedExpression::Prefix(prefix)),
        op: Operator::EQ,
    })
}

/// Reads back what [`set`] writes: the form whose own rules are those that are there. Anything else is
/// [`NftTable::Other`].
fn content(ruleset: &Nftables<'_>) -> NftTable {
    let Some((found_chains, rules)) = chains_and_rules(ruleset) else { return NftTable::Other };
    let is_there = |table: &NftTable| is_same(&chains(table), &found_chains, &rules);
    forms(&rules).into_iter().find(is_there).unwrap_or(NftTable::Other)
}

type ChainsAndRules<'a, 'b> = (Vec<&'a Chain<'b>>, Vec<&'a Rule<'b>>);

/// None if there is anything else.
fn chains_and_rules<'a, 'b>(ruleset: &'a Nftables<'b>) -> Option<ChainsAndRules<'a, 'b>> {
    let (mut chains, mut rules) = (Vec::new(), Vec::new());
    for object in ruleset.objects.iter() {
        match object {
            NfObject::ListObject(NfListObject::MetainfoObject(_) | NfListObject::Table(_)) => {}
            NfObject::ListObject(NfListObject::Chain(found)) => chains.push(found),
            NfObject::ListObject(NfListObject::Rule(rule)) => rules.push(rule),
            _ => return None,
        }
    }
    Some((chains, rules))
}

/// Whether what was found is what we would write.
fn is_same(wanted: &[(Chain<'_>, Rule<'_>)], chains: &[&Chain<'_>], rules: &[&Rule<'_>]) -> bool {
    wanted.len() == chains.len()
        && wanted.len() == rules.len()
        && wanted.iter().zip(chains).all(|((own, _), found)| is_chain(own, found))
        && wanted.iter().zip(rules).all(|((_, own), found)| is_rule(own, found))
}

/// Every form with the devices and the range that the rules name.
fn forms(rules: &[&Rule<'_>]) -> Vec<NftTable> {
    let matches = rules.iter().flat_map(|rule| rule.expr.iter()).filter_map(|statement| match statement {
        Statement::Match(found) => Some(&found.right),
        _ => None,
    });
    let (mut devices, mut range) = (BTreeSet::new(), None);
    for right in matches {
        match right {
            Expression::String(device) if device != PODS => {
                devices.insert(device.to_string());
            }
            Expression::Named(NamedExpression::Prefix(prefix)) => range = network(prefix),
            _ => {}
        }
    }
    let Some(pod_ipv4) = range else { return Vec::new() };
    let mut forms = vec![NftTable::Backstop { uplink: None, pod_ipv4 }];
    for uplink in devices {
        forms.push(NftTable::Backstop { uplink: Some(uplink.clone()), pod_ipv4 });
        forms.push(NftTable::Masquerade { uplink, pod_ipv4 });
    }
    forms
}

fn network(prefix: &Prefix<'_>) -> Option<Ipv4Network> {
    let Expression::String(address) = &*prefix.addr else { return None };
    Ipv4Network::new(address.parse().ok()?, u8::try_from(prefix.len).ok()?).ok()
}

fn is_chain(own: &Chain<'_>, found: &Chain<'_>) -> bool {
    (&own.name, own._type, own.hook, own.prio) == (&found.name, found._type, found.hook, found.prio)
}

/// What was counted since makes no difference.
fn is_rule(own: &Rule<'_>, found: &Rule<'_>) -> bool {
    let is_equal = |(own, found): (&Statement<'_>, &Statement<'_>)| match (own, found) {
        (Statement::Counter(_), Statement::Counter(_)) => true,
        (own, found) => own == found,
    };
    own.chain == found.chain
        && own.expr.len() == found.expr.len()
        && own.expr.iter().zip(found.expr.iter()).all(is_equal)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SADDR: &str = r#"{"match": {"op": "==", "left": {"payload": {"protocol": "ip", "field": "saddr"}},
        "right": {"prefix": {"addr": "10.254.0.0", "len": 20}}}}"#;
    const COUNTER: &str = r#"{"counter": {"packets": 7, "bytes": 588}}"#;

    fn oif(op: &str, device: &str) -> String {
        format!(
            r#"{{"match": {{"op": "{op}", "left": {{"meta": {{"key": "oifname"}}}}, "right": "{device}"}}}}"#
        )
    }

    fn chain_and_rule(name: &str, kind: &str, priority: i32, statements: &[&str]) -> String {
        format!(
            r#"{{"chain": {{"family": "ip", "table": "hextet", "name": "{name}", "handle": 1, "type": "{kind}",
                       "hook": "postrouting", "prio": {priority}, "policy": "accept"}}}},
            {{"rule": {{"family": "ip", "table": "hextet", "chain": "{name}", "handle": 2, "expr": [{}]}}}}"#,
            statements.join(", ")
        )
    }

    /// As nftables 1.0.6 answers `nft -j list table ip hextet`.
    fn listing(content: &[String]) -> String {
        format!(
            r#"{{"nftables": [{{"metainfo": {{"version": "1.0.6", "release_name": "x", "json_schema_version": 1}}}},
            {{"table": {{"family": "ip", "name": "hextet", "handle": 1}}}}, {}]}}"#,
            content.join(", ")
        )
    }

    fn backstop_of(devices: &[&str]) -> String {
        let devices: Vec<String> = devices.iter().map(|device| oif("!=", device)).collect();
        let mut statements: Vec<&str> = devices.iter().map(String::as_str).collect();
        statements.extend([SADDR, COUNTER, r#"{"drop": null}"#]);
        chain_and_rule("backstop", "filter", 200, &statements)
    }

    fn range() -> Ipv4Network {
        "10.254.0.0/20".parse().unwrap()
    }

    fn parsed(json: &str) -> NftTable {
        content(&serde_json::from_str(json).unwrap())
    }

    #[test]
    fn own_rules_are_recognised_whatever_they_have_counted() {
        let rule = [&oif("==", "eth0"), SADDR, r#"{"masquerade": null}"#];
        let masquerade = chain_and_rule("postrouting", "nat", 100, &rule);
        assert_eq!(
            parsed(&listing(&[masquerade, backstop_of(&["hx*"])])),
            NftTable::Masquerade { uplink: "eth0".to_owned(), pod_ipv4: range() }
        );
        assert_eq!(
            parsed(&listing(&[backstop_of(&["hx*", "eth0"])])),
            NftTable::Backstop { uplink: Some("eth0".to_owned()), pod_ipv4: range() }
        );
        assert_eq!(
            parsed(&listing(&[backstop_of(&["hx*"])])),
            NftTable::Backstop { uplink: None, pod_ipv4: range() }
        );
    }

    #[test]
    fn changed_rule_is_not_taken_for_ours() {
        let other = chain_and_rule("backstop", "filter", 200, &[&oif("!=", "hx*"), SADDR, COUNTER]);
        assert_eq!(parsed(&listing(&[other])), NftTable::Other);
        assert_eq!(parsed(&listing(&[backstop_of(&["eth0", "hx*"])])), NftTable::Other);
        assert_eq!(parsed(&listing(&[backstop_of(&["hx*"]), backstop_of(&["hx*"])])), NftTable::Other);
    }

    #[test]
    fn empty_table_is_not_taken_for_ours() {
        let json = r#"{"nftables": [{"table": {"family": "ip", "name": "hextet", "handle": 1}}]}"#;
        assert_eq!(parsed(json), NftTable::Other);
    }
}
