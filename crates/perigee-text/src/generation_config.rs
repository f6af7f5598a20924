//! What a checkpoint says about generation: which tokens end a sequence and which sampling values to assume where a
//! request gives none. From generation_config.json, with config.json's `eos_token_id` where that has none. It does
//! not apply the defaults.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::error::TextError;

/// The end tokens and default sampling values of a model. `do_sample` is ignored: a request decides by its temperature.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationConfig {
    /// The tokens that end a sequence, in the file's order, each once; empty where the model names none.
    pub eos_token_ids: Vec<u32>,
    /// Default temperature, at least 0.
    pub temperature: Option<f32>,
    /// Default top_p, in (0, 1].
    pub top_p: Option<f32>,
    /// Default top_k; 0 (in files also -1) keeps all.
    pub top_k: Option<u32>,
    /// Default min_p, in \[0, 1\].
    pub min_p: Option<f32>,
    /// Default repetition penalty, above 0.
    pub repetition_penalty: Option<f32>,
}

impl GenerationConfig {
    /// Reads a model directory. Files that do not exist count as empty.
    ///
    /// # Errors
    /// [`TextError::Read`] where a file is there but unreadable, [`TextError::Malformed`] with the field where it has
    /// another type or range than the above.
    pub fn load(dir: &Path) -> Result<Self, TextError> {
        let mut config = match JsonFile::read(dir, "generation_config.json")? {
            Some(file) => Self::from_file(&file)?,
            None => Self::default(),
        };
        if config.eos_token_ids.is_empty()
            && let Some(file) = JsonFile::read(dir, "config.json")?
        {
            config.eos_token_ids = file.token_ids("eos_token_id")?;
        }
        Ok(config)
    }

    /// Reads the text of a generation_config.json; `path` is only named in errors.
    ///
    /// # Errors
    /// [`TextError::Malformed`], as [`Self::load`].
    pub fn parse(text: &str, path: PathBuf) -> Result<Self, TextError> {
        match serde_json::from_str(text) {
            Ok(fields) => Self::from_file(&JsonFile { path, fields }),
            Err(error) => Err(TextError::Malformed { path, reason: error.to_string() }),
        }
    }

    fn from_file(file: &JsonFile) -> Result<Self, TextError> {
        Ok(Self {
            eos_token_ids: file.token_ids("eos_token_id")?,
            temperature: file.number("temperature", |value| value >= 0.0, "at least 0")?,
            top_p: file.number("top_p", |value| value > 0.0 && value <= 1.0, "above 0 and at most 1")?,
            top_k: file.top_k()?,
            min_p: file.number("min_p", |value| (0.0..=1.0).contains(&value), "between 0 and 1")?,
            repetition_penalty: file.number("repetition_penalty", |value| value > 0.0, "above 0")?,
        })
    }
}

/// A JSON object and where it came from.
struct JsonFile {
    path: std::path::PathBuf,
    fields: Map<String, Value>,
}

