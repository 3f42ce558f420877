//! What may be the name of a job, group, task or node: an RFC 1123 label.

/// The most bytes in a job's, group's or task's name: two of them and a suffix make a pod's.
pub const JOB_NAME_LEN_MAX: usize = 32;

/// The most bytes in a node's, user's or load balancer's name.
pub const NODE_NAME_LEN_MAX: usize = 63;

/// Why a text is not a name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Nothing was given.
    #[error("a name is missing")]
    Empty,
    /// More bytes than fit.
    #[error("the name `{name}` has {len} characters; at most {max} fit")]
    TooLong {
        /// Its beginning.
        name: String,
        /// Its length.
        len: usize,
        /// How many fit.
        max: usize,
    },
    /// A character that host names do not have, or one in the wrong place.
    #[error("the name `{0}` is not of a-z, 0-9 and `-` alone, with a letter or digit at both ends")]
    Characters(String),
}

/// Checks that `name` is an RFC 1123 label of at most `max` bytes.
///
/// # Errors
/// [`NameError`], in words for the one who wrote it.
pub fn check(name: &str, max: usize) -> Result<(), NameError> {
    if name.is_empty() {
        return Err(NameError::Empty);
    }
    if name.len() > max {
        return Err(NameError::TooLong { name: name.chars().take(max).collect(), len: name.len(), max });
    }
    let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    if !name.bytes().all(inner) || name.starts_with('-') || name.ends_with('-') {
        return Err(NameError::Characters(name.to_owned()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_names() {
        for name in ["a", "web", "n1", "0-a-9"] {
            assert_eq!(check(name, 32), Ok(()));
        }
    }

    #[test]
    fn what_dns_would_not_take_is_refused() {
        assert_eq!(check("", 32), Err(NameError::Empty));
        for name in ["Web", "a_b", "-a", "a-", "a.b", "ü", "a b", "a/b"] {
            assert_eq!(check(name, 32), Err(NameError::Characters(name.to_owned())));
        }
        assert!(matches!(check(&"a".repeat(33), 32), Err(NameError::TooLong { len: 33, .. })));
    }
}
