//! Forwards what the programs log to `tracing`, at TRACE only.

use aya::{Ebpf, maps::Array};
use aya_log::EbpfLogger;
use log::{Log, Metadata, Record};
use tokio::io::{Interest, unix::AsyncFd};

use super::{
    BpfError,
    settings::{failed, map_mut},
};

const LOG: &str = "LOG";

pub(super) fn spawn(object: &mut Ebpf) -> Result<(), BpfError> {
    let on = tracing::enabled!(target: "dataplane::bpf", tracing::Level::TRACE);
    switch(object, on)?;
    if !on {
        return Ok(());
    }
    let logger = EbpfLogger::init_with_logger(object, ToTracing).map_err(|e| BpfError::Log(Box::new(e)))?;
    // SAFETY: the logger owns the ring buffer's descriptor, never changes it, and closes it when dropped.
    let registered = unsafe { AsyncFd::register_with_interest(logger, Interest::READABLE) };
    let mut logger = registered.map_err(|e| BpfError::Log(Box::new(e.into_parts().1)))?;
    tokio::spawn(async move {
        while let Ok(mut ready) = logger.readable_mut().await {
            ready.get_inner_mut().flush();
            ready.clear_ready();
        }
    });
    Ok(())
}

/// Tells the programs, adopted ones included, whether somebody listens.
fn switch(object: &mut Ebpf, on: bool) -> Result<(), BpfError> {
    let mut array: Array<_, u32> = Array::try_from(map_mut(object, LOG)?).map_err(failed("open", LOG))?;
    array.set(0, u32::from(on), 0).map_err(failed("write", LOG))
}

/// The sink of aya-log.
struct ToTracing;

impl Log for ToTracing {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        tracing::trace!(target: "dataplane::bpf", "{}", record.args());
    }

    fn flush(&self) {}
}
