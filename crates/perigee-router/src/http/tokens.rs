//! /tokenize and /detokenize, in the form that other servers have made common.

use axum::Json;
use axum::extract::State;
use perigee_text::ChatInput;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::body::Body;
use super::error::HttpError;
use super::messages::conversation;
use crate::service::InferenceService;
use crate::validate;

/// A prompt or a conversation.
#[derive(Debug, Deserialize)]
#[serde(expecting = "a JSON object")]
pub(crate) struct TokenizeRequest {
    prompt: Option<String>,
    messages: Option<Vec<Map<String, Value>>>,
    tools: Option<Vec<Value>>,
    add_generation_prompt: Option<bool>,
    chat_template_kwargs: Option<Map<String, Value>>,
    /// Whether the names of control tokens in `prompt` are those tokens.
    parse_special: Option<bool>,
}

/// Tokens.
#[derive(Debug, Deserialize)]
#[serde(expecting = "a JSON object")]
pub(crate) struct DetokenizeRequest {
    tokens: Option<Vec<u32>>,
}

/// Text to tokens.
pub(crate) async fn tokenize(
    State(service): State<InferenceService>,
    Body(request): Body<TokenizeRequest>,
) -> Result<Json<Value>, HttpError> {
    let _place = service.admission.enter()?;
    let model = service.model()?;
    let tokens = match (request.prompt, request.messages) {
        (Some(text), None) => {
            validate::text_length("prompt", &text, &service.limits)?;
            let special = validate::special_tokens(request.parse_special.unwrap_or(false));
            service.text.encode("prompt", text, special).await?
        }
        (None, Some(messages)) => {
            let input = ChatInput {
                messages: conversation(messages)?,
                tools: request.tools.into(),
                add_generation_prompt: request.add_generation_prompt.unwrap_or(true),
                variables: request.chat_template_kwargs.unwrap_or_default(),
            };
            service.text.encode_chat(input, service.limits.text_bytes).await?
        }
        _ => return Err(HttpError::invalid("prompt", "give exactly one of prompt and messages")),
    };
    Ok(Json(json!({"count": tokens.len(), "max_model_len": model.max_len, "tokens": tokens})))
}

/// Tokens to text.
pub(crate) async fn detokenize(
    State(service): State<InferenceService>,
    Body(request): Body<DetokenizeRequest>,
) -> Result<Json<Value>, HttpError> {
    let tokens = request.tokens.ok_or_else(|| HttpError::invalid("tokens", "it is missing"))?;
    let text = service.decode("tokens", tokens).await?;
    Ok(Json(json!({"prompt": text})))
}
