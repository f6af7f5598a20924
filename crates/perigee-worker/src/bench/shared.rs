//! A replica's ranks that an engine drives and a benchmark asks between two steps. Both are on one thread; the lock is never
//! waited for.

use std::sync::Arc;

use parking_lot::Mutex;
use perigee_backend::{Backend, StatePart};
use perigee_engine::executor::{CacheBytes, Executor, ExecutorError, ExecutorLimits, StepOutput, StepPlan};
use perigee_engine::ranks::Ranks;
use perigee_sampling::Draw;

/// Ranks with two owners.
pub(super) struct SharedRanks<B: Backend>(Arc<Mutex<Ranks<B>>>);

impl<B: Backend> SharedRanks<B> {
    pub(super) fn new(ranks: Ranks<B>) -> Self {
        Self(Arc::new(Mutex::new(ranks)))
    }

    /// See [`Ranks::experts_touched`].
    pub(super) fn experts_touched(&self) -> Result<u64, ExecutorError> {
        self.0.lock().experts_touched()
    }
}

impl<B: Backend> Clone for SharedRanks<B> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<B: Backend> Executor for SharedRanks<B> {
    fn limits(&self) -> ExecutorLimits {
        self.0.lock().limits()
    }

    fn cache_bytes(&self) -> CacheBytes {
        self.0.lock().cache_bytes()
    }

    fn step(&mut self, plan: &StepPlan, draws: &[Draw<'_>], want_logits: bool) -> Result<StepOutput, ExecutorError> {
        self.0.lock().step(plan, draws, want_logits)
    }

    fn park(&mut self, key: u64, slot: u32, pages: &[u32]) -> Result<(), ExecutorError> {
        self.0.lock().park(key, slot, pages)
    }

    fn unpark(&mut self, key: u64, slot: u32, pages: &[u32]) -> Result<(), ExecutorError> {
        self.0.lock().unpark(key, slot, pages)
    }

    fn drop_parked(&mut self, key: u64) -> Result<(), ExecutorError> {
        self.0.lock().drop_parked(key)
    }

    fn export_state(&mut self, slot: u32, part: &StatePart) -> Result<Vec<u8>, ExecutorError> {
        self.0.lock().export_state(slot, part)
    }

    fn weight_bytes(&self) -> Vec<u64> {
        self.0.lock().weight_bytes()
    }
}
