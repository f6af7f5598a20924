//! What one rank computes for a sequence that has it to itself: the logits after it, and how close the router's choices
//! were on the way. Tests excuse with it a token that came out otherwise under load, where rounding may decide.

use perigee_backend::{Backend, DType, PAGE_TOKENS, Row, Segment, StepBatch};
use perigee_collectives::Solo;
use perigee_cpu::{CpuBackend, CpuOptions};
use perigee_model::forward::NoHooks;
use perigee_model::{Model, StepLimits, WeightSource};

use crate::error::Result;

/// The computation of one sequence.
#[derive(Debug, Clone)]
pub struct SoloRun {
    /// Logits after the last token `[V]`.
    pub logits: Vec<f32>,
    /// For every position the narrowest choice of experts over all layers: the last chosen score minus the next.
    pub router_gaps: Vec<f32>,
}

impl SoloRun {
    /// Computes a sequence of at least one token in one step, in float32. The model is named as `--model` takes it.
    ///
    /// # Errors
    /// The model cannot be opened, or refuses a token.
    pub fn compute(model: &str, tokens: &[u32]) -> Result<Self> {
        let source = WeightSource::open(&model.parse()?)?;
        let mut backend = CpuBackend::new(CpuOptions { activation: DType::Fp32, threads: 1 }, Box::new(Solo));
        let limits = StepLimits { tokens: tokens.len(), logits: 1 };
        let mut loaded = Model::load(&mut backend, &source, (0, 1), limits, &mut |_, _| {})?;
        let pages = tokens.len().div_ceil(PAGE_TOKENS);
        backend.reserve_cache(&source.config().cache_shape(1, 1, pages))?;
        backend.clear_slots(&[0])?;
        let length = tokens.len() as u32;
        let row = Row {
            tokens: length,
            position: 0,
            read_slot: 0,
            write_slot: 0,
            segments: vec![Segment { start: 0, end: length.into(), pages: (0..pages as u32).collect() }],
        };
        let batch = StepBatch { tokens: tokens.to_vec(), rows: vec![row], logits: vec![length.saturating_sub(1)] };
        backend.router_gaps();
        loaded.step(&mut backend, &batch, &mut NoHooks)?;
        let mut narrowest = vec![f32::INFINITY; tokens.len()];
        for layer in backend.router_gaps().chunks_exact(tokens.len()) {
            narrowest.iter_mut().zip(layer).for_each(|(least, gap)| *least = least.min(*gap));
        }
        Ok(Self { logits: backend.read(loaded.logits(), 1)?, router_gaps: narrowest })
    }
}
