//! The BPF half of the shell: loads the object, adopts what earlier agents pinned, attaches programs,
//! and reads and writes their maps. It decides nothing: which address is answered for and where a
//! program hangs is planned in `dataplane-core`.
//!
//! Everything works in the network namespace of the calling thread.

mod attach;
mod batch;
mod carry;
mod counters;
mod features;
mod filter;
mod flows;
mod log;
mod object;
mod pins;
mod settings;
mod words;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
};

use aya::{
    Ebpf, EbpfError,
    maps::MapError,
    programs::{ProgramError, SchedClassifier, tc::TcError},
};
pub use dataplane_core::{Masquerade, Program};
pub use flows::{Flow, PortBlock, Swept};
use ipnetwork::Ipv4Network;
use thiserror::Error;

/// The object as built for this agent, aligned for aya's ELF parser.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/hextet.o"));

/// A program of this build on a live interface.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Attachment {
    /// The program.
    pub program: Program,
    /// The interface's name.
    pub ifname: String,
    /// The interface's index.
    pub ifindex: u32,
}

/// What the kernel offers to the programs, found out by trying.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct BpfFeatures {
    /// The calling process may load programs of the type `sched_cls`.
    pub sched_cls: bool,
    /// TCX links exist; without them programs hang as filters on a clsact qdisc.
    pub tcx: bool,
}

/// What a pod's guard lets through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuardEntry {
    /// The pod's only IPv6 source.
    pub ipv6: Ipv6Addr,
    /// The pod's only IPv4 source.
    pub ipv4: Ipv4Addr,
    /// The range of all pods, to which no pod may send IPv4.
    pub pod_ipv4: Ipv4Network,
    /// The pod's only source MAC address.
    pub pod_mac: [u8; 6],
    /// The MAC address of the veth's host side, given to those who ask for `fe80::1`.
    pub host_mac: [u8; 6],
}

/// One counter of the programs, summed over the CPUs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counter {
    /// What counts: the NDP proxy, a half of the masquerade, the guard.
    pub part: &'static str,
    /// The verdict or the reason of a drop.
    pub name: &'static str,
    /// How often.
    pub count: u64,
}

/// How programs hang on interfaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// Pinned TCX links.
    Tcx,
    /// Filters on a clsact qdisc, which stay as they are when the process ends.
    Clsact,
}

/// What may be chosen when the object is opened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BpfOptions {
    /// Where programs hang; TCX where the kernel has it when this is `None`.
    pub hook: Option<Hook>,
    /// Capacities of maps by name, instead of those of `dataplane-common`.
    pub capacities: BTreeMap<&'static str, u32>,
}

