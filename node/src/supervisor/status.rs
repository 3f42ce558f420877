//! What agent and supervisor say to each other on `supervisor.sock`: one JSON value per line.
//!
//! The supervisor sends its [`Status`] on connect and after each change; the agent sends [`Command`]s. Unknown
//! fields are ignored, so that an agent understands a supervisor of another version.

use std::collections::BTreeMap;

use hextet_lifecycle::Ending;
use serde::{Deserialize, Serialize};

/// The file name of the socket in a pod's run folder.
pub const SOCKET_FILE: &str = "supervisor.sock";
/// The file name of the lock in a pod's run folder; the supervisor holds it for its whole life.
pub const LOCK_FILE: &str = "lock";
/// The longest line either side accepts.
pub const LINE_BYTES_MAX: usize = 64 * 1024;
/// Messages about a task are cut to this length.
pub const MESSAGE_BYTES_MAX: usize = 240;

/// What the agent tells a supervisor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Command {
    /// Stop every task and exit.
    Stop,
    /// Read `spec.json` again: restart tasks that changed, start new ones, stop those that are gone.
    Update,
}

/// What a supervisor says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The supervisor's process id.
    pub pid: u32,
    /// Which spec it runs.
    pub fingerprint: String,
    /// Inode of the network namespace it lives in: another namespace of the same name is not the pod's.
    #[serde(default)]
    pub netns_inode: Option<u64>,
    /// The last status: every task has ended and the supervisor exits.
    #[serde(default)]
    pub stopped: bool,
    /// How a task ended by itself last, or why it could not be started, and what it wrote before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ending: Option<Ending>,
    /// By task name.
    pub tasks: BTreeMap<String, TaskStatus>,
}

/// What a supervisor says of one task.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskStatus {
    /// What it does now.
    pub state: TaskState,
    /// Its process id while it runs.
    #[serde(default)]
    pub pid: Option<u32>,
    /// How often it was started again after it had ended by itself.
    pub restarts: u32,
    /// How it ended last or why it could not be started; empty when it never ended.
    #[serde(default)]
    pub message: String,
}

/// What a task does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TaskState {
    /// Not started yet.
    #[default]
    Starting,
    /// Its process lives.
    Running,
    /// It ended and waits for its next start.
    Failed,
    /// It was told to end.
    Stopping,
}

/// Cuts a message to [`MESSAGE_BYTES_MAX`], at a character.
pub fn bounded_message(mut message: String) -> String {
    if message.len() > MESSAGE_BYTES_MAX {
        message.truncate(message.floor_char_boundary(MESSAGE_BYTES_MAX - 3));
        message.push_str("...");
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_one_word() {
        assert_eq!(serde_json::to_string(&Command::Stop).unwrap(), "\"stop\"");
    }

    #[test]
    fn a_status_of_a_later_version_is_understood() {
        let text =
            r#"{"pid":7,"fingerprint":"x","colour":"red","tasks":{"a":{"state":"running","restarts":2}}}"#;
        let status: Status = serde_json::from_str(text).unwrap();
        assert_eq!(status.tasks["a"].state, TaskState::Running);
        assert_eq!(status.netns_inode, None);
    }

    #[test]
    fn a_long_message_is_cut_at_a_character() {
        let cut = bounded_message("é".repeat(MESSAGE_BYTES_MAX));
        assert!(cut.len() <= MESSAGE_BYTES_MAX && cut.ends_with("é..."), "{cut}");
        assert_eq!(bounded_message("short".into()), "short");
    }
}
