//! A backend under test with what every case needs around it: a validated step, rows of activations in and out. It offers
//! no op of its own; the case modules call the backend.

use crate::batch::{BatchLimits, Row, Segment, StepBatch};
use crate::error::Result;
use crate::ops::{Backend, Precision};
use crate::shapes::CacheShape;
use crate::weights::DType;

use super::{Factory, OpenSpec};

/// Most tokens of a step in any case.
pub(super) const MAX_TOKENS: usize = 320;
/// Most rows of a step in any case.
pub(super) const MAX_ROWS: usize = 64;
/// Token ids of every case are below this.
pub(super) const VOCAB: usize = 517;

/// An opened backend with its cache reserved.
pub(super) struct Harness<B: Backend> {
    pub(super) backend: B,
    pub(super) activation: DType,
    pub(super) cache: CacheShape,
}

/// The cache of cases that are about something else: the per-head shapes of the published model, as little as possible.
pub(super) fn small_cache() -> CacheShape {
    CacheShape {
        kda_layers: 1,
        kda_heads: 1,
        kda_head_dim: 128,
        conv: 4,
        mla_layers: 1,
        latent_width: 576,
        slots: 4,
        pages: 8,
    }
}

impl<B: Backend> Harness<B> {
    /// Opens a backend, lets `load` put weights on it, then reserves the cache: the order of a real start.
    pub(super) fn open<F, L>(
        factory: &mut F,
        cache: CacheShape,
        load: impl FnOnce(&mut B) -> Result<L>,
    ) -> Result<(Self, L)>
    where
        F: Factory<B = B>,
    {
        let mut backend = factory.open(&OpenSpec { max_tokens: MAX_TOKENS, max_rows: MAX_ROWS, vocab: VOCAB })?;
        let loaded = load(&mut backend)?;
        backend.reserve_cache(&cache)?;
        Ok((Self { backend, activation: factory.activation(), cache }, loaded))
    }

    /// An activation tensor with room for any step.
    pub(super) fn activations(&mut self, width: usize) -> Result<B::Tensor> {
        self.backend.tensor(MAX_TOKENS, width, Precision::Activation)
    }

    /// A full-precision tensor with room for any step.
    pub(super) fn full(&mut self, width: usize) -> Result<B::Tensor> {
        self.backend.tensor(MAX_TOKENS, width, Precision::Full)
    }

    /// Validates a batch of these rows and makes it the current one. Token ids are arbitrary.
    pub(super) fn begin(&mut self, rows: Vec<Row>) -> Result<()> {
        let tokens: u32 = rows.iter().map(|row| row.tokens).sum();
        let tokens = (0..tokens).map(|token| token * 7 % VOCAB as u32).collect();
        self.begin_batch(&StepBatch { tokens, rows, logits: Vec::new() })
    }

    /// A step of one new sequence, for ops that look at no cache.
    pub(super) fn begin_plain(&mut self, tokens: Vec<u32>, logits: Vec<u32>) -> Result<()> {
        let count = tokens.len() as u64;
        let pages = (0..Segment::pages_for(0, count) as u32).collect();
        let segments = vec![Segment { start: 0, end: count, pages }];
        let rows = vec![Row { tokens: count as u32, position: 0, read_slot: 0, write_slot: 0, segments }];
        self.begin_batch(&StepBatch { tokens, rows, logits })
    }

    /// A plain step of `count` tokens whose ids and logits do not matter.
    pub(super) fn begin_count(&mut self, count: usize) -> Result<()> {
        self.begin_plain((0..count as u32).map(|token| token % VOCAB as u32).collect(), Vec::new())
    }

    fn begin_batch(&mut self, batch: &StepBatch) -> Result<()> {
        self.validate(batch)?;
        self.backend.begin_step(batch)
    }

    /// A batch within the limits of every case.
    pub(super) fn validate(&self, batch: &StepBatch) -> Result<()> {
        batch.validate(&BatchLimits {
            tokens: MAX_TOKENS,
            vocab: VOCAB,
            slots: self.cache.slots,
            pages: self.cache.pages,
        })
    }

    /// Overwrites the first rows of a tensor.
    pub(super) fn upload(&mut self, tensor: &mut B::Tensor, values: &[f64]) -> Result<()> {
        let values: Vec<f32> = values.iter().map(|&value| value as f32).collect();
        self.backend.write(tensor, &values)
    }
}
