//! A modelled executor: logits are a hash of what a row can see, its slot's state (a running hash over the tokens fed) and the
//! tokens that its pages hold. So a wrong slot, page, position or order of operations changes the tokens, while everything about a
//! correct run depends on the session's own tokens alone. It does no arithmetic of the model.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use perigee_backend::batch::BatchLimits;
use perigee_backend::{Row, StatePart};
use perigee_migration::{AnswerStatus, Digest, Geometry, PageSlice, StateSlice, TensorDigests};
use perigee_sampling::{Draw, Scratch};

use super::mix;
use super::model_ahead::ModelFlights;
use super::model_cache::{self, EMPTY_PAGE, GEOMETRY, ModelPages, Page, Words, page, refused};
use super::model_sizes::{Faults, ModelCounters, ModelSizes, RemoteAnswer};
use crate::executor::{
    CacheBytes, Executor, ExecutorError, ExecutorLimits, PageSpan, StateSource, StepOutput, StepPlan,
};
use crate::remote::{RemoteHome, RemoteRow};

/// State of an empty sequence.
const EMPTY: u64 = 0x5045_5249_4745_4531;

/// What a row writes that missed an answer: whoever goes on from it is found out.
const GARBAGE: u64 = 0x6761_7262_6167_6521;

/// Asks a home about positions of a row's session.
type RemoteHook = Box<dyn FnMut(&RemoteHome, &RemoteRow, &Range<u64>) -> RemoteAnswer + Send>;

/// What homes said of a row: tokens by first position, or why not.
type Asked = Result<BTreeMap<u64, Vec<u32>>, Option<AnswerStatus>>;

/// Called before every step, for instance to let a modelled time pass.
type StepHook = Box<dyn FnMut(&StepPlan) + Send>;

/// A replica on paper.
pub struct ModelExecutor {
    sizes: ModelSizes,
    /// Running hash of every slot; none where nothing was started.
    slots: Vec<Option<Words>>,
    pages: ModelPages,
    parked: HashMap<u64, (Words, Vec<Page>)>,
    faults: Faults,
    counters: Arc<ModelCounters>,
    on_step: Option<StepHook>,
    remote: Option<RemoteHook>,
    /// Whether what is drawn depends on the pages.
    reads: bool,
    ahead: ModelFlights,
    scratch: Scratch,
}

