//! Locks whose holders leave what they guard as it should be at every step: after a panic the next one goes on with it.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Waits for the lock, also after a thread that held it has panicked.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
