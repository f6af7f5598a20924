//! One rank: a backend, the model's shard on it and the sessions parked in its host memory. It executes commands one after
//! the other, the same ones as every other rank of its replica, and decides nothing.

use std::collections::HashMap;
use std::sync::Arc;

use perigee_backend::batch::BatchLimits;
use perigee_backend::{Backend, BackendError, CacheShape, LatentReader, PAGE_TOKENS, Routing, StateKind, StatePart};
use perigee_migration::AttendShape;
use perigee_model::forward::{Model, StepHooks};
use perigee_model::{LayerKind, ModelError};
use perigee_sampling::{Draw, Sampled, Scratch};

use crate::executor::{CacheBytes, ExecutorLimits, StepPlan};
use crate::homes::AnswerModel;
use crate::link::{FollowerLink, LinkError};
use crate::protocol::{RankCommand, RankReply};
use crate::remote::{AttentionClient, RemoteAttention};

/// Most tokens of a session in one question: a prefill chunk is asked about in pieces of a page.
const QUESTION_TOKENS: u32 = 64;

/// A session's cache in host memory: parts of its slot, then its pages, all as bytes.
struct Parked {
    state: Vec<(StatePart, Vec<u8>)>,
    /// [pages][MLA layers].
    pages: Vec<Vec<Vec<u8>>>,
}

/// One rank of a replica.
pub struct Rank<B: Backend> {
    backend: B,
    model: Model<B>,
    cache: CacheShape,
    limits: ExecutorLimits,
    rank: usize,
    parked: HashMap<u64, Parked>,
    attention: Option<RemoteAttention>,
}

/// Sizes of a rank that is about to run.
#[derive(Debug, Clone, Copy)]
pub struct RankShape {
    /// This rank.
    pub rank: usize,
    /// Caches, already divided by the tensor-parallel degree.
    pub cache: CacheShape,
    /// Sizes that all ranks share.
    pub limits: ExecutorLimits,
}

impl<B: Backend> Rank<B> {
    /// Takes a loaded model and reserves the caches.
    ///
    /// # Errors
    /// The device has no room for them.
    pub fn new(mut backend: B, model: Model<B>, shape: RankShape) -> Result<Self, BackendError> {
        backend.reserve_cache(&shape.cache)?;
        let RankShape { rank, cache, limits } = shape;
        Ok(Self { backend, model, cache, limits, rank, parked: HashMap::new(), attention: None })
    }

    /// Sizes that all ranks share.
    pub fn limits(&self) -> ExecutorLimits {
        self.limits
    }

    /// What questions of this model look like, and what answering them needs to know.
    pub fn answer_model(&self) -> AnswerModel {
        let shape = self.model.config().mla_shape(1);
        let layers = self.cache.mla_layers as u32;
        let (heads, latent, rope) = (shape.heads as u32, shape.latent as u32, shape.rope as u32);
        let tokens = QUESTION_TOKENS;
        AnswerModel { shape: AttendShape { layers, heads, latent, rope, tokens }, scale: shape.scale() }
    }

    /// Attention over this rank's latents beside its steps, where the backend offers that.
    pub fn latent_reader(&self) -> Option<Arc<dyn LatentReader>> {
        self.backend.latent_reader()
    }

    /// Lets remote rows ask through `client`; without one they are all faulty.
    pub fn set_attention(&mut self, client: Box<dyn AttentionClient>, shape: AttendShape) {
        self.attention = Some(RemoteAttention { client, shape });
    }

    /// Bytes of weights on this rank.
    pub fn weight_bytes(&self) -> u64 {
        self.backend.weight_bytes()
    }

    /// Runs a step.
    ///
    /// # Errors
    /// The plan contradicts itself or an op failed.
    pub fn step(&mut self, plan: &StepPlan, hooks: &mut dyn StepHooks) -> Result<(), ModelError> {
        plan.batch.validate(&BatchLimits {
            tokens: self.limits.step_tokens,
            vocab: self.limits.vocab,
            slots: self.limits.slots,
            pages: self.limits.pages,
        })?;
        self.backend.clear_slots(&plan.clear_slots)?;
        for &(from, to) in &plan.copy_slots {
            self.backend.copy_slot(from, to)?;
        }
        for &(from, to) in &plan.copy_pages {
            self.backend.copy_page(from, to)?;
        }
        self.model.step(&mut self.backend, &plan.batch, hooks)
    }

    /// The first `rows` rows of the last step's logits, [rows, V].
    ///
    /// # Errors
    /// There are fewer rows.
    pub fn logits(&mut self, rows: usize) -> Result<Vec<f32>, BackendError> {
        self.backend.read(self.model.logits(), rows)
    }

