//! What a target of a move may get wrong, planted between an engine and its ranks: in what it writes, which its digests must
//! find, or behind their back, which only the output can show. The engine and the ranks themselves are the shipped ones.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use perigee_backend::{PairOrder, PairState, StateKind, StatePart};
use perigee_engine::executor::{
    CacheBytes, Executor, ExecutorError, ExecutorLimits, PageSpan, StateSource, StepOutput, StepPlan,
};
use perigee_migration::{Digest, Geometry, PAGE_POSITIONS, PageSlice, StateSlice, TensorDigests};
use perigee_sampling::{Draw, TokenCounts};

/// A mistake that a target makes with every session that arrives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// One layer's tail of the k convolution is zero.
    TailDropped,
    /// One layer's recurrent state is zero.
    LayerZero,
    /// Every recurrent state is that of the next head.
    HeadsRotated,
    /// The last page has, from its middle on, what was there before.
    StalePage,
    /// The heads of the last of two ranks are missing.
    SliceMissing,
    /// Noise is drawn as if the session began where it arrived.
    NoiseReset,
    /// Penalties know nothing of what was generated before.
    CountsReset,
}

impl Fault {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::TailDropped,
        Self::LayerZero,
        Self::HeadsRotated,
        Self::StalePage,
        Self::SliceMissing,
        Self::NoiseReset,
        Self::CountsReset,
    ];

    /// Whether it changes what is in slots or pages.
    pub fn is_of_tensors(self) -> bool {
        !matches!(self, Self::NoiseReset | Self::CountsReset)
    }
}

/// When a mistake is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// While the handoff is written, before digests are taken over it.
    Writing,
    /// When the session is stepped for the first time.
    Running,
}

/// What became of slots that were given back after moves.
#[derive(Debug, Default)]
pub struct Poisoned {
    slots: AtomicUsize,
    readable: AtomicUsize,
}

impl Poisoned {
    /// How many there were, and in how many of them a number was left.
    pub fn counts(&self) -> (usize, usize) {
        (self.slots.load(Ordering::Relaxed), self.readable.load(Ordering::Relaxed))
    }
}

/// An executor that makes a mistake, if it is to make one, and looks at what is given back.
pub(super) struct Faulty<E> {
    inner: E,
    fault: Option<Fault>,
    stage: Stage,
    poisoned: Arc<Poisoned>,
    /// Slots that were written and not yet stepped.
    fresh: Vec<u32>,
    /// Last pages that were written and not yet stepped.
    tails: Vec<(u32, PageSlice)>,
    /// Slots of sessions that arrived, with the number of steps since.
    arrived: BTreeMap<u32, u64>,
    empty: TokenCounts,
}

impl<E: Executor> Faulty<E> {
    pub(super) fn new(inner: E, planted: Option<(Fault, Stage)>, poisoned: Arc<Poisoned>) -> Self {
        let (fresh, tails, arrived) = (Vec::new(), Vec::new(), BTreeMap::new());
        let (fault, stage) = planted.map_or((None, Stage::Running), |(fault, stage)| (Some(fault), stage));
        Self { inner, fault, stage, poisoned, fresh, tails, arrived, empty: TokenCounts::new() }
    }

    fn known_geometry(&self) -> Result<Geometry, ExecutorError> {
        let none = || ExecutorError { rank: 0, message: "no geometry".into(), fatal: false };
        self.inner.geometry().ok_or_else(none)
    }

    fn damaged(&self, slices: &[StateSlice]) -> Result<Vec<StateSlice>, ExecutorError> {
        let geometry = self.known_geometry()?;
        slices.iter().map(|slice| self.damage(&geometry, slice)).collect()
    }

    fn damage(&self, geometry: &Geometry, slice: &StateSlice) -> Result<StateSlice, ExecutorError> {
        let StatePart { layer, kind, first_head, heads } = slice.part;
        let mut bytes = slice.bytes.clone();
        let head = bytes.len() / heads.max(1) as usize;
        match self.fault {
            Some(Fault::TailDropped) if (layer, kind) == (0, StateKind::ConvK) => bytes.fill(0),
            Some(Fault::LayerZero) if (layer, kind) == (1, StateKind::Recurrent) => bytes.fill(0),
            Some(Fault::HeadsRotated) if kind == StateKind::Recurrent => bytes.rotate_left(head),
            Some(Fault::SliceMissing) => {
                for (index, bytes) in (first_head..).zip(bytes.chunks_exact_mut(head)) {
                    if index >= geometry.kda_heads / 2 {
                        bytes.fill(0);
                    }
                }
            }
            _ => {}
        }
        let failed =
            |error: &dyn std::fmt::Display| ExecutorError { rank: 0, message: error.to_string(), fatal: false };
        StateSlice::new(geometry, slice.part, bytes).map_err(|error| failed(&error))
    }

    fn stale(&self, slice: &PageSlice) -> Result<PageSlice, ExecutorError> {
        let geometry = self.known_geometry()?;
        let mut bytes = slice.bytes.clone();
        let middle = slice.positions as usize / 2 * geometry.position_bytes() as usize;
        let (before, after) = bytes.split_at_mut(middle);
        for (index, byte) in after.iter_mut().enumerate() {
            *byte = before.get(index).copied().unwrap_or(0);
        }
        let failed =
            |error: &dyn std::fmt::Display| ExecutorError { rank: 0, message: error.to_string(), fatal: false };
        PageSlice::new(&geometry, slice.layer, slice.first, bytes).map_err(|error| failed(&error))
    }

