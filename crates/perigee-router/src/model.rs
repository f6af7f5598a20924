//! The model that a router serves, as replicas describe it: what requests are checked against, and the values that absent
//! sampling fields take. The router knows no more of a model than this.

use perigee_proto::{internal, v1};

use crate::config::Limits;

/// A served model. All replicas that a router uses have the same digest.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Model {
    /// Name, for people.
    pub(crate) name: String,
    /// Digest of configuration and weights.
    pub(crate) digest: String,
    /// Number of token ids.
    pub(crate) vocab: u32,
    /// Longest sequence, prompt and output together.
    pub(crate) max_len: u32,
    /// Tokens that end generation.
    pub(crate) eos: Vec<u32>,
    /// Whether leaders return text.
    pub(crate) has_tokenizer: bool,
    /// What absent sampling fields take.
    pub(crate) defaults: Defaults,
}

/// Sampling values of a model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Defaults {
    pub(crate) temperature: f32,
    pub(crate) top_k: u32,
    pub(crate) top_p: f32,
    pub(crate) min_p: f32,
    pub(crate) repetition_penalty: f32,
}

impl Defaults {
    /// What a model without recommendations has.
    pub(crate) const NEUTRAL: Self =
        Self { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0 };
}

impl From<internal::ModelInfo> for Model {
    fn from(info: internal::ModelInfo) -> Self {
        let given = info.defaults.unwrap_or_default();
        let neutral = Defaults::NEUTRAL;
        Self {
            name: info.name,
            digest: info.digest,
            vocab: info.vocab_size,
            max_len: info.max_model_len,
            eos: info.eos_token_ids,
            has_tokenizer: info.has_tokenizer,
            defaults: Defaults {
                temperature: given.temperature.unwrap_or(neutral.temperature),
                top_k: given.top_k.unwrap_or(neutral.top_k),
                top_p: given.top_p.unwrap_or(neutral.top_p),
                min_p: given.min_p.unwrap_or(neutral.min_p),
                repetition_penalty: given.repetition_penalty.unwrap_or(neutral.repetition_penalty),
            },
        }
    }
}

impl Model {
    /// As clients see it; `has_tokenizer` says whether this router can encode text.
    pub(crate) fn describe(&self, has_tokenizer: bool, limits: &Limits) -> v1::GetModelInfoResponse {
        let defaults = self.defaults;
        v1::GetModelInfoResponse {
            model: self.name.clone(),
            digest: self.digest.clone(),
            vocab_size: self.vocab,
            max_model_len: self.max_len,
            eos_token_ids: self.eos.clone(),
            has_tokenizer: has_tokenizer && self.has_tokenizer,
            max_text_bytes: limits.text_bytes as u64,
            max_message_bytes: limits.message_bytes as u64,
            max_n: limits.choices,
            max_logprobs: limits.logprobs,
            default_sampling: Some(v1::SamplingParams {
                temperature: Some(defaults.temperature),
                top_k: Some(defaults.top_k),
                top_p: Some(defaults.top_p),
                min_p: Some(defaults.min_p),
                repetition_penalty: Some(defaults.repetition_penalty),
                ..v1::SamplingParams::default()
            }),
        }
    }
}
