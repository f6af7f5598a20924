//! `perigee score` on the leader: runs prompts through the replica's ranks outside of the scheduler and writes logits,
//! states and traces. It exists to be judged: chunk sizes, segment cuts, fed tokens and forced experts are all given.

mod files;
mod job;
mod prompt;

pub use files::{Inputs, Outputs};
pub use job::{ScoreJob, ScoreRequest};

use std::time::Instant;

use perigee_backend::Backend;
use perigee_engine::executor::Executor;
use perigee_engine::ranks::Ranks;

use crate::error::{Result, WorkerError};
use crate::events::{WorkerEvent, emit};
use crate::load::Opened;
use prompt::Scorer;

/// Runs the job that a parent process planned, and writes its output.
///
/// # Errors
/// A file or tensor is missing or malformed, or a rank failed.
pub fn run<B: Backend>(ranks: &mut Ranks<B>, opened: &Opened, job: &str, supervised: bool) -> Result<()> {
    let job: ScoreJob = serde_json::from_str(job).map_err(|error| WorkerError::Score(format!("job: {error}")))?;
    let inputs = Inputs::read(&job)?;
    let started = Instant::now();
    let outputs = run_job(ranks, opened, &job, &inputs)?;
    let seconds = started.elapsed().as_secs_f64();
    outputs.write(&job.out)?;
    emit(supervised, &WorkerEvent::Scored { weight_bytes: ranks.weight_bytes(), seconds });
    Ok(())
}

/// Runs a job over any ranks and keeps its output in memory.
///
/// # Errors
/// The inputs do not fit the model or the job, or a rank failed.
pub fn run_job<B: Backend>(ranks: &mut Ranks<B>, opened: &Opened, job: &ScoreJob, inputs: &Inputs) -> Result<Outputs> {
    let mut outputs = Outputs::default();
    let mut scorer = Scorer::new(ranks, opened, job, inputs)?;
    let count = inputs.prompts.len();
    for first in (0..count).step_by(job.batch) {
        let end = (first + job.batch).min(count);
        scorer.score(first..end, &mut outputs)?;
        tracing::info!(prompts = end, of = count, "scored");
    }
    Ok(outputs)
}
