//! The OpenAI-compatible HTTP API: /v1/models, /v1/completions, /v1/chat/completions, and /tokenize and /detokenize. Its
//! handlers turn JSON into the same requests as gRPC's and read the same streams; admission, placement and what becomes of
//! a client that goes away are decided there. /health and /metrics are telemetry's.
//!
//! A request's way: `body` (JSON, bounded) → `sampling` and `completions` or `chat` (fields to a request) → `answers` (starts
//! them, merges their streams) → one object, or `events` (a stream of them). What a handler leaves of a body, `linger` reads.

mod answers;
mod body;
mod chat;
mod completions;
mod error;
mod events;
mod linger;
mod logprobs;
mod messages;
mod models;
mod response_format;
mod sampling;
mod tokens;
mod tools;

use std::time::{SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::middleware::map_request;
use axum::routing::{get, post};

use crate::service::InferenceService;

/// The routes of the API.
pub(crate) fn routes(service: InferenceService) -> Router {
    let limit = DefaultBodyLimit::max(service.limits.message_bytes);
    Router::new()
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*name}", get(models::one))
        .route("/v1/completions", post(completions::handle))
        .route("/v1/chat/completions", post(chat::handle))
        .route("/tokenize", post(tokens::tokenize))
        .route("/detokenize", post(tokens::detokenize))
        .method_not_allowed_fallback(error::method_not_allowed)
        .fallback(error::no_such_path)
        .layer(limit)
        .layer(map_request(linger::linger))
        .with_state(service)
}

/// Seconds since 1970, as OpenAI's objects carry.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
