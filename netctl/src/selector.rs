//! `JOB` or `JOB/GROUP` on the command line.

use std::{fmt, str::FromStr};

use scheduler_core::name::{self, JOB_NAME_LEN_MAX};

/// A job, or one group of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Selector {
    pub(crate) job: String,
    /// None: every group of the job.
    pub(crate) group: Option<String>,
}

impl FromStr for Selector {
    type Err = String;

    fn from_str(text: &str) -> Result<Selector, String> {
        let (job, group) = match text.split_once('/') {
            Some((job, group)) => (job, Some(group)),
            None => (text, None),
        };
        for name in [Some(job), group].into_iter().flatten() {
            name::check(name, JOB_NAME_LEN_MAX).map_err(|error| format!("{error}; give JOB or JOB/GROUP"))?;
        }
        Ok(Selector { job: job.to_owned(), group: group.map(str::to_owned) })
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.group {
            Some(group) => write!(f, "{}/{group}", self.job),
            None => f.write_str(&self.job),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jobs_and_groups_are_read_and_written() {
        for text in ["hello", "hello/web", "a-1/b"] {
            assert_eq!(text.parse::<Selector>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn other_texts_are_refused() {
        for text in ["", "/", "hello/", "/web", "Hello", "a/b/c", "-a", "a b"] {
            assert!(text.parse::<Selector>().is_err(), "{text}");
        }
    }
}
