//! What a caller is shown of what is stored: secrets are replaced by a word, wherever they would appear.
//!
//! Which fields are secret, and to whom, is said once ([`scheduler_core::history::secrecy`]).

use hextet_api::v1;
use scheduler_core::{
    change::Key,
    history::{HIDDEN, Secrecy, secrecy},
    token::Level,
};

use crate::identity::Identity;

/// How much a caller is shown.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shown {
    environment: bool,
}

impl Shown {
    pub(crate) fn to(caller: &Identity) -> Shown {
        Shown { environment: caller.level() >= Some(Level::Operator) }
    }

    fn hides(self, secrecy: Secrecy) -> bool {
        match secrecy {
            Secrecy::Open => false,
            Secrecy::Operators => !self.environment,
            Secrecy::Nobody => true,
        }
    }

    pub(crate) fn status(self, mut status: v1::JobStatus) -> v1::JobStatus {
        status.job.iter_mut().for_each(|job| self.job(job));
        status
    }

    /// The names of environment variables are shown to everybody, and their values are not.
    pub(crate) fn job(self, job: &mut v1::Job) {
        if self.environment {
            return;
        }
        for group in &mut job.groups {
            let of_tasks = group.tasks.iter_mut().flat_map(|task| task.env.values_mut());
            let of_hooks = group.hooks.iter_mut().flat_map(|hook| hook.env.values_mut());
            of_tasks.chain(of_hooks).for_each(|value| *value = HIDDEN.to_owned());
        }
    }

    /// That a secret field changed is shown, and not how.
    pub(crate) fn object(self, object: &mut v1::ObjectChange) {
        let key = object.key.parse::<Key>();
        for field in &mut object.fields {
            // Of what is no key nothing is known.
            let is_hidden = key.as_ref().map_or(true, |key| self.hides(secrecy(key, &field.field)));
            if is_hidden {
                let shown = [&mut field.old, &mut field.new];
                shown.into_iter().flatten().for_each(|value| *value = HIDDEN.to_owned());
            }
        }
    }
}
