//! A program that a user adds to a pod's lifecycle: at a point of the graph, or on events.

use std::{collections::BTreeMap, fmt, str::FromStr, time::Duration};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::{
    graph::is_name,
    pod::{FOLDERS, NETWORKING, STORAGE, SUPERVISOR},
    step::{Owner, Retry, Step},
};

/// Events that a hook can follow.
pub const EVENTS: [&str; 6] =
    ["pod-starting", "pod-running", "pod-failed", "pod-stopping", "pod-gone", "step-failed"];
/// How long a hook may run when nothing is said.
pub const TIMEOUT: Duration = Duration::from_secs(60);
/// The longest time that a hook may be given.
pub const TIMEOUT_MAX: Duration = Duration::from_secs(24 * 3600);
/// How much longer than that the graph waits: what runs a hook ends it first, and says so.
pub const GRACE: Duration = Duration::from_secs(10);
/// How often a hook is tried when nothing is said.
pub const ATTEMPTS: u32 = 3;
/// The most attempts that a hook may be given.
pub const ATTEMPTS_MAX: u32 = 1_000;
/// The most entries in a program's argv.
pub const EXEC_ENTRIES_MAX: usize = 256;
/// The most bytes in a program's argv, each with its terminating zero.
pub const EXEC_BYTES_MAX: usize = 64 * 1024;
/// The most variables that a program is given.
pub const ENV_ENTRIES_MAX: usize = 256;
/// The most bytes in a program's environment.
pub const ENV_BYTES_MAX: usize = 64 * 1024;
/// Variables of this beginning are Hextet's to set.
pub const RESERVED_ENV: &str = "HEXTET_";
const POINTS_MAX: usize = 16;

/// A program at a point of the graph, or on events.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hook {
    /// The program, by its absolute path, and its arguments.
    pub exec: Vec<String>,
    /// What is run on the way down, where the graph comes past it backwards.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub undo: Vec<String>,
    /// Steps and targets that wait for it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub before: Vec<String>,
    /// Steps and targets that it waits for, and needs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub after: Vec<String>,
    /// Events that it follows, instead of a point of the graph.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub on: Vec<String>,
    /// As which user, by name; for a node's operator alone. Without it, root.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// What is added to its environment.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// How long it may run.
    #[serde(default)]
    pub timeout: Timeout,
    /// How often it is tried.
    #[serde(default = "attempts")]
    pub attempts: u32,
    /// Whether the pod goes on without it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub optional: bool,
}

/// A length of time as a user writes it: `90s`, `5m`, `1h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeout(pub Duration);

/// A field of a hook that is wrong, and why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("hooks.{hook}.{field}: {problem}")]
pub struct HookError {
    /// The hook.
    pub hook: String,
    /// The field.
    pub field: &'static str,
    /// What is wrong with it.
    pub problem: HookProblem,
}

/// What is wrong with a field of a hook.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HookProblem {
    /// There is no program.
    #[error("a program is needed, by its absolute path, such as [/bin/sh, -c, ...]")]
    Program,
    /// There is more than fits.
    #[error("{given} is more than {max}")]
    TooMany {
        /// How much there is.
        given: u64,
        /// How much fits.
        max: u64,
    },
    /// It cannot be in an environment.
    #[error(
        "`{0}` cannot be set: a variable has a name without `=`, no byte 0, and does not start with HEXTET_"
    )]
    Variable(String),
    /// It is nowhere.
    #[error("say where it stands: `before`, `after` (a step or target), or `on` (events)")]
    Nowhere,
    /// It is at a point and on events.
    #[error("a hook that follows events has no point in the graph: leave out `before`, `after` and `undo`")]
    Both,
    /// There is nothing of that name to stand at.
    #[error("`{point}` is no point for a hook; there are {known}")]
    Point {
        /// What is named.
        point: String,
        /// What there is.
        known: String,
    },
    /// A job's programs end with its pod.
    #[error(
        "a job's hook runs in its pod and cannot follow `{0}`: only the node's operator can have one that does"
    )]
    Outlives(String),
    /// There is no such event.
    #[error(
        "`{0}` is no event; there are pod-starting, pod-running, pod-failed, pod-stopping, pod-gone, step-failed"
    )]
    Event(String),
    /// A job does not choose users of the node.
    #[error("a job's hook runs as its pod's own user: only the node's operator names one")]
    User,
    /// A job's hook lives in its pod's namespace.
    #[error(
        "a job's hook runs in its pod's network namespace and cannot come before it is there: only the node's \
         operator can have one there"
    )]
    Namespace,
    /// The name cannot be a step's.
    #[error("a hook's name has 1 to 32 characters of a-z, 0-9 and -")]
    Name,
}

