//! `JOB` or `JOB/GROUP` on the command line.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

const NAME_LEN_MAX: usize = 63;

/// A job, or one group of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Selector {
    pub(crate) job: String,
    /// Empty: every group of the job.
    pub(crate) group: String,
}

impl Selector {
    /// A name for nginx.
    pub(crate) fn upstream(&self) -> String {
        match self.group.as_str() {
            "" => format!("hextet_{}", self.job),
            group => format!("hextet_{}_{group}", self.job),
        }
    }
}

impl FromStr for Selector {
    type Err = String;

    fn from_str(text: &str) -> Result<Selector, String> {
        let (job, group) = match text.split_once('/') {
            Some((job, "")) => return Err(format!("a group is missing after `{job}/`")),
            Some((job, group)) => (job, group),
            None => (text, ""),
        };
        if is_name(job) && (group.is_empty() || is_name(group)) {
            Ok(Selector { job: job.to_owned(), group: group.to_owned() })
        } else {
            Err(format!("`{text}` is not JOB or JOB/GROUP: names are of a-z, 0-9 and -"))
        }
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.group.as_str() {
            "" => f.write_str(&self.job),
            group => write!(f, "{}/{group}", self.job),
        }
    }
}

/// RFC 1123 section 2.1, in lower case. Such a name can be written into a configuration as it is.
pub(crate) fn is_name(text: &str) -> bool {
    let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    (1..=NAME_LEN_MAX).contains(&text.len()) && text.chars().all(fits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selectors_are_read_and_written() {
        for text in ["hello", "hello/web"] {
            assert_eq!(text.parse::<Selector>().unwrap().to_string(), text);
        }
        for text in ["", "hello/", "/web", "a b", "a;b", "a/b/c"] {
            assert!(text.parse::<Selector>().is_err(), "{text}");
        }
    }
}
