//! One rank: a backend, the model's shard on it and the sessions parked in its host memory. It executes commands one after
//! the other, the same ones as every other rank of its replica, and decides nothing.

mod caches;
mod filling;
mod traces;

use std::collections::HashMap;
use std::sync::Arc;

use perigee_backend::batch::BatchLimits;
use perigee_backend::{Backend, BackendError, CacheShape, DType, LatentReader, PAGE_TOKENS, Routing};
use perigee_migration::AttendShape;
use perigee_model::forward::{Model, StepHooks};
use perigee_model::{LayerKind, ModelError};
use perigee_sampling::{Draw, Sampled, Scratch};

use self::caches::{Parked, storage_type};
use self::filling::Filling;
use self::traces::RankTraces;
use crate::executor::{CacheBytes, ExecutorLimits, StepPlan};
use crate::homes::AnswerModel;
use crate::link::{FollowerLink, LinkError};
use crate::protocol::{RankCommand, RankReply};
use crate::remote::{AttentionClient, RemoteAttention, RemoteHooks, RemoteStep, Seat, StepReport};

/// Most tokens of a session in one question: a prefill chunk is asked about in pieces of a page.
const QUESTION_TOKENS: u32 = 64;

/// One rank of a replica.
pub struct Rank<B: Backend> {
    backend: B,
    model: Model<B>,
    cache: CacheShape,
    limits: ExecutorLimits,
    rank: usize,
    parked: HashMap<u64, Parked>,
    /// In which latents and tails are kept, where that is known.
    dtype: Option<DType>,
    attention: Option<RemoteAttention>,
    traces: RankTraces,
    /// What prompts are filled in with, where they are not computed.
    filling: Option<Filling>,
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
        let RankShape { rank, cache, limits } = shape;
        backend.reserve_cache(&cache)?;
        let dtype = storage_type(&mut backend, &cache)?;
        let traces = RankTraces::default();
        let (parked, attention, filling) = (HashMap::new(), None, None);
        Ok(Self { backend, model, cache, limits, rank, parked, dtype, attention, traces, filling })
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

    /// Distinct experts computed with, summed over mixture layers and steps since the start; see
    /// [`Backend::experts_touched`].
    ///
    /// # Errors
    /// A fault of the device.
    pub(crate) fn experts_touched(&mut self) -> Result<u64, BackendError> {
        self.backend.experts_touched()
    }

    /// Runs a step; its remote rows ask through this rank's client, and what became of that is the result.
    ///
    /// # Errors
    /// The plan contradicts itself or an op failed. A missing answer is not an error.
    pub fn step(&mut self, plan: &StepPlan, hooks: &mut dyn StepHooks) -> Result<StepReport, ModelError> {
        plan.batch.validate(&BatchLimits {
            tokens: self.limits.step_tokens,
            vocab: self.limits.vocab,
            slots: self.limits.slots,
            pages: self.limits.pages,
        })?;
        plan.remote.validate(&plan.batch)?;
        if !plan.feed.is_empty() && plan.feed.len() != plan.batch.tokens.len() {
            let (fed, tokens) = (plan.feed.len(), plan.batch.tokens.len());
            return Err(BackendError::Batch(format!("{fed} draws feed {tokens} tokens")).into());
        }
        self.traces.take(&plan.traces);
        self.traces.stepped();
        self.backend.clear_slots(&plan.clear_slots)?;
        for &(from, to) in &plan.copy_slots {
            self.backend.copy_slot(from, to)?;
        }
        for &(from, to) in &plan.copy_pages {
            self.backend.copy_page(from, to)?;
        }
        if !plan.feed.is_empty() {
            self.backend.feed_drawn(&plan.feed)?;
        }
        if plan.remote.rows.is_empty() {
            let filling = self.filling.take();
            let filled = filling.as_ref().map(|filling| self.fill(filling, &plan.batch)).transpose();
            self.filling = filling;
            self.model.step(&mut self.backend, filled?.as_ref().unwrap_or(&plan.batch), hooks)?;
            return Ok(StepReport::default());
        }
        let seat = Seat { rank: self.rank, dtype: self.dtype.unwrap_or(DType::Fp32) };
        let mut asking = RemoteStep::new(plan, self.attention.as_mut(), seat);
        let done =
            self.model.step(&mut self.backend, &plan.batch, &mut RemoteHooks { inner: hooks, asking: &mut asking });
        let report = asking.finish();
        done.map(|()| report)
    }

