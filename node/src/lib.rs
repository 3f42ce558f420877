//! The node agent: assignments in, dataplane and processes out.
//!
//! [`run`] is `netctl node`: it joins a cluster once, keeps all it needs in its own store, brings kernel and
//! processes to what it was told, and goes on without a server and after a reboot. [`supervisor::run`] is
//! `netctl supervise`, one process per pod, which goes on without the agent. The other functions are the
//! commands about a node; they ask the agent, and do without when there is none.
//!
//! It deliberately holds no policy: where pods run is the scheduler's word, what the kernel must hold follows
//! from it in `dataplane-core`.
//!
//! Under systemd the agent's unit needs `KillMode=process`, so that supervisors stay when it is stopped or
//! upgraded.
#![deny(unsafe_code)]

mod agent;
mod assignment;
mod attach;
mod backoff;
mod behind;
mod certificates;
mod commands;
pub mod config;
mod conflict;
mod desired;
mod events;
mod explain;
mod farewell;
mod files;
mod hardware;
mod hook_keeper;
mod identity;
mod join;
mod keeper;
mod lease;
mod lease_file;
mod leftovers;
mod local;
mod lock;
mod log_sender;
mod logs;
mod lost_peers;
mod news;
mod pod_ipv4;
mod pod_state;
mod pods;
mod port_log;
mod processes;
mod refusal;
mod rejoin;
mod reports;
mod roster;
mod scripts;
pub mod socket;
mod start;
mod store;
pub mod supervisor;
mod teardown;
mod view;

pub use self::{
    commands::{counters, down, events, flows, plan, show, whois},
    config::{ChoiceError, MasqueradeChoice, NdpChoice, NodeConfig, NodePaths, PodPrefixChoice},
    events::NodeEvent,
    port_log::Holder,
    start::run,
    view::{FlowView, NodeView, PodView},
};
