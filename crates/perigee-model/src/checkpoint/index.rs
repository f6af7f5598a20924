//! model.safetensors.index.json: which of several files holds which tensor. Only names are read here; whether the files
//! keep the promise is checked when they are opened.

use std::collections::BTreeMap;
use std::path::{Component, Path};

use serde_json::Value;

use crate::error::{ModelError, Result};

/// Reads the map from tensor to file name.
///
/// # Errors
/// The file cannot be read, is no index, or names a file outside of its own directory.
pub(super) fn read(path: &Path) -> Result<BTreeMap<String, String>> {
    let text = std::fs::read(path).map_err(ModelError::io("read", path))?;
    let document: Value =
        serde_json::from_slice(&text).map_err(|error| ModelError::file(path, "JSON", error.to_string()))?;
    let Some(map) = document.get("weight_map").and_then(Value::as_object) else {
        return Err(ModelError::file(path, "an object weight_map", "none"));
    };
    let mut places = BTreeMap::new();
    for (tensor, file) in map {
        let name = file.as_str().filter(|name| is_plain(name)).ok_or_else(|| {
            ModelError::file(
                path,
                format!("the name of a file in this directory for tensor {tensor}"),
                file.to_string(),
            )
        })?;
        places.insert(tensor.clone(), name.to_owned());
    }
    Ok(places)
}

/// Whether a name is a single ordinary path component.
fn is_plain(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    matches!((parts.next(), parts.next()), (Some(Component::Normal(part)), None) if part == name)
}
