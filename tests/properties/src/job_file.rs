//! Job files: what is refused is refused with a place that is in the file.

use crate::netctl::job_file::{FILE_LEN_MAX, JobFileError, parse};

/// The property.
///
/// # Panics
/// When it does not hold.
pub fn holds(data: &[u8]) {
    if data.len() as u64 > FILE_LEN_MAX {
        return;
    }
    match parse("fuzz.yaml", data) {
        Ok(jobs) => assert!(!jobs.is_empty(), "a file without jobs is read"),
        Err(JobFileError::Content { mark: Some(mark), message, .. }) => {
            // A carriage return alone is a line break in YAML, and the end of the file may be a line of its own.
            let lines = data.iter().filter(|byte| [b'\n', b'\r'].contains(byte)).count() + 2;
            assert!((1..=lines).contains(&mark.line), "line {} of {lines}: {message}", mark.line);
            assert!(mark.column >= 1, "column 0: {message}");
        }
        Err(_) => {}
    }
}
