//! Subcommands, one file each: arguments, and a `run` that does the work or starts the processes that do.

pub(crate) mod bench;
pub(crate) mod config;
pub(crate) mod hint;
pub(crate) mod init_model;
pub(crate) mod router;
pub(crate) mod score;
pub(crate) mod up;

use tokio::runtime::{Builder, Runtime};

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

/// Tells what a model lacks for want of which clients will be refused.
pub(crate) fn warn_of_missing(model: &str, has_tokenizer: bool, has_template: bool) {
    if !has_tokenizer {
        tracing::warn!(
            model,
            "no tokenizer.json or tiktoken.model: prompts must be token ids, and no text is answered"
        );
    } else if !has_template {
        tracing::warn!(model, "no chat template: completions are answered, chat is not");
    }
}

/// A count that 0 makes no sense for.
pub(crate) fn at_least_one() -> clap::builder::RangedU64ValueParser<usize> {
    clap::builder::RangedU64ValueParser::new().range(1..)
}

/// One for every so many processors that this process may have, and at least one.
pub(crate) fn one_for_every(processors: usize) -> usize {
    (std::thread::available_parallelism().map_or(1, usize::from) / processors).max(1)
}

/// A runtime of so many threads. One thread alone takes its tasks in the order in which they became ready; that of several
/// has a queue of 256 for each, and what no longer fits waits until the others have found it, which a batch's tokens would do.
pub(crate) fn runtime(threads: usize) -> std::io::Result<Runtime> {
    let mut builder = if threads == 1 { Builder::new_current_thread() } else { Builder::new_multi_thread() };
    builder.worker_threads(threads).enable_all().build()
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
