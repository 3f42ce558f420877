//! A group that runs two versions of itself: which pods are of which, and how many of each there are to be.

use serde::{Deserialize, Serialize};

use crate::{
    change::JobRecord,
    job::{Group, JobProblem},
    pod::Pod,
};

/// Two versions of a group's tasks, and how many of its pods are of the next, in hundredths.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Rollout {
    /// The version of the job that is left.
    pub previous: u32,
    /// The version of the job that is gone to; it may be that of the text in which this stands.
    pub next: u32,
    /// 0 is back to the previous, 100 is all the way to the next.
    pub percent_next: u32,
    /// How many stay of the previous version, in hundredths, when they are more than those that are not of the next.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub percent_previous: Option<u32>,
    /// The pods of the next version are made beside all of the previous one, and load balancers are not told of them.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub standby: bool,
    /// Pods are given the tasks of the other version where they are, and never are there more than `count`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub in_place: bool,
}

/// One of the two versions of a group in a rollout.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Side {
    /// The version of the job that its pods run.
    pub version: u32,
    /// What they are: the tasks, resources and constraints of that version, and all else of the text in force. Its
    /// `count` is that of this side.
    pub text: Group,
    /// Whether load balancers are not told of its pods.
    pub standby: bool,
}

impl Rollout {
    /// From one version to another, so many hundredths of the way.
    #[must_use]
    pub fn new(previous: u32, next: u32, percent_next: u32) -> Rollout {
        Rollout { previous, next, percent_next, percent_previous: None, standby: false, in_place: false }
    }

    /// How many of `count` pods are of the next version: rounded up, as a percentage above zero that tries nothing
    /// would pass every check; but below 100 % one stays of the previous version if there are two or more.
    #[must_use]
    pub fn next_of(&self, count: u32) -> u32 {
        share(count, self.percent_next)
    }

    /// How many of `count` pods stay of the previous version: all that are not of the next, or more.
    #[must_use]
    pub fn previous_of(&self, count: u32) -> u32 {
        let percent = if self.standby { Some(100) } else { self.percent_previous };
        let kept = percent.map_or(0, |percent| count - share(count, 100_u32.saturating_sub(percent)));
        kept.max(count - self.next_of(count))
    }

    /// Checks what can be told without knowing which versions there are.
    ///
    /// # Errors
    /// Both versions are the same, one of them is none, or the percentage is none.
    pub fn check(&self) -> Result<(), JobProblem> {
        if self.previous == self.next {
            return Err(JobProblem::SameVersion(self.next));
        }
        if self.previous == 0 || self.next == 0 {
            return Err(JobProblem::VersionZero);
        }
        if self.in_place && (self.standby || self.percent_previous.is_some()) {
            return Err(JobProblem::InPlaceBeside);
        }
        let previous = self.percent_previous.unwrap_or(100_u32.saturating_sub(self.percent_next));
        if let Some(given) = [self.percent_next, previous].into_iter().find(|percent| *percent > 100) {
            return Err(JobProblem::TooMany { given: u64::from(given), max: 100, unit: "" });
        }
        if previous + self.percent_next < 100 { Err(JobProblem::FewerThanAll) } else { Ok(()) }
    }
}

/// So many hundredths of `count` pods, rounded as [`Rollout::next_of`] says.
pub(crate) fn share(count: u32, percent: u32) -> u32 {
    if percent >= 100 {
        return count;
    }
    let rounded = (u64::from(count) * u64::from(percent)).div_ceil(100);
    let rounded = u32::try_from(rounded).unwrap_or(count);
    if count >= 2 { rounded.min(count - 1) } else { rounded }
}

/// The previous and the next side of a group whose text in force is `wanted`; none when it has no rollout, or a text
/// is missing, which no text that was applied lets happen.
#[must_use]
pub fn sides(record: &JobRecord, group: &str, wanted: &Group) -> Option<[Side; 2]> {
    let rollout = wanted.rollout?;
    let (previous, next) = (rollout.previous_of(wanted.count), rollout.next_of(wanted.count));
    let side = |version: u32, count: u32, standby: bool| {
        let of_version = record.versions.get(&version)?.group(group)?;
        let text = Group {
            count,
            // That of the whole group: one pod of three is as important as the others.
            availability: Some(wanted.availability()),
            tasks: of_version.tasks.clone(),
            resources: of_version.resources.clone(),
            constraints: of_version.constraints.clone(),
            rollout: None,
            hooks: of_version.hooks.clone(),
            ..wanted.clone()
        };
        Some(Side { version, text, standby })
    };
    Some([side(rollout.previous, previous, false)?, side(rollout.next, next, rollout.standby)?])
}

