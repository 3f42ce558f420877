//! What a user writes: a job, its groups and their tasks, in the shape of the YAML file.
//!
//! Unknown fields are errors, and so are names that appear twice. [`Job::validate`] checks what types
//! cannot; it names the field that is wrong.

use std::{collections::BTreeMap, fmt, marker::PhantomData};

use serde::{Deserialize, Deserializer, Serialize, de};

use crate::{
    name::{self, JOB_NAME_LEN_MAX, NameError},
    quantity::{Cpu, Memory, Resources},
};

/// The most groups in a job.
pub const GROUPS_MAX: usize = 64;
/// The most tasks in a group.
pub const TASKS_MAX: usize = 16;
/// The most pods of a group.
pub const COUNT_MAX: u32 = 10_000;
/// The most entries in a task's argv.
pub const EXEC_ENTRIES_MAX: usize = 256;
/// The most bytes in a task's argv, each with its terminating zero.
pub const EXEC_BYTES_MAX: usize = 64 * 1024;
/// The most variables that a task is given.
pub const ENV_ENTRIES_MAX: usize = 256;
/// The most bytes in a task's environment.
pub const ENV_BYTES_MAX: usize = 64 * 1024;
/// The most constraints of a group.
pub const CONSTRAINTS_MAX: usize = 64;
/// The most bytes in a label of a node, its key or its value.
pub const LABEL_LEN_MAX: usize = 128;
/// The most memory of a task or a node: sums of it never overflow.
pub const MEMORY_MAX: Memory = Memory(1 << 50);
/// Variables of this beginning are the runtime's to set.
pub const RESERVED_ENV: &str = "HEXTET_";

/// A name and its groups.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Job {
    /// The job's name.
    pub job: String,
    /// Its groups by name.
    #[serde(deserialize_with = "unique")]
    pub groups: BTreeMap<String, Group>,
}

/// Tasks that always run together on one node and share one address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Group {
    /// How many pods of it run.
    #[serde(default = "one")]
    pub count: u32,
    /// What happens when a node's lease ends; without it, what [`Group::availability`] says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub availability: Option<Availability>,
    /// How its pods are laid over the nodes.
    #[serde(default)]
    pub spread: Spread,
    /// Labels that a node must have; `node` is its name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty", deserialize_with = "unique")]
    pub constraints: BTreeMap<String, String>,
    /// Its processes by name.
    #[serde(deserialize_with = "unique")]
    pub tasks: BTreeMap<String, Task>,
}

/// One process of a pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Task {
    /// The program, by its absolute path, and its arguments.
    pub exec: Vec<String>,
    /// What is added to its environment.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty", deserialize_with = "unique")]
    pub env: BTreeMap<String, String>,
    /// The processor time that is kept free for it.
    #[serde(default = "default_cpu")]
    pub cpu: Cpu,
    /// The memory that is kept free for it.
    #[serde(default = "default_memory")]
    pub memory: Memory,
}

/// What happens to a pod when its node's lease ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Availability {
    /// Another pod takes its place on another node, at once.
    Ha,
    /// It waits for its node.
    Pet,
}

/// How a group's pods are laid over the nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Spread {
    /// As few pods of the group on each node as can be.
    #[default]
    Node,
    /// As few nodes as can be.
    Pack,
}

/// A field of a job that is wrong, and why: `groups.web.count: 20000 is more than 10000`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct JobError {
    /// The path of the field.
    pub field: String,
    /// What is wrong with it.
    pub problem: JobProblem,
}

/// What is wrong with a field of a job.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JobProblem {
    /// The name of it is not one.
    #[error("{0}")]
    Name(NameError),
    /// Nothing is there.
    #[error("at least one is needed")]
    Empty,
    /// More than fit.
    #[error("{given} is more than {max}{unit}")]
    TooMany {
        /// How many there are.
        given: u64,
        /// How many fit.
        max: u64,
        /// Of what, with a leading space, or empty.
        unit: &'static str,
    },
    /// The program is looked up nowhere.
    #[error("the program `{0}` is not an absolute path, such as `/bin/sh`")]
    RelativeProgram(String),
    /// The kernel ends an argument there.
    #[error("holds a zero byte")]
    ZeroByte,
    /// A variable whose name cannot be told from its value.
    #[error("`{0}` is not a variable's name: it is empty or holds `=`")]
    VariableName(String),
    /// A variable that the runtime sets.
    #[error("variables that start with `HEXTET_` are set by the node")]
    ReservedVariable,
    /// A key or value that no label of a node can equal.
    #[error("a label's key and value have 1 to {LABEL_LEN_MAX} characters, none of them a control character")]
    Label,
}

fn one() -> u32 {
    1
}

fn default_cpu() -> Cpu {
    Cpu(100)
}

fn default_memory() -> Memory {
    Memory(64 << 20)
}

