//! What can happen to a cluster, and why an event may be refused.

use std::{collections::BTreeMap, fmt, net::Ipv6Addr, sync::Arc};

use hextet_address::{ClusterPrefix, GroupId, NodePrefix, SubnetId};
use hextet_lifecycle::Ending;

use crate::{
    authority::{Turn, TurnError},
    cluster::Cluster,
    deploy::{DeployError, DeployId, Move, Order, Schedule},
    endpoint::Selector,
    job::{Job, JobError},
    name::NameError,
    node::{Hello, HelloError},
    pod::{PodId, PodPhase},
    restore::Restored,
    time::WallTime,
    token::{Role, Token, TokenError, TokenId},
};

/// Older versions of a job that its text names, from the history: what is kept beside the job in force need not be there.
pub type Texts = BTreeMap<u32, Arc<Job>>;

/// What happened, or what somebody asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The server starts for the first time.
    ClusterCreated(Cluster),
    /// Somebody wants a job to be so.
    ApplyJob(Job, Texts),
    /// The same, if this is the version in force; 0: if there is no such job.
    ApplyJobAt(u32, Job, Texts),
    /// Somebody wants a job to be as this older version of it was.
    RollbackJob(Job, u32, Texts),
    /// Somebody wants a job to be gone.
    DeleteJob(String),
    /// Somebody wants a job to become so by steps.
    Deploy(Job, Schedule),
    /// The driver of deploys has decided, after so many moves of this one.
    DeployMoved(DeployId, u64, Move),
    /// Somebody wants something of a deploy.
    DeployOrder(DeployId, Order),
    /// Somebody wants a token.
    CreateToken(TokenId, Token),
    /// Somebody shows a token and wants to be known by a key.
    Enroll(Enroll),
    /// Somebody with a certificate wants another key.
    Renew(Renew),
    /// Somebody has used a key that was asked for so.
    KeyUsed(Enrolled, String),
    /// Somebody wants another CA, the one before it, or the end of the old one.
    TurnCa(Turn),
    /// A person or load balancer came with a certificate of the CA that goes out of use: the key, and when it ends.
    LateCa(Enrolled, String, WallTime),
    /// A node has attached.
    NodeHello(String, Hello),
    /// A node that was lost has reported.
    NodeReturned(String),
    /// A node says how its pods are.
    PodReports(String, Vec<PodReport>),
    /// A node says that another machine has the address of one of its pods.
    AddressConflict(String, Conflict),
    /// These nodes do not report, and are dead as far as anybody can tell.
    LeaseEnded(Vec<String>),
    /// These nodes do not report, and may well be alive.
    CutOff(Vec<String>),
    /// What these nodes were last granted is over, by their own clocks.
    Fenced(Vec<String>),
    /// An operator says that a node is dead.
    NodeDead(String),
    /// A node is being taken down and gives its lease back, in this session of its agent.
    NodeLeaving(String, u64),
    /// Load balancers know that these pods terminate, or have had the time to.
    Drained(Vec<PodId>),
    /// A node will not come back.
    DeleteNode(String),
    /// The state is that of a backup, and goes on from there.
    Restored(Restored),
    /// Since a restore as much time has gone by as a lease can take that the server before has granted.
    RestoreSettled,
}

/// Somebody shows a token and wants to be known by a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Enroll {
    /// SHA-256 of the token's secret, in hex.
    pub token: TokenId,
    /// The name that is wanted; none to take the token's.
    pub name: Option<String>,
    /// SHA-256 of the public key, in hex.
    pub key: String,
    /// What a node claims; none for people and load balancers.
    pub node: Option<Claim>,
}

/// Somebody with a certificate wants another key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Renew {
    /// Who.
    pub holder: Enrolled,
    /// SHA-256 of the public key in the certificate, in hex.
    pub old: String,
    /// That of the key that is to take its place.
    pub new: String,
    /// When the certificate for the old key ends.
    pub ends: WallTime,
    /// It can keep the CA that comes with the certificate.
    pub takes_ca: bool,
}

