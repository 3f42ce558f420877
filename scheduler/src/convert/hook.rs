//! Hooks as messages.

use std::{collections::BTreeMap, time::Duration};

use hextet_api::v1;
use hextet_lifecycle::{
    Hook,
    hook::{ATTEMPTS, Timeout},
};

use super::ConvertError;

pub(super) fn to_message(name: &str, hook: &Hook) -> v1::Hook {
    v1::Hook {
        name: name.to_owned(),
        exec: hook.exec.clone(),
        undo: hook.undo.clone(),
        before: hook.before.clone(),
        after: hook.after.clone(),
        on: hook.on.clone(),
        timeout_ms: u64::try_from(hook.timeout.0.as_millis()).unwrap_or(u64::MAX),
        attempts: hook.attempts,
        optional: hook.optional,
        env: hook.env.clone(),
    }
}

pub(super) fn from_messages(
    group: &str,
    messages: Vec<v1::Hook>,
) -> Result<BTreeMap<String, Hook>, ConvertError> {
    let mut hooks = BTreeMap::new();
    for message in messages {
        let name = message.name.clone();
        if hooks.insert(name.clone(), from_message(message)).is_some() {
            return Err(ConvertError::Twice(format!("groups.{group}.hooks.{name}")));
        }
    }
    Ok(hooks)
}

/// What is not set is what a file that does not say it means.
fn from_message(message: v1::Hook) -> Hook {
    let timeout = match message.timeout_ms {
        0 => Timeout::default(),
        ms => Timeout(Duration::from_millis(ms)),
    };
    Hook {
        exec: message.exec,
        undo: message.undo,
        before: message.before,
        after: message.after,
        on: message.on,
        user: None,
        env: message.env,
        timeout,
        attempts: if message.attempts == 0 { ATTEMPTS } else { message.attempts },
        optional: message.optional,
    }
}
