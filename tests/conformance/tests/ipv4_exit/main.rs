//! The way out of the pods' IPv4: what RFC 4787, 5382, 5508 and their kin demand, one test for each clause or for
//! several that one look shows. Each runs with eBPF and with nftables.

mod filtering;
mod fragments;
mod hairpin;
mod icmp;
mod mapping;
mod node;
mod protocols;
mod tcp;
