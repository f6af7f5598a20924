//! Subcommands, one file each: arguments, and a `run` that does the work or starts the processes that do.

pub(crate) mod config;
pub(crate) mod init_model;
pub(crate) mod router;
pub(crate) mod score;
pub(crate) mod up;

/// Completes on Ctrl-C or SIGTERM.
pub(crate) async fn interrupted() -> anyhow::Result<()> {
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    tokio::select! {
        result = tokio::signal::ctrl_c() => result?,
        _ = terminate.recv() => {}
    }
    Ok(())
}