impl Hook {
    /// Checks what types cannot.
    ///
    /// # Errors
    /// The first field that is wrong.
    pub fn check(&self, name: &str, owner: Owner) -> Result<(), HookError> {
        let at = |field, result: Result<(), HookProblem>| {
            result.map_err(|problem| HookError { hook: name.to_owned(), field, problem })
        };
        at("name", if is_name(name) && !name.ends_with('-') { Ok(()) } else { Err(HookProblem::Name) })?;
        at("exec", check_exec(&self.exec))?;
        if !self.undo.is_empty() {
            at("undo", check_exec(&self.undo))?;
        }
        at("env", check_env(&self.env))?;
        at("timeout", check_max(self.timeout.0.as_secs(), TIMEOUT_MAX.as_secs()))?;
        at("attempts", check_max(u64::from(self.attempts), u64::from(ATTEMPTS_MAX)))?;
        at("on", self.check_place())?;
        if owner == Owner::Job {
            at("user", self.user.as_ref().map_or(Ok(()), |_| Err(HookProblem::User)))?;
            let outlives =
                |event: &&String| ["pod-starting", "pod-stopping", "pod-gone"].contains(&event.as_str());
            let found = self.on.iter().find(outlives).cloned();
            at("on", found.map_or(Ok(()), |event| Err(HookProblem::Outlives(event))))?;
            let early = |name: &String| [NETWORKING, STORAGE].contains(&name.as_str());
            at("before", if self.before.iter().any(early) { Err(HookProblem::Namespace) } else { Ok(()) })?;
        }
        Ok(())
    }

    /// Its step in the graph; none for one that follows events.
    #[must_use]
    pub fn step(&self, name: &str, owner: Owner) -> Option<Step> {
        if !self.on.is_empty() {
            return None;
        }
        let first = Duration::from_secs(1);
        // With another text it is another step.
        let text = format!("{self:?}");
        let mut step = Step::new(name, owner, &text).deadline(self.timeout.0 + GRACE);
        step.retry = Retry { attempts_max: Some(self.attempts.max(1)), first, max: Duration::from_secs(60) };
        (step.before, step.requires) = (self.before.clone(), self.after.clone());
        (step.optional, step.undo) = (self.optional, !self.undo.is_empty());
        if owner == Owner::Job {
            step = step.requires(NETWORKING).requires(FOLDERS);
            // A supervisor that starts ends what it finds of its pod's processes.
            step = if self.before.is_empty() { step.after(SUPERVISOR) } else { step };
        }
        Some(step)
    }

    fn check_place(&self) -> Result<(), HookProblem> {
        let points = self.before.len() + self.after.len();
        check_max((points.max(self.on.len())) as u64, POINTS_MAX as u64)?;
        match (points, self.on.len()) {
            (0, 0) => Err(HookProblem::Nowhere),
            (_, 0) => Ok(()),
            (0, _) if self.undo.is_empty() => {
                let unknown = self.on.iter().find(|event| !EVENTS.contains(&event.as_str()));
                unknown.map_or(Ok(()), |event| Err(HookProblem::Event(event.clone())))
            }
            _ => Err(HookProblem::Both),
        }
    }
}

fn check_env(env: &BTreeMap<String, String>) -> Result<(), HookProblem> {
    check_max(env.len() as u64, ENV_ENTRIES_MAX as u64)?;
    check_max(
        env.iter().map(|(key, value)| (key.len() + value.len() + 2) as u64).sum(),
        ENV_BYTES_MAX as u64,
    )?;
    let is_odd = |key: &str, value: &str| {
        key.is_empty() || key.contains(['=', '\0']) || key.starts_with(RESERVED_ENV) || value.contains('\0')
    };
    let odd = env.iter().find(|(key, value)| is_odd(key, value));
    odd.map_or(Ok(()), |(key, _)| Err(HookProblem::Variable(key.clone())))
}

fn check_exec(exec: &[String]) -> Result<(), HookProblem> {
    check_max(exec.len() as u64, EXEC_ENTRIES_MAX as u64)?;
    check_max(exec.iter().map(|argument| argument.len() as u64 + 1).sum(), EXEC_BYTES_MAX as u64)?;
    let whole = exec.iter().all(|argument| !argument.contains('\0'));
    match exec.first() {
        Some(program) if program.starts_with('/') && whole => Ok(()),
        _ => Err(HookProblem::Program),
    }
}

fn check_max(given: u64, max: u64) -> Result<(), HookProblem> {
    if given > max { Err(HookProblem::TooMany { given, max }) } else { Ok(()) }
}

fn attempts() -> u32 {
    ATTEMPTS
}

/// The hooks among `hooks` that follow `event`.
pub fn following<'a>(
    hooks: &'a BTreeMap<String, Hook>,
    event: &'a str,
) -> impl Iterator<Item = (&'a String, &'a Hook)> {
    hooks.iter().filter(move |(_, hook)| hook.on.iter().any(|on| on == event))
}

