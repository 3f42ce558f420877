//! `testbed status`: what runs, for a person to read.

use anyhow::Result;

use crate::testbed::Testbed;
use crate::topology::{self, Place};

/// Prints places, addresses, processes and, when there is a cluster, nodes and pods.
///
/// # Errors
/// None so far: what cannot be read is shown as such.
pub fn print(testbed: &Testbed) -> Result<()> {
    println!("testbed {} in {}", testbed.prefix(), testbed.dir().display());
    for place in topology::places(testbed.options.nodes) {
        println!("  {}", place_line(testbed, place));
    }
    if testbed.has_cluster() {
        print_cluster(testbed);
    }
    Ok(())
}

fn place_line(testbed: &Testbed, place: Place) -> String {
    let netns = testbed.netns(&place.to_string());
    let state = if netns.identity().is_some() { "up" } else { "missing" };
    let addresses = match place.addresses() {
        Some(at) => format!("{:<14} {}", at.v4, at.v6),
        None => "(the LAN's switch)".to_owned(),
    };
    format!("{:<16} {state:<8} {addresses:<36} {}", netns.name(), role(testbed, place))
}

fn role(testbed: &Testbed, place: Place) -> String {
    let pid = |pid: Option<nix::unistd::Pid>| match pid {
        Some(pid) => format!("runs ({pid})"),
        None => "does not run".to_owned(),
    };
    match place {
        Place::Node(number) if testbed.has_cluster() => {
            let agent = format!("agent {}", pid(testbed.agent(&place.to_string()).pid()));
            match number {
                1 => format!("{agent}, server {}", pid(testbed.server().pid())),
                _ => agent,
            }
        }
        Place::Wan => format!("echo {}", pid(testbed.echo().pid())),
        _ => String::new(),
    }
}

fn print_cluster(testbed: &Testbed) {
    for what in ["nodes", "jobs", "pods"] {
        match testbed.netctl(&[what]).and_then(|output| output.success()) {
            Ok(table) => println!("\nnetctl {what}\n{}", table.trim_end()),
            Err(e) => println!("\nnetctl {what}\n{e:#}"),
        }
    }
}
