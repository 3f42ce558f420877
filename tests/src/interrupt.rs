//! Ctrl-C for work that has to clean up after itself: a flag that every wait and command looks at.
//!
//! The signals are handled, not blocked: a blocked signal would stay blocked in the programs that we start.

use nix::libc::c_int;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

use anyhow::{Context, Result};

use crate::wait::set_interrupted;

const SIGNALS: [Signal; 2] = [Signal::SIGINT, Signal::SIGTERM];

/// From now on Ctrl-C and SIGTERM make waits and commands of this process fail with `interrupted`.
///
/// # Errors
/// When the kernel does not take the handler.
pub fn catch() -> Result<()> {
    install(SigHandler::Handler(note))
}

/// Lets what follows, the clearing up, run to its end.
///
/// # Errors
/// When the kernel does not take the handler.
pub fn ignore() -> Result<()> {
    install(SigHandler::SigIgn)?;
    set_interrupted(false);
    Ok(())
}

#[expect(unsafe_code, reason = "there is no safe way to handle a signal")]
fn install(handler: SigHandler) -> Result<()> {
    let action = SigAction::new(handler, SaFlags::SA_RESTART, SigSet::empty());
    for signal in SIGNALS {
        // SAFETY: the only handler that is installed is `note`, which does no more than store to an atomic,
        // and that is allowed in a signal handler (signal-safety(7)).
        unsafe { sigaction(signal, &action) }.context("cannot handle Ctrl-C")?;
    }
    Ok(())
}

extern "C" fn note(_signal: c_int) {
    set_interrupted(true);
}
