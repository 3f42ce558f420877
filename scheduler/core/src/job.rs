//! What a user writes: a job, its groups and their tasks, in the shape of the YAML file.
//!
//! Unknown fields are errors, and so are names that appear twice. [`Job::validate`] checks what types
//! cannot; it names the field that is wrong.

use std::{collections::BTreeMap, fmt, marker::PhantomData};

use hextet_lifecycle::{
    Hook, HookError, Owner,
    hook::{ENV_BYTES_MAX, ENV_ENTRIES_MAX, EXEC_BYTES_MAX, EXEC_ENTRIES_MAX, RESERVED_ENV},
    pod as lifecycle,
};
use serde::{Deserialize, Deserializer, Serialize, de};

pub use self::{
    constraint::{Conditions, Constraint},
    spread::{Apart, Spread},
};
use crate::{
    countable::{COUNTABLE_MAX, COUNTABLES_MAX, Countables},
    name::{self, JOB_NAME_LEN_MAX, NameError},
    quantity::{Cpu, Memory, Resources},
    rollout::Rollout,
};

mod constraint;
mod spread;

/// The most groups in a job.
pub const GROUPS_MAX: usize = 64;
/// The most tasks in a group.
pub const TASKS_MAX: usize = 16;
/// The most pods of a group.
pub const COUNT_MAX: u32 = 10_000;
/// The most constraints of a group.
pub const CONSTRAINTS_MAX: usize = 64;
/// The most rules of a group on what it keeps apart from.
pub const APART_MAX: usize = 16;
/// The highest priority of a job, and with a minus sign the lowest.
pub const PRIORITY_MAX: i32 = 1_000;
/// The most bytes in a label of a node, its key or its value.
pub const LABEL_LEN_MAX: usize = 128;
/// The most memory of a task or a node: sums of it never overflow.
pub const MEMORY_MAX: Memory = Memory(1 << 50);

/// A name and its groups.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Job {
    /// The job's name.
    pub job: String,
    /// Whose pods are placed first: the higher number's.
    #[serde(default, skip_serializing_if = "is_default")]
    pub priority: i32,
    /// Whether pods of `preemptible` jobs of a lower priority are stopped when no node has room for one of its own.
    #[serde(default, skip_serializing_if = "is_default")]
    pub preempts: bool,
    /// Whether its pods may be stopped for those of a job of a higher priority that `preempts`.
    #[serde(default, skip_serializing_if = "is_default")]
    pub preemptible: bool,
    /// Its groups by name. In boxes, as the tasks are: most maps have one entry, and a map sets aside room for eleven.
    #[serde(deserialize_with = "unique")]
    pub groups: BTreeMap<String, Box<Group>>,
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
    /// What is asked of a node's labels; `node` is its name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty", deserialize_with = "unique")]
    pub constraints: BTreeMap<String, Constraint>,
    /// Pods that its own are never put beside.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub apart: Vec<Apart>,
    /// What a pod takes besides what its tasks take of what nodes have a number of.
    #[serde(default, skip_serializing_if = "Countables::is_empty")]
    pub resources: Countables,
    /// Two versions of its tasks that run side by side.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollout: Option<Rollout>,
    /// Programs that it adds to the lifecycle of its pods, by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty", deserialize_with = "unique")]
    pub hooks: BTreeMap<String, Hook>,
    /// Its processes by name.
    #[serde(deserialize_with = "unique")]
    pub tasks: BTreeMap<String, Box<Task>>,
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
    /// What it takes of what nodes have a number of, such as `gpu`.
    #[serde(default, skip_serializing_if = "Countables::is_empty")]
    pub resources: Countables,
}