    /// The first `rows` rows of the last step's logits, [rows, V].
    ///
    /// # Errors
    /// There are fewer rows.
    pub fn logits(&mut self, rows: usize) -> Result<Vec<f32>, BackendError> {
        self.backend.read(self.model.logits(), rows)
    }

    /// Waits until a step's work is done on the device.
    ///
    /// # Errors
    /// A fault of the device, or a rank lost in the exchange.
    pub(crate) fn finish(&mut self) -> Result<(), BackendError> {
        self.backend.finish()
    }

    /// One token for every draw, draw `i` from row `i` of the last step's logits.
    ///
    /// # Errors
    /// There are fewer rows, or nothing can be drawn from one.
    pub(crate) fn sample(&mut self, draws: &[Draw<'_>], scratch: &mut Scratch) -> Result<Vec<Sampled>, BackendError> {
        self.backend.sample(self.model.logits(), draws, scratch)
    }

    /// Whether this rank's steps can be queued before the last one's draws are read.
    pub(crate) fn runs_ahead(&self) -> bool {
        self.backend.runs_ahead()
    }

    /// Queues draws like those of [`Self::sample`].
    ///
    /// # Errors
    /// There are fewer rows, or the device failed.
    pub(crate) fn queue_draws(&mut self, draws: &[Draw<'_>]) -> Result<(), BackendError> {
        self.backend.queue_draws(self.model.logits(), draws)
    }

    /// What the oldest queued draws gave.
    ///
    /// # Errors
    /// The device failed, or a rank was lost in the exchange.
    pub(crate) fn collect_draws(&mut self) -> Result<Vec<Option<Sampled>>, BackendError> {
        self.backend.collect_draws()
    }

    /// Executes any command but `Shutdown`, which needs no work.
    pub fn execute(&mut self, command: &RankCommand) -> RankReply {
        let result = match command {
            RankCommand::Step { plan, forced } => {
                let mut hooks = ForcedRouting { forced };
                self.step(plan, &mut hooks).map(RankReply::Stepped)
            }
            RankCommand::Park { key, slot, pages } => self.park(*key, *slot, pages),
            RankCommand::Unpark { key, slot, pages } => self.unpark(*key, *slot, pages),
            RankCommand::DropParked { key } => {
                self.parked.remove(key);
                Ok(RankReply::Done)
            }
            RankCommand::ExportState { slot, part } => self.export_part(*slot, part),
            RankCommand::ExportSlot { from } => self.export_slot(*from),
            RankCommand::ImportState { slot, parts } => self.import_state(*slot, parts),
            RankCommand::DigestSlot { slot } => self.digest_slot(*slot),
            RankCommand::ShareSlots => self.share_slots(),
            RankCommand::OpenSlots { shared } => self.open_slots(shared),
            RankCommand::TakeSlot { shared, from, slot } => self.take_slot(shared, *from, *slot),
            RankCommand::CloseSlots { shared } => self.close_slots(shared),
            RankCommand::ImportPages { pages } => self.import_pages(pages),
            RankCommand::DigestPages { pages } => self.digest_pages(pages),
            RankCommand::Poison { slots, pages } => self.poison(slots, pages),
            RankCommand::Note { notes } => {
                self.traces.take(notes);
                Ok(RankReply::Done)
            }
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
            let sent = link.reply(&reply);
            // What went wrong here says more than that nobody hears of it.
            if let RankReply::Failed { fatal: true, message } = reply {
                return Err(LinkError::Lost(message));
            }
            match sent {
                // A leader that needs no more answers has said goodbye; else the next look tells that it is lost.
                Ok(()) | Err(LinkError::Lost(_)) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
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
    fn is_plain(&self) -> bool {
        self.forced.is_empty()
    }

    fn routing(&mut self, layer: usize) -> Routing<'_> {
        match self.forced.iter().find(|(number, _)| *number as usize == layer) {
            Some((_, experts)) => Routing::Forced(experts),
            None => Routing::Free,
        }
    }
}
