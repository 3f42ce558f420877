//! Logging of rare events: answers, drops, new flows. Off, it costs one array look-up per event, and a
//! packet on the fast path is no event.

use crate::maps::LOG;

/// Whether the agent wants to hear of events.
#[inline(always)]
pub(crate) fn is_on() -> bool {
    LOG.get(0).is_some_and(|on| *on != 0)
}

/// Logs an event when the agent wants to hear of it.
macro_rules! event {
    ($ctx:expr, $($arg:tt)+) => {
        if crate::log::is_on() {
            aya_log_ebpf::debug!($ctx, $($arg)+);
        }
    };
}

pub(crate) use event;