/// What happens to a pod when its node's lease ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Availability {
    /// Another pod takes its place on another node, at once.
    Ha,
    /// It waits for its node, or for an operator's word that the node is dead.
    Pet,
    /// Another pod takes its place once the first has surely ended: never are there two that live.
    Singleton,
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
    /// A hook that cannot be one, or that does not fit the others.
    #[error("{0}")]
    Hook(String),
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
    /// There is only ever one.
    #[error("{0} is more than the one pod of a group with `availability: singleton`")]
    Singleton(u32),
    /// A key or value that no label of a node can equal.
    #[error("a label's key and value have 1 to {LABEL_LEN_MAX} characters, none of them a control character")]
    Label,
    /// A constraint that asks for nothing.
    #[error("a value, a list of values, or at least one of `not`, `exists`, `at-least`, `at-most` is needed")]
    NoConstraint,
    /// A number below or above what a priority can be.
    #[error("{0} is not from -{PRIORITY_MAX} to {PRIORITY_MAX}")]
    Priority(i32),
    /// A countable that has a field of its own.
    #[error("`{0}` is a field of its own, beside `resources`")]
    OwnField(String),
    /// A rollout of a group that may not grow.
    #[error(
        "a rollout has pods of both versions for a while, and of a singleton there is never more than one: \
         with `in-place: true` it restarts where it is"
    )]
    SingletonRollout,
    /// A rollout that has more pods than `count`, and may not.
    #[error(
        "with `in-place` there are never pods beside the others: leave out `standby` and `percent-previous`"
    )]
    InPlaceBeside,
    /// A rollout from a version to itself.
    #[error("`previous` and `next` are both {0}: a rollout goes from one version to another")]
    SameVersion(u32),
    /// A rollout that would leave pods out.
    #[error("`percent-previous` and `percent-next` are at least 100 together")]
    FewerThanAll,
    /// No number is both.
    #[error("nothing is at least {least} and at most {most}")]
    NoNumber {
        /// What it is at least.
        least: i64,
        /// What it is at most.
        most: i64,
    },
    /// A rollout names a version that there never is.
    #[error("versions begin at 1; `netctl history` lists those of a job")]
    VersionZero,
    /// None of a countable is asked for.
    #[error("it has to be at least 1: leave it out to ask for none")]
    Zero,
    /// A label that looks like a slip of the pen.
    #[error("`{0}` would be a label; to spread over nodes write `node`, to fill them up `pack`")]
    SpreadWord(String),
    /// What pods keep apart from is neither a job nor a group.
    #[error("`{0}` is neither JOB nor JOB/GROUP")]
    NotGroup(String),
}