/// What a node claims when it joins; its numbers are drawn at random.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// Which /64 its pods get their addresses in.
    pub prefix: PrefixChoice,
    /// The 16 bits of a /64 of its own, should it get one.
    pub subnet: SubnetId,
    /// The low 24 bits that their addresses share.
    pub group_id: GroupId,
}

/// Which /64 the pods of a node get their addresses in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PrefixChoice {
    /// One of the cluster's /48 that is the node's alone.
    Own,
    /// That of its LAN.
    Lan(NodePrefix),
    /// The cluster's pod prefix, if it is one of these, in which the uplink has addresses; else one of its own.
    OfUplink(Vec<NodePrefix>),
}

/// Another machine has the address of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conflict {
    /// The pod.
    pub pod: PodId,
    /// The address, which may no longer be the pod's.
    pub address: Ipv6Addr,
    /// Who has it.
    pub mac: Mac,
}

/// The Ethernet address of somebody on a LAN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// How a pod is, in the words of its node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodReport {
    /// The pod.
    pub id: PodId,
    /// Starting, running or failed.
    pub phase: PodPhase,
    /// Why, in words.
    pub message: String,
    /// How often a task of it was started again.
    pub restarts: u32,
    /// It was told to stop and has: nothing of it is left.
    pub gone: bool,
    /// The version of its job of which this is told, if the node says so: of another it says nothing.
    pub version: Option<u32>,
    /// How a task or a hook of it ended last; none when its node has nothing new to say of that.
    pub ending: Option<Ending>,
}

/// Why an event changes nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// A field of the job is wrong.
    #[error(transparent)]
    Job(#[from] JobError),
    /// The cluster would have too many pods.
    #[error("the cluster would have {wanted} pods; {max} fit")]
    TooManyPods {
        /// With this change.
        wanted: u64,
        /// How many fit.
        max: u64,
    },
    /// A deploy is not begun, or is in the way.
    #[error(transparent)]
    Deploy(#[from] DeployError),
    /// The CA is not replaced.
    #[error(transparent)]
    Turn(#[from] TurnError),
    /// There is no such job.
    #[error("there is no job `{0}`; `netctl jobs` lists them")]
    NoJob(String),
    /// A rollout names a version that there is not, or that has not the group.
    #[error(
        "groups.{group}.rollout: job {job} has no version {version} with this group; `netctl history job/{job}` lists \
         versions, and this text will be {this}"
    )]
    NoVersion {
        /// The job.
        job: String,
        /// The group.
        group: String,
        /// What was named.
        version: u32,
        /// What this text would be.
        this: u32,
    },
    /// There is no such node.
    #[error("there is no node `{0}`; `netctl nodes` lists them")]
    NoNode(String),
    /// Its pods may be running.
    #[error("node `{0}` still reports; stop its agent and wait until its lease ends")]
    NodeReports(String),
    /// Its pods run, as far as anybody can tell.
    #[error(
        "node `{0}` does not report but may be alive, and its pods with it; if it is dead, say so first: \
         `netctl node dead {0}`"
    )]
    NodeCutOff(String),
    /// What comes late from an agent that has ended.
    #[error("node `{0}` was taken down: `netctl node` on it starts an agent that brings it back")]
    TakenDown(String),
    /// There must never be two of its pods.
    #[error("node `{0}` may still run a pod of which there is only one; try again in a few seconds")]
    NotFenced(String),
    /// What a node says of itself is wrong.
    #[error(transparent)]
    Hello(#[from] HelloError),
    /// The token is not good for this.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// The name is not one.
    #[error(transparent)]
    Name(#[from] NameError),
    /// Another key has the name.
    #[error("the node name `{0}` is taken by another machine; choose another with --name")]
    NameTaken(String),
    /// Somebody else has the key.
    #[error(
        "this key is known here already, of another machine or of an earlier certificate: make a new one"
    )]
    KeyTaken,
    /// Another key is in its place.
    #[error("another key has taken the place of this one")]
    KeyReplaced,
    /// Too many keys.
    #[error("too many keys were replaced; go on with the present one, and try again in some weeks")]
    TooManyRenewals,
    /// Another node has the address.
    #[error(
        "the underlay address {address} is that of node `{node}`, which is not lost: give this node another, or name another of its \
         addresses with --underlay"
    )]
    UnderlayTaken {
        /// What was said.
        address: Ipv6Addr,
        /// Who has it.
        node: String,
    },
    /// Another node has the subnet.
    #[error("the subnet {prefix} is taken by node `{node}`; draw another subnet ID")]
    SubnetTaken {
        /// What was claimed.
        prefix: NodePrefix,
        /// Who has it.
        node: String,
    },
    /// Somebody else has changed the job since it was looked at.
    #[error(
        "job `{job}` is at {}, and not at {}: somebody else has changed it (`netctl history {job}`)",
        version_words(*found),
        version_words(*wanted)
    )]
    OtherVersion {
        /// The job.
        job: String,
        /// The version that should be in force; 0 for none.
        wanted: u32,
        /// The one that is.
        found: u32,
    },
    /// Another node has the group.
    #[error("the group {group} is taken by node `{node}`; draw another group ID")]
    GroupTaken {
        /// What was claimed.
        group: GroupId,
        /// Who has it.
        node: String,
    },
    /// A LAN's prefix that is not one.
    #[error(
        "the pod prefix {prefix} is inside of the cluster's own {cluster}: give the /64 of the LAN, \
         or none, so that each node gets a /64 of its own"
    )]
    PodPrefix {
        /// What was given.
        prefix: NodePrefix,
        /// The cluster's.
        cluster: ClusterPrefix,
    },
    /// A token for a node was used without claiming a subnet, or the other way about.
    #[error("a node enrolls with a subnet ID and a group ID inside the cluster's prefix")]
    Claim,
    /// Too many tokens wait for their use.
    #[error("{0} tokens are kept already; use them, or wait until they are too old")]
    TooManyTokens(usize),
    /// The cluster is there already.
    #[error("the cluster exists already")]
    ClusterExists,
}

