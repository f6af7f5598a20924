//! Subcommands, one file each: arguments, and a `run` that does the work or starts the processes that do.

pub(crate) mod bench;
pub(crate) mod config;
pub(crate) mod hint;
pub(crate) mod init_model;
pub(crate) mod router;
pub(crate) mod score;
pub(crate) mod up;

/// Options that contradict each other, one fault a line: exit code 2, as for options that do not exist.
#[derive(Debug)]
pub(crate) struct UsageError(String);

impl std::fmt::Display for UsageError {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl std::error::Error for UsageError {}

/// An error where there are faults.
pub(crate) fn without_faults(faults: &[String]) -> anyhow::Result<()> {
    if faults.is_empty() { Ok(()) } else { Err(UsageError(faults.join("\n")).into()) }
}

/// A count that 0 makes no sense for.
pub(crate) fn at_least_one() -> clap::builder::RangedU64ValueParser<usize> {
    clap::builder::RangedU64ValueParser::new().range(1..)
}

/// Completes on Ctrl-C or SIGTERM.
pub(crate) async fn interrupted() -> anyhow::Result<()> {
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    tokio::select! {
        result = tokio::signal::ctrl_c() => result?,
        _ = terminate.recv() => {}
    }
    Ok(())
}