/// Which of the two sides `pod` is of: that of its version, or one that has the same tasks and resources; `None` is
/// neither, and it is to be replaced.
#[must_use]
pub fn side_of(record: &JobRecord, sides: &[Side; 2], pod: &Pod) -> Option<usize> {
    let by_version = sides.iter().position(|side| side.version == pod.job_version);
    by_version.or_else(|| {
        let now = record.versions.get(&pod.job_version)?.group(&pod.group)?;
        let is_same = |side: &Side| now.tasks == side.text.tasks && now.resources == side.text.resources;
        sides.iter().rposition(is_same)
    })
}

/// Which of the live pods of a group stop, when `surplus` of these `pods` are too many and `serving` pods of the whole
/// group do: first all that serve nobody, then as many of those that do as leave `count`. The newest first.
#[must_use]
pub fn to_stop(mut pods: Vec<Pod>, surplus: usize, serving: &mut usize, count: usize) -> Vec<Pod> {
    pods.sort_by_key(|pod| (pod.serves(), u64::MAX - pod.serial));
    let mut stopping = Vec::new();
    for pod in pods.into_iter().take(surplus) {
        if pod.serves() {
            if *serving <= count {
                break;
            }
            *serving -= 1;
        }
        stopping.push(pod);
    }
    stopping
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_rounded_up_and_one_stays_below_all() {
        let cases = [
            (10, 0, 0),
            (10, 1, 1),
            (10, 20, 2),
            (10, 21, 3),
            (10, 99, 9),
            (10, 100, 10),
            (3, 20, 1),
            (3, 70, 2),
            (2, 99, 1),
            (1, 0, 0),
            (1, 1, 1),
            (0, 50, 0),
            (0, 100, 0),
        ];
        for (count, percent_next, next) in cases {
            let rollout = Rollout::new(1, 2, percent_next);
            assert_eq!(rollout.next_of(count), next, "{percent_next} % of {count}");
        }
    }

    #[test]
    fn more_percent_are_never_fewer_pods() {
        for count in 0..50 {
            let next = |percent_next| Rollout::new(1, 2, percent_next).next_of(count);
            assert!((0..100).all(|percent| next(percent) <= next(percent + 1)), "{count}");
        }
    }

    #[test]
    fn the_previous_version_may_keep_more() {
        let both = |count, percent_next, percent_previous| {
            let rollout = Rollout { percent_previous, ..Rollout::new(1, 2, percent_next) };
            (rollout.previous_of(count), rollout.next_of(count))
        };
        // As many as there were before this step, while the new ones have not shown that they do well.
        assert_eq!(both(10, 40, Some(80)), (8, 4));
        assert_eq!(both(10, 40, None), (6, 4));
        assert_eq!(both(3, 100, Some(20)), (1, 3));
        assert_eq!(both(1, 1, Some(100)), (1, 1));
        let check = |percent_next, percent_previous| {
            Rollout { percent_previous, ..Rollout::new(1, 2, percent_next) }.check()
        };
        assert_eq!(check(40, Some(60)), Ok(()));
        assert_eq!(check(40, Some(59)), Err(JobProblem::FewerThanAll));
        assert!(matches!(check(40, Some(101)), Err(JobProblem::TooMany { given: 101, max: 100, .. })));
    }

    #[test]
    fn a_rollout_has_two_versions_and_a_percentage() {
        let check = |previous, next, percent_next| Rollout::new(previous, next, percent_next).check();
        assert_eq!(check(3, 4, 20), Ok(()));
        assert_eq!(check(4, 4, 20), Err(JobProblem::SameVersion(4)));
        assert_eq!(check(0, 4, 20), Err(JobProblem::VersionZero));
        assert!(matches!(check(3, 4, 101), Err(JobProblem::TooMany { given: 101, max: 100, .. })));
        let beside = Rollout { in_place: true, standby: true, ..Rollout::new(3, 4, 20) };
        assert_eq!(beside.check(), Err(JobProblem::InPlaceBeside));
    }
}
