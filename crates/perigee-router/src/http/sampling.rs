//! The fields that completions and chat share, and how they become gRPC's. Fields that OpenAI does not have are those of
//! gRPC under the names that other servers give them; unknown ones are ignored, as clients send many.

use std::collections::HashMap;

use perigee_proto::v1;
use serde::Deserialize;

use super::error::HttpError;
use crate::model::Model;

/// One string or several.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub(crate) enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

/// What is shared.
#[derive(Debug, Clone, Default, Deserialize)]
pub(crate) struct Shared {
    pub(crate) model: Option<String>,
    pub(crate) stream: Option<bool>,
    pub(crate) stream_options: Option<StreamOptions>,
    pub(crate) n: Option<u32>,
    stop: Option<OneOrMany>,
    seed: Option<i64>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    /// -1 keeps all, like 0.
    top_k: Option<i64>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    /// Token id to value.
    logit_bias: Option<HashMap<String, f32>>,
    min_tokens: Option<u32>,
    ignore_eos: Option<bool>,
    stop_token_ids: Option<Vec<u32>>,
    priority: Option<i32>,
    cache_salt: Option<String>,
    request_id: Option<String>,
}

/// Options of a stream.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
pub(crate) struct StreamOptions {
    pub(crate) include_usage: Option<bool>,
}

impl Shared {
    /// Refuses another model than the one that is served; none means that one.
    pub(crate) fn check_model(&self, model: &Model) -> Result<(), HttpError> {
        match &self.model {
            Some(asked) if *asked != model.name => Err(HttpError::no_such_model(asked, &model.name)),
            _ => Ok(()),
        }
    }

    /// Whether the answer is a stream.
    pub(crate) fn streams(&self) -> bool {
        self.stream.unwrap_or(false)
    }

    /// Whether a stream ends with counts.
    pub(crate) fn includes_usage(&self) -> bool {
        self.stream_options.and_then(|options| options.include_usage).unwrap_or(false)
    }

    /// A request without its prompt, lengths and log-probabilities.
    pub(crate) fn request(&self) -> Result<v1::GenerateRequest, HttpError> {
        let mut logit_bias = HashMap::new();
        for (token, value) in self.logit_bias.iter().flatten() {
            let id =
                token.parse().map_err(|_| HttpError::invalid("logit_bias", format!("{token:?} is no token id")))?;
            logit_bias.insert(id, *value);
        }
        let top_k = match self.top_k {
            Some(-1) => Some(0),
            Some(k) => Some(
                u32::try_from(k)
                    .map_err(|_| HttpError::invalid("top_k", format!("it is {k}, but must be -1 or more")))?,
            ),
            None => None,
        };
        Ok(v1::GenerateRequest {
            request_id: self.request_id.clone().unwrap_or_default(),
            stop: match &self.stop {
                None => Vec::new(),
                Some(OneOrMany::One(stop)) => vec![stop.clone()],
                Some(OneOrMany::Many(stops)) => stops.clone(),
            },
            priority: self.priority.unwrap_or(0),
            cache_salt: self.cache_salt.clone().unwrap_or_default(),
            sampling: Some(v1::SamplingParams {
                temperature: self.temperature,
                top_k,
                top_p: self.top_p,
                min_p: self.min_p,
                repetition_penalty: self.repetition_penalty,
                presence_penalty: self.presence_penalty,
                frequency_penalty: self.frequency_penalty,
                logit_bias,
                // Any bits will do; OpenAI's seeds may be negative.
                seed: self.seed.map(i64::cast_unsigned),
                n: self.n,
                min_tokens: self.min_tokens.unwrap_or(0),
                ignore_eos: self.ignore_eos.unwrap_or(false),
                stop_token_ids: self.stop_token_ids.clone().unwrap_or_default(),
                ..v1::SamplingParams::default()
            }),
            ..v1::GenerateRequest::default()
        })
    }
}
