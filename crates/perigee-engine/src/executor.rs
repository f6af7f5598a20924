//! What the step loop drives: something that runs a planned step on every rank of the replica and reports every rank's
//! result. The real one is a group of ranks; tests put a modelled one in its place.

use perigee_backend::{PairOrder, PairState, StatePart, StepBatch};
use perigee_migration::attend::AnswerStatus;
use perigee_migration::{Digest, Geometry, PageSlice, StateSlice, TensorDigests};
use perigee_sampling::{Draw, Sampled};
use serde::{Deserialize, Serialize};

use crate::remote::{RemoteCounts, RemotePlan};
use crate::traces::TraceNotes;

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
    /// The rows of the pass whose older keys are at other replicas.
    pub remote: RemotePlan,
    /// Traced sessions that begin with this step, and those that ended before it.
    pub traces: TraceNotes,
    /// Where the step is fed with what the one before it drew, the draw for each token of the batch, whose own tokens are of
    /// no meaning then; else empty.
    pub feed: Vec<u32>,
}

/// What a step gave.
#[derive(Debug, Default)]
pub struct StepOutput {
    /// One draw for every entry of the `draws` that the step was given, in order. None for one that has to be made again,
    /// only where the step was launched: what its row was fed with next is nothing.
    pub sampled: Vec<Option<Sampled>>,
    /// Logits [batch.logits.len(), vocab], where they were asked for.
    pub logits: Option<Vec<f32>>,
    /// Rows (indices into `batch.rows`, ascending) that missed an answer on any rank: what they drew, and what they wrote
    /// to their written slot and behind their position, must not be used.
    pub faulty: Vec<u32>,
    /// Rows to which a home said why it does not answer, with what it said; all of them are faulty.
    pub refusals: Vec<(u32, AnswerStatus)>,
    /// What asking cost.
    pub remote: RemoteCounts,
}

/// Where a session's state is when it is exported.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum StateSource {
    /// In a slot.
    Slot(u32),
    /// In the ranks' host memory, under this key.
    Parked(u64),
    /// Nowhere: the session has not begun, and its state is zero.
    Empty,
}

/// Filled positions of a page, from its beginning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageSpan {
    /// Number of the page.
    pub page: u32,
    /// Absolute position of its first latents, a multiple of [`perigee_backend::PAGE_TOKENS`].
    pub first: u64,
    /// How many positions; 1 to [`perigee_backend::PAGE_TOKENS`].
    pub positions: u32,
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

impl ExecutorError {
    /// The answer of an executor whose steps are done when they return.
    fn runs_nothing_ahead() -> Self {
        Self { rank: 0, message: "this executor does not run ahead".into(), fatal: false }
    }

