//! The forward pass, once, over the ops of a backend: embedding, then for every layer a mixer and a feed-forward part
//! around the residual stream, then the head. What happens inside an op is the backend's business; what a caller wants to
//! see or to change on the way (traces, forced routing, attention answered elsewhere) goes through [`StepHooks`].

use std::ops::Range;

use perigee_backend::{Backend, DType, OtherPart, Partials, Precision, Recorded, Routing, StepBatch};

use crate::config::ModelConfig;
use crate::error::Result;

/// One token's attention over keys that another replica holds, for one MLA layer.
#[derive(Debug, Clone, PartialEq)]
pub struct RemotePart {
    /// Index of the token in the step.
    pub token: usize,
    /// [heads * R], normalised.
    pub output: Vec<f32>,
    /// `[heads]`, natural log of the sum of exponentials.
    pub lse: Vec<f32>,
}

impl RemotePart {
    fn as_other(&self) -> OtherPart<'_> {
        OtherPart { token: self.token, output: &self.output, lse: &self.lse }
    }
}

/// What a caller sees and changes during a step. The defaults do nothing.
pub trait StepHooks {
    /// Routing of a mixture-of-experts layer (0-based layer number of the model).
    fn routing(&mut self, _layer: usize) -> Routing<'_> {
        Routing::Free
    }
    /// Whether a step's ops may be run as a whole, or in pieces between those at which somebody is asked: no routing is forced
    /// and nothing is traced. It is for performance only; as provided, every step is run op by op.
    fn is_plain(&self) -> bool {
        false
    }
    /// Whether `hidden` and `experts` are called; both cost a copy from the device.
    fn traced(&self) -> bool {
        false
    }
    /// The residual stream [tokens, d] after a layer.
    fn hidden(&mut self, _layer: usize, _values: Vec<f32>) {}
    /// A layer's own selection, `top_k` for each token, ascending.
    fn experts(&mut self, _layer: usize, _selected: Vec<u32>) {}
    /// Whether tokens of this step have keys elsewhere; if so, `ask` and `answers` are called in every MLA layer.
    fn remote(&self) -> bool {
        false
    }
    /// Tokens of the step from the first to the last with keys elsewhere.
    fn asking(&self) -> Range<usize> {
        0..0
    }
    /// Sends absorbed queries [tokens, heads * (R + r)] of MLA layer `index`, those of the tokens of `asking`, to whoever holds
    /// the other keys. The local part is computed after this returns.
    fn ask(&mut self, _index: usize, _queries: &[f32]) {}
    /// Waits for the parts asked for; a missing answer is the hook's to remember, not an error of the step.
    fn answers(&mut self, _index: usize) -> Vec<RemotePart> {
        Vec::new()
    }
}

/// No hooks.
#[derive(Debug, Default, Clone, Copy)]
pub struct NoHooks;

impl StepHooks for NoHooks {
    fn is_plain(&self) -> bool {
        true
    }
}

/// A layer's mixer, with its index among the layers of its kind.
pub(crate) enum Mixer<B: Backend> {
    Kda(B::Kda, usize),
    Mla(B::Mla, usize),
}

/// A layer's feed-forward part.
pub(crate) enum FeedForward<B: Backend> {
    Dense(B::Mlp),
    Experts(B::Moe),
}

/// One layer on one rank.
pub(crate) struct Layer<B: Backend> {
    pub(crate) input_norm: B::Norm,
    pub(crate) mixer: Mixer<B>,
    pub(crate) post_norm: B::Norm,
    pub(crate) feed_forward: FeedForward<B>,
}

/// Activations, allocated once for the largest step.
pub(crate) struct Activations<B: Backend> {
    residual: B::Tensor,
    normed: B::Tensor,
    delta: B::Tensor,
    queries: B::Tensor,
    partials: Partials<B::Tensor>,
    logits: B::Tensor,
}

/// Most tokens and most rows of logits in one step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepLimits {
    /// Tokens.
    pub tokens: usize,
    /// Rows of logits.
    pub logits: usize,
}

impl<B: Backend> Activations<B> {
    pub(crate) fn new(backend: &mut B, config: &ModelConfig, tp: usize, limits: StepLimits) -> Result<Self> {
        let mla = config.mla_shape(tp);
        let mut tensor = |width, precision| backend.tensor(limits.tokens, width, precision);
        Ok(Self {
            residual: tensor(config.hidden, Precision::Full)?,
            normed: tensor(config.hidden, Precision::Activation)?,
            delta: tensor(config.hidden, Precision::Activation)?,
            queries: tensor(mla.heads * mla.cache_width(), Precision::Full)?,
            partials: Partials {
                output: tensor(mla.heads * mla.latent, Precision::Full)?,
                lse: tensor(mla.heads, Precision::Full)?,
            },
            logits: backend.tensor(limits.logits, config.vocab, Precision::Full)?,
        })
    }
}

/// Bytes of the activations of one rank of `tp`, in the activation type `precision` where they are not full.
pub fn activation_bytes(config: &ModelConfig, tp: usize, limits: StepLimits, precision: DType) -> u64 {
    let mla = config.mla_shape(tp);
    let full = DType::Fp32.bytes();
    let token =
        config.hidden * (full + 2 * precision.bytes()) + mla.heads * (mla.cache_width() + mla.latent + 1) * full;
    (limits.tokens * token + limits.logits * config.vocab * full) as u64
}

