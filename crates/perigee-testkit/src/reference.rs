//! What an undisturbed run gives: one rank that has a model to itself computes a prompt and everything that was generated
//! after it, and tells for every token what is drawn there and how close that was. It runs no scheduler, moves nothing and
//! starts no process, so that whatever disturbs a session elsewhere can be held against it.

mod verdict;

pub use verdict::{Excuse, Observed, Undisturbed, Verdict};

use std::collections::HashMap;
use std::sync::Arc;

use perigee_backend::{Backend, DType, PAGE_TOKENS, Row, Segment, StepBatch};
use perigee_collectives::Solo;
use perigee_cpu::{CpuBackend, CpuOptions};
use perigee_model::forward::NoHooks;
use perigee_model::{Model, StepLimits, WeightSource};

use crate::error::Result;

/// Tokens of one step.
const CHUNK: usize = 512;
/// Where the prompt's state is kept, and where those that go on from it are computed.
const PROMPT: u32 = 0;
const COURSE: u32 = 1;

/// One rank with a model, in float32, that has computed one prompt and goes on from it again and again.
pub struct Reference {
    backend: CpuBackend,
    model: Model<CpuBackend>,
    vocab: usize,
    prompt: Vec<u32>,
    /// After every prompt token where they were asked for, else after the last.
    prompt_logits: Vec<f32>,
    prompt_gaps: Vec<f32>,
    /// Courses of this prompt, by what was generated.
    courses: HashMap<Vec<u32>, Arc<Course>>,
}

/// A prompt with what was generated after it.
#[derive(Debug, Clone)]
pub struct Course {
    /// The logits that each generated token was drawn from, [tokens, V].
    logits: Vec<f32>,
    vocab: usize,
    /// For every position the narrowest choice of experts over all layers: the last chosen score minus the next.
    router_gaps: Vec<f32>,
}

impl Course {
    /// The logits that generated token `index` was drawn from, \[V\].
    ///
    /// # Panics
    /// There is no such token: the test is wrong.
    pub fn logits(&self, index: usize) -> &[f32] {
        &self.logits[index * self.vocab..(index + 1) * self.vocab]
    }

    /// The narrowest choice of experts at the positions of a range; those beyond what was computed do not count.
    pub fn router_gap(&self, positions: std::ops::Range<usize>) -> f32 {
        let end = positions.end.min(self.router_gaps.len());
        let gaps = self.router_gaps.get(positions.start..end).unwrap_or_default();
        gaps.iter().copied().fold(f32::INFINITY, f32::min)
    }
}

impl Reference {
    /// Opens a model, named as `--model` takes it, for sequences of at most `longest` tokens.
    ///
    /// # Errors
    /// The model cannot be opened.
    pub fn open(model: &str, longest: usize) -> Result<Self> {
        let source = WeightSource::open(&model.parse()?)?;
        let mut backend = CpuBackend::new(CpuOptions { activation: DType::Fp32, threads: 1 }, Box::new(Solo));
        let limits = StepLimits { tokens: CHUNK, logits: CHUNK };
        let loaded = Model::load(&mut backend, &source, (0, 1), limits, &mut |_, _| {})?;
        // The prompt's last page is there twice: as the prompt left it, and as a course goes on in it.
        let pages = longest.div_ceil(PAGE_TOKENS) + 1;
        backend.reserve_cache(&source.config().cache_shape(1, 2, pages))?;
        // The first call begins the watch.
        backend.router_gaps();
        Ok(Self {
            backend,
            model: loaded,
            vocab: source.config().vocab,
            prompt: Vec::new(),
            prompt_logits: Vec::new(),
            prompt_gaps: Vec::new(),
            courses: HashMap::new(),
        })
    }

