//! Typed access to the keys of a JSON object, with errors that name the key, what was expected and what was found. It
//! knows nothing of models; ranges that depend on other keys are checked by the caller.

use serde_json::{Map, Value};

use crate::error::{ModelError, Result};

/// Largest single size accepted: with it, a product of two sizes stays below 2^48.
const MAX_SIZE: usize = 1 << 24;

/// An object of config.json.
pub(super) struct Keys<'a> {
    prefix: &'static str,
    map: &'a Map<String, Value>,
}

impl<'a> Keys<'a> {
    /// The whole document.
    pub(super) fn root(value: &'a Value) -> Result<Self> {
        match value {
            Value::Object(map) => Ok(Self { prefix: "", map }),
            other => Err(ModelError::config("(document)", "an object", shown(other))),
        }
    }

    /// The object under a required key; `prefix` is the key and a dot, for the names in errors.
    pub(super) fn object(&self, key: &str, prefix: &'static str) -> Result<Self> {
        match self.map.get(key) {
            Some(Value::Object(map)) => Ok(Keys { prefix, map }),
            other => Err(self.wrong(key, "an object", other)),
        }
    }

    /// A fault of a key here.
    pub(super) fn fault(&self, key: &str, expected: impl Into<String>, found: impl Into<String>) -> ModelError {
        ModelError::config(format!("{}{key}", self.prefix), expected, found)
    }

    fn wrong(&self, key: &str, expected: impl Into<String>, found: Option<&Value>) -> ModelError {
        self.fault(key, expected, found.map_or_else(|| "no such key".to_owned(), shown))
    }

    /// The value of a key, if it is there and not null.
    pub(super) fn present(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// A size within `low..=high`, both included.
    pub(super) fn within(&self, key: &str, low: usize, high: usize) -> Result<usize> {
        let value = self.map.get(key);
        value
            .and_then(Value::as_u64)
            .and_then(|size| usize::try_from(size).ok())
            .filter(|size| (low..=high).contains(size))
            .ok_or_else(|| self.wrong(key, format!("an integer from {low} to {high}"), value))
    }

    /// A size of at least 1.
    pub(super) fn size(&self, key: &str) -> Result<usize> {
        self.within(key, 1, MAX_SIZE)
    }

    /// A size of at least 1, or none where the key is null or missing.
    pub(super) fn optional_size(&self, key: &str) -> Result<Option<usize>> {
        self.present(key).map(|_| self.size(key)).transpose()
    }

    /// A truth value, or a default where the key is missing.
    pub(super) fn flag(&self, key: &str, default: Option<bool>) -> Result<bool> {
        match (self.map.get(key), default) {
            (Some(Value::Bool(flag)), _) => Ok(*flag),
            (None, Some(flag)) => Ok(flag),
            (other, _) => Err(self.wrong(key, "true or false", other)),
        }
    }

    /// A finite positive number, as float32.
    pub(super) fn positive(&self, key: &str) -> Result<f32> {
        let value = self.map.get(key);
        value
            .and_then(Value::as_f64)
            .map(|number| number as f32)
            .filter(|number| number.is_finite() && *number > 0.0)
            .ok_or_else(|| self.wrong(key, "a positive number", value))
    }

    /// Fails unless the key is missing or has exactly this value.
    pub(super) fn only(&self, key: &str, accepted: &Value) -> Result<()> {
        match self.map.get(key) {
            None => Ok(()),
            Some(value) if value == accepted => Ok(()),
            other => Err(self.wrong(key, accepted.to_string(), other)),
        }
    }

    /// Fails unless the key is there and has exactly this value.
    pub(super) fn required(&self, key: &str, accepted: &Value) -> Result<()> {
        match self.map.get(key) {
            Some(value) if value == accepted => Ok(()),
            other => Err(self.wrong(key, accepted.to_string(), other)),
        }
    }

    /// Token ids: none, one or a list of them.
    pub(super) fn token_ids(&self, key: &str) -> Result<Vec<u32>> {
        let fault = |found| self.wrong(key, "a token id, a list of token ids or null", Some(found));
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        match self.present(key) {
            None => Ok(Vec::new()),
            Some(list @ Value::Array(items)) => {
                items.iter().map(id).collect::<Option<Vec<u32>>>().ok_or_else(|| fault(list))
            }
            Some(value) => id(value).map(|id| vec![id]).ok_or_else(|| fault(value)),
        }
    }

    /// At most one token id.
    pub(super) fn token_id(&self, key: &str) -> Result<Option<u32>> {
        match self.token_ids(key)?.as_slice() {
            [] => Ok(None),
            [id] => Ok(Some(*id)),
            _ => Err(self.wrong(key, "one token id or null", self.map.get(key))),
        }
    }

    /// A list of layer numbers from 1 to `layers`.
    pub(super) fn layer_numbers(&self, key: &str, layers: usize) -> Result<Vec<usize>> {
        let value = self.map.get(key);
        let Some(Value::Array(items)) = value else {
            return Err(self.wrong(key, "a list of layer numbers", value));
        };
        let number = |item: &Value| {
            item.as_u64()
                .and_then(|number| usize::try_from(number).ok())
                .filter(|number| (1..=layers).contains(number))
                .ok_or_else(|| self.wrong(key, format!("layer numbers from 1 to {layers}"), Some(item)))
        };
        items.iter().map(number).collect()
    }
}

/// A value as an error shows it: JSON, cut to a readable length.
fn shown(value: &Value) -> String {
    const LONGEST: usize = 80;
    let text = value.to_string();
    if text.chars().count() <= LONGEST {
        return text;
    }
    let mut cut: String = text.chars().take(LONGEST).collect();
    cut.push_str(" ...");
    cut
}