impl Default for Timeout {
    fn default() -> Timeout {
        Timeout(TIMEOUT)
    }
}

impl FromStr for Timeout {
    type Err = String;

    fn from_str(text: &str) -> Result<Timeout, String> {
        let wrong = || format!("`{text}` is no length of time; write 90s, 5m or 1h");
        let split = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
        let number: u64 = text[..split].parse().map_err(|_| wrong())?;
        let unit = match &text[split..] {
            "s" => 1,
            "m" => 60,
            "h" => 3600,
            _ => return Err(wrong()),
        };
        match number.checked_mul(unit) {
            Some(seconds) if seconds > 0 => Ok(Timeout(Duration::from_secs(seconds))),
            _ => Err(wrong()),
        }
    }
}

impl fmt::Display for Timeout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}s", self.0.as_secs())
    }
}

impl Serialize for Timeout {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Timeout {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Timeout, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, owner: Owner) -> Result<(), String> {
        let hook: Hook = serde_json::from_str(text).map_err(|error| error.to_string())?;
        hook.check("h", owner).map_err(|error| error.to_string())
    }

    #[test]
    fn what_is_wrong_is_said_with_its_field() {
        let job = |text| check(text, Owner::Job).unwrap_err();
        assert!(
            job(r#"{"exec": ["sh"], "before": ["running"]}"#)
                .starts_with("hooks.h.exec: a program is needed")
        );
        assert!(job(r#"{"exec": ["/bin/sh"]}"#).starts_with("hooks.h.on: say where it stands"));
        assert!(job(r#"{"exec": ["/bin/sh"], "on": ["x"]}"#).starts_with("hooks.h.on: `x` is no event"));
        assert!(
            job(r#"{"exec": ["/bin/sh"], "on": ["pod-failed"], "after": ["running"]}"#).contains("leave out")
        );
        assert!(
            job(r#"{"exec": ["/bin/sh"], "before": ["networking"]}"#)
                .starts_with("hooks.h.before: a job's hook")
        );
        assert!(
            job(r#"{"exec": ["/bin/sh"], "after": ["running"], "user": "root"}"#)
                .contains("only the node's operator")
        );
        assert!(job(r#"{"exec": ["/bin/sh"], "after": ["running"], "timeout": "5"}"#).contains("write 90s"));
        assert!(job(r#"{"exec": ["/bin/sh"], "after": ["running"], "colour": 1}"#).contains("unknown field"));
        assert!(
            job(r#"{"exec": ["/bin/sh"], "after": ["running"], "timeout": "25h"}"#)
                .ends_with("90000 is more than 86400")
        );
    }

    #[test]
    fn a_variable_is_a_name_that_is_not_hextets() {
        let with = |env: &str| {
            check(&format!(r#"{{"exec": ["/bin/sh"], "after": ["running"], "env": {{{env}}}}}"#), Owner::Job)
        };
        assert_eq!(with(r#""PGPASSWORD": "a=b""#), Ok(()));
        for odd in [r#""HEXTET_POD": "x""#, r#""": "x""#, r#""A=B": "x""#, r#""A": "\u0000""#] {
            assert!(with(odd).unwrap_err().starts_with("hooks.h.env: `"), "{odd}");
        }
        assert!(
            with(&format!(r#""A": "{}""#, "x".repeat(70_000))).unwrap_err().contains("is more than 65536")
        );
    }

    #[test]
    fn another_text_is_another_step() {
        let step = |exec: &str| {
            let hook: Hook =
                serde_json::from_str(&format!(r#"{{"exec": ["{exec}"], "after": ["running"]}}"#)).unwrap();
            hook.step("h", Owner::Job).unwrap()
        };
        assert_eq!(step("/bin/a"), step("/bin/a"));
        assert_ne!(step("/bin/a"), step("/bin/b"));
    }

    #[test]
    fn the_operator_may_do_more() {
        assert_eq!(
            check(r#"{"exec": ["/bin/sh"], "before": ["networking"], "user": "nobody"}"#, Owner::Operator),
            Ok(())
        );
    }

    #[test]
    fn times_read_back_as_they_print() {
        for (text, seconds) in [("90s", 90), ("5m", 300), ("1h", 3600)] {
            let timeout: Timeout = text.parse().unwrap();
            assert_eq!(timeout.0.as_secs(), seconds);
            assert_eq!(timeout.to_string().parse(), Ok(timeout));
        }
        for text in ["", "0s", "5", "s", "-1s", "5d", "99999999999999999999h", "9999999999999999999h"] {
            assert!(text.parse::<Timeout>().is_err(), "{text}");
        }
    }
}
