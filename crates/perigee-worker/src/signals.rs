//! What a rank does when it is told to end by SIGTERM or Ctrl-C. The leader drains its replica; a follower is often told
//! at the same moment, by whoever tells all of them, and must go on until the leader has drained.

use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};

use crate::error::{Result, WorkerError};

/// How much longer than the grace a follower stays: the leader's last step and last words.
const AFTERWARDS: Duration = Duration::from_secs(5);

/// Completes on SIGTERM or Ctrl-C.
pub(crate) async fn told_to_end() {
    match signal(SignalKind::terminate()) {
        Ok(mut terminate) => {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = tokio::signal::ctrl_c() => {}
            }
        }
        Err(error) => {
            tracing::warn!(%error, "no handler for SIGTERM; only Ctrl-C ends this worker in order");
            // An error here would leave no way to end in order; waiting on is all that is left.
            let _ = tokio::signal::ctrl_c().await;
        }
    }
}

/// From now on this follower, told to end, goes on for the grace time and a little more, in which its leader ends it.
///
/// # Errors
/// The system gives no thread or no runtime.
pub(crate) fn follow_to_the_end(grace: Duration) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(WorkerError::io("starting the runtime of signals"))?;
    let wait = move || {
        runtime.block_on(async {
            told_to_end().await;
            tracing::info!(?grace, "told to end; going on until the leader has ended, or its grace is over");
            tokio::time::sleep(grace + AFTERWARDS).await;
        });
        std::process::exit(0);
    };
    let thread = std::thread::Builder::new().name("perigee-signals".into()).spawn(wait);
    thread.map(drop).map_err(WorkerError::io("starting a thread"))
}