fn version_words(version: u32) -> String {
    if version == 0 { "no version".to_owned() } else { format!("version {version}") }
}

/// What an enrolled key is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Enrolled {
    /// What it is.
    pub role: Role,
    /// Its name.
    pub name: String,
}

impl Enrolled {
    /// The URI that its certificate names: `hextet:node/n1`.
    #[must_use]
    pub fn uri(&self) -> String {
        let who = format!("hextet:{}/{}", self.role.word(), self.name);
        match &self.role {
            Role::Lb(selector) => format!("{who}?select={selector}"),
            _ => who,
        }
    }

    /// Reads what [`Enrolled::uri`] wrote.
    #[must_use]
    pub fn from_uri(uri: &str) -> Option<Enrolled> {
        let (word, rest) = uri.strip_prefix("hextet:")?.split_once('/')?;
        let (role, name) = match word {
            "node" => (Role::Node, rest),
            "user" => (Role::User, rest),
            "admin" => (Role::Admin, rest),
            "operator" => (Role::Operator, rest),
            "viewer" => (Role::Viewer, rest),
            "lb" => {
                let (name, selector) = rest.split_once("?select=")?;
                (Role::Lb(selector.parse::<Selector>().ok()?), name)
            }
            _ => return None,
        };
        crate::name::check(name, crate::name::NODE_NAME_LEN_MAX).ok()?;
        Some(Enrolled { role, name: name.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identities_read_back_as_they_are_written() {
        for uri in [
            "hextet:node/n1",
            "hextet:user/alice",
            "hextet:admin/alice",
            "hextet:operator/alice",
            "hextet:viewer/alice",
            "hextet:lb/edge?select=a/b",
            "hextet:lb/edge?select=a",
        ] {
            assert_eq!(Enrolled::from_uri(uri).unwrap().uri(), uri);
        }
        for uri in
            ["", "hextet:root/x", "hextet:node/", "hextet:node/a/b", "hextet:lb/edge", "spiffe://x/node/n1"]
        {
            assert_eq!(Enrolled::from_uri(uri), None, "{uri}");
        }
    }
}
