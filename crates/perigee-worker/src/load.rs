//! From options to a rank that can run: opens the model, settles the sizes, meets the other ranks, loads this rank's share.

use std::path::PathBuf;
use std::sync::Arc;

use perigee_backend::{Backend, DType, PAGE_TOKENS};
use perigee_collectives::Collective;
use perigee_engine::executor::ExecutorLimits;
use perigee_engine::rank::{Rank, RankShape};
use perigee_model::forward::activation_bytes;
use perigee_model::inventory::{WeightElements, weight_elements};
use perigee_model::{Model, ModelConfig, ModelSpec, StepLimits, WeightSource, model_digest};
use perigee_text::{ChatTemplate, GenerationConfig, SpecialIds, TextError, Tokenizer, byte_level_tokenizer};

use crate::config::{EngineOptions, WorkerConfig};
use crate::error::{Result, WorkerError};
use crate::events::{WorkerEvent, emit};
use crate::memory::{self, MemoryPlan};

/// Longest session on CPUs where neither the options nor the model say less; on a GPU what a plan makes room for at least.
const DEFAULT_MODEL_LEN: usize = 32_768;
/// Positions for which every slot gets pages by default on CPUs.
const DEFAULT_POSITIONS: usize = 1_024;

/// A model that was opened and measured, not yet loaded.
pub struct Opened {
    /// What the options name.
    pub spec: ModelSpec,
    /// Its weights.
    pub source: WeightSource,
    /// Digest of model and weights.
    pub digest: String,
    /// Sizes of the replica.
    pub limits: ExecutorLimits,
    /// Most rows of logits in one step.
    pub logit_rows: usize,
    /// How this rank's card is divided; none on CPUs.
    pub memory: Option<MemoryPlan>,
    /// Positions below which prompts are filled in rather than computed.
    pub fill_prompts: Option<u64>,
}

/// A rank of a replica.
#[derive(Debug, Clone, Copy)]
pub struct Seat {
    /// The rank.
    pub rank: usize,
    /// Ranks of the replica.
    pub tp: usize,
}

/// Opens the model of a worker process and settles every size that the ranks share.
///
/// # Errors
/// The model cannot be opened, the degree does not divide it, or the card has no room for it.
pub fn open(config: &WorkerConfig) -> Result<Opened> {
    open_engine(&config.engine, Seat { rank: config.rank, tp: config.tp })
}

/// The same from the engine's options.
///
/// # Errors
/// As [`open`].
pub fn open_engine(options: &EngineOptions, seat: Seat) -> Result<Opened> {
    let spec: ModelSpec = options.model.parse()?;
    let source = WeightSource::open(&spec)?;
    source.config().check_tp(seat.tp)?;
    let digest = served_digest(options, &spec)?;
    let step_tokens = options.step_tokens().max(options.step_rows());
    // The engine asks for no more rows of logits than a step has rows.
    let logit_rows = options.step_rows();
    let steps = StepLimits { tokens: step_tokens, logits: logit_rows };
    let memory = match options.card(seat.rank) {
        Some(card) => Some(divide(options, seat, source.config(), steps, perigee_cuda::memory(card)?)?),
        None => None,
    };
    let usual = source.config().max_length.min(DEFAULT_MODEL_LEN);
    let longest = options.max_model_len.unwrap_or(if memory.is_some() { source.config().max_length } else { usual });
    let pages = match &memory {
        Some(plan) => plan.pages,
        None => options.latent_pages.unwrap_or_else(|| {
            (options.state_slots * DEFAULT_POSITIONS.div_ceil(PAGE_TOKENS)).max(longest.div_ceil(PAGE_TOKENS))
        }),
    };
    let limits = ExecutorLimits {
        vocab: source.config().vocab,
        slots: options.state_slots,
        pages,
        step_tokens,
        step_rows: options.step_rows(),
        max_model_len: longest.min(pages * PAGE_TOKENS),
    };
    Ok(Opened { spec, source, digest, limits, logit_rows, memory, fill_prompts: options.fill_prompts })
}

/// The digest under which a model is served with these options.
///
/// # Errors
/// The model cannot be read.
pub fn served_digest(options: &EngineOptions, spec: &ModelSpec) -> Result<String> {
    let mut digest = model_digest(spec)?;
    if options.fill_prompts.is_some() {
        // Neither routers nor replicas take it for the model itself.
        digest.push_str("-filled");
    }
    Ok(digest)
}

/// Divides a card of `card` bytes for this rank.
fn divide(
    options: &EngineOptions,
    seat: Seat,
    model: &ModelConfig,
    steps: StepLimits,
    card: u64,
) -> Result<MemoryPlan> {
    let (precision, tp) = (options.activation(), seat.tp);
    let WeightElements { total, routers, experts } = weight_elements(model, seat.rank, tp);
    let shapes = perigee_cuda::LayerShapes {
        kda: model.kda_shape(tp),
        mla: model.mla_shape(tp),
        mlp: model.mlp_shape(tp),
        moe: model.moe_shape(tp),
    };
    let element = precision.bytes() as u64;
    let longest = options.max_model_len.unwrap_or(model.max_length.min(DEFAULT_MODEL_LEN));
    let cache = model.cache_shape(tp, options.state_slots, 1);
    let working = perigee_cuda::working_bytes(&shapes, steps.tokens, precision);
    let request = memory::Request {
        card,
        fraction: options.memory_fraction / options.sharers(seat.rank, tp) as f64,
        weights: (total - routers - experts) * element
            + routers * DType::Fp32.bytes() as u64
            + experts * DType::Bf16.bytes() as u64,
        working: working
            + activation_bytes(model, tp, steps, precision)
            + perigee_cuda::gathered_bytes(steps.logits, model.vocab.div_ceil(tp), tp),
        graphs: perigee_cuda::ladder(options.step_rows().min(options.state_slots)).len(),
        slots: options.state_slots,
        slot_bytes: cache.slot_bytes(precision),
        pages: options.latent_pages,
        page_bytes: cache.page_bytes(precision),
        longest: longest.div_ceil(PAGE_TOKENS),
        most_pages: options
            .state_slots
            .saturating_mul(options.max_model_len.unwrap_or(model.max_length).div_ceil(PAGE_TOKENS)),
    };
    Ok(MemoryPlan::make(&request)?)
}

