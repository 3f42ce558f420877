//! What the kernel offers, found out by trying: vendors port features back and leave others out.

use aya::{
    programs::{ProgramType, SchedClassifier, TcAttachType},
    sys::is_program_supported,
};

use super::BpfFeatures;

pub(super) fn probe() -> BpfFeatures {
    BpfFeatures { sched_cls: is_program_supported(ProgramType::SchedClassifier).unwrap_or(false), tcx: tcx() }
}

/// Asks which TCX programs hang on the loopback: kernels without TCX do not know the question.
pub(super) fn tcx() -> bool {
    SchedClassifier::query_tcx("lo", TcAttachType::Ingress).is_ok()
}