    /// Computes a prompt of at least one token, unless it is the one that was computed last; with `all` it keeps the logits
    /// after each of its tokens and not only after the last.
    ///
    /// # Errors
    /// The model refuses a token.
    pub fn begin(&mut self, prompt: &[u32], all: bool) -> Result<()> {
        let has_all = self.prompt_logits.len() == self.prompt.len() * self.vocab;
        if self.prompt == prompt && (has_all || !all) {
            return Ok(());
        }
        self.courses.clear();
        self.prompt.clear();
        self.backend.clear_slots(&[PROMPT])?;
        let pages: Vec<u32> = (0..prompt.len().div_ceil(PAGE_TOKENS) as u32).collect();
        (self.prompt_logits, self.prompt_gaps) = self.compute((prompt, 0), PROMPT, &pages, all)?;
        self.prompt = prompt.to_vec();
        Ok(())
    }

    /// The logits after a token of the prompt, where all were kept.
    ///
    /// # Panics
    /// They were not: the test is wrong.
    pub fn prompt_logits(&self, index: usize) -> &[f32] {
        &self.prompt_logits[index * self.vocab..(index + 1) * self.vocab]
    }

    /// Goes on from the prompt with what was generated after it. The same course is computed once.
    ///
    /// # Errors
    /// The model refuses a token.
    pub fn follow(&mut self, output: &[u32]) -> Result<Arc<Course>> {
        if let Some(known) = self.courses.get(output) {
            return Ok(Arc::clone(known));
        }
        let length = self.prompt.len();
        let (whole, all) = (length / PAGE_TOKENS, length.div_ceil(PAGE_TOKENS));
        self.backend.copy_slot(PROMPT, COURSE)?;
        if whole < all {
            self.backend.copy_page(whole as u32, all as u32)?;
        }
        let fed = &output[..output.len().saturating_sub(1)];
        let further = (length + fed.len()).div_ceil(PAGE_TOKENS) - whole;
        let pages: Vec<u32> = (0..whole as u32).chain((all as u32..).take(further)).collect();
        let (after, gaps) = self.compute((fed, length), COURSE, &pages, true)?;
        let last = self.prompt_logits.len() - self.vocab;
        let mut logits = self.prompt_logits[last..].to_vec();
        logits.extend(after);
        let router_gaps = [self.prompt_gaps.as_slice(), &gaps].concat();
        let course = Arc::new(Course { logits, vocab: self.vocab, router_gaps });
        self.courses.insert(output.to_vec(), Arc::clone(&course));
        Ok(course)
    }

    /// Feeds tokens from a position on, whose latents go to the pages of the whole sequence; logits after all of them or
    /// after the last, and the narrowest choice of experts of each.
    fn compute(
        &mut self,
        (tokens, start): (&[u32], usize),
        slot: u32,
        pages: &[u32],
        all: bool,
    ) -> Result<(Vec<f32>, Vec<f32>)> {
        let (mut logits, mut gaps) = (Vec::new(), Vec::new());
        let mut position = start;
        for chunk in tokens.chunks(CHUNK) {
            let (count, end) = (chunk.len() as u32, position + chunk.len());
            let row = Row {
                tokens: count,
                position: position as u64,
                read_slot: slot,
                write_slot: slot,
                segments: vec![Segment {
                    start: 0,
                    end: end as u64,
                    pages: pages[..end.div_ceil(PAGE_TOKENS)].to_vec(),
                }],
            };
            let is_last = end == start + tokens.len();
            let wanted = match (all, is_last) {
                (true, _) => (0..count).collect(),
                (false, true) => vec![count - 1],
                (false, false) => Vec::new(),
            };
            let rows = wanted.len();
            let batch = StepBatch { tokens: chunk.to_vec(), rows: vec![row], logits: wanted };
            self.model.step(&mut self.backend, &batch, &mut NoHooks)?;
            logits.extend(self.backend.read(self.model.logits(), rows)?);
            let mut narrowest = vec![f32::INFINITY; chunk.len()];
            for layer in self.backend.router_gaps().chunks_exact(chunk.len()) {
                narrowest.iter_mut().zip(layer).for_each(|(least, gap)| *least = least.min(*gap));
            }
            gaps.extend(narrowest);
            position = end;
        }
        Ok((logits, gaps))
    }
}
