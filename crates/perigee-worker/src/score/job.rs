//! What `perigee score` asks of a replica, and the sizes that follow from it. The parent process plans, the leader runs.

use std::path::{Path, PathBuf};

use perigee_backend::PAGE_TOKENS;
use serde::{Deserialize, Serialize};

use super::files::{Inputs, read_prompts};
use crate::config::EngineOptions;
use crate::error::{Result, WorkerError};

/// Prompts that run side by side.
const BATCH: usize = 8;
/// Tokens of one prompt in a step where no chunk size is given.
const WHOLE: usize = 8_192;

/// A job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScoreJob {
    /// Safetensors file with int64 `prompt_<i>`.
    pub tokens: PathBuf,
    /// Safetensors file to write.
    pub out: PathBuf,
    /// Most tokens of a prompt in one step.
    pub chunk: usize,
    /// Parts that the latent cache is cut into.
    pub segments: usize,
    /// Tokens to continue greedily.
    pub greedy: Option<usize>,
    /// Safetensors file with int64 `greedy_<i>` to feed.
    pub feed: Option<PathBuf>,
    /// Safetensors file with `experts_<i>_<l>` and `greedy_experts_<i>_<l>` to use.
    pub experts: Option<PathBuf>,
    /// Also write hidden states and experts.
    pub trace: bool,
    /// Prompts that run side by side.
    pub batch: usize,
}

/// What the command line says, before the files are looked at.
#[derive(Debug, Clone)]
pub struct ScoreRequest<'a> {
    /// `--tokens`.
    pub tokens: &'a Path,
    /// `--out`.
    pub out: &'a Path,
    /// `--chunk`.
    pub chunk: Option<usize>,
    /// `--segments`.
    pub segments: usize,
    /// `--greedy`.
    pub greedy: Option<usize>,
    /// `--feed`.
    pub feed: Option<&'a Path>,
    /// `--experts`.
    pub experts: Option<&'a Path>,
    /// `--trace`.
    pub trace: bool,
}

impl ScoreJob {
    /// Plans a job, and sets the sizes of `options` to what it needs: a slot and pages for every prompt that runs at once,
    /// doubled where the greedy run goes beside the fed one.
    ///
    /// # Errors
    /// The prompts cannot be read, or a number is out of range.
    pub fn plan(request: &ScoreRequest<'_>, options: &mut EngineOptions) -> Result<Self> {
        for (name, value) in [("--chunk", request.chunk), ("--segments", Some(request.segments))] {
            if value == Some(0) {
                return Err(WorkerError::Score(format!("{name}: expected at least 1, found 0")));
            }
        }
        let prompts = read_prompts(request.tokens)?;
        let longest = prompts.iter().map(|(_, tokens)| tokens.len()).max().unwrap_or(0);
        let chunk = request.chunk.unwrap_or(WHOLE).min(longest.max(1));
        let batch = (WHOLE / chunk).clamp(1, BATCH).min(prompts.len().max(1));
        let fed = match request.feed {
            Some(path) => Inputs::longest_feed(path, &prompts)?,
            None => 0,
        };
        let total = longest + fed.max(request.greedy.unwrap_or(0));
        let forks = if request.greedy.is_some() && request.feed.is_some() { 2 } else { 1 };
        options.state_slots = batch * forks;
        let step_tokens = batch * chunk;
        options.token_budget = Some(step_tokens);
        // Logits of every token of a step come back, and a step has room for one row of them for each of its rows.
        options.max_batch = Some(step_tokens.max(batch * forks));
        options.latent_pages = Some(batch * forks * (total.div_ceil(PAGE_TOKENS) + 1));
        options.max_model_len = Some(total.max(1));
        Ok(Self {
            tokens: request.tokens.into(),
            out: request.out.into(),
            chunk,
            segments: request.segments,
            greedy: request.greedy,
            feed: request.feed.map(Into::into),
            experts: request.experts.map(Into::into),
            trace: request.trace,
            batch,
        })
    }
}