impl Opened {
    /// What ranks must agree on, in 32 hexadecimal digits.
    pub fn identity(&self, config: &WorkerConfig) -> String {
        let sizes = format!("{:?} {:?} {}", self.limits, config.engine.activation(), config.engine.device);
        let key = |salt| perigee_backend::random::tensor_key(salt, &format!("{} {sizes}", self.digest));
        format!("{:016x}{:016x}", key(0), key(1))
    }

    /// Loads this rank's share on a backend and reserves the caches.
    ///
    /// # Errors
    /// The backend refuses a layer or has no room.
    pub fn load<B: Backend>(&self, config: &WorkerConfig, backend: B) -> Result<Rank<B>> {
        let mut progress = |done, all| {
            emit(config.supervised, &WorkerEvent::Loading { rank: config.rank, done, all });
        };
        self.load_at(Seat { rank: config.rank, tp: config.tp }, backend, &mut progress)
    }

    /// The same for any seat; `progress(done, all)` is called after every layer.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn load_at<B: Backend>(
        &self,
        Seat { rank, tp }: Seat,
        mut backend: B,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Rank<B>> {
        let limits = StepLimits { tokens: self.limits.step_tokens, logits: self.logit_rows };
        let model = Model::load(&mut backend, &self.source, (rank, tp), limits, progress)?;
        let cache = self.source.config().cache_shape(tp, self.limits.slots, self.limits.pages);
        let mut loaded = Rank::new(backend, model, RankShape { rank, cache, limits: self.limits })?;
        if let Some(until) = self.fill_prompts {
            tracing::warn!("prompts are filled in, not computed: what is answered means nothing");
            loaded.fill_prompts(until);
        }
        Ok(loaded)
    }
}

/// A CPU backend at this rank's seat.
pub fn cpu_backend(config: &WorkerConfig, collective: Box<dyn Collective>) -> perigee_cpu::CpuBackend {
    let options =
        perigee_cpu::CpuOptions { activation: config.engine.activation(), threads: config.engine.threads(config.tp) };
    perigee_cpu::CpuBackend::new(options, collective)
}

/// The tokenizer of a model: the directory's, none where it has none, the demo's own, and a byte-level one for a random
/// model whose vocabulary has room for all bytes.
///
/// # Errors
/// A tokenizer.json, tiktoken.model or generation_config.json that cannot be read.
pub fn tokenizer(spec: &ModelSpec) -> Result<Option<Arc<Tokenizer>>> {
    let failed = |error: TextError| WorkerError::Options(format!("tokenizer: {error}"));
    match spec {
        ModelSpec::Directory(path) => match Tokenizer::load(path) {
            Ok(tokenizer) => Ok(Some(Arc::new(tokenizer))),
            Err(TextError::NoTokenizer { .. }) => Ok(None),
            Err(error) => Err(failed(error)),
        },
        ModelSpec::Demo => {
            let (name, json) = (PathBuf::from(perigee_demo::NAME), perigee_demo::TOKENIZER.as_bytes());
            let generation = GenerationConfig::parse(perigee_demo::GENERATION_CONFIG, name.clone()).map_err(failed)?;
            Ok(Some(Arc::new(Tokenizer::from_json(json, name, generation).map_err(failed)?)))
        }
        ModelSpec::Random { preset, .. } => {
            let config = ModelConfig::parse(&preset.config_json()?)?;
            let special = SpecialIds { bos: config.bos, eos: config.eos.first().copied(), pad: config.pad };
            let json = match byte_level_tokenizer(config.vocab as u32, special) {
                Err(TextError::VocabularyTooSmall { .. }) => return Ok(None),
                other => other.map_err(failed)?,
            };
            let generation = GenerationConfig { eos_token_ids: config.eos.clone(), ..GenerationConfig::default() };
            let path = PathBuf::from(spec.to_string());
            Ok(Some(Arc::new(Tokenizer::from_json(json.to_string().as_bytes(), path, generation).map_err(failed)?)))
        }
    }
}

/// The chat template of a model: the directory's, none where it has none, the demo's own, and the default one for a random
/// model.
///
/// # Errors
/// A template that cannot be read.
pub fn chat_template(spec: &ModelSpec) -> Result<Option<Arc<ChatTemplate>>> {
    let template = match spec {
        ModelSpec::Directory(path) => ChatTemplate::load(path),
        ModelSpec::Demo => {
            ChatTemplate::parse(perigee_demo::CHAT_TEMPLATE.to_owned(), perigee_demo::NAME.into()).map(Some)
        }
        ModelSpec::Random { .. } => ChatTemplate::fallback().map(Some),
    };
    match template {
        Ok(template) => Ok(template.map(Arc::new)),
        Err(error) => Err(WorkerError::Options(format!("chat template: {error}"))),
    }
}
