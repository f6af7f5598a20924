//! The fields that completions and chat share, and how they become gRPC's. Fields that OpenAI does not have are those of
//! gRPC under the names that other servers give them. Those of other servers without which the answer would be another one
//! are refused; further unknown ones are ignored, as clients send many.

use std::collections::HashMap;

use perigee_proto::v1;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::error::HttpError;
use crate::model::Model;

/// Ways of other servers to say what `response_format` says.
const FORMATS: &str = "it is not offered: response_format takes json_schema, regex and lark";
/// Fields of other servers that cannot be ignored, and what to do without them.
const NOT_OFFERED: [(&str, &str); 21] = [
    ("guided_json", FORMATS),
    ("guided_regex", FORMATS),
    ("guided_choice", FORMATS),
    ("guided_grammar", FORMATS),
    ("structured_outputs", FORMATS),
    ("json_schema", FORMATS),
    ("regex", FORMATS),
    ("ebnf", FORMATS),
    ("functions", "it is not offered: give tools"),
    ("function_call", "it is not offered: give tool_choice"),
    ("chat_template", "it is not offered: the model's own is used, with the variables of chat_template_kwargs"),
    ("continue_final_message", "it is not offered: give the text to go on from to /v1/completions"),
    ("truncate_prompt_tokens", "it is not offered: give a shorter prompt"),
    ("prompt_embeds", "it is not offered: give text or token ids"),
    ("prompt_logprobs", "it is not offered: /v1/completions gives them with echo and logprobs"),
    ("allowed_token_ids", "it is not offered: logit_bias or response_format keep tokens out"),
    ("bad_words", "it is not offered: logit_bias keeps tokens out"),
    ("logits_processors", "it is not offered"),
    ("custom_logit_processor", "it is not offered"),
    ("include_stop_str_in_output", "it is not offered: texts end before their stop string"),
    ("use_beam_search", "it is not offered: tokens are drawn"),
];

/// One string or several.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged, expecting = "expected a text or a list of texts")]
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
    /// All others, which may be those of one path alone.
    #[serde(flatten)]
    others: Map<String, Value>,
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
    ///
    /// # Errors
    /// A field with a bad value, or one that is not offered and cannot be ignored.
    pub(crate) fn request(&self) -> Result<v1::GenerateRequest, HttpError> {
        let asks = |field: &str| self.others.get(field).is_some_and(asks_for_something);
        if let Some((field, message)) = NOT_OFFERED.iter().find(|(field, _)| asks(field)) {
            return Err(HttpError::invalid(field, *message));
        }
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

/// Whether a value is more than the words for none: clients send those too.
fn asks_for_something(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(asks) => *asks,
        Value::Number(_) => true,
        Value::String(text) => !text.is_empty(),
        Value::Array(values) => !values.is_empty(),
        Value::Object(fields) => !fields.is_empty(),
    }
}