/// Why the kernel's BPF side cannot be used or changed.
#[derive(Debug, Error)]
pub enum BpfError {
    /// No BPF file system where the pins go.
    #[error("{} is not on a BPF file system: mount -t bpf bpf /sys/fs/bpf", .0.display())]
    NoBpfFs(PathBuf),
    /// The process may not load programs.
    #[error("may not load BPF programs: run as root, or with CAP_BPF and CAP_NET_ADMIN")]
    NotPermitted,
    /// A call of the operating system failed on a path.
    #[error("cannot {action} {}", path.display())]
    Path {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The object cannot be parsed, or a map of it cannot be made or adopted.
    #[error("cannot load the BPF object with pins in {}", dir.display())]
    Object {
        /// The folder of the pins.
        dir: PathBuf,
        /// Why it failed.
        #[source]
        source: Box<EbpfError>,
    },
    /// The kernel's verifier refused a program.
    #[error("the kernel refused the BPF program {program}: {log}")]
    Verifier {
        /// The program.
        program: Program,
        /// The last lines of the verifier's log.
        log: String,
        /// Its error number.
        #[source]
        source: io::Error,
    },
    /// A program cannot be loaded, found or asked about.
    #[error("cannot use the BPF program {program}")]
    Program {
        /// The program.
        program: Program,
        /// Why it failed.
        #[source]
        source: Box<ProgramError>,
    },
    /// A program cannot be put on an interface or taken off.
    #[error("cannot {action} {program} on {ifname}")]
    Attach {
        /// What was tried.
        action: &'static str,
        /// The program.
        program: Program,
        /// The interface.
        ifname: String,
        /// Why it failed.
        #[source]
        source: AttachError,
    },
    /// A map cannot be read or written.
    #[error("cannot {action} the BPF map {map}")]
    Map {
        /// What was tried.
        action: &'static str,
        /// The map's name.
        map: &'static str,
        /// Why it failed.
        #[source]
        source: Box<MapError>,
    },
    /// A map is not in the object, which happens only when agent and object are of different builds.
    #[error("the BPF object has no map {0}: build the agent anew")]
    NoMap(&'static str),
    /// A map is full.
    #[error("the BPF map {map} is full with {capacity} entries")]
    MapFull {
        /// The map's name.
        map: &'static str,
        /// Its capacity.
        capacity: u32,
    },
    /// The qdiscs of the interfaces cannot be listed.
    #[error("cannot list the qdiscs of this network namespace")]
    Qdiscs(#[source] io::Error),
    /// The log of the programs cannot be read.
    #[error("cannot read the log of the BPF programs")]
    Log(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// Why a program does not get onto an interface or off it.
#[derive(Debug, Error)]
pub enum AttachError {
    /// From the programs' side.
    #[error(transparent)]
    Program(Box<ProgramError>),
    /// From the qdisc's side.
    #[error("cannot use the clsact qdisc")]
    Qdisc(#[source] TcError),
    /// A netlink request for filters failed.
    #[error("cannot talk to the kernel about filters")]
    Filters(#[source] io::Error),
    /// A pin cannot be read, made or removed.
    #[error("cannot use the pin {}", path.display())]
    Pin {
        /// The pin.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl From<ProgramError> for AttachError {
    fn from(error: ProgramError) -> Self {
        Self::Program(Box::new(error))
    }
}

/// The loaded programs and their maps.
///
/// Dropping it detaches nothing: maps, TCX links and filters stay until [`Bpf::detach`] or [`Bpf::teardown`].
pub struct Bpf {
    /// The folder of this layout's pins.
    pins: PathBuf,
    hook: Hook,
    object: Ebpf,
    /// By program, what tells it from others of its name.
    builds: BTreeMap<Program, object::Build>,
    sweeper: flows::Sweeper,
}

impl Bpf {
    /// Loads the object and adopts the maps pinned under `dir/v<LAYOUT>`.
    ///
    /// # Errors
    /// [`BpfError::NoBpfFs`], [`BpfError::NotPermitted`], [`BpfError::Verifier`] and what else can go wrong.
    pub fn open(dir: &Path) -> Result<Bpf, BpfError> {
        Self::open_with(dir, &BpfOptions::default())
    }

    /// As [`Bpf::open`], with choices.
    ///
    /// # Errors
    /// As [`Bpf::open`].
    pub fn open_with(dir: &Path, options: &BpfOptions) -> Result<Bpf, BpfError> {
        let pins = pins::prepare(dir)?;
        let mut object = object::load(&pins, &options.capacities)?;
        let builds = object::load_programs(&mut object, &pins)?;
        object::set_tails(&mut object)?;
        let hook = options.hook.unwrap_or_else(|| if features::tcx() { Hook::Tcx } else { Hook::Clsact });
        attach::collect_stale(&pins);
        let carried = carry::flows(dir, &mut object)?;
        if carried > 0 {
            tracing::info!(flows = carried, "masquerade flows of an older build carried over");
        }
        Ok(Bpf { pins, hook, object, builds, sweeper: flows::Sweeper::default() })
    }

    /// The folder of this layout's pins.
    pub(crate) fn pins(&self) -> &Path {
        &self.pins
    }

    /// Whether programs hang as TCX links, whose loss the kernel does not announce.
    pub(crate) fn uses_tcx(&self) -> bool {
        self.hook == Hook::Tcx
    }

    /// What the kernel has, by trying.
    pub fn probe() -> BpfFeatures {
        features::probe()
    }

    /// The loaded object, for tests that run its programs on bytes.
    pub fn object(&mut self) -> &mut Ebpf {
        &mut self.object
    }

    /// What hangs where: programs of this build on interfaces that exist. An older build's program is left
    /// out, so that it is attached anew, which replaces it without a gap.
    ///
    /// # Errors
    /// [`BpfError::Path`] or [`BpfError::Attach`] when the kernel cannot be asked.
    pub fn attached(&self) -> Result<BTreeSet<Attachment>, BpfError> {
        attach::attached(&self.pins, &self.builds)
    }

    /// Puts `program` on the interface, or replaces there what an earlier agent attached, atomically.
    ///
    /// # Errors
    /// [`BpfError::Attach`].
    pub fn attach(&mut self, program: Program, ifindex: u32, ifname: &str) -> Result<(), BpfError> {
        let (hook, pins) = (self.hook, self.pins.clone());
        let place = attach::Place { pins: &pins, program, ifindex, ifname };
        let classifier = self.program(program)?;
        attach::attach(&place, hook, classifier).map_err(|source| BpfError::Attach {
            action: "attach",
            program,
            ifname: ifname.to_owned(),
            source,
        })?;
        if program == Program::UplinkEgress {
            // Flows that began while the older program was still there.
            let dir = self.dir().to_owned();
            carry::flows(&dir, &mut self.object)?;
        }
        Ok(())
    }

    /// Ends the programs and maps of builds with another layout, whose places are taken by now.
    ///
    /// # Errors
    /// [`BpfError::Path`].
    pub fn end_other_layouts(&mut self) -> Result<(), BpfError> {
        carry::end_others(self.dir())
    }

    fn dir(&self) -> &Path {
        self.pins.parent().unwrap_or(&self.pins)
    }

    /// Takes `program` off the interface; fine when it is not there or the interface has gone.
    ///
    /// # Errors
    /// [`BpfError::Attach`].
    pub fn detach(&mut self, program: Program, ifname: &str) -> Result<(), BpfError> {
        attach::detach(&self.pins, program, ifname).map_err(|source| BpfError::Attach {
            action: "detach",
            program,
            ifname: ifname.to_owned(),
            source,
        })
    }

    /// The addresses that the NDP proxy answers for, with the MAC address it gives.
    ///
    /// # Errors
    /// [`BpfError::Map`].
    pub fn local_pods(&self) -> Result<BTreeMap<Ipv6Addr, [u8; 6]>, BpfError> {
        settings::local_pods(&self.object)
    }

    /// Answers for `pod` with `mac` (the uplink's) from now on.
    ///
    /// # Errors
    /// [`BpfError::MapFull`] or [`BpfError::Map`].
    pub fn set_local_pod(&mut self, pod: Ipv6Addr, mac: [u8; 6]) -> Result<(), BpfError> {
        settings::set_local_pod(&mut self.object, pod, mac)
    }

    /// Answers for `pod` no longer; fine when it did not.
    ///
    /// # Errors
    /// [`BpfError::Map`].
    pub fn remove_local_pod(&mut self, pod: Ipv6Addr) -> Result<(), BpfError> {
        settings::remove_local_pod(&mut self.object, pod)
    }

    /// The guards by index of the veth's host side.
    ///
    /// # Errors
    /// [`BpfError::Map`].
    pub fn guards(&self) -> Result<BTreeMap<u32, GuardEntry>, BpfError> {
        settings::guards(&self.object)
    }

    /// What the interface's pod may send from now on. A guarded interface without an entry passes nothing.
    ///
    /// # Errors
    /// [`BpfError::MapFull`] or [`BpfError::Map`].
    pub fn set_guard(&mut self, ifindex: u32, entry: GuardEntry) -> Result<(), BpfError> {
        settings::set_guard(&mut self.object, ifindex, entry)
    }

    /// Forgets the interface's guard entry; fine when there is none.
    ///
    /// # Errors
    /// [`BpfError::Map`].
    pub fn remove_guard(&mut self, ifindex: u32) -> Result<(), BpfError> {
        settings::remove_guard(&mut self.object, ifindex)
    }

    /// What is translated now.
    ///
    /// # Errors
    /// [`BpfError::Map`].
    pub fn masquerade(&self) -> Result<Option<Masquerade>, BpfError> {
        settings::masquerade(&self.object)
    }

    /// Translates so from now on, or no longer. Ports that the host gives to its own sockets
    /// (`ip_local_port_range` of this network namespace) are read anew.
    ///
    /// # Errors
    /// [`BpfError::Map`] or [`BpfError::Path`].
    pub fn set_masquerade(&mut self, masquerade: Option<&Masquerade>) -> Result<(), BpfError> {
        settings::set_masquerade(&mut self.object, masquerade)
    }

    /// Frees the flows that have expired at `now_ns` ([`monotonic_ns`]), and says how many and who has which
    /// ports.
    ///
    /// # Errors
    /// [`BpfError::Map`].
    pub fn sweep_flows(&mut self, now_ns: u64) -> Result<Swept, BpfError> {
        self.sweeper.sweep(&mut self.object, now_ns)
    }

    /// Detaches every program that is pinned under `dir` and removes the pins, of every layout version.
    /// Goes on after a failure and returns all of them.
    pub fn teardown(dir: &Path) -> Vec<BpfError> {
        pins::teardown(dir)
    }

    /// The counters, read from the pins under `dir`: works while no agent runs. Empty when nothing is pinned.
    ///
    /// # Errors
    /// [`BpfError::Map`] when there are pins that cannot be read.
    pub fn counters(dir: &Path) -> Result<Vec<Counter>, BpfError> {
        counters::read(&pins::layout(dir))
    }

    /// The masquerade's flows that have not ended, from the pins under `dir`: works while no agent runs.
    ///
    /// # Errors
    /// [`BpfError::Map`] when there are pins that cannot be read.
    pub fn flows(dir: &Path) -> Result<Vec<Flow>, BpfError> {
        flows::list(&pins::layout(dir), monotonic_ns())
    }

    /// The private address of the pod that has an outside port now, and the first port of its block; from the
    /// pins under `dir`.
    ///
    /// # Errors
    /// [`BpfError::Map`] when there are pins that cannot be read.
    pub fn port_holder(dir: &Path, port: u16) -> Result<Option<(Ipv4Addr, u16)>, BpfError> {
        flows::holder(&pins::layout(dir), port)
    }

    /// Forwards what the programs log to `tracing` at TRACE (target `dataplane::bpf`), on a task of the
    /// current tokio runtime, until that ends. Switches the programs' logging off when TRACE is off.
    ///
    /// # Errors
    /// [`BpfError::Log`] or [`BpfError::Map`].
    pub fn spawn_logger(&mut self) -> Result<(), BpfError> {
        log::spawn(&mut self.object)
    }

    fn program(&mut self, program: Program) -> Result<&mut SchedClassifier, BpfError> {
        object::program(&mut self.object, program)
    }
}

/// How often the programs of the TCX hook have changed where `program` belongs; none when there is no such interface.
pub(crate) fn hook_revision(program: Program, ifname: &str) -> Option<u64> {
    attach::revision(program, ifname)
}

/// `CLOCK_MONOTONIC` in nanoseconds: the clock of the programs and of [`Bpf::sweep_flows`].
pub fn monotonic_ns() -> u64 {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)
        .map(|t| t.tv_sec() as u64 * 1_000_000_000 + t.tv_nsec() as u64)
        .unwrap_or_default()
}
