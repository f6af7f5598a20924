//! A replica's ranks that an engine drives and a benchmark asks between two steps. Both are on one thread; the lock is never
//! waited for.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use perigee_backend::{Backend, StatePart};
use perigee_engine::executor::{CacheBytes, Executor, ExecutorError, ExecutorLimits, StepOutput, StepPlan};
use perigee_engine::ranks::Ranks;
use perigee_sampling::Draw;

/// Ranks with two owners.
pub(super) struct SharedRanks<B: Backend> {
    ranks: Arc<Mutex<Ranks<B>>>,
    begun: Arc<AtomicU64>,
}

/// Work since the start, steps in flight included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Touched {
    /// See [`Ranks::experts_touched`].
    pub(super) experts: u64,
    /// Steps.
    pub(super) steps: u64,
}

impl<B: Backend> SharedRanks<B> {
    pub(super) fn new(ranks: Ranks<B>) -> Self {
        Self { ranks: Arc::new(Mutex::new(ranks)), begun: Arc::default() }
    }

    /// Waits for all steps that began.
    pub(super) fn touched(&self) -> Result<Touched, ExecutorError> {
        let experts = self.ranks.lock().experts_touched()?;
        Ok(Touched { experts, steps: self.begun.load(Ordering::Relaxed) })
    }
}

impl<B: Backend> Clone for SharedRanks<B> {
    fn clone(&self) -> Self {
        Self { ranks: Arc::clone(&self.ranks), begun: Arc::clone(&self.begun) }
    }
}

impl<B: Backend> Executor for SharedRanks<B> {
    fn limits(&self) -> ExecutorLimits {
        self.ranks.lock().limits()
    }

    fn cache_bytes(&self) -> CacheBytes {
        self.ranks.lock().cache_bytes()
    }

    fn step(&mut self, plan: &StepPlan, draws: &[Draw<'_>], want_logits: bool) -> Result<StepOutput, ExecutorError> {
        self.begun.fetch_add(1, Ordering::Relaxed);
        self.ranks.lock().step(plan, draws, want_logits)
    }

    fn runs_ahead(&self) -> bool {
        self.ranks.lock().runs_ahead()
    }

    fn launch(&mut self, plan: &StepPlan, draws: &[Draw<'_>]) -> Result<(), ExecutorError> {
        self.begun.fetch_add(1, Ordering::Relaxed);
        self.ranks.lock().launch(plan, draws)
    }

    fn collect(&mut self) -> Result<StepOutput, ExecutorError> {
        self.ranks.lock().collect()
    }

    fn park(&mut self, key: u64, slot: u32, pages: &[u32]) -> Result<(), ExecutorError> {
        self.ranks.lock().park(key, slot, pages)
    }

    fn unpark(&mut self, key: u64, slot: u32, pages: &[u32]) -> Result<(), ExecutorError> {
        self.ranks.lock().unpark(key, slot, pages)
    }

    fn drop_parked(&mut self, key: u64) -> Result<(), ExecutorError> {
        self.ranks.lock().drop_parked(key)
    }

    fn export_state(&mut self, slot: u32, part: &StatePart) -> Result<Vec<u8>, ExecutorError> {
        self.ranks.lock().export_state(slot, part)
    }

    fn weight_bytes(&self) -> Vec<u64> {
        self.ranks.lock().weight_bytes()
    }
}
