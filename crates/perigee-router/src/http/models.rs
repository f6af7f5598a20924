//! /v1/models: the one model that is served.

use axum::Json;
use axum::extract::{Path, State};
use serde_json::{Value, json};

use super::error::HttpError;
use crate::model::Model;
use crate::service::InferenceService;

/// All models.
pub(crate) async fn list(State(service): State<InferenceService>) -> Result<Json<Value>, HttpError> {
    let model = service.model()?;
    Ok(Json(json!({"object": "list", "data": [describe(&model)]})))
}

/// One model.
pub(crate) async fn one(
    State(service): State<InferenceService>,
    Path(name): Path<String>,
) -> Result<Json<Value>, HttpError> {
    let model = service.model()?;
    if name != model.name {
        return Err(HttpError::no_such_model(&name, &model.name));
    }
    Ok(Json(describe(&model)))
}

fn describe(model: &Model) -> Value {
    // When a model was made is not known; the field must be a number.
    json!({"id": model.name, "object": "model", "created": 0, "owned_by": "perigee", "max_model_len": model.max_len})
}
