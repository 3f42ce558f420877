//! One line on a terminal that says what is being waited for, gone when it is there.

use std::{
    future::Future,
    io::{self, IsTerminal as _, Write as _},
    time::Duration,
};

const SILENT: Duration = Duration::from_millis(500);

/// Waits for `work`; shows `what` on stderr when it takes long and stderr is a terminal.
pub(crate) async fn shown<T>(what: &str, work: impl Future<Output = T>) -> T {
    let mut work = std::pin::pin!(work);
    if !io::stderr().is_terminal() {
        return work.await;
    }
    tokio::select! {
        done = &mut work => return done,
        () = tokio::time::sleep(SILENT) => {}
    }
    // A terminal that cannot be written to shows nothing, which harms nobody.
    let _ = write!(io::stderr(), "{what} ...");
    let done = work.await;
    let _ = write!(io::stderr(), "\r\x1b[K");
    done
}