impl ModelExecutor {
    /// An empty replica.
    pub fn new(sizes: ModelSizes) -> Self {
        Self {
            slots: vec![None; sizes.limits.slots],
            pages: ModelPages::new(sizes.limits.pages),
            sizes,
            parked: HashMap::new(),
            faults: Faults::default(),
            counters: Arc::default(),
            on_step: None,
            remote: None,
            reads: true,
            ahead: ModelFlights::default(),
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

    /// One that draws by its slots alone: long runs are cheap, and nobody learns whether the pages are the right ones.
    pub fn without_reading(mut self) -> Self {
        self.reads = false;
        self
    }

    /// One that runs ahead: what a launched step gives is there at once, but is told only when it is collected. Every `undrawn`th
    /// draw of launched steps is not made, if that is not 0.
    pub fn running_ahead(mut self, undrawn: u64) -> Self {
        self.ahead = ModelFlights::running(undrawn);
        self
    }

    /// With homes to ask; without, every remote row misses its answers.
    pub fn with_homes(
        mut self,
        ask: impl FnMut(&RemoteHome, &RemoteRow, &Range<u64>) -> RemoteAnswer + Send + 'static,
    ) -> Self {
        self.remote = Some(Box::new(ask));
        self
    }

    /// Its pages, for answers in its name.
    pub fn pages(&self) -> ModelPages {
        self.pages.clone()
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
        plan.remote.validate(&plan.batch).map_err(|error| refused(error.to_string()))?;
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
            *self.slot(slot)? = Some(Words::of(EMPTY));
        }
        for &(from, to) in &plan.copy_slots {
            let state = *self.slot(from)?;
            *self.slot(to)? = state;
            self.counters.slot_copies.fetch_add(1, Ordering::Relaxed);
        }
        let mut pages = self.pages.lock();
        for &(from, to) in &plan.copy_pages {
            *page(&mut pages, to)? = *page(&mut pages, from)?;
        }
        Ok(())
    }

    /// Asks the homes of a row, if it has any.
    fn ask(&mut self, plan: &StepPlan, row: u32) -> Asked {
        let mut found = BTreeMap::new();
        let Some(asking) = plan.remote.rows.iter().find(|asking| asking.row == row) else { return Ok(found) };
        self.counters.remote_rows.fetch_add(1, Ordering::Relaxed);
        for part in &asking.parts {
            let (Some(hook), Some(home)) = (&mut self.remote, plan.remote.homes.get(part.home as usize)) else {
                return Err(None);
            };
            for range in &part.ranges {
                match hook(home, asking, range) {
                    RemoteAnswer::Tokens(tokens) => found.insert(range.start, tokens),
                    RemoteAnswer::Missed => return Err(None),
                    RemoteAnswer::Refused(status) => return Err(Some(status)),
                };
            }
        }
        Ok(found)
    }

    /// Feeds a row's tokens; returns what each of the wanted ones (indices within the row, ascending) sees.
    fn feed(
        &mut self,
        row: &Row,
        asked: &Asked,
        (tokens, wanted): (&[u32], &[u32]),
    ) -> Result<Vec<u64>, ExecutorError> {
        let unset = || refused("a slot was read that was never set".into());
        let mut state = self.slot(row.read_slot)?.ok_or_else(unset)?.hash();
        let mut seen = Vec::with_capacity(wanted.len());
        let shared = self.pages();
        let mut pages = shared.lock();
        for (offset, &token) in (0u32..).zip(tokens) {
            let position = row.position + u64::from(offset);
            let segment = row.segments.iter().find(|segment| (segment.start..segment.end).contains(&position));
            let segment = segment.ok_or_else(|| refused(format!("position {position} is in no segment")))?;
            let (number, place) = segment.locate(position);
            page(&mut pages, number)?[place] = Some(token);
            state = mix(mix(state, position), u64::from(token));
            if wanted.contains(&offset) {
                let sight = match asked {
                    Ok(_) if !self.reads => EMPTY,
                    Ok(remote) => read(&mut pages, row, remote, position)?,
                    Err(_) => GARBAGE,
                };
                seen.push(mix(state, sight));
            }
        }
        if asked.is_err() {
            state = GARBAGE;
        }
        *self.slot(row.write_slot)? = Some(Words::of(state));
        Ok(seen)
    }

    fn slot(&mut self, slot: u32) -> Result<&mut Option<Words>, ExecutorError> {
        self.slots.get_mut(slot as usize).ok_or_else(|| refused(format!("there is no slot {slot}")))
    }

    fn set_slot(&mut self, slot: u32) -> Result<Words, ExecutorError> {
        self.slot(slot)?.ok_or_else(|| refused(format!("slot {slot} was never set")))
    }
}

/// A hash over every position up to `last`, whether its token is in the row's pages or came from a home.
fn read(pages: &mut [Page], row: &Row, remote: &BTreeMap<u64, Vec<u32>>, last: u64) -> Result<u64, ExecutorError> {
    let mut places: Vec<(u64, Vec<Option<u32>>)> = Vec::new();
    for segment in &row.segments {
        let mut tokens = Vec::new();
        for position in segment.start..segment.end.min(last + 1) {
            let (number, place) = segment.locate(position);
            tokens.push(page(pages, number)?[place]);
        }
        places.push((segment.start, tokens));
    }
    places.extend(remote.iter().map(|(start, tokens)| (*start, tokens.iter().copied().map(Some).collect())));
    places.sort_by_key(|(start, _)| *start);
    let mut hash = EMPTY;
    for (start, tokens) in places {
        for (position, token) in (start..).zip(tokens) {
            let token = token.ok_or_else(|| refused(format!("position {position} was read but never written")))?;
            hash = mix(mix(hash, position), u64::from(token));
        }
    }
    Ok(hash)
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
        let mut output = StepOutput::default();
        for (index, row) in (0..).zip(&plan.batch.rows) {
            let asked = self.ask(plan, index);
            if let Err(refusal) = &asked {
                self.counters.faulty_rows.fetch_add(1, Ordering::Relaxed);
                output.faulty.push(index);
                output.refusals.extend(refusal.map(|status| (index, status)));
            }
            let (tokens, after) = rest.split_at(row.tokens as usize);
            rest = after;
            let within = plan.batch.logits.iter().filter(|index| (first..first + row.tokens).contains(index));
            let wanted: Vec<u32> = within.map(|index| index - first).collect();
            seen.extend(self.feed(row, &asked, (tokens, &wanted))?);
            first += row.tokens;
        }
        let mut all = Vec::new();
        for (index, sight) in seen.into_iter().enumerate() {
            let logits = logits(sight, self.sizes.limits.vocab);
            if let Some(draw) = draws.get(index) {
                let sampled = perigee_sampling::sample(&logits, draw, &mut self.scratch);
                output.sampled.push(Some(sampled.map_err(|error| refused(error.to_string()))?));
            }
            if want_logits {
                all.extend(logits);
            }
        }
        output.logits = want_logits.then_some(all);
        Ok(output)
    }

