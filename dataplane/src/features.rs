//! What this kernel and machine offer, found out by trying and not by version.

use std::fmt;

use crate::{
    bpf::{Bpf, BpfError, BpfFeatures},
    nft, sysctl,
};

/// What this kernel and machine offer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Features {
    /// BPF programs can be used, or why not.
    pub bpf: Result<(), NoBpf>,
    /// Programs hang as TCX links; without it as clsact filters.
    pub tcx: bool,
    /// IPv6 can be forwarded per interface (Linux 6.17); without it all interfaces forward.
    pub force_forwarding: bool,
    /// `nft` is there and the kernel answers it.
    pub nft: bool,
}

/// Why BPF programs cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NoBpf {
    /// On one line.
    pub reason: String,
    /// It is not the kernel: the BPF file system is not mounted where the pins go.
    pub unmounted: bool,
}

impl Features {
    pub(crate) async fn probe(bpf_error: Option<&BpfError>) -> Self {
        let BpfFeatures { tcx, .. } = Bpf::probe();
        Self {
            bpf: bpf_error.map_or(Ok(()), |error| Err(NoBpf::of(error))),
            tcx,
            force_forwarding: sysctl::exists("net/ipv6/conf/all/force_forwarding"),
            nft: nft::works().await,
        }
    }
}

impl NoBpf {
    /// The verifier's log is many lines, and goes to the agent's log; its error number tells what kind it is.
    fn of(error: &BpfError) -> Self {
        let all = chain(error);
        tracing::debug!(reason = all, "BPF cannot be used");
        let first = all.lines().next().unwrap_or_default();
        let reason = match error {
            BpfError::Verifier { log, source, .. } if log.contains('\n') => format!("{first}: {source}"),
            _ => first.to_owned(),
        };
        Self { reason, unmounted: matches!(error, BpfError::NoBpfFs(_)) }
    }
}

impl fmt::Display for NoBpf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)
    }
}

/// An error with its causes, one after the other.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}

impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = |has: bool| if has { "yes" } else { "no" };
        match &self.bpf {
            Ok(()) => writeln!(f, "bpf: yes")?,
            Err(reason) => writeln!(f, "bpf: no ({reason})")?,
        }
        writeln!(f, "tcx: {}", word(self.tcx))?;
        writeln!(f, "force_forwarding: {}", word(self.force_forwarding))?;
        write!(f, "nft: {}", word(self.nft))
    }
}