pub(crate) fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
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
        at("priority", check_priority(self.priority))?;
        at("groups", check_len(self.groups.len(), GROUPS_MAX, ""))?;
        for (name, group) in &self.groups {
            let path = format!("groups.{name}");
            at(&path, check_name(name))?;
            group.validate(&path)?;
        }
        Ok(())
    }

    /// The jobs that rules of its groups name to keep apart from; some more than once.
    pub fn keeps_apart_from(&self) -> impl Iterator<Item = &str> {
        let rules = self.groups.values().flat_map(|group| &group.apart);
        rules
            .filter_map(|apart| apart.from.as_deref())
            .map(|from| from.split_once('/').map_or(from, |(job, _)| job))
    }

    /// The group of this name.
    #[must_use]
    pub fn group(&self, name: &str) -> Option<&Group> {
        self.groups.get(name).map(Box::as_ref)
    }

    /// The versions of the job that its rollouts name.
    pub fn versions_named(&self) -> impl Iterator<Item = u32> {
        let rollouts = self.groups.values().filter_map(|group| group.rollout);
        rollouts.flat_map(|rollout| [rollout.previous, rollout.next])
    }

    /// Whether one of its rollouts names this version.
    #[must_use]
    pub fn names_version(&self, version: u32) -> bool {
        self.versions_named().any(|named| named == version)
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

    /// What one pod of it takes of what nodes have a number of.
    #[must_use]
    pub fn countables(&self) -> Countables {
        let mut sum = self.resources.clone();
        self.tasks.values().for_each(|task| sum.add(&task.resources));
        sum
    }

    fn validate(&self, path: &str) -> Result<(), JobError> {
        let within = |name: &str| format!("{path}.{name}");
        at(&within("count"), check_max(u64::from(self.count), u64::from(COUNT_MAX), ""))?;
        at(&within("count"), self.check_singleton())?;
        self.validate_placement(path)?;
        at(&within("rollout"), self.check_rollout())?;
        self.validate_hooks(path)?;
        at(&within("tasks"), check_len(self.tasks.len(), TASKS_MAX, ""))?;
        for (name, task) in &self.tasks {
            let path = format!("{path}.tasks.{name}");
            at(&path, check_name(name))?;
            task.validate(&path)?;
        }
        Ok(())
    }

    /// A rollout grows before it shrinks, unless it is in place: a group of which there is never more than one pod cannot.
    fn check_rollout(&self) -> Result<(), JobProblem> {
        match (self.rollout, self.availability()) {
            (Some(rollout), Availability::Singleton) if !rollout.in_place => {
                Err(JobProblem::SingletonRollout)
            }
            (Some(rollout), _) => rollout.check(),
            (None, _) => Ok(()),
        }
    }

    /// Without hooks there is nothing to check: the pod's own steps fit each other.
    fn validate_hooks(&self, path: &str) -> Result<(), JobError> {
        if self.hooks.is_empty() {
            return Ok(());
        }
        let hooks = format!("{path}.hooks");
        at(&hooks, check_max(self.hooks.len() as u64, lifecycle::HOOKS_MAX as u64, " hooks"))?;
        for (name, hook) in &self.hooks {
            let problem = |error: HookError| JobError {
                field: format!("{hooks}.{name}.{}", error.field),
                problem: JobProblem::Hook(error.problem.to_string()),
            };
            hook.check(name, Owner::Job).map_err(problem)?;
        }
        let fit = lifecycle::graph(&self.hooks, &BTreeMap::new()).map(drop);
        at(&hooks, fit.map_err(|error| JobProblem::Hook(error.to_string())))
    }

    fn validate_placement(&self, path: &str) -> Result<(), JobError> {
        let constraints = format!("{path}.constraints");
        at(&constraints, check_max(self.constraints.len() as u64, CONSTRAINTS_MAX as u64, " entries"))?;
        for (key, constraint) in &self.constraints {
            at(&format!("{constraints}.{key}"), check_constraint(key, constraint))?;
        }
        if let Spread::Label(label) = &self.spread {
            at(&format!("{path}.spread"), check_spread(label))?;
        }
        at(&format!("{path}.apart"), check_max(self.apart.len() as u64, APART_MAX as u64, " entries"))?;
        for (place, apart) in self.apart.iter().enumerate() {
            at(&format!("{path}.apart[{place}].by"), check_label(&apart.by, "any"))?;
            at(&format!("{path}.apart[{place}].from"), check_from(apart.from.as_deref()))?;
        }
        check_countables(&format!("{path}.resources"), &self.resources)
    }

    fn check_singleton(&self) -> Result<(), JobProblem> {
        let too_many = self.count > 1 && self.availability == Some(Availability::Singleton);
        if too_many { Err(JobProblem::Singleton(self.count)) } else { Ok(()) }
    }
}

