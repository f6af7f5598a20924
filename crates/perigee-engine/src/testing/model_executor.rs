//! A modelled executor: logits are a hash of what a row can see, its slot's state (a running hash over the tokens fed) and the
//! tokens that its pages hold. So a wrong slot, page, position or order of operations changes the tokens, while everything about a
//! correct run depends on the session's own tokens alone. It does no arithmetic of the model.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use perigee_backend::batch::BatchLimits;
use perigee_backend::{PAGE_TOKENS, Row, Segment, StatePart};
use perigee_sampling::{Draw, Scratch};

use crate::executor::{CacheBytes, Executor, ExecutorError, ExecutorLimits, StepOutput, StepPlan};

/// State of an empty sequence.
const EMPTY: u64 = 0x5045_5249_4745_4531;

/// What a page holds for each of its positions; none where nothing was written.
type Page = [Option<u32>; PAGE_TOKENS];

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
}

/// What a modelled executor did, readable while an engine owns it.
#[derive(Debug, Default)]
pub struct ModelCounters {
    /// Steps asked for.
    pub steps: AtomicU64,
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
}

/// Called before every step, for instance to let a modelled time pass.
type StepHook = Box<dyn FnMut(&StepPlan) + Send>;

/// A replica on paper.
pub struct ModelExecutor {
    sizes: ModelSizes,
    /// Running hash of every slot; none where nothing was started.
    slots: Vec<Option<u64>>,
    pages: Vec<Page>,
    parked: HashMap<u64, (u64, Vec<Page>)>,
    faults: Faults,
    counters: Arc<ModelCounters>,
    on_step: Option<StepHook>,
    scratch: Scratch,
}

impl ModelExecutor {
    /// An empty replica.
    pub fn new(sizes: ModelSizes) -> Self {
        Self {
            slots: vec![None; sizes.limits.slots],
            pages: vec![[None; PAGE_TOKENS]; sizes.limits.pages],
            sizes,
            parked: HashMap::new(),
            faults: Faults::default(),
            counters: Arc::default(),
            on_step: None,
            scratch: Scratch::new(),
        }
    }

    /// With operations that go wrong.
    pub fn with_faults(mut self, faults: Faults) -> Self {
        self.faults = faults;
        self
    }

    /// With something to be called before every step.
    pub fn with_step_hook(mut self, hook: impl FnMut(&StepPlan) + Send + 'static) -> Self {
        self.on_step = Some(Box::new(hook));
        self
    }

    /// What it did so far, and will do.
    pub fn counters(&self) -> Arc<ModelCounters> {
        Arc::clone(&self.counters)
    }

    fn validate(&self, plan: &StepPlan, draws: usize) -> Result<(), ExecutorError> {
        let limits = &self.sizes.limits;
        let batch_limits =
            BatchLimits { tokens: limits.step_tokens, vocab: limits.vocab, slots: limits.slots, pages: limits.pages };
        plan.batch.validate(&batch_limits).map_err(|error| refused(error.to_string()))?;
        let positions = plan.batch.logits.len();
        if plan.batch.rows.len() > limits.step_rows || positions > limits.step_rows || draws > positions {
            let rows = plan.batch.rows.len();
            return Err(refused(format!("{rows} rows, {positions} positions with logits, {draws} draws")));
        }
        match plan.batch.rows.iter().find(|row| row.position + u64::from(row.tokens) > limits.max_model_len as u64) {
            Some(row) => Err(refused(format!("position {} is beyond the model's length", row.position))),
            None => Ok(()),
        }
    }

    fn move_caches(&mut self, plan: &StepPlan) -> Result<(), ExecutorError> {
        for &slot in &plan.clear_slots {
            *self.slot(slot)? = Some(EMPTY);
        }
        for &(from, to) in &plan.copy_slots {
            let state = *self.slot(from)?;
            *self.slot(to)? = state;
            self.counters.slot_copies.fetch_add(1, Ordering::Relaxed);
        }
        for &(from, to) in &plan.copy_pages {
            let page = *self.page(from)?;
            *self.page(to)? = page;
        }
        Ok(())
    }

    /// Feeds a row's tokens; returns what each of the wanted ones (indices within the row, ascending) sees.
    fn feed(&mut self, row: &Row, tokens: &[u32], wanted: &[u32]) -> Result<Vec<u64>, ExecutorError> {
        let mut state =
            self.slot(row.read_slot)?.ok_or_else(|| refused("a slot was read that was never set".into()))?;
        let mut seen = Vec::with_capacity(wanted.len());
        for (offset, &token) in (0u32..).zip(tokens) {
            let position = row.position + u64::from(offset);
            let segment = row.segments.iter().find(|segment| (segment.start..segment.end).contains(&position));
            let segment = segment.ok_or_else(|| refused(format!("position {position} is in no segment")))?;
            let (page, place) = segment.locate(position);
            self.page(page)?[place] = Some(token);
            state = mix(mix(state, position), u64::from(token));
            if wanted.contains(&offset) {
                seen.push(mix(state, self.read(&row.segments, position)?));
            }
        }
        *self.slot(row.write_slot)? = Some(state);
        Ok(seen)
    }

    /// A hash over every position up to `last` that the segments hold.
    fn read(&mut self, segments: &[Segment], last: u64) -> Result<u64, ExecutorError> {
        let mut hash = EMPTY;
        for segment in segments {
            for position in segment.start..segment.end.min(last + 1) {
                let (page, place) = segment.locate(position);
                let token = self.page(page)?[place];
                let token = token.ok_or_else(|| refused(format!("position {position} was read but never written")))?;
                hash = mix(mix(hash, position), u64::from(token));
            }
        }
        Ok(hash)
    }

