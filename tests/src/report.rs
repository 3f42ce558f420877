//! What a person needs to see when a scenario failed: routes, neighbours, counters and logs of each node.

use std::fmt::Write;

use crate::process::{describe, living_in};
use crate::progress::write_now;
use crate::testbed::Testbed;

/// How many lines of each log are shown.
const LOG_LINES: usize = 40;

/// Prints the report to stderr.
pub fn print(testbed: &Testbed) {
    write_now(&text(testbed));
}

/// The report.
pub fn text(testbed: &Testbed) -> String {
    let mut text = format!("\n===== report of the testbed {} =====\n", testbed.prefix());
    for node in testbed.nodes() {
        section(&mut text, &format!("{node}: links, routes, neighbours"), &network(testbed, &node));
    }
    for place in ["client", "router"] {
        section(&mut text, &format!("{place}: routes, neighbours"), &network(testbed, place));
    }
    if testbed.has_cluster() {
        cluster(&mut text, testbed);
    }
    text.push_str("===== end of the report =====\n");
    text
}

fn network(testbed: &Testbed, place: &str) -> String {
    let commands: [&[&str]; 4] = [
        &["ip", "-s", "-br", "link", "show"],
        &["ip", "-6", "route", "show"],
        &["ip", "-4", "route", "show"],
        &["ip", "neigh", "show"],
    ];
    commands.map(|args| said(testbed.in_ns(place, args))).join("")
}

fn cluster(text: &mut String, testbed: &Testbed) {
    for what in ["nodes", "jobs", "pods"] {
        section(text, &format!("netctl {what}"), &said(testbed.netctl(&[what])));
    }
    for node in testbed.nodes() {
        let counters = said(testbed.netctl_on(&node, &["node", "counters"]));
        section(text, &format!("{node}: counters"), &counters);
        let agent = testbed.agent(&node);
        section(text, &format!("{node}: agent's log"), &tail(&agent.log()));
        let place = testbed.netns(&node).identity().into_iter().collect();
        let living: Vec<String> = living_in(&place).into_iter().map(describe).collect();
        section(text, &format!("{node}: processes"), &living.join("\n"));
    }
    section(text, "server's log", &tail(&testbed.server().daemon().log()));
}

fn section(text: &mut String, title: &str, body: &str) {
    writeln!(text, "--- {title}\n{}", body.trim_end()).expect("a String takes all that is written to it");
}

fn said(result: anyhow::Result<crate::command::Output>) -> String {
    match result {
        Ok(output) => format!("{}{}", output.stdout, output.stderr),
        Err(e) => format!("{e:#}\n"),
    }
}

fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(LOG_LINES)..].join("\n")
}
