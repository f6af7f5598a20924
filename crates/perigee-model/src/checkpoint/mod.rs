//! A checkpoint directory in the published layout: config.json beside model.safetensors, or beside several files and
//! their index; or the same as bytes of the program. Opening it maps the files and compares every tensor with the
//! inventory of the configuration; it copies no weights and knows no ranks.

mod header;
mod index;
mod map;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::{Deref, Range};
use std::path::{Path, PathBuf};

use perigee_backend::DType;

use crate::config::ModelConfig;
use crate::error::{ModelError, Result};
use crate::inventory::{self, TensorSpec};
use header::Entry;
use map::FileMap;

/// The configuration's file name.
pub const CONFIG_FILE: &str = "config.json";
/// The weights' file name in a checkpoint of one file.
pub const WEIGHTS_FILE: &str = "model.safetensors";
/// The index's file name in a checkpoint of several.
pub const INDEX_FILE: &str = "model.safetensors.index.json";

/// An open checkpoint whose tensors are all there, with the right shapes and types.
#[derive(Debug)]
pub struct Checkpoint {
    config: ModelConfig,
    config_text: String,
    files: Vec<Contents>,
    places: HashMap<String, Place>,
}

/// A file's bytes.
#[derive(Debug)]
enum Contents {
    Mapped(FileMap),
    Unpacked(Vec<u8>),
}

impl Deref for Contents {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Unpacked(bytes) => bytes,
        }
    }
}

/// Where a tensor's bytes are.
#[derive(Debug)]
struct Place {
    file: usize,
    bytes: Range<usize>,
}

/// A tensor that some file holds, before it is known to be the right one.
struct Found {
    file: usize,
    entry: Entry,
}

impl Checkpoint {
    /// Opens and validates a directory.
    ///
    /// # Errors
    /// A file is missing, unreadable, truncated or contradicts itself; the configuration is not supported; a tensor is
    /// missing, superfluous, or has another shape or type than the configuration implies.
    pub fn open(directory: &Path) -> Result<Self> {
        let path = directory.join(CONFIG_FILE);
        let config_text = std::fs::read_to_string(&path).map_err(ModelError::io("read", &path))?;
        let (files, found) = read_files(directory)?;
        Self::validate(config_text, files, found)
    }

    /// The demo model.
    ///
    /// # Errors
    /// This program's file is damaged.
    pub fn demo() -> Result<Self> {
        let mut files = Files::default();
        files.add(perigee_demo::NAME.into(), Contents::Unpacked(perigee_demo::weights()?), None)?;
        Self::validate(perigee_demo::CONFIG.to_owned(), files.contents, files.found)
    }

    fn validate(config_text: String, files: Vec<Contents>, mut found: BTreeMap<String, Found>) -> Result<Self> {
        let config = ModelConfig::parse(&config_text)?;
        let mut places = HashMap::with_capacity(found.len());
        for spec in inventory::tensors(&config) {
            let Some(Found { file, entry }) = found.remove(&spec.name) else {
                return Err(ModelError::tensor(&spec.name, described(&spec), "no such tensor"));
            };
            check(&spec, &entry)?;
            places.insert(spec.name, Place { file, bytes: entry.bytes });
        }
        if let Some((name, Found { entry, .. })) = found.pop_first() {
            return Err(ModelError::tensor(
                name,
                "no such tensor in this configuration",
                format!("{} {:?}", entry.dtype, entry.shape),
            ));
        }
        Ok(Self { config, config_text, files, places })
    }

    /// The configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The text of config.json.
    pub fn config_text(&self) -> &str {
        &self.config_text
    }

    /// The bytes of a tensor, row-major and little-endian, or none where the model has no such tensor.
    pub fn bytes(&self, name: &str) -> Option<&[u8]> {
        let place = self.places.get(name)?;
        self.files.get(place.file)?.get(place.bytes.clone())
    }
}

/// Maps the weights' files and collects what they hold.
fn read_files(directory: &Path) -> Result<(Vec<Contents>, BTreeMap<String, Found>)> {
    let single = directory.join(WEIGHTS_FILE);
    let index_path = directory.join(INDEX_FILE);
    let mut files = Files::default();
    if single.exists() {
        files.map(single, None)?;
    } else if index_path.exists() {
        let promised = index::read(&index_path)?;
        let names: BTreeSet<&String> = promised.values().collect();
        for name in names {
            files.map(directory.join(name), Some(&promised))?;
        }
        for (tensor, name) in &promised {
            if !files.found.contains_key(tensor) {
                let expected = format!("tensor {tensor}, as {INDEX_FILE} says");
                return Err(ModelError::file(&directory.join(name), expected, "no such tensor"));
            }
        }
    } else {
        return Err(ModelError::file(directory, format!("{WEIGHTS_FILE} or {INDEX_FILE}"), "neither"));
    }
    Ok((files.contents, files.found))
}

#[derive(Default)]
struct Files {
    paths: Vec<PathBuf>,
    contents: Vec<Contents>,
    found: BTreeMap<String, Found>,
}

impl Files {
    /// Maps a file and notes its tensors.
    fn map(&mut self, path: PathBuf, promised: Option<&BTreeMap<String, String>>) -> Result<()> {
        let map = FileMap::open(&path)?;
        self.add(path, Contents::Mapped(map), promised)
    }

    /// Notes the tensors of a file. `promised`, if there is an index, says which file holds which tensor.
    fn add(&mut self, path: PathBuf, contents: Contents, promised: Option<&BTreeMap<String, String>>) -> Result<()> {
        for (name, entry) in header::read(&path, &contents)? {
            if let Some(other) = self.found.get(&name) {
                let other = self.paths[other.file].display();
                return Err(ModelError::file(
                    &path,
                    format!("tensor {name} in one file"),
                    format!("it in {other} too"),
                ));
            }
            if let Some(promised) = promised {
                let place = promised.get(&name);
                if place.is_none_or(|file| !path.ends_with(file)) {
                    let found = place.map_or_else(|| "it in no file".to_owned(), |file| format!("it in {file}"));
                    return Err(ModelError::file(&path, format!("tensor {name} here in {INDEX_FILE} too"), found));
                }
            }
            self.found.insert(name, Found { file: self.contents.len(), entry });
        }
        self.paths.push(path);
        self.contents.push(contents);
        Ok(())
    }
}

/// Compares a tensor with what the configuration implies.
fn check(spec: &TensorSpec, entry: &Entry) -> Result<()> {
    let dtype = format_name(spec.dtype);
    if entry.dtype != dtype || entry.shape != spec.shape {
        let found = format!("{} {:?}", entry.dtype, entry.shape);
        return Err(ModelError::tensor(&spec.name, described(spec), found));
    }
    if entry.bytes.len() as u64 != spec.bytes() {
        let expected = format!("{} bytes for {}", spec.bytes(), described(spec));
        return Err(ModelError::tensor(&spec.name, expected, format!("{} bytes", entry.bytes.len())));
    }
    Ok(())
}

/// A type in the spelling of the safetensors format.
pub(crate) fn format_name(dtype: DType) -> &'static str {
    match dtype {
        DType::Bf16 => "BF16",
        DType::Fp32 => "F32",
    }
}

fn described(spec: &TensorSpec) -> String {
    format!("{} {:?}", format_name(spec.dtype), spec.shape)
}