    /// One token for every draw, draw `i` from row `i` of the last step's logits.
    ///
    /// # Errors
    /// There are fewer rows, or nothing can be drawn from one.
    pub(crate) fn sample(&mut self, draws: &[Draw<'_>], scratch: &mut Scratch) -> Result<Vec<Sampled>, BackendError> {
        self.backend.sample(self.model.logits(), draws, scratch)
    }

    /// Executes any command but `Shutdown`, which needs no work.
    pub fn execute(&mut self, command: &RankCommand) -> RankReply {
        let result = match command {
            RankCommand::Step { plan, forced } => {
                let mut hooks = ForcedRouting { forced };
                self.step(plan, &mut hooks).map(|()| RankReply::Done)
            }
            RankCommand::Park { key, slot, pages } => self.park(*key, *slot, pages).map(|()| RankReply::Done),
            RankCommand::Unpark { key, slot, pages } => self.unpark(*key, *slot, pages).map(|()| RankReply::Done),
            RankCommand::DropParked { key } => {
                self.parked.remove(key);
                Ok(RankReply::Done)
            }
            RankCommand::ExportState { slot, part } => self.export(*slot, part),
            RankCommand::WeightBytes => Ok(RankReply::Bytes(self.weight_bytes().to_le_bytes().to_vec())),
            RankCommand::Shutdown => Ok(RankReply::Done),
        };
        result.unwrap_or_else(|error| RankReply::Failed { fatal: is_fatal(&error), message: error.to_string() })
    }

    /// Executes the leader's commands until it says goodbye or is gone.
    ///
    /// # Errors
    /// The connection or this rank broke; the process should end.
    pub fn follow(&mut self, link: &mut dyn FollowerLink) -> Result<(), LinkError> {
        while let Some(command) = link.next()? {
            if command == RankCommand::Shutdown {
                // The one command without an answer: the leader may be gone by now.
                break;
            }
            let reply = self.execute(&command);
            link.reply(&reply)?;
            if let RankReply::Failed { fatal: true, message } = reply {
                return Err(LinkError::Lost(message));
            }
        }
        Ok(())
    }

    fn state_parts(&self) -> Vec<StatePart> {
        let kinds = [StateKind::Recurrent, StateKind::ConvQ, StateKind::ConvK, StateKind::ConvV];
        let heads = self.cache.kda_heads as u32;
        (0..self.cache.kda_layers as u32)
            .flat_map(|layer| kinds.map(|kind| StatePart { layer, kind, first_head: 0, heads }))
            .collect()
    }

    fn park(&mut self, key: u64, slot: u32, pages: &[u32]) -> Result<(), ModelError> {
        let mut state = Vec::new();
        for part in self.state_parts() {
            state.push((part, self.backend.export_state(slot, &part)?));
        }
        let mut parked = Vec::with_capacity(pages.len());
        for &page in pages {
            let layers = 0..self.cache.mla_layers as u32;
            parked.push(layers.map(|layer| self.backend.export_page(page, layer)).collect::<Result<_, _>>()?);
        }
        self.parked.insert(key, Parked { state, pages: parked });
        Ok(())
    }

    fn unpark(&mut self, key: u64, slot: u32, pages: &[u32]) -> Result<(), ModelError> {
        let Some(parked) = self.parked.get(&key) else {
            return Err(BackendError::Batch(format!("no parked session {key}")).into());
        };
        if parked.pages.len() != pages.len() {
            return Err(BackendError::shape("pages of a parked session", &[parked.pages.len()], &[pages.len()]).into());
        }
        for (part, bytes) in &parked.state {
            self.backend.import_state(slot, part, bytes)?;
        }
        for (&page, layers) in pages.iter().zip(&parked.pages) {
            for (layer, bytes) in (0..).zip(layers) {
                self.backend.import_page(page, layer, bytes)?;
            }
        }
        Ok(())
    }

    /// Bytes of a part if its heads are this rank's, else nothing.
    fn export(&mut self, slot: u32, part: &StatePart) -> Result<RankReply, ModelError> {
        let mine = self.cache.kda_heads as u32;
        let first = self.rank as u32 * mine;
        if part.first_head < first || part.first_head + part.heads > first + mine {
            return Ok(RankReply::Done);
        }
        let local = StatePart { first_head: part.first_head - first, ..*part };
        Ok(RankReply::Bytes(self.backend.export_state(slot, &local)?))
    }

    /// KDA heads on each rank.
    pub(crate) fn heads_per_rank(&self) -> usize {
        self.cache.kda_heads
    }

    /// Host memory that a parked slot and a parked page take on one rank. Tails and latents are counted as float32, which
    /// is what they are at most.
    pub(crate) fn cache_bytes(&self) -> CacheBytes {
        let CacheShape { kda_layers, kda_heads, kda_head_dim, conv, mla_layers, latent_width, .. } = self.cache;
        let numbers = kda_layers * kda_heads * kda_head_dim * (kda_head_dim + 3 * (conv - 1));
        let page = mla_layers * PAGE_TOKENS * latent_width;
        CacheBytes { slot: 4 * numbers as u64, page: 4 * page as u64 }
    }

    /// The model numbers of its KDA layers, in order.
    pub fn kda_layers(&self) -> Vec<usize> {
        let layers = self.model.config().layers.iter().enumerate();
        layers.filter(|(_, layer)| layer.kind == LayerKind::Kda).map(|(number, _)| number).collect()
    }
}

/// Whether a rank that reported this error can go on: a broken exchange or device cannot.
pub(crate) fn is_fatal(error: &ModelError) -> bool {
    matches!(error, ModelError::Backend(BackendError::Collective(_) | BackendError::Device(_)))
}

/// Hooks that only force experts.
struct ForcedRouting<'a> {
    forced: &'a [(u32, Vec<u32>)],
}

impl StepHooks for ForcedRouting<'_> {
    fn routing(&mut self, layer: usize) -> Routing<'_> {
        match self.forced.iter().find(|(number, _)| *number as usize == layer) {
            Some((_, experts)) => Routing::Forced(experts),
            None => Routing::Free,
        }
    }
}