impl JsonFile {
    fn read(dir: &Path, name: &str) -> Result<Option<Self>, TextError> {
        let path = dir.join(name);
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(source) if source.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(TextError::Read { path, source }),
        };
        match serde_json::from_slice(&bytes) {
            Ok(fields) => Ok(Some(Self { path, fields })),
            Err(error) => Err(TextError::Malformed { path, reason: error.to_string() }),
        }
    }

    fn malformed<T>(&self, field: &str, expected: &str) -> Result<T, TextError> {
        let found = self.get(field).map_or_else(|| "nothing".to_owned(), Value::to_string);
        Err(TextError::Malformed {
            path: self.path.clone(),
            reason: format!("{field} is {found}, but must be {expected}"),
        })
    }

    /// A field's value; null counts as absent.
    fn get(&self, field: &str) -> Option<&Value> {
        self.fields.get(field).filter(|value| !value.is_null())
    }

    fn number(&self, field: &str, allowed: fn(f32) -> bool, range: &str) -> Result<Option<f32>, TextError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        match value.as_f64().map(|value| value as f32) {
            Some(value) if value.is_finite() && allowed(value) => Ok(Some(value)),
            _ => self.malformed(field, &format!("a number {range}")),
        }
    }

    fn top_k(&self) -> Result<Option<u32>, TextError> {
        let Some(value) = self.get("top_k") else { return Ok(None) };
        match value.as_i64() {
            Some(-1) => Ok(Some(0)),
            Some(value) if u32::try_from(value).is_ok() => Ok(Some(value as u32)),
            _ => self.malformed("top_k", "a whole number of at least 0 (or -1)"),
        }
    }

    /// One id or a list of ids.
    fn token_ids(&self, field: &str) -> Result<Vec<u32>, TextError> {
        let values = match self.get(field) {
            None => return Ok(Vec::new()),
            Some(Value::Array(values)) => values.as_slice(),
            Some(value) => std::slice::from_ref(value),
        };
        let mut ids: Vec<u32> = Vec::with_capacity(values.len());
        for value in values {
            match value.as_u64().map(u32::try_from) {
                Some(Ok(id)) if ids.contains(&id) => {}
                Some(Ok(id)) => ids.push(id),
                _ => return self.malformed(field, "a token id or a list of token ids"),
            }
        }
        Ok(ids)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(files: &[(&str, &str)]) -> Result<GenerationConfig, TextError> {
        let dir = tempfile::tempdir().unwrap();
        for (name, content) in files {
            std::fs::write(dir.path().join(name), content).unwrap();
        }
        GenerationConfig::load(dir.path())
    }

    #[test]
    fn eos_is_a_scalar_or_a_list_and_falls_back_to_config() {
        assert_eq!(load(&[]).unwrap(), GenerationConfig::default());
        let scalar =
            load(&[("generation_config.json", r#"{"eos_token_id": 7}"#), ("config.json", "{\"eos_token_id\": 1}")]);
        assert_eq!(scalar.unwrap().eos_token_ids, [7]);
        let list = load(&[("generation_config.json", r#"{"eos_token_id": [9, 7, 9]}"#)]);
        assert_eq!(list.unwrap().eos_token_ids, [9, 7]);
        let fallback = load(&[
            ("generation_config.json", r#"{"eos_token_id": null, "top_k": 40}"#),
            ("config.json", r#"{"eos_token_id": [3, 4]}"#),
        ]);
        let fallback = fallback.unwrap();
        assert_eq!((fallback.eos_token_ids.as_slice(), fallback.top_k), ([3, 4].as_slice(), Some(40)));
        assert_eq!(load(&[("config.json", r#"{"eos_token_id": 2}"#)]).unwrap().eos_token_ids, [2]);
    }

    #[test]
    fn defaults_are_read_and_absent_ones_stay_open() {
        let text = r#"{"temperature": 0.6, "top_p": 0.95, "top_k": -1, "min_p": 0.01, "repetition_penalty": 1.1,
                       "do_sample": true, "max_length": 20}"#;
        let config = load(&[("generation_config.json", text)]).unwrap();
        let expected = GenerationConfig {
            eos_token_ids: Vec::new(),
            temperature: Some(0.6),
            top_p: Some(0.95),
            top_k: Some(0),
            min_p: Some(0.01),
            repetition_penalty: Some(1.1),
        };
        assert_eq!(config, expected);
    }

    #[test]
    fn malformed_files_are_refused_by_field() {
        for (content, part) in [
            ("{", "EOF"),
            ("[1]", "invalid type"),
            (r#"{"eos_token_id": "x"}"#, "eos_token_id is \"x\""),
            (r#"{"eos_token_id": [1, -2]}"#, "eos_token_id is [1,-2]"),
            (r#"{"eos_token_id": 4294967296}"#, "eos_token_id"),
            (r#"{"temperature": -1}"#, "temperature is -1"),
            (r#"{"top_p": 0}"#, "top_p is 0"),
            (r#"{"top_k": 1.5}"#, "top_k is 1.5"),
            (r#"{"min_p": true}"#, "min_p is true"),
            (r#"{"repetition_penalty": 0.0}"#, "repetition_penalty is 0.0"),
        ] {
            let error = load(&[("generation_config.json", content)]).unwrap_err().to_string();
            assert!(error.contains("generation_config.json is malformed") && error.contains(part), "{error}");
        }
        let error = load(&[("config.json", "nonsense")]).unwrap_err().to_string();
        assert!(error.contains("config.json is malformed"), "{error}");
    }
}
