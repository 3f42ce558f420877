//! What happens to a pod, step by step, as a graph: who does each step, what it waits for, how long it may take.
//!
//! [`Graph`] is checked when it is made: unknown names, two steps of one name and circles are refused. [`Run`] walks
//! it, forwards to bring a pod up and backwards to take it down, with as many steps at a time as the graph allows.
//! [`pod`] holds the steps of a pod, [`hook`] the programs that a user adds to them, [`status`] what is told of them,
//! [`ending`] what is kept of a failure.
//!
//! It starts no program and reads no clock: what happened and when comes in, what is to be done comes out. Node and
//! server share it, and neither depends on the other.
#![forbid(unsafe_code)]

pub mod ending;
pub mod graph;
pub mod hook;
pub mod pod;
pub mod run;
pub mod status;
pub mod step;

pub use self::{
    ending::Ending,
    graph::{Graph, GraphError},
    hook::{Hook, HookError},
    run::{Command, Event, Run},
    status::{Chain, Phase, StepStatus},
    step::{Owner, Retry, Step},
};