    /// The answer of an executor that has nothing of moves.
    fn moves_nothing() -> Self {
        Self { rank: 0, message: "this executor does not move sessions".into(), fatal: false }
    }
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
    /// Whether [`Self::launch`] and [`Self::collect`] do anything. If not, as provided, they fail.
    fn runs_ahead(&self) -> bool {
        false
    }
    /// Begins a step in which every row draws, without waiting for it. It may be fed with the draws of the step launched before
    /// (`plan.feed`), of which at most that one is not collected.
    fn launch(&mut self, _plan: &StepPlan, _draws: &[Draw<'_>]) -> Result<(), ExecutorError> {
        Err(ExecutorError::runs_nothing_ahead())
    }
    /// What the step launched first, of those not collected, gave; waits for it.
    fn collect(&mut self) -> Result<StepOutput, ExecutorError> {
        Err(ExecutorError::runs_nothing_ahead())
    }
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
    /// Tells every rank what is to be told of traces, where no step takes it along. As provided nobody traces.
    fn note(&mut self, _notes: TraceNotes) -> Result<(), ExecutorError> {
        Ok(())
    }
    /// Tells the other ranks that the replica ends in order; nothing is asked of them afterwards. As provided there are none.
    fn shutdown(&mut self) {}

    // Moves. As provided, an executor moves nothing; none of these errors is fatal.

    /// Shapes and types of a session's tensors over the whole replica; none where sessions cannot be moved.
    fn geometry(&self) -> Option<Geometry> {
        None
    }
    /// A session's state from every rank: all KDA layers, kinds and heads (counted over the whole model), each slice with
    /// the digest that its rank took over it.
    fn export_slot(&mut self, _from: StateSource) -> Result<Vec<StateSlice>, ExecutorError> {
        Err(ExecutorError::moves_nothing())
    }
    /// Writes slices to a slot; every rank gets the part of each that lies in its heads. After an error the slot holds
    /// anything.
    fn import_state(&mut self, _slot: u32, _slices: &[StateSlice]) -> Result<(), ExecutorError> {
        Err(ExecutorError::moves_nothing())
    }
    /// Digests over a slot as it is now, summed over the ranks; those of the latents are zero.
    fn digest_slot(&mut self, _slot: u32) -> Result<TensorDigests, ExecutorError> {
        Err(ExecutorError::moves_nothing())
    }
    /// How a replica on the same machine reaches this one's slots, by rank; none where it cannot.
    fn share_slots(&mut self) -> Result<Option<Vec<Vec<u8>>>, ExecutorError> {
        Ok(None)
    }
    /// Opens another replica's slots, to be closed as often as it was opened. Where that fails, slices are sent instead.
    fn open_slots(&mut self, _shared: &[Vec<u8>]) -> Result<(), ExecutorError> {
        Err(ExecutorError::moves_nothing())
    }
    /// Copies a slot of another replica, which it does not change meanwhile, to one of this replica's. After an error the
    /// slot holds anything.
    fn take_slot(&mut self, _shared: &[Vec<u8>], _from: u32, _slot: u32) -> Result<(), ExecutorError> {
        Err(ExecutorError::moves_nothing())
    }
    /// Another replica's slots are not needed any more.
    fn close_slots(&mut self, _shared: &[Vec<u8>]) -> Result<(), ExecutorError> {
        Ok(())
    }
    /// Invitations to pairs (see [`perigee_backend::pairs`]), by rank, for another replica's [`Self::pairs`]; none where there are
    /// no pairs.
    fn invite_pairs(&mut self) -> Result<Option<Vec<Vec<u8>>>, ExecutorError> {
        Ok(None)
    }
    /// Carries out an order about the pairs of these invitations on every rank, and says how far they are together. An error
    /// leaves them in any state.
    fn pairs(&mut self, _invitations: &[Vec<u8>], _order: PairOrder) -> Result<PairState, ExecutorError> {
        Err(ExecutorError::moves_nothing())
    }
    /// Pages with their digests, of every page in order all MLA layers; from the leader, since all ranks hold the same.
    fn export_pages(&mut self, _pages: &[PageSpan]) -> Result<Vec<PageSlice>, ExecutorError> {
        Err(ExecutorError::moves_nothing())
    }
    /// Writes slices to the beginnings of pages, on every rank. After an error the pages hold anything.
    fn import_pages(&mut self, _pages: &[(u32, PageSlice)]) -> Result<(), ExecutorError> {
        Err(ExecutorError::moves_nothing())
    }
    /// Digests over pages as they are now, one for every MLA layer, summed over the pages. All ranks hold the same
    /// latents; one whose digests differ is an error that names it.
    fn digest_pages(&mut self, _pages: &[PageSpan]) -> Result<Vec<Digest>, ExecutorError> {
        Err(ExecutorError::moves_nothing())
    }
    /// Fills slots and pages that were given back with not-a-number, so that a stale read shows.
    fn poison(&mut self, _slots: &[u32], _pages: &[u32]) -> Result<(), ExecutorError> {
        Err(ExecutorError::moves_nothing())
    }
}
