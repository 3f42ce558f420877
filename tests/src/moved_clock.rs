//! A process whose wall clock is not the machine's. Its monotonic clock and file times stay as they are.
//!
//! The kernel has no namespace for the wall clock, and the machine's own is everybody's: libfaketime stands between the
//! process and its C library.

use std::{ffi::OsString, process::Command};

use anyhow::{Context, Result, ensure};

/// What a process needs in its environment for its clock to be `days` ahead.
///
/// # Errors
/// When `faketime` cannot be run.
pub fn days_ahead(days: u32) -> Result<Vec<(String, OsString)>> {
    let offset = format!("+{days}d");
    let asked = Command::new("faketime").args(["-f", &offset, "printenv", "LD_PRELOAD"]).output();
    let asked = asked.context("cannot run faketime")?;
    let library = String::from_utf8(asked.stdout).context("faketime names a library")?;
    ensure!(asked.status.success() && !library.trim().is_empty(), "faketime names no library");
    let variables = [
        ("LD_PRELOAD", library.trim()),
        ("FAKETIME", &offset),
        ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
        ("NO_FAKE_STAT", "1"),
    ];
    Ok(variables.map(|(name, value)| (name.to_owned(), value.into())).into())
}
