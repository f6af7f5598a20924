//! What the step loop drives: something that runs a planned step on every rank of the replica and reports every rank's
//! result. The real one is a group of ranks; tests put a modelled one in its place.

use perigee_backend::{StatePart, StepBatch};
use perigee_sampling::{Draw, Sampled};
use serde::{Deserialize, Serialize};

/// One step as the leader tells it to every rank: cache work first, in field order, then the forward pass.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepPlan {
    /// Slots to zero: a session starts in each.
    pub clear_slots: Vec<u32>,
    /// Slot copies (from, to): forks.
    pub copy_slots: Vec<(u32, u32)>,
    /// Page copies (from, to): a fork's partial last page.
    pub copy_pages: Vec<(u32, u32)>,
    /// The forward pass; empty when only cache work is due.
    pub batch: StepBatch,
}

/// What a step gave.
#[derive(Debug, Default)]
pub struct StepOutput {
    /// One draw for every entry of the `draws` that the step was given, in order.
    pub sampled: Vec<Sampled>,
    /// Logits [batch.logits.len(), vocab], where they were asked for.
    pub logits: Option<Vec<f32>>,
}

/// A failed step or cache operation: which rank, and why. The replica cannot go on after `fatal`.
#[derive(Debug, Clone, thiserror::Error)]
#[error("rank {rank}: {message}")]
pub struct ExecutorError {
    /// The rank that failed or was lost.
    pub rank: usize,
    /// What it reported.
    pub message: String,
    /// Whether the group is broken (a rank lost, a collective failed) rather than one operation refused.
    pub fatal: bool,
}

/// Fixed sizes of a replica, agreed by all ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExecutorLimits {
    /// Vocabulary size.
    pub vocab: usize,
    /// State slots.
    pub slots: usize,
    /// Latent pages.
    pub pages: usize,
    /// Most tokens in one step (the token budget).
    pub step_tokens: usize,
    /// Most rows in one step.
    pub step_rows: usize,
    /// Longest sequence, prompt and output together.
    pub max_model_len: usize,
}

/// Memory that a session takes, summed over all ranks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CacheBytes {
    /// One state slot.
    pub slot: u64,
    /// One latent page in every MLA layer.
    pub page: u64,
}

/// A replica's ranks, seen by its step loop. Every call reaches every rank; an error on any of them is an error.
pub trait Executor: Send {
    /// Fixed sizes.
    fn limits(&self) -> ExecutorLimits;
    /// Sizes for the account of host memory. Where they are not known, parking is not limited by bytes.
    fn cache_bytes(&self) -> CacheBytes {
        CacheBytes::default()
    }
    /// Runs a step. `draws[i]` draws from row `i` of the logits (`batch.logits`); there may be fewer draws than rows of
    /// logits, never more. With `want_logits` the logits come back too. The engine asks for at most `step_rows` rows.
    fn step(&mut self, plan: &StepPlan, draws: &[Draw<'_>], want_logits: bool) -> Result<StepOutput, ExecutorError>;
    /// Copies a session's slot and pages into every rank's host memory under `key`; slot and pages are free afterwards.
    fn park(&mut self, key: u64, slot: u32, pages: &[u32]) -> Result<(), ExecutorError>;
    /// Writes a parked session back to a slot and as many pages as it had, in order; the copy is kept until `drop_parked`.
    fn unpark(&mut self, key: u64, slot: u32, pages: &[u32]) -> Result<(), ExecutorError>;
    /// Forgets a parked session.
    fn drop_parked(&mut self, key: u64) -> Result<(), ExecutorError>;
    /// One part of a slot from the rank that holds those heads; `part.first_head` counts heads of the whole model and
    /// the range lies within one rank.
    fn export_state(&mut self, slot: u32, part: &StatePart) -> Result<Vec<u8>, ExecutorError>;
    /// Weight bytes of every rank, in rank order.
    fn weight_bytes(&self) -> Vec<u64>;
}
