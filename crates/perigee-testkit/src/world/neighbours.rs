//! Replicas that reach each other's state slots, as processes with GPUs of one machine do: what a source has taken digests of
//! lies where its target can fetch it. A wrapper of the executor, so that nothing but the negotiation and the copy differs.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use perigee_backend::{PairOrder, PairState, StatePart};
use perigee_engine::executor::{
    CacheBytes, Executor, ExecutorError, ExecutorLimits, PageSpan, StateSource, StepOutput, StepPlan,
};
use perigee_migration::{Digest, Geometry, PageSlice, StateSlice, TensorDigests};
use perigee_sampling::Draw;

use super::pairing::Pairing;

/// The memory that replicas share. Clones are the same.
#[derive(Debug, Clone, Default)]
pub struct Neighbours(Arc<Mutex<Inner>>);

#[derive(Debug, Default)]
struct Inner {
    slots: HashMap<(Vec<u8>, u32), Vec<StateSlice>>,
    open: usize,
    taken: usize,
}

impl Neighbours {
    /// How often slots are open at present, and how many were taken so far.
    pub fn counts(&self) -> (usize, usize) {
        let inner = self.lock();
        (inner.open, inner.taken)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An executor whose slots others reach, if there are neighbours.
pub(super) struct Sharing<E> {
    inner: E,
    neighbours: Option<Neighbours>,
    pairing: Pairing,
    /// What its slots are known by, for each rank.
    name: Vec<Vec<u8>>,
}

impl<E: Executor> Sharing<E> {
    pub(super) fn new(
        inner: E,
        (neighbours, pairing): (Option<Neighbours>, Pairing),
        name: &str,
        degree: usize,
    ) -> Self {
        Self { inner, neighbours, pairing, name: vec![name.as_bytes().to_vec(); degree] }
    }
}

fn refused(message: &str) -> ExecutorError {
    ExecutorError { rank: 0, message: message.into(), fatal: false }
}

impl<E: Executor> Executor for Sharing<E> {
    fn limits(&self) -> ExecutorLimits {
        self.inner.limits()
    }

    fn cache_bytes(&self) -> CacheBytes {
        self.inner.cache_bytes()
    }

    fn step(&mut self, plan: &StepPlan, draws: &[Draw<'_>], want_logits: bool) -> Result<StepOutput, ExecutorError> {
        self.inner.step(plan, draws, want_logits)
    }

    fn park(&mut self, key: u64, slot: u32, pages: &[u32]) -> Result<(), ExecutorError> {
        self.inner.park(key, slot, pages)
    }

    fn unpark(&mut self, key: u64, slot: u32, pages: &[u32]) -> Result<(), ExecutorError> {
        self.inner.unpark(key, slot, pages)
    }

    fn drop_parked(&mut self, key: u64) -> Result<(), ExecutorError> {
        self.inner.drop_parked(key)
    }

    fn export_state(&mut self, slot: u32, part: &StatePart) -> Result<Vec<u8>, ExecutorError> {
        self.inner.export_state(slot, part)
    }

    fn weight_bytes(&self) -> Vec<u64> {
        self.inner.weight_bytes()
    }

    fn geometry(&self) -> Option<Geometry> {
        self.inner.geometry()
    }

    fn export_slot(&mut self, from: StateSource) -> Result<Vec<StateSlice>, ExecutorError> {
        self.inner.export_slot(from)
    }

    fn import_state(&mut self, slot: u32, slices: &[StateSlice]) -> Result<(), ExecutorError> {
        self.inner.import_state(slot, slices)
    }

    fn digest_slot(&mut self, slot: u32) -> Result<TensorDigests, ExecutorError> {
        if let (Some(neighbours), Some(name)) = (&self.neighbours, self.name.first()) {
            let slices = self.inner.export_slot(StateSource::Slot(slot))?;
            neighbours.lock().slots.insert((name.clone(), slot), slices);
        }
        self.inner.digest_slot(slot)
    }

    fn share_slots(&mut self) -> Result<Option<Vec<Vec<u8>>>, ExecutorError> {
        Ok(self.neighbours.as_ref().map(|_| self.name.clone()))
    }

    fn open_slots(&mut self, shared: &[Vec<u8>]) -> Result<(), ExecutorError> {
        let Some(neighbours) = &self.neighbours else { return Err(refused("nobody is near")) };
        if shared.len() != self.name.len() {
            return Err(refused("slots of another number of ranks"));
        }
        neighbours.lock().open += 1;
        Ok(())
    }

    fn take_slot(&mut self, shared: &[Vec<u8>], from: u32, slot: u32) -> Result<(), ExecutorError> {
        let (Some(neighbours), Some(name)) = (&self.neighbours, shared.first()) else {
            return Err(refused("nobody is near"));
        };
        let slices = neighbours.lock().slots.get(&(name.clone(), from)).cloned();
        self.inner.import_state(slot, &slices.ok_or_else(|| refused("there is nothing in that slot"))?)?;
        neighbours.lock().taken += 1;
        Ok(())
    }

    fn close_slots(&mut self, _shared: &[Vec<u8>]) -> Result<(), ExecutorError> {
        let Some(neighbours) = &self.neighbours else { return Err(refused("nobody is near")) };
        neighbours.lock().open -= 1;
        Ok(())
    }

    fn invite_pairs(&mut self) -> Result<Option<Vec<Vec<u8>>>, ExecutorError> {
        self.inner.invite_pairs()
    }

    fn pairs(&mut self, invitations: &[Vec<u8>], order: PairOrder) -> Result<PairState, ExecutorError> {
        self.pairing.order(&mut self.inner, invitations, order)
    }

    fn export_pages(&mut self, pages: &[PageSpan]) -> Result<Vec<PageSlice>, ExecutorError> {
        self.inner.export_pages(pages)
    }

    fn import_pages(&mut self, pages: &[(u32, PageSlice)]) -> Result<(), ExecutorError> {
        self.inner.import_pages(pages)
    }

    fn digest_pages(&mut self, pages: &[PageSpan]) -> Result<Vec<Digest>, ExecutorError> {
        self.inner.digest_pages(pages)
    }

    fn poison(&mut self, slots: &[u32], pages: &[u32]) -> Result<(), ExecutorError> {
        self.inner.poison(slots, pages)
    }
}
