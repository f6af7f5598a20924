//! From options to a rank that can run: opens the model, settles the sizes, meets the other ranks, loads this rank's share.

use std::path::PathBuf;
use std::sync::Arc;

use perigee_backend::{Backend, PAGE_TOKENS};
use perigee_collectives::Collective;
use perigee_engine::executor::ExecutorLimits;
use perigee_engine::rank::{Rank, RankShape};
use perigee_model::{Model, ModelConfig, ModelSpec, StepLimits, WeightSource, model_digest};
use perigee_text::{ChatTemplate, GenerationConfig, SpecialIds, TextError, Tokenizer, byte_level_tokenizer};

use crate::config::WorkerConfig;
use crate::error::{Result, WorkerError};
use crate::events::{WorkerEvent, emit};

/// Longest session where neither the options nor the model say less.
const DEFAULT_MODEL_LEN: usize = 32_768;
/// Positions for which every slot gets pages by default.
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
}

/// Opens the model and settles every size that the ranks share.
///
/// # Errors
/// The model cannot be opened, or the degree does not divide it.
pub fn open(config: &WorkerConfig) -> Result<Opened> {
    let spec: ModelSpec = config.engine.model.parse()?;
    let source = WeightSource::open(&spec)?;
    source.config().check_tp(config.tp)?;
    let digest = model_digest(&spec)?;
    let options = &config.engine;
    let longest = options.max_model_len.unwrap_or(source.config().max_length.min(DEFAULT_MODEL_LEN));
    let pages = options.latent_pages.unwrap_or_else(|| {
        (options.state_slots * DEFAULT_POSITIONS.div_ceil(PAGE_TOKENS)).max(longest.div_ceil(PAGE_TOKENS))
    });
    let limits = ExecutorLimits {
        vocab: source.config().vocab,
        slots: options.state_slots,
        pages,
        step_tokens: options.token_budget.max(options.max_batch),
        step_rows: options.max_batch,
        max_model_len: longest.min(pages * PAGE_TOKENS),
    };
    // Log-probabilities of prompts need a row for every token of a chunk.
    let logit_rows = limits.step_tokens;
    Ok(Opened { spec, source, digest, limits, logit_rows })
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
    pub fn load<B: Backend>(&self, config: &WorkerConfig, mut backend: B) -> Result<Rank<B>> {
        let limits = StepLimits { tokens: self.limits.step_tokens, logits: self.logit_rows };
        let mut progress = |done, all| {
            emit(config.supervised, &WorkerEvent::Loading { rank: config.rank, done, all });
        };
        let place = (config.rank, config.tp);
        let model = Model::load(&mut backend, &self.source, place, limits, &mut progress)?;
        let cache = self.source.config().cache_shape(config.tp, self.limits.slots, self.limits.pages);
        Ok(Rank::new(backend, model, RankShape { rank: config.rank, cache, limits: self.limits })?)
    }
}

/// A CPU backend at this rank's seat.
pub fn cpu_backend(config: &WorkerConfig, collective: Box<dyn Collective>) -> perigee_cpu::CpuBackend {
    let options =
        perigee_cpu::CpuOptions { activation: config.engine.activation(), threads: config.engine.threads(config.tp) };
    perigee_cpu::CpuBackend::new(options, collective)
}

/// The tokenizer of a model: the directory's, none where it has none, and a byte-level one for a random model whose
/// vocabulary has room for all bytes.
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

/// The chat template of a model: the directory's, none where it has none, and the default one for a random model.
///
/// # Errors
/// A template that cannot be read.
pub fn chat_template(spec: &ModelSpec) -> Result<Option<Arc<ChatTemplate>>> {
    let template = match spec {
        ModelSpec::Directory(path) => ChatTemplate::load(path),
        ModelSpec::Random { .. } => ChatTemplate::fallback().map(Some),
    };
    match template {
        Ok(template) => Ok(template.map(Arc::new)),
        Err(error) => Err(WorkerError::Options(format!("chat template: {error}"))),
    }
}
