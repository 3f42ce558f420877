//! The BPF object: one file per program, their maps in `maps.rs`. What they decide is decided in
//! `dataplane-common`; here it meets the kernel.
//!
//! | program | hook |
//! | --- | --- |
//! | `uplink_ingress` (`ndp_proxy.rs`, `masquerade.rs`) | uplink, ingress |
//! | `uplink_egress` (`masquerade.rs`) | uplink, egress |
//! | `uplink_backstop` (`backstop.rs`) | uplink, egress, behind the others |
//! | `fragment_egress`, `fragment_ingress` (`fragment.rs`) | none: the uplink's programs hand fragments over to them |
//! | `pod_guard` | host side of each pod's veth, ingress |
//! | `hairpin_ipv4`, `hairpin_ipv6` (`hairpin.rs`) | none: the guard hands over to them |
//!
//! It is built for `bpfel-unknown-none` by `dataplane/build.rs`. On the host it compiles for clippy alone.
#![cfg_attr(target_arch = "bpf", no_std)]
#![cfg_attr(target_arch = "bpf", no_main)]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]

mod answer;
mod backstop;
mod fragment;
mod hairpin;
mod log;
mod maps;
mod masquerade;
mod ndp_proxy;
mod pod_guard;
mod skb;
mod tables;
mod uplink_egress;
mod uplink_ingress;

/// Verdict: on to the next program, and in the end to the kernel (`TCX_NEXT`, `TC_ACT_UNSPEC`).
const NEXT: i32 = -1;
/// Verdict: dropped (`TCX_DROP`, `TC_ACT_SHOT`).
const DROP: i32 = 2;

#[cfg(not(target_arch = "bpf"))]
fn main() {}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}

/// The kernel's helpers for packets are for programs under the GPL.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
