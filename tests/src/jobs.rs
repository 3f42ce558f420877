//! Jobs that scenarios apply, all after `examples/hello.yaml`.

/// The example that the documents show: three pods, one on each node.
pub const HELLO: &str = include_str!("../../examples/hello.yaml");

/// Where that file is, for commands that are shown to people.
pub const HELLO_PATH: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/hello.yaml");

/// A hundred pods of the same.
pub const HELLO_100: &str = include_str!("../../examples/hello-100.yaml");

/// [`HELLO`] with another number of pods.
pub fn hello(count: u32) -> String {
    replaced(HELLO, "count: 3", &format!("count: {count}"))
}

/// [`hello`] under another name, with more lines in its group.
pub fn hello_as(job: &str, count: u32, group_lines: &[&str]) -> String {
    let lines: String = group_lines.iter().map(|line| format!("\n    {line}")).collect();
    let named = replaced(&hello(count), "\njob: hello\n", &format!("\njob: {job}\n"));
    replaced(&named, &format!("count: {count}"), &format!("count: {count}{lines}"))
}

fn replaced(text: &str, old: &str, new: &str) -> String {
    assert_eq!(text.matches(old).count(), 1, "the example has {old:?} once");
    text.replacen(old, new, 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_can_be_changed() {
        let job = hello_as("cat", 1, &["availability: pet", "constraints: {node: n3}"]);
        assert!(job.contains("\njob: cat\n"), "{job}");
        assert!(job.contains("    count: 1\n    availability: pet\n    constraints: {node: n3}\n"), "{job}");
    }
}
