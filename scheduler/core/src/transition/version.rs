//! Keeps the versions of jobs that a revision makes or replaces.

use std::sync::Arc;

use crate::{
    change::{JobRecord, Key, Value},
    draft::Draft,
    version::{self, JobVersion, Text, VersionId},
};

/// Keeps what came into force, and forgets what is more than is kept. What went out of force is kept, too, if it is not
/// yet: it came into force when nobody kept versions.
pub(super) fn keep(draft: &mut Draft<'_>, message: &str) {
    let touched = draft.jobs_touched();
    for (name, before) in &touched {
        if let Some(before) = before {
            put(draft, name, before, (0, ""));
        }
        if let Some(after) = draft.job_record(name).cloned() {
            put(draft, name, &after, (draft.revision() + 1, message));
        }
        let surplus = version::surplus(draft, name);
        surplus.into_iter().for_each(|id| draft.put(Key::Version(id), None));
    }
    if !touched.is_empty() {
        trim(draft, version::ALL_BYTES_MAX);
    }
}

/// Forgets what was kept first, until all versions take no more than `max` bytes.
fn trim(draft: &mut Draft<'_>, max: u64) {
    while draft.versions().bytes() > max {
        let Some(oldest) = draft.versions().oldest().cloned() else { return };
        draft.put(Key::Version(oldest), None);
    }
}

/// Keeps the text in force, unless it is kept already.
fn put(draft: &mut Draft<'_>, job: &str, record: &JobRecord, (made, message): (u64, &str)) {
    let id = VersionId { job: job.to_owned(), version: record.version };
    let Some(text) = record.current().filter(|_| draft.versions().get(&id).is_none()) else { return };
    let version = JobVersion {
        text: Text::of(text),
        made,
        kept: draft.revision() + 1,
        applied: record.applied,
        changer: record.changer.clone(),
        message: message.to_owned(),
        equals: record.equals,
    };
    draft.put(Key::Version(id), Some(Value::Version(Arc::new(version))));
}

#[cfg(test)]
mod tests {
    use rand::{SeedableRng as _, rngs::StdRng};

    use super::*;
    use crate::{
        event::{Event, Texts},
        job::Job,
        state::State,
        time::WallTime,
        transition::{Context, Origin, handle},
    };

    #[test]
    fn of_all_jobs_what_was_kept_first_goes_first() {
        let mut state = State::default();
        let mut apply = |job: &str, argument: &str| {
            let text =
                format!("{{job: {job}, groups: {{web: {{tasks: {{t: {{exec: [/x, {argument}]}}}}}}}}}}");
            let job: Job = serde_norway::from_str(&text).unwrap();
            let mut rng = StdRng::seed_from_u64(1);
            let mut context = Context { wall: WallTime(0), rng: &mut rng, is_watched: &|_| false };
            let origin = Origin { changer: "user:a".to_owned(), message: String::new() };
            handle(&mut state, &Event::ApplyJob(job, Texts::new()), &origin, &mut context).unwrap();
        };
        let applied = [("a", "one"), ("b", "one"), ("a", "two"), ("b", "two")];
        applied.into_iter().for_each(|(job, argument)| apply(job, argument));
        let bytes = state.versions().bytes();
        let left = |max: u64| -> Vec<String> {
            let mut state = state.clone();
            trim(&mut Draft::new(&mut state), max);
            assert!(state.versions().bytes() <= max);
            state.versions().iter().map(|(id, _)| id.to_string()).collect()
        };
        assert_eq!(left(bytes), ["a@1", "a@2", "b@1", "b@2"]);
        assert_eq!(left(bytes - 1), ["a@2", "b@1", "b@2"]);
        assert_eq!(left(bytes / 2), ["a@2", "b@2"]);
        assert_eq!(left(0), [""; 0]);
    }
}
