//! The table `ip6 hextet`: the way to the IPv6 internet where nftables masquerades.
//!
//! Prefixes are compared one after the other, not in a set: in a set of nftables they must not overlap, and routes
//! do.

use std::{collections::BTreeSet, net::Ipv6Addr};

use dataplane_core::NftExit;
use ipnetwork::Ipv6Network;
use nftables::{
    expr::{Expression, NamedExpression, Payload, PayloadField, Prefix},
    schema::{Chain, Nftables, Rule},
    stmt::{Match, Operator, Statement},
    types::NfFamily,
};

use super::{
    NftError, chain, chains_and_rules, count_and_drop, is_same, list, oifname, remove, replace, rule,
};

/// Where pods' addresses are good: unique local, link-local and multicast addresses.
const NEAR: [(Ipv6Addr, u8); 3] = [
    (Ipv6Addr::new(0xfc00, 0, 0, 0, 0, 0, 0, 0), 7),
    (Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0), 10),
    (Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0), 8),
];

/// What is in the table, if it is there.
pub(crate) async fn read() -> Result<Option<NftExit>, NftError> {
    list("ip6", content).await
}

/// Makes the table hold exactly `table`, in one transaction.
pub(crate) async fn set(table: &NftExit) -> Result<(), NftError> {
    replace(NfFamily::IP6, chains(table)).await
}

/// Removes the table.
pub(crate) async fn delete() -> Result<(), NftError> {
    remove(NfFamily::IP6).await
}

/// The chains of the table, with the one rule of each. Behind the translation, what has still a pod's address is
/// dropped.
fn chains(table: &NftExit) -> Vec<(Chain<'static>, Rule<'static>)> {
    let NftExit::Rules { uplink, pods, direct, masquerade } = table else { return Vec::new() };
    let leaving = || {
        let mut statements = vec![oifname(Operator::EQ, uplink), address("saddr", Operator::EQ, *pods)];
        let near = NEAR.map(|(ip, length)| Ipv6Network::new(ip, length).expect("the length is at most 128"));
        let spared = near.into_iter().chain(direct.iter().copied());
        statements.extend(spared.map(|prefix| address("daddr", Operator::NEQ, prefix)));
        statements
    };
    let with = |name, last: &[Statement<'static>]| {
        (chain(NfFamily::IP6, name), rule(NfFamily::IP6, name, [leaving(), last.to_vec()].concat()))
    };
    let translate = masquerade.then(|| with("postrouting", &[Statement::Masquerade(None)]));
    translate.into_iter().chain([with("backstop", &count_and_drop())]).collect()
}

fn address(field: &'static str, op: Operator, prefix: Ipv6Network) -> Statement<'static> {
    let field = PayloadField { protocol: "ip6".into(), field: field.into() };
    let network = Expression::String(prefix.network().to_string().into());
    // As nft writes it: a whole address is no prefix.
    let right = match prefix.prefix() {
        128 => network,
        length => {
            Expression::Named(NamedExpression::Prefix(Prefix { addr: Box::new(network), len: length.into() }))
        }
    };
    Statement::Match(Match {
        left: Expression::Named(NamedExpression::Payload(Payload::PayloadField(field))),
        right,
        op,
    })
}

/// Reads back what [`set`] writes. Anything else is [`NftExit::Other`].
fn content(ruleset: &Nftables<'_>) -> NftExit {
    let found = chains_and_rules(ruleset).and_then(|(found, rules)| {
        let table = form(rules.last()?, rules.len() == 2)?;
        is_same(&chains(&table), &found, &rules).then_some(table)
    });
    found.unwrap_or(NftExit::Other)
}

/// The table whose last rule may be this one.
fn form(rule: &Rule<'_>, masquerade: bool) -> Option<NftExit> {
    let (mut uplink, mut pods, mut direct) = (None, None, BTreeSet::new());
    for statement in rule.expr.iter() {
        let Statement::Match(Match { left, right, op }) = statement else { continue };
        match (left, prefix(right)) {
            (Expression::Named(NamedExpression::Payload(_)), Some(prefix)) if *op == Operator::EQ => {
                pods = Some(prefix);
            }
            (Expression::Named(NamedExpression::Payload(_)), Some(prefix)) => {
                direct.insert(prefix);
            }
            (_, None) => uplink = word(right),
            _ => return None,
        }
    }
    direct.retain(|prefix| !NEAR.contains(&(prefix.network(), prefix.prefix())));
    Some(NftExit::Rules { uplink: uplink?, pods: pods?, direct, masquerade })
}

fn word(expression: &Expression<'_>) -> Option<String> {
    match expression {
        Expression::String(text) => Some(text.to_string()),
        _ => None,
    }
}

fn prefix(expression: &Expression<'_>) -> Option<Ipv6Network> {
    match expression {
        Expression::Named(NamedExpression::Prefix(prefix)) => {
            let ip = word(&prefix.addr)?.parse().ok()?;
            Ipv6Network::new(ip, u8::try_from(prefix.len).ok()?).ok()
        }
        other => Ipv6Network::new(word(other)?.parse().ok()?, 128).ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(masquerade: bool) -> NftExit {
        NftExit::Rules {
            uplink: "eth0".to_owned(),
            pods: "fd00:1:2:a::/64".parse().unwrap(),
            direct: ["2001:db8:1::/64".parse().unwrap(), "2001:db8:1::11/128".parse().unwrap()].into(),
            masquerade,
        }
    }

    /// What is written, as a listing.
    fn listing(table: &NftExit) -> serde_json::Value {
        let objects: Vec<_> = chains(table)
            .into_iter()
            .flat_map(|(chain, rule)| {
                [serde_json::json!({ "chain": chain }), serde_json::json!({ "rule": rule })]
            })
            .collect();
        serde_json::json!({ "nftables": objects })
    }

    fn parsed(json: &serde_json::Value) -> NftExit {
        let text = json.to_string();
        content(&serde_json::from_str(&text).unwrap())
    }

    #[test]
    fn own_rules_are_recognised() {
        for table in [rules(true), rules(false)] {
            assert_eq!(parsed(&listing(&table)), table);
        }
    }

    #[test]
    fn changed_rules_are_not_taken_for_ours() {
        let changed = listing(&rules(true)).to_string().replacen("fc00::", "fe00::", 1);
        assert_eq!(parsed(&serde_json::from_str(&changed).unwrap()), NftExit::Other);
        assert_eq!(parsed(&serde_json::json!({ "nftables": [] })), NftExit::Other);
    }
}