    /// Makes the mistake in what rows of a step are about to read for the first time.
    fn spoil(&mut self, plan: &StepPlan) -> Result<(), ExecutorError> {
        for row in &plan.batch.rows {
            if let Some(index) = self.fresh.iter().position(|slot| *slot == row.read_slot) {
                self.fresh.remove(index);
                let slices = self.inner.export_slot(StateSource::Slot(row.read_slot))?;
                self.inner.import_state(row.read_slot, &self.damaged(&slices)?)?;
            }
            let is_here = |page: u32| row.segments.iter().any(|segment| segment.pages.contains(&page));
            let (here, elsewhere) = std::mem::take(&mut self.tails).into_iter().partition(|(page, _)| is_here(*page));
            self.tails = elsewhere;
            let here: Vec<(u32, PageSlice)> = here;
            for (page, slice) in here {
                let stale = self.stale(&slice)?;
                self.inner.import_pages(&[(page, stale)])?;
            }
        }
        Ok(())
    }

    /// Steps since its arrival of the session that draw `index` is for; none for one that began here.
    fn steps_since(&self, plan: &StepPlan, index: usize) -> Option<u64> {
        let token = *plan.batch.logits.get(index)?;
        let mut end = 0;
        let row = plan.batch.rows.iter().find(|row| {
            end += row.tokens;
            token < end
        })?;
        self.arrived.get(&row.read_slot).copied()
    }
}

impl<E: Executor> Executor for Faulty<E> {
    fn limits(&self) -> ExecutorLimits {
        self.inner.limits()
    }

    fn cache_bytes(&self) -> CacheBytes {
        self.inner.cache_bytes()
    }

    fn step(&mut self, plan: &StepPlan, draws: &[Draw<'_>], want_logits: bool) -> Result<StepOutput, ExecutorError> {
        for slot in &plan.clear_slots {
            self.arrived.remove(slot);
        }
        if self.stage == Stage::Running && self.fault.is_some() {
            self.spoil(plan)?;
        }
        let empty = self.empty.clone();
        let draws: Vec<Draw<'_>> = draws
            .iter()
            .enumerate()
            .map(|(index, draw)| match (self.fault, self.steps_since(plan, index)) {
                (Some(Fault::NoiseReset), Some(steps)) => Draw { position: steps, ..*draw },
                (Some(Fault::CountsReset), Some(_)) => Draw { counts: &empty, ..*draw },
                _ => *draw,
            })
            .collect();
        let output = self.inner.step(plan, &draws, want_logits)?;
        for row in &plan.batch.rows {
            match self.arrived.get(&row.read_slot) {
                Some(steps) => drop(self.arrived.insert(row.write_slot, steps + 1)),
                None => drop(self.arrived.remove(&row.write_slot)),
            }
        }
        Ok(output)
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
        self.arrived.insert(slot, 0);
        if self.fault.is_some() && self.stage == Stage::Writing {
            let damaged = self.damaged(slices)?;
            return self.inner.import_state(slot, &damaged);
        }
        if !self.fresh.contains(&slot) {
            self.fresh.push(slot);
        }
        self.inner.import_state(slot, slices)
    }

    fn digest_slot(&mut self, slot: u32) -> Result<TensorDigests, ExecutorError> {
        self.inner.digest_slot(slot)
    }

    fn invite_pairs(&mut self) -> Result<Option<Vec<Vec<u8>>>, ExecutorError> {
        self.inner.invite_pairs()
    }

    /// What is taken from a pair is written like what was sent.
    fn pairs(&mut self, invitations: &[Vec<u8>], order: PairOrder) -> Result<PairState, ExecutorError> {
        let state = self.inner.pairs(invitations, order)?;
        if let PairOrder::Take { slot } = order {
            let slices = self.inner.export_slot(StateSource::Slot(slot))?;
            self.import_state(slot, &slices)?;
        }
        Ok(state)
    }

    fn export_pages(&mut self, pages: &[PageSpan]) -> Result<Vec<PageSlice>, ExecutorError> {
        self.inner.export_pages(pages)
    }

    fn import_pages(&mut self, pages: &[(u32, PageSlice)]) -> Result<(), ExecutorError> {
        if self.fault != Some(Fault::StalePage) {
            return self.inner.import_pages(pages);
        }
        let is_tail = |slice: &PageSlice| u64::from(slice.positions) < PAGE_POSITIONS;
        if self.stage == Stage::Running {
            self.tails.extend(pages.iter().filter(|(_, slice)| is_tail(slice)).cloned());
            return self.inner.import_pages(pages);
        }
        let written = pages
            .iter()
            .map(|(page, slice)| Ok((*page, if is_tail(slice) { self.stale(slice)? } else { slice.clone() })));
        let written = written.collect::<Result<Vec<_>, ExecutorError>>()?;
        self.inner.import_pages(&written)
    }

    fn digest_pages(&mut self, pages: &[PageSpan]) -> Result<Vec<Digest>, ExecutorError> {
        self.inner.digest_pages(pages)
    }

    fn poison(&mut self, slots: &[u32], pages: &[u32]) -> Result<(), ExecutorError> {
        self.inner.poison(slots, pages)?;
        for &slot in slots {
            let slices = self.inner.export_slot(StateSource::Slot(slot))?;
            // Random models run in float32.
            let numbers = slices.iter().flat_map(|slice| slice.bytes.as_chunks().0);
            let is_readable = numbers.map(|bytes| f32::from_le_bytes(*bytes)).any(|number| !number.is_nan());
            self.poisoned.slots.fetch_add(1, Ordering::Relaxed);
            self.poisoned.readable.fetch_add(usize::from(is_readable), Ordering::Relaxed);
        }
        Ok(())
    }
}