/// A model on one rank: its layers and the activations that steps work in.
pub struct Model<B: Backend> {
    pub(crate) config: ModelConfig,
    pub(crate) embedding: B::Embedding,
    pub(crate) layers: Vec<Layer<B>>,
    pub(crate) final_norm: B::Norm,
    pub(crate) head: B::Head,
    pub(crate) activations: Activations<B>,
}

impl<B: Backend> Model<B> {
    /// The configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Logits of the last step, [batch.logits.len(), V].
    pub fn logits(&self) -> &B::Tensor {
        &self.activations.logits
    }

    /// Runs one step of a validated batch. Sessions' slots and pages are updated; logits of the asked tokens are left in
    /// [`Self::logits`].
    ///
    /// # Errors
    /// An op failed; caches that the step touched are then undefined.
    pub fn step(&mut self, backend: &mut B, batch: &StepBatch, hooks: &mut dyn StepHooks) -> Result<()> {
        if batch.tokens.is_empty() {
            return Ok(());
        }
        let recorded = match (hooks.is_plain(), hooks.remote()) {
            (true, false) => backend.run_recorded(batch)?,
            (true, true) if backend.begin_pieces(batch)? => return self.run_ops(backend, batch, hooks, true),
            _ => Recorded::No,
        };
        match recorded {
            Recorded::Done => return Ok(()),
            Recorded::Recording => {}
            Recorded::No => backend.begin_step(batch)?,
        }
        self.run_ops(backend, batch, hooks, false)?;
        if recorded == Recorded::Recording {
            backend.end_recording()?;
        }
        Ok(())
    }

    /// The whole step, piece by piece: one ends with the queries of an MLA layer, the next begins with its output, and between
    /// them is attention, to which others may contribute. They may be recorded where `in_pieces` says so.
    fn run_ops(
        &mut self,
        backend: &mut B,
        batch: &StepBatch,
        hooks: &mut dyn StepHooks,
        in_pieces: bool,
    ) -> Result<()> {
        let mut begun = None;
        for number in 0.. {
            let attends = |layer: &usize| matches!(self.layers[*layer].mixer, Mixer::Mla(..));
            let until = (begun.map_or(0, |layer| layer + 1)..self.layers.len()).find(attends);
            let recorded = if in_pieces { backend.run_piece(number)? } else { Recorded::No };
            if recorded != Recorded::Done {
                self.run_piece(backend, batch, hooks, (begun, until))?;
            }
            if recorded == Recorded::Recording {
                backend.end_recording()?;
            }
            let Some(layer) = until else { break };
            self.attend(backend, layer, hooks)?;
            begun = until;
        }
        Ok(())
    }

    /// From the output of the MLA layer `begun`, or the embedding, to the queries of the layer `until`, or the logits.
    fn run_piece(
        &mut self,
        backend: &mut B,
        batch: &StepBatch,
        hooks: &mut dyn StepHooks,
        (begun, until): (Option<usize>, Option<usize>),
    ) -> Result<()> {
        let Activations { residual, normed, delta, queries, partials, logits } = &mut self.activations;
        if begun.is_none() {
            backend.embed(&self.embedding, residual)?;
            backend.all_reduce(residual)?;
            if let Some(first) = self.layers.first() {
                backend.rms_norm(residual, &first.input_norm, normed)?;
            }
        }
        let end = until.map_or(self.layers.len(), |layer| layer + 1);
        for (number, layer) in self.layers.iter().enumerate().take(end).skip(begun.unwrap_or(0)) {
            match &layer.mixer {
                Mixer::Kda(mixer, index) => backend.kda_mixer(mixer, *index, normed, delta)?,
                Mixer::Mla(mixer, index) if until == Some(number) => {
                    return Ok(backend.mla_project(mixer, *index, normed, queries)?);
                }
                Mixer::Mla(mixer, _) => backend.mla_output(mixer, partials, delta)?,
            }
            backend.all_reduce(delta)?;
            backend.add_rms_norm(residual, delta, &layer.post_norm, normed)?;
            match &layer.feed_forward {
                FeedForward::Dense(mlp) => backend.mlp(mlp, normed, delta)?,
                FeedForward::Experts(moe) => {
                    backend.moe(moe, normed, hooks.routing(number), delta)?;
                    if hooks.traced() {
                        hooks.experts(number, backend.selected_experts()?);
                    }
                }
            }
            backend.all_reduce(delta)?;
            let next = self.layers.get(number + 1).map_or(&self.final_norm, |next| &next.input_norm);
            backend.add_rms_norm(residual, delta, next, normed)?;
            if hooks.traced() {
                hooks.hidden(number, backend.read(residual, batch.tokens.len())?);
            }
        }
        if !batch.logits.is_empty() {
            backend.logits(&self.head, normed, logits)?;
        }
        Ok(())
    }

    /// Attention of an MLA layer over the keys that are here, and what others add to it.
    fn attend(&mut self, backend: &mut B, layer: usize, hooks: &mut dyn StepHooks) -> Result<()> {
        let Mixer::Mla(mixer, index) = &self.layers[layer].mixer else { return Ok(()) };
        let Activations { queries, partials, .. } = &mut self.activations;
        if hooks.remote() {
            let queries = backend.read_some(queries, hooks.asking())?;
            hooks.ask(*index, &queries);
        }
        backend.mla_attend(mixer, *index, queries, partials)?;
        if hooks.remote() {
            let parts = hooks.answers(*index);
            let parts: Vec<OtherPart<'_>> = parts.iter().map(RemotePart::as_other).collect();
            backend.mla_merge(mixer, partials, &parts)?;
        }
        Ok(())
    }
}