    fn runs_ahead(&self) -> bool {
        self.ahead.runs
    }

    fn launch(&mut self, plan: &StepPlan, draws: &[Draw<'_>]) -> Result<(), ExecutorError> {
        let mut plan = plan.clone();
        self.ahead.feed(&mut plan)?;
        let output = self.step(&plan, draws, false)?;
        self.ahead.began(output);
        self.counters.launched.fetch_add(1, Ordering::Relaxed);
        self.counters.fed.fetch_add(u64::from(!plan.feed.is_empty()), Ordering::Relaxed);
        Ok(())
    }

    fn collect(&mut self) -> Result<StepOutput, ExecutorError> {
        self.ahead.collect()
    }

    fn park(&mut self, key: u64, slot: u32, pages: &[u32]) -> Result<(), ExecutorError> {
        let number = self.counters.parks.fetch_add(1, Ordering::Relaxed) + 1;
        if self.faults.park_every.is_some_and(|every| number.is_multiple_of(every)) {
            return Err(refused("this park was to fail".into()));
        }
        let state = self.slot(slot)?.take().ok_or_else(|| refused("a slot was parked that was never set".into()))?;
        let mut pool = self.pages.lock();
        let held = pages.iter().map(|&number| page(&mut pool, number).copied()).collect::<Result<Vec<_>, _>>()?;
        drop(pool);
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
        let mut pool = self.pages.lock();
        for (&number, content) in pages.iter().zip(held) {
            *page(&mut pool, number)? = content;
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
        Ok(self.set_slot(slot)?.hash().to_le_bytes().to_vec())
    }

    fn weight_bytes(&self) -> Vec<u64> {
        vec![0]
    }

    fn geometry(&self) -> Option<Geometry> {
        Some(GEOMETRY)
    }

    fn export_slot(&mut self, from: StateSource) -> Result<Vec<StateSlice>, ExecutorError> {
        let words = match from {
            StateSource::Slot(slot) => self.set_slot(slot)?,
            StateSource::Parked(key) => {
                self.parked.get(&key).ok_or_else(|| refused(format!("nothing is parked under {key}")))?.0
            }
            StateSource::Empty => Words::of(EMPTY),
        };
        Ok(words.slices())
    }

    fn import_state(&mut self, slot: u32, slices: &[StateSlice]) -> Result<(), ExecutorError> {
        let number = self.counters.imports.fetch_add(1, Ordering::Relaxed) + 1;
        let is_due = |every: Option<u64>| every.is_some_and(|every| number.is_multiple_of(every));
        if is_due(self.faults.import_every) {
            return Err(refused("this import was to fail".into()));
        }
        let mut slices = slices.to_vec();
        if is_due(self.faults.damage_every)
            && let Some(byte) = slices.first_mut().and_then(|slice| slice.bytes.first_mut())
        {
            *byte ^= 1;
        }
        model_cache::overwrite(self.slot(slot)?, &slices)
    }

    fn digest_slot(&mut self, slot: u32) -> Result<TensorDigests, ExecutorError> {
        Ok(self.set_slot(slot)?.digests())
    }

    fn export_pages(&mut self, pages: &[PageSpan]) -> Result<Vec<PageSlice>, ExecutorError> {
        let mut pool = self.pages.lock();
        pages.iter().map(|span| model_cache::export_page(&mut pool, span)).collect()
    }

    fn import_pages(&mut self, pages: &[(u32, PageSlice)]) -> Result<(), ExecutorError> {
        self.counters.pages_imported.fetch_add(pages.len() as u64, Ordering::Relaxed);
        let mut pool = self.pages.lock();
        pages.iter().try_for_each(|(number, slice)| model_cache::import_page(&mut pool, *number, slice))
    }

    fn digest_pages(&mut self, pages: &[PageSpan]) -> Result<Vec<Digest>, ExecutorError> {
        Ok(vec![self.export_pages(pages)?.iter().map(|slice| slice.digest).sum()])
    }

    fn poison(&mut self, slots: &[u32], pages: &[u32]) -> Result<(), ExecutorError> {
        for &slot in slots {
            *self.slot(slot)? = None;
        }
        let mut pool = self.pages.lock();
        for &number in pages {
            *page(&mut pool, number)? = EMPTY_PAGE;
        }
        Ok(())
    }
}

impl std::fmt::Debug for ModelExecutor {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("ModelExecutor").field("sizes", &self.sizes).finish_non_exhaustive()
    }
}

/// Logits between -4 and 4, a function of what is seen.
fn logits(sight: u64, vocab: usize) -> Vec<f32> {
    (0..vocab as u64).map(|token| (mix(sight, token) >> 40) as f32 / (1u32 << 21) as f32 - 4.0).collect()
}
