//! What the engine tells whoever keeps metrics. Plain calls with plain numbers: the engine depends on no metrics library
//! and names no metric. Calls come from the step loop, so they must not block.

use std::time::Duration;

use perigee_migration::Mode;

use crate::moves::MoveFacts;
use crate::remote::RemoteCounts;
use crate::request::{FinishReason, SessionId};

/// What a step was made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StepPhase {
    /// Prompt chunks only.
    Prefill,
    /// One token for each session.
    Decode,
    /// Both.
    Mixed,
}

/// What became of a preempted session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Preemption {
    /// State and pages went to host memory.
    Parked,
    /// They were dropped and will be computed again.
    Recomputed,
}

/// What tokens were.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenKind {
    /// Fed as part of a prompt, or again after a preemption.
    Prompt,
    /// Drawn.
    Completion,
}

/// How a move ended at its source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MoveResult {
    /// The session is another replica's.
    Moved,
    /// The target did not take it.
    Failed,
    /// The router took it back.
    Aborted,
}

/// A move that is over at its source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MoveRecord {
    /// What went along.
    pub mode: Mode,
    /// How it ended.
    pub result: MoveResult,
    /// What it came to, where the target had verified everything.
    pub facts: Option<MoveFacts>,
}

/// Takes the engine's measurements. Every method does nothing by default.
pub trait EngineObserver: Send + Sync {
    /// A request got its slots for the first time, so long after it came.
    fn queued(&self, _wait: Duration) {}
    /// A session's first token was drawn, so long after its request came.
    fn first_token(&self, _since_arrival: Duration) {}
    /// A session's next token was drawn, so long after the one before.
    fn next_token(&self, _since_last: Duration) {}
    /// A step was done.
    fn stepped(&self, _phase: StepPhase, _time: Duration) {}
    /// A session lost its slot and pages to a better one.
    fn preempted(&self, _how: Preemption) {}
    /// Tokens went through the model.
    fn tokens(&self, _kind: TokenKind, _count: u64) {}
    /// A session ended.
    fn finished(&self, _reason: FinishReason) {}
    /// A session left, or did not.
    fn moved(&self, _session: &SessionId, _record: &MoveRecord) {}
    /// A segment turned local: so many bytes of latents followed their session.
    fn followed(&self, _bytes: u64) {}
    /// A step asked homes for attention.
    fn asked(&self, _counts: &RemoteCounts) {}
}

/// Nobody keeps metrics.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl EngineObserver for Silent {}
