//! Neighbour discovery for pods between real kernels, with the BPF programs and with the kernel's own proxy. Where
//! the two differ, the test says so, and docs/ndp.md does.

#[path = "ndp/rig.rs"]
mod rig;
#[path = "bpf/support.rs"]
mod support;
#[path = "ndp/tap.rs"]
mod tap;

#[path = "ndp/announced.rs"]
mod announced;
#[path = "ndp/answered.rs"]
mod answered;
#[path = "ndp/claimed.rs"]
mod claimed;
#[path = "ndp/harmless.rs"]
mod harmless;

use std::net::Ipv6Addr;

use rig::{HOST_MAC, group, host};
use support::{icmpv6, link_layer, solicitation};

/// Each test once per backend.
macro_rules! both {
    ($($module:ident :: $name:ident,)*) => {$(
        mod $name {
            #[test]
            fn ebpf() {
                run("ebpf", dataplane::NdpBackend::Ebpf);
            }

            #[test]
            fn kernel() {
                run("kernel", dataplane::NdpBackend::Kernel);
            }

            fn run(name: &str, backend: dataplane::NdpBackend) {
                if super::support::may_run(&format!("{}::{name}", stringify!($name))) {
                    super::$module::$name(backend);
                }
            }
        }
    )*};
}

both! {
    answered::every_kind_of_solicitation_is_answered,
    answered::what_rfc_4861_forbids_is_not_answered,
    answered::a_tagged_solicitation_is_answered_with_its_tag,
    answered::the_nodes_own_addresses_are_left_to_the_kernel,
    answered::a_snooping_switch_delivers_because_the_node_has_joined,
    announced::a_new_address_is_announced_and_a_restart_says_nothing,
    announced::a_host_that_asked_too_early_gets_through_at_once,
    announced::a_host_that_gave_up_gets_through_with_its_next_packet,
    announced::a_router_has_an_entry_before_the_first_packet,
    announced::a_neighbour_follows_an_address_to_its_new_node,
    announced::a_new_mac_address_is_announced,
    announced::addresses_are_announced_again_when_the_carrier_is_back,
    claimed::a_host_that_has_the_address_is_a_conflict,
    claimed::anothers_probe_at_the_same_time_is_a_conflict,
    claimed::an_echo_of_the_probe_is_no_conflict,
    claimed::a_later_claim_is_a_conflict,
    harmless::a_flood_fills_no_table_and_answers_go_on,
    harmless::no_setting_of_others_is_changed,
}

const GROUP_MAC: [u8; 6] = [0x33, 0x33, 0xff, 0xab, 0xcd, 0xef];
const ALL_NODES_MAC: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];
const ALL_ROUTERS_MAC: [u8; 6] = [0x33, 0x33, 0, 0, 0, 2];

const ROUTER: u8 = 0x80;
const SOLICITED: u8 = 0x40;
const OVERRIDE: u8 = 0x20;

fn all_nodes() -> Ipv6Addr {
    "ff02::1".parse().unwrap()
}

fn all_routers() -> Ipv6Addr {
    "ff02::2".parse().unwrap()
}

/// A good solicitation to the group of the pods, from the host.
fn ask(target: Ipv6Addr) -> Vec<u8> {
    icmpv6((GROUP_MAC, HOST_MAC), host(), group(), 255, &solicitation(target, &link_layer(1, HOST_MAC)))
}