impl Task {
    fn validate(&self, path: &str) -> Result<(), JobError> {
        at(&format!("{path}.exec"), self.check_exec())?;
        at(&format!("{path}.memory"), check_max(self.memory.0, MEMORY_MAX.0, " bytes"))?;
        check_countables(&format!("{path}.resources"), &self.resources)?;
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

fn check_spread(label: &str) -> Result<(), JobProblem> {
    match label.to_ascii_lowercase().as_str() {
        "nodes" | "node" | "packed" | "pack" | "binpack" => Err(JobProblem::SpreadWord(label.to_owned())),
        _ => check_label(label, "any"),
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

/// Checks the name and number of something that a node has a number of, or a pod takes some of.
///
/// # Errors
/// The name is none, or that of a field; the number is zero or too large.
pub fn check_countable(name: &str, number: u32) -> Result<(), JobProblem> {
    check_name(name)?;
    match (name, number) {
        ("cpu" | "memory", _) => Err(JobProblem::OwnField(name.to_owned())),
        (_, 0) => Err(JobProblem::Zero),
        _ => check_max(u64::from(number), u64::from(COUNTABLE_MAX), ""),
    }
}

fn check_countables(path: &str, countables: &Countables) -> Result<(), JobError> {
    at(path, check_max(countables.0.len() as u64, COUNTABLES_MAX as u64, " entries"))?;
    let mut all = countables.0.iter();
    all.try_for_each(|(name, number)| at(&format!("{path}.{name}"), check_countable(name, *number)))
}

fn check_constraint(key: &str, constraint: &Constraint) -> Result<(), JobProblem> {
    if constraint.is_empty() {
        return Err(JobProblem::NoConstraint);
    }
    check_label(key, "any")?;
    if let Constraint::All(Conditions { at_least: Some(least), at_most: Some(most), .. }) = constraint
        && least > most
    {
        return Err(JobProblem::NoNumber { least: *least, most: *most });
    }
    let values = constraint.values().count() as u64;
    check_max(values, constraint::VALUES_MAX as u64, " values")?;
    constraint.values().try_for_each(|value| check_label(key, value))
}

fn check_from(from: Option<&str>) -> Result<(), JobProblem> {
    let Some(from) = from else { return Ok(()) };
    let (job, group) = from.split_once('/').unwrap_or((from, "any"));
    let good = check_name(job).and_then(|()| check_name(group));
    good.map_err(|_| JobProblem::NotGroup(from.chars().take(LABEL_LEN_MAX).collect()))
}

fn check_priority(priority: i32) -> Result<(), JobProblem> {
    let good = (-PRIORITY_MAX..=PRIORITY_MAX).contains(&priority);
    if good { Ok(()) } else { Err(JobProblem::Priority(priority)) }
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
        assert_eq!((web.count, web.availability(), &web.spread), (3, Availability::Ha, &Spread::Node));
        assert_eq!(web.resources(), Resources { cpu: Cpu(250), memory: Memory(64 << 20) });
        assert_eq!(job.pods_wanted(), 3);
    }

    #[test]
    fn a_task_and_its_group_may_both_take_countables() {
        let both =
            HELLO.replace("cpu: 250m", "resources: {gpu: 2}").replace("count: 3", "resources: {gpu: 1}");
        let job = read(&both).unwrap();
        assert_eq!(job.validate(), Ok(()));
        assert_eq!(job.groups["web"].countables().to_string(), "gpu=3");
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
            (
                "count: 3",
                "spread: nodes",
                "groups.web.spread: `nodes` would be a label; to spread over nodes",
            ),
            ("count: 3", "count: 10001", "groups.web.count: 10001 is more than 10000"),
            ("{node: n1}", "{node: ''}", "groups.web.constraints.node: a label's key"),
            ("/bin/sh,", "sh,", "groups.web.tasks.server.exec: the program `sh` is not an absolute path"),
            ("[/bin/sh, -c, 'sleep 1']", "[]", "groups.web.tasks.server.exec: at least one is needed"),
            ("'sleep 1'", "\"a\\0b\"", "groups.web.tasks.server.exec: holds a zero byte"),
            ("KEY:", "HEXTET_POD:", "groups.web.tasks.server.env.HEXTET_POD: variables that start"),
            ("cpu: 250m", "memory: 2000Ti", "groups.web.tasks.server.memory: 2199023255552000 is more"),
            ("job: hello", "job: hello\npriority: 1001", "priority: 1001 is not from -1000 to 1000"),
            ("count: 3", "resources: {cpu: 1}", "groups.web.resources.cpu: `cpu` is a field of its own"),
            ("count: 3", "resources: {gpu: 0}", "groups.web.resources.gpu: it has to be at least 1"),
            ("cpu: 250m", "resources: {Gpu: 1}", "groups.web.tasks.server.resources.Gpu: the name"),
            ("count: 3", "apart: [{by: ''}]", "groups.web.apart[0].by: a label's key"),
            ("count: 3", "apart: [{from: a/b/c}]", "groups.web.apart[0].from: `a/b/c` is neither JOB"),
            ("count: 3", "spread: ''", "groups.web.spread: a label's key"),
            ("{node: n1}", "{node: []}", "groups.web.constraints.node: a value, a list"),
            ("{node: n1}", "{node: {}}", "groups.web.constraints.node: a value, a list"),
            (
                "{node: n1}",
                "{gen: {at-least: 5, at-most: 3}}",
                "groups.web.constraints.gen: nothing is at least 5",
            ),
            ("{node: n1}", "{node: {not: ''}}", "groups.web.constraints.node: a label's key"),
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
