//! What a supervisor is told to run: `spec.json` in the pod's run folder.
//!
//! Written by the agent, whole and atomically; read by the supervisor when it starts and when it is told that
//! the file has changed. It is not the job's own shape: names are resolved and the environment is complete.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::files;

/// The file name of the spec in a pod's run folder.
pub const SPEC_FILE: &str = "spec.json";

/// Everything that a supervisor needs to know of its pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodSpec {
    /// The pod's id, for messages.
    pub pod: String,
    /// Names this content; the supervisor repeats it in its status, so that the agent knows what runs.
    pub fingerprint: String,
    /// The network namespace to enter; none: stay where the supervisor was started.
    pub netns: Option<PathBuf>,
    /// User and group id of the tasks; none: those of the supervisor.
    pub uid: Option<u32>,
    /// Holds the tasks' logs and their private folders.
    pub folder: PathBuf,
    /// The processes to run.
    pub tasks: Vec<TaskSpec>,
    /// They may run only while the node holds the lease in this file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<PathBuf>,
}

/// One process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskSpec {
    /// Its name, an RFC 1123 label: names its log and its folder.
    pub name: String,
    /// The argument vector; the first is the absolute path of the program.
    pub exec: Vec<String>,
    /// The whole environment.
    pub env: BTreeMap<String, String>,
}

/// Why a spec cannot be read or written.
#[derive(Debug, Error)]
pub enum SpecError {
    /// The file cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The file is not a spec.
    #[error("{path} is not the spec of a pod")]
    Parse {
        /// The file.
        path: PathBuf,
        /// What the parser said.
        #[source]
        source: serde_json::Error,
    },
    /// The file cannot be written.
    #[error("cannot write {path}")]
    Write {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

impl PodSpec {
    /// Reads the spec in `pod_dir`.
    ///
    /// # Errors
    /// [`SpecError::Read`] and [`SpecError::Parse`].
    pub fn load(pod_dir: &Path) -> Result<PodSpec, SpecError> {
        let path = pod_dir.join(SPEC_FILE);
        let text = fs::read(&path).map_err(|source| SpecError::Read { path: path.clone(), source })?;
        serde_json::from_slice(&text).map_err(|source| SpecError::Parse { path, source })
    }

    /// Writes the spec into `pod_dir`; a reader sees the old one or the new one, never a part.
    ///
    /// # Errors
    /// [`SpecError::Write`].
    pub fn save(&self, pod_dir: &Path) -> Result<(), SpecError> {
        let path = pod_dir.join(SPEC_FILE);
        let text = serde_json::to_vec_pretty(self).expect("a spec holds only strings and numbers");
        files::replace(&path, &text, 0o600).map_err(|source| SpecError::Write { path, source })
    }

    /// Where the output of `task` is written.
    pub fn log(&self, task: &str) -> PathBuf {
        log_path(&self.folder, task)
    }

    /// The private folder of `task`: its working directory, its HOME and its TMPDIR.
    pub fn private_folder(&self, task: &str) -> PathBuf {
        private_folder(&self.folder, task)
    }
}

/// Where the output of a task of the pod whose folder is `folder` is written.
pub fn log_path(folder: &Path, task: &str) -> PathBuf {
    folder.join(format!("{task}.log"))
}

/// The private folder of a task of the pod whose folder is `folder`.
pub fn private_folder(folder: &Path, task: &str) -> PathBuf {
    folder.join(task)
}
