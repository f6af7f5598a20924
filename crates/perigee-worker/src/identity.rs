//! What a leader says about its replica: to routers in its welcome, to anybody who asks for the model. It is settled once
//! the ranks are loaded and does not change after.

use perigee_proto::{PROTOCOL_VERSION, internal, v1};
use perigee_text::GenerationConfig;

/// A loaded replica.
#[derive(Debug, Clone, PartialEq)]
pub struct ReplicaIdentity {
    /// Name of the replica.
    pub replica: String,
    /// Changes with every start.
    pub incarnation: String,
    /// The model as the operator named it.
    pub model: String,
    /// Digest of configuration and weights.
    pub digest: String,
    /// Number of token ids.
    pub vocab: u32,
    /// Longest session, prompt and output together.
    pub max_model_len: u32,
    /// Tokens that end generation.
    pub eos_token_ids: Vec<u32>,
    /// Whether this leader returns text.
    pub has_tokenizer: bool,
    /// Sampling values that the model recommends.
    pub generation: GenerationConfig,
    /// Number of ranks.
    pub tp: u32,
    /// cpu or cuda.
    pub device: String,
    /// Process ids of the ranks, in rank order.
    pub pids: Vec<u32>,
    /// Bytes of weights on each rank, in rank order.
    pub weight_bytes: Vec<u64>,
    /// Most tokens in one step.
    pub step_tokens: u32,
    /// What a session's move takes; none where sessions do not move.
    pub move_costs: Option<internal::MoveCosts>,
}

impl ReplicaIdentity {
    /// The first message to a router.
    pub(crate) fn welcome(&self) -> internal::Welcome {
        let generation = &self.generation;
        internal::Welcome {
            protocol_version: PROTOCOL_VERSION,
            replica: self.replica.clone(),
            incarnation: self.incarnation.clone(),
            model: Some(internal::ModelInfo {
                name: self.model.clone(),
                digest: self.digest.clone(),
                vocab_size: self.vocab,
                max_model_len: self.max_model_len,
                eos_token_ids: self.eos_token_ids.clone(),
                has_tokenizer: self.has_tokenizer,
                defaults: Some(internal::GenerationDefaults {
                    temperature: generation.temperature,
                    top_k: generation.top_k,
                    top_p: generation.top_p,
                    repetition_penalty: generation.repetition_penalty,
                    min_p: generation.min_p,
                }),
            }),
            tp: self.tp,
            pids: self.pids.clone(),
            weight_bytes: self.weight_bytes.clone(),
            device: self.device.clone(),
            step_tokens: self.step_tokens,
            move_costs: self.move_costs,
        }
    }

    /// The answer to who asks this leader for its model. It takes no requests of clients, so it names no limits on them.
    pub(crate) fn model_info(&self) -> v1::GetModelInfoResponse {
        v1::GetModelInfoResponse {
            model: self.model.clone(),
            digest: self.digest.clone(),
            vocab_size: self.vocab,
            max_model_len: self.max_model_len,
            eos_token_ids: self.eos_token_ids.clone(),
            has_tokenizer: self.has_tokenizer,
            default_sampling: Some(v1::SamplingParams {
                temperature: self.generation.temperature,
                top_k: self.generation.top_k,
                top_p: self.generation.top_p,
                min_p: self.generation.min_p,
                repetition_penalty: self.generation.repetition_penalty,
                ..v1::SamplingParams::default()
            }),
            ..v1::GetModelInfoResponse::default()
        }
    }
}