impl Job {
    /// Checks names and bounds.
    ///
    /// # Errors
    /// The first field that is wrong.
    pub fn validate(&self) -> Result<(), JobError> {
        at("job", check_name(&self.job))?;
        at("groups", check_len(self.groups.len(), GROUPS_MAX, ""))?;
        for (name, group) in &self.groups {
            let path = format!("groups.{name}");
            at(&path, check_name(name))?;
            group.validate(&path)?;
        }
        Ok(())
    }

    /// How many pods it asks for.
    #[must_use]
    pub fn pods_wanted(&self) -> u64 {
        self.groups.values().map(|group| u64::from(group.count)).sum()
    }
}

impl Group {
    /// What was written, or `ha` when there is more than one pod and `pet` otherwise.
    #[must_use]
    pub fn availability(&self) -> Availability {
        let default = if self.count > 1 { Availability::Ha } else { Availability::Pet };
        self.availability.unwrap_or(default)
    }

    /// What one pod of it asks for. Saturates at the largest amounts, which no node has.
    #[must_use]
    pub fn resources(&self) -> Resources {
        self.tasks.values().fold(Resources::default(), |sum, task| Resources {
            cpu: Cpu(sum.cpu.0.saturating_add(task.cpu.0)),
            memory: Memory(sum.memory.0.saturating_add(task.memory.0)),
        })
    }

    fn validate(&self, path: &str) -> Result<(), JobError> {
        let within = |name: &str| format!("{path}.{name}");
        at(&within("count"), check_max(u64::from(self.count), u64::from(COUNT_MAX), ""))?;
        let constraints = within("constraints");
        at(&constraints, check_max(self.constraints.len() as u64, CONSTRAINTS_MAX as u64, " entries"))?;
        for (key, value) in &self.constraints {
            at(&format!("{constraints}.{key}"), check_label(key, value))?;
        }
        at(&within("tasks"), check_len(self.tasks.len(), TASKS_MAX, ""))?;
        for (name, task) in &self.tasks {
            let path = format!("{path}.tasks.{name}");
            at(&path, check_name(name))?;
            task.validate(&path)?;
        }
        Ok(())
    }
}

impl Task {
    fn validate(&self, path: &str) -> Result<(), JobError> {
        at(&format!("{path}.exec"), self.check_exec())?;
        at(&format!("{path}.memory"), check_max(self.memory.0, MEMORY_MAX.0, " bytes"))?;
        let env = format!("{path}.env");
        at(&env, check_max(self.env.len() as u64, ENV_ENTRIES_MAX as u64, " entries"))?;
        let bytes: usize = self.env.iter().map(|(key, value)| key.len() + value.len() + 2).sum();
        at(&env, check_max(bytes as u64, ENV_BYTES_MAX as u64, " bytes"))?;
        self.env.iter().try_for_each(|(key, value)| at(&format!("{env}.{key}"), check_variable(key, value)))
    }

    fn check_exec(&self) -> Result<(), JobProblem> {
        check_len(self.exec.len(), EXEC_ENTRIES_MAX, " entries")?;
        let bytes: usize = self.exec.iter().map(|argument| argument.len() + 1).sum();
        check_max(bytes as u64, EXEC_BYTES_MAX as u64, " bytes")?;
        if self.exec.iter().any(|argument| argument.contains('\0')) {
            return Err(JobProblem::ZeroByte);
        }
        if !self.exec[0].starts_with('/') {
            return Err(JobProblem::RelativeProgram(self.exec[0].clone()));
        }
        Ok(())
    }
}

/// Checks a label of a node, or what a group asks of one.
///
/// # Errors
/// [`JobProblem::Label`].
pub fn check_label(key: &str, value: &str) -> Result<(), JobProblem> {
    let good = |text: &str| (1..=LABEL_LEN_MAX).contains(&text.len()) && !text.chars().any(char::is_control);
    if good(key) && good(value) { Ok(()) } else { Err(JobProblem::Label) }
}

fn at(field: &str, result: Result<(), JobProblem>) -> Result<(), JobError> {
    result.map_err(|problem| JobError { field: field.to_owned(), problem })
}

fn check_name(text: &str) -> Result<(), JobProblem> {
    name::check(text, JOB_NAME_LEN_MAX).map_err(JobProblem::Name)
}

fn check_len(given: usize, max: usize, unit: &'static str) -> Result<(), JobProblem> {
    if given == 0 { Err(JobProblem::Empty) } else { check_max(given as u64, max as u64, unit) }
}

fn check_max(given: u64, max: u64, unit: &'static str) -> Result<(), JobProblem> {
    if given > max { Err(JobProblem::TooMany { given, max, unit }) } else { Ok(()) }
}

fn check_variable(key: &str, value: &str) -> Result<(), JobProblem> {
    if key.is_empty() || key.contains('=') {
        return Err(JobProblem::VariableName(key.to_owned()));
    }
    if key.starts_with(RESERVED_ENV) {
        return Err(JobProblem::ReservedVariable);
    }
    if key.contains('\0') || value.contains('\0') { Err(JobProblem::ZeroByte) } else { Ok(()) }
}

