//! Bodies of requests: JSON within the limit of bytes, whatever the content type says, as OpenAI's servers take it. What is
//! not of the right form is refused by the name of its field.

use std::time::Duration;

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{FromRequest, Request};
use axum::http::{StatusCode, header};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::error::HttpError;
use crate::service::InferenceService;

/// Longest body in which the field at fault is looked for: each value takes several times its text then.
const SEARCHED_BYTES: usize = 1 << 20;

/// How long a body may take to come.
const TIME: Duration = Duration::from_secs(300);

/// A body that was read.
pub(crate) struct Body<T>(pub(crate) T);

impl<T: DeserializeOwned> FromRequest<InferenceService> for Body<T> {
    type Rejection = HttpError;

    async fn from_request(request: Request, service: &InferenceService) -> Result<Self, HttpError> {
        let limit = service.limits.message_bytes;
        // Before any of it is read, and before a client that asks whether to send it does.
        if stated_bytes(&request).is_some_and(|bytes| bytes > limit as u64) {
            return Err(HttpError::too_large(limit));
        }
        let read = tokio::time::timeout(TIME, Bytes::from_request(request, service)).await;
        let read = read.map_err(|_| HttpError::too_slow(TIME))?;
        let bytes = read.map_err(|rejected: BytesRejection| {
            if rejected.status() == StatusCode::PAYLOAD_TOO_LARGE {
                return HttpError::too_large(limit);
            }
            HttpError::malformed(rejected.body_text())
        })?;
        match serde_json::from_slice(&bytes) {
            Ok(value) => Ok(Self(value)),
            Err(error) => Err(match culprit::<T>(&bytes) {
                Some((field, reason)) => HttpError::invalid(&field, reason),
                None => HttpError::malformed(format!("the body is not what this path takes: {error}")),
            }),
        }
    }
}

/// The first field that is refused by itself, and why: the error about a whole object names none. Bodies have no field that
/// must be there, or this would be refused with every other one.
fn culprit<T: DeserializeOwned>(bytes: &[u8]) -> Option<(String, String)> {
    if bytes.len() > SEARCHED_BYTES {
        return None;
    }
    let fields: Map<String, Value> = serde_json::from_slice(bytes).ok()?;
    fields.into_iter().find_map(|(name, value)| {
        let alone = Value::Object(Map::from_iter([(name.clone(), value)]));
        Some((name, T::deserialize(alone).err()?.to_string()))
    })
}

/// The length that a request's header states.
fn stated_bytes(request: &Request) -> Option<u64> {
    request.headers().get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}