    fn slot(&mut self, slot: u32) -> Result<&mut Option<u64>, ExecutorError> {
        self.slots.get_mut(slot as usize).ok_or_else(|| refused(format!("there is no slot {slot}")))
    }

    fn page(&mut self, page: u32) -> Result<&mut Page, ExecutorError> {
        self.pages.get_mut(page as usize).ok_or_else(|| refused(format!("there is no page {page}")))
    }
}

impl Executor for ModelExecutor {
    fn limits(&self) -> ExecutorLimits {
        self.sizes.limits
    }

    fn cache_bytes(&self) -> CacheBytes {
        self.sizes.bytes
    }

    fn step(&mut self, plan: &StepPlan, draws: &[Draw<'_>], want_logits: bool) -> Result<StepOutput, ExecutorError> {
        if let Some(hook) = &mut self.on_step {
            hook(plan);
        }
        let number = self.counters.steps.fetch_add(1, Ordering::Relaxed) + 1;
        if self.faults.fatal_step == Some(number) {
            return Err(ExecutorError { rank: 1, message: "lost".into(), fatal: true });
        }
        if self.faults.refused_step == Some(number) {
            return Err(refused("this step was to fail".into()));
        }
        self.validate(plan, draws.len())?;
        self.move_caches(plan)?;
        self.counters.tokens.fetch_add(plan.batch.tokens.len() as u64, Ordering::Relaxed);
        let mut rest = plan.batch.tokens.as_slice();
        let mut first = 0;
        let mut seen = Vec::new();
        for row in &plan.batch.rows {
            let (tokens, after) = rest.split_at(row.tokens as usize);
            rest = after;
            let within = plan.batch.logits.iter().filter(|index| (first..first + row.tokens).contains(index));
            let wanted: Vec<u32> = within.map(|index| index - first).collect();
            seen.extend(self.feed(row, tokens, &wanted)?);
            first += row.tokens;
        }
        let mut output = StepOutput::default();
        let mut all = Vec::new();
        for (index, sight) in seen.into_iter().enumerate() {
            let logits = logits(sight, self.sizes.limits.vocab);
            if let Some(draw) = draws.get(index) {
                let sampled = perigee_sampling::sample(&logits, draw, &mut self.scratch);
                output.sampled.push(sampled.map_err(|error| refused(error.to_string()))?);
            }
            if want_logits {
                all.extend(logits);
            }
        }
        output.logits = want_logits.then_some(all);
        Ok(output)
    }

    fn park(&mut self, key: u64, slot: u32, pages: &[u32]) -> Result<(), ExecutorError> {
        let number = self.counters.parks.fetch_add(1, Ordering::Relaxed) + 1;
        if self.faults.park_every.is_some_and(|every| number.is_multiple_of(every)) {
            return Err(refused("this park was to fail".into()));
        }
        let state = self.slot(slot)?.take().ok_or_else(|| refused("a slot was parked that was never set".into()))?;
        let mut held = Vec::with_capacity(pages.len());
        for &page in pages {
            held.push(*self.page(page)?);
        }
        if self.parked.insert(key, (state, held)).is_some() {
            return Err(refused(format!("key {key} is parked twice")));
        }
        self.counters.parked_now.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn unpark(&mut self, key: u64, slot: u32, pages: &[u32]) -> Result<(), ExecutorError> {
        let number = self.counters.unparks.fetch_add(1, Ordering::Relaxed) + 1;
        if self.faults.unpark_every.is_some_and(|every| number.is_multiple_of(every)) {
            return Err(refused("this unpark was to fail".into()));
        }
        let (state, held) = self.parked.get(&key).cloned().ok_or_else(|| refused(format!("nothing under {key}")))?;
        if held.len() != pages.len() {
            return Err(refused(format!("{} pages were parked, {} are given", held.len(), pages.len())));
        }
        *self.slot(slot)? = Some(state);
        for (&page, content) in pages.iter().zip(held) {
            *self.page(page)? = content;
        }
        Ok(())
    }

    fn drop_parked(&mut self, key: u64) -> Result<(), ExecutorError> {
        self.parked.remove(&key).ok_or_else(|| refused(format!("nothing is parked under {key}")))?;
        self.counters.parked_now.fetch_sub(1, Ordering::Relaxed);
        Ok(())
    }

    /// The slot's hash, whatever the part.
    fn export_state(&mut self, slot: u32, _part: &StatePart) -> Result<Vec<u8>, ExecutorError> {
        let state = self.slot(slot)?.ok_or_else(|| refused(format!("slot {slot} was never set")))?;
        Ok(state.to_le_bytes().to_vec())
    }

    fn weight_bytes(&self) -> Vec<u64> {
        vec![0]
    }
}

impl std::fmt::Debug for ModelExecutor {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("ModelExecutor").field("sizes", &self.sizes).finish_non_exhaustive()
    }
}

fn refused(message: String) -> ExecutorError {
    ExecutorError { rank: 0, message, fatal: false }
}

/// Logits between -4 and 4, a function of what is seen.
fn logits(sight: u64, vocab: usize) -> Vec<f32> {
    (0..vocab as u64).map(|token| (mix(sight, token) >> 40) as f32 / (1u32 << 21) as f32 - 4.0).collect()
}

/// The finaliser of SplitMix64 (Steele, Lea, Flood 2014) over a running hash and a value.
fn mix(hash: u64, value: u64) -> u64 {
    let mut mixed =
        hash.rotate_left(23) ^ value.wrapping_add(0x9e37_79b9_7f4a_7c15).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}