/// Reads a map in which no key may appear twice.
fn unique<'de, D, V>(deserializer: D) -> Result<BTreeMap<String, V>, D::Error>
where
    D: Deserializer<'de>,
    V: Deserialize<'de>,
{
    struct Visitor<V>(PhantomData<V>);
    impl<'de, V: Deserialize<'de>> de::Visitor<'de> for Visitor<V> {
        type Value = BTreeMap<String, V>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a map")
        }

        fn visit_map<A: de::MapAccess<'de>>(self, mut access: A) -> Result<Self::Value, A::Error> {
            let mut map = BTreeMap::new();
            while let Some((key, value)) = access.next_entry::<String, V>()? {
                if map.contains_key(&key) {
                    return Err(de::Error::custom(format!("`{key}` is there twice")));
                }
                map.insert(key, value);
            }
            Ok(map)
        }
    }
    deserializer.deserialize_map(Visitor(PhantomData))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HELLO: &str = "
job: hello
groups:
  web:
    count: 3
    constraints: {node: n1}
    tasks:
      server:
        exec: [/bin/sh, -c, 'sleep 1']
        env: {KEY: value}
        cpu: 250m
";

    #[test]
    fn the_documented_shape_is_read() {
        let job = read(HELLO).unwrap();
        assert_eq!(job.validate(), Ok(()));
        let web = &job.groups["web"];
        assert_eq!((web.count, web.availability(), web.spread), (3, Availability::Ha, Spread::Node));
        assert_eq!(web.resources(), Resources { cpu: Cpu(250), memory: Memory(64 << 20) });
        assert_eq!(job.pods_wanted(), 3);
    }

    #[test]
    fn a_job_written_out_reads_back_the_same() {
        let job = read(HELLO).unwrap();
        assert_eq!(read(&serde_norway::to_string(&job).unwrap()).unwrap(), job);
    }

    #[test]
    fn one_pod_is_a_pet_unless_it_says_otherwise() {
        let job = read(&HELLO.replace("count: 3", "count: 1")).unwrap();
        assert_eq!(job.groups["web"].availability(), Availability::Pet);
        let job = read(&HELLO.replace("count: 3", "availability: ha")).unwrap();
        assert_eq!((job.groups["web"].count, job.groups["web"].availability()), (1, Availability::Ha));
    }

    #[test]
    fn unknown_fields_and_repeated_names_are_errors() {
        let error = read(&HELLO.replace("count", "cuont")).unwrap_err();
        assert!(error.contains("unknown field `cuont`, expected one of `count`"), "{error}");
        let error = read(&HELLO.replace("env: {KEY: value}", "env: {A: a, A: b}")).unwrap_err();
        assert!(error.contains("`A` is there twice"), "{error}");
    }

    #[test]
    fn validation_names_the_field() {
        let cases = [
            ("job: hello", "job: Hello", "job: the name `Hello` is not of a-z"),
            ("  web:", "  w_b:", "groups.w_b: the name `w_b` is not of a-z"),
            ("count: 3", "count: 10001", "groups.web.count: 10001 is more than 10000"),
            ("{node: n1}", "{node: ''}", "groups.web.constraints.node: a label's key"),
            ("/bin/sh,", "sh,", "groups.web.tasks.server.exec: the program `sh` is not an absolute path"),
            ("[/bin/sh, -c, 'sleep 1']", "[]", "groups.web.tasks.server.exec: at least one is needed"),
            ("'sleep 1'", "\"a\\0b\"", "groups.web.tasks.server.exec: holds a zero byte"),
            ("KEY:", "HEXTET_POD:", "groups.web.tasks.server.env.HEXTET_POD: variables that start"),
            ("cpu: 250m", "memory: 2000Ti", "groups.web.tasks.server.memory: 2199023255552000 is more"),
            ("KEY:", "A=B:", "groups.web.tasks.server.env.A=B: `A=B` is not a variable's name"),
        ];
        for (from, to, expected) in cases {
            let error = read(&HELLO.replace(from, to)).unwrap().validate().unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error}");
        }
    }

    #[test]
    fn bounds_hold_at_their_edge() {
        let mut job = read(HELLO).unwrap();
        let server = |job: &mut Job| job.groups.get_mut("web").unwrap().tasks.remove("server").unwrap();
        let mut task = server(&mut job);
        task.exec = vec!["/x".to_owned(); EXEC_ENTRIES_MAX];
        assert_eq!(task.validate("t"), Ok(()));
        task.exec.push("/x".to_owned());
        assert_eq!(task.validate("t").unwrap_err().to_string(), "t.exec: 257 is more than 256 entries");
        task.exec = vec![format!("/{}", "x".repeat(EXEC_BYTES_MAX))];
        assert!(task.validate("t").unwrap_err().to_string().ends_with("more than 65536 bytes"));
    }

    fn read(yaml: &str) -> Result<Job, String> {
        serde_norway::from_str(yaml).map_err(|error| error.to_string())
    }
}
