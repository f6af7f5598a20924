//! What a modelled executor is made with and what it tells: its sizes, operations that are to go wrong, counters, and what
//! homes say to it. It runs nothing.

use std::sync::atomic::AtomicU64;

use perigee_migration::AnswerStatus;

use crate::executor::{CacheBytes, ExecutorLimits};

/// Sizes of a modelled replica.
#[derive(Debug, Clone, Copy)]
pub struct ModelSizes {
    /// Fixed sizes as the engine sees them.
    pub limits: ExecutorLimits,
    /// Memory of a slot and a page in host memory.
    pub bytes: CacheBytes,
}

impl Default for ModelSizes {
    /// Roomy: 64 slots, 4096 pages, 512 tokens and 64 rows a step, sequences of 8192 over a vocabulary of 300.
    fn default() -> Self {
        let limits =
            ExecutorLimits { vocab: 300, slots: 64, pages: 4096, step_tokens: 512, step_rows: 64, max_model_len: 8192 };
        Self { limits, bytes: CacheBytes { slot: 1000, page: 100 } }
    }
}

/// Operations that go wrong; counted from 1.
#[derive(Debug, Clone, Copy, Default)]
pub struct Faults {
    /// Every so many-th park is refused.
    pub park_every: Option<u64>,
    /// Every so many-th unpark is refused.
    pub unpark_every: Option<u64>,
    /// This step is refused.
    pub refused_step: Option<u64>,
    /// This step breaks the replica.
    pub fatal_step: Option<u64>,
    /// Every so many-th import of state is refused.
    pub import_every: Option<u64>,
    /// Every so many-th import of state writes something else than it was given.
    pub damage_every: Option<u64>,
}

/// What a modelled executor did, readable while an engine owns it.
#[derive(Debug, Default)]
pub struct ModelCounters {
    /// Steps asked for.
    pub steps: AtomicU64,
    /// Of those, steps that were launched.
    pub launched: AtomicU64,
    /// Of those, steps that were fed with draws which nobody had read.
    pub fed: AtomicU64,
    /// Sessions parked.
    pub parks: AtomicU64,
    /// Sessions brought back.
    pub unparks: AtomicU64,
    /// Copies in host memory now.
    pub parked_now: AtomicU64,
    /// Slot copies.
    pub slot_copies: AtomicU64,
    /// Tokens fed.
    pub tokens: AtomicU64,
    /// Imports of state asked for.
    pub imports: AtomicU64,
    /// Pages written by imports.
    pub pages_imported: AtomicU64,
    /// Remote rows fed, and those of them that missed an answer.
    pub remote_rows: AtomicU64,
    /// See [`Self::remote_rows`].
    pub faulty_rows: AtomicU64,
}

/// What a home says when it is asked for the tokens of some positions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RemoteAnswer {
    /// These.
    Tokens(Vec<u32>),
    /// Nothing in time.
    Missed,
    /// That it does not answer.
    Refused(AnswerStatus),
}
