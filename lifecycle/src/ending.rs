//! How a task or a hook of a pod ended last, and the last lines that it wrote before: what is kept of a failure.

use serde::{Deserialize, Serialize};

/// Lines of output that are kept.
pub const OUTPUT_LINES_MAX: usize = 10;
/// Bytes of them.
pub const OUTPUT_BYTES_MAX: usize = 2048;
/// Bytes of what ended and how.
pub const WHAT_BYTES_MAX: usize = 512;

/// How a task or a hook ended by itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ending {
    /// What ended, and how: `task web: exited with status 3 after 0.1 s`.
    pub what: String,
    /// The last lines that it wrote, [`OUTPUT_LINES_MAX`] and [`OUTPUT_BYTES_MAX`] at most.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub output: String,
    /// It was the last attempt of a hook that is not optional.
    #[serde(default, skip_serializing_if = "is_false")]
    pub for_good: bool,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde gives a reference")]
fn is_false(it: &bool) -> bool {
    !*it
}

impl Ending {
    /// An ending, bounded and without what commands a terminal.
    #[must_use]
    pub fn new(what: &str, output: &[u8]) -> Ending {
        let what = what[..what.floor_char_boundary(WHAT_BYTES_MAX)].chars().map(tame).collect();
        Ending { what, output: last_lines(output), for_good: false }
    }

    /// Whether it tells nobody anything new beside another: a task that is started again and again says the same each
    /// time but for times, ports and process ids.
    #[must_use]
    pub fn is_like(&self, other: &Ending) -> bool {
        let subject = |ending: &Ending| ending.what.split(':').next().map(str::to_owned);
        let is_same = subject(self) == subject(other) && self.for_good == other.for_good;
        is_same && shape(&self.output).eq(shape(&other.output))
    }
}

/// The last lines of an output, without control characters; a line that does not fit is cut at its beginning.
#[must_use]
pub fn last_lines(output: &[u8]) -> String {
    let start = output.len().saturating_sub(OUTPUT_BYTES_MAX);
    let text = String::from_utf8_lossy(&output[start..]);
    let is_cut = start > 0 && output[start - 1] != b'\n';
    // The line in whose middle it begins goes, if there are others.
    let whole = text.trim_end().split_once('\n').filter(|_| is_cut).map_or(&*text, |(_, rest)| rest);
    let lines: Vec<&str> = whole.trim_end().lines().collect();
    let lines = &lines[lines.len().saturating_sub(OUTPUT_LINES_MAX)..];
    let tamed: Vec<String> = lines.iter().map(|line| line.chars().map(tame).collect()).collect();
    let text = tamed.join("\n");
    // What was no UTF-8 takes more room now.
    text[text.ceil_char_boundary(text.len().saturating_sub(OUTPUT_BYTES_MAX))..].to_owned()
}

fn tame(c: char) -> char {
    match c {
        '\t' => ' ',
        c if c.is_control() => '?',
        c => c,
    }
}

/// The text with each number as one digit.
fn shape(text: &str) -> impl Iterator<Item = char> {
    let mut in_number = false;
    text.chars().filter_map(move |c| {
        let is_again = c.is_ascii_digit() && in_number;
        in_number = c.is_ascii_digit();
        (!is_again).then_some(if in_number { '0' } else { c })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_ten_lines_are_kept() {
        let text: String = (0..30).map(|line| format!("line {line}\n")).collect();
        let kept = last_lines(text.as_bytes());
        assert_eq!(kept.lines().count(), OUTPUT_LINES_MAX);
        assert!(kept.starts_with("line 20\n") && kept.ends_with("line 29"), "{kept}");
        assert_eq!(last_lines(b"one\n\n\n"), "one");
        assert_eq!(last_lines(b""), "");
    }

    #[test]
    fn the_line_that_does_not_fit_goes_unless_it_is_the_only_one() {
        let long = "x".repeat(3000);
        let last = "the last";
        assert_eq!(last_lines(format!("{long}\n{last}\n").as_bytes()), last);
        assert_eq!(last_lines(format!("{long}\n").as_bytes()).len(), OUTPUT_BYTES_MAX - 1);
        assert_eq!(last_lines(long.as_bytes()).len(), OUTPUT_BYTES_MAX);
    }

    #[test]
    fn what_is_kept_commands_no_terminal_and_has_a_bound_whatever_was_written() {
        assert_eq!(last_lines(b"\x1b[2Jred\ttwo\r\n\x07\x9b"), "?[2Jred two\n?\u{fffd}");
        assert!(last_lines(&[0xff; 5000]).len() <= OUTPUT_BYTES_MAX);
        assert!(Ending::new(&"\u{7}é".repeat(900), b"").what.len() <= WHAT_BYTES_MAX);
    }

    #[test]
    fn numbers_alone_make_no_news() {
        let ending = |what: &str, output: &str| Ending::new(what, output.as_bytes());
        let first = ending("task web: exited with status 3 after 0.1 s", "12:00:01 [77] no such table");
        assert!(
            ending("task web: exited with status 3 after 9.8 s", "12:00:31 [1234] no such table")
                .is_like(&first)
        );
        assert!(!ending("task web: exited with status 3", "12:00:31 [1234] no route").is_like(&first));
        assert!(!ending("task db: exited with status 3", "12:00:01 [77] no such table").is_like(&first));
    }
}
