//! Writes a random model, or the demo model, as a checkpoint in the published layout, tensor by tensor in bounded memory.
//! The result holds the very numbers of the model; a tokenizer is no business of this crate.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use half::bf16;
use perigee_backend::DType;
use perigee_backend::random::{element, tensor_key};
use serde_json::json;

use crate::checkpoint::{CONFIG_FILE, WEIGHTS_FILE, format_name};
use crate::config::ModelConfig;
use crate::error::{ModelError, Result};
use crate::inventory::{self, TensorSpec};
use crate::presets::ModelSpec;
use crate::source::{Origin, WeightSource};

/// Elements made at a time.
const CHUNK: u64 = 1 << 16;

/// Writes a random preset or the demo model into a new or empty directory; see [`write_checkpoint`].
///
/// # Errors
/// The name is a directory's; otherwise as there.
pub fn init_model(directory: &Path, spec: &ModelSpec, progress: &mut dyn FnMut(u64, u64)) -> Result<()> {
    if *spec == ModelSpec::Demo {
        let weights = perigee_demo::weights()?;
        let bytes = weights.len() as u64;
        claim(directory)?;
        write_file(directory, WEIGHTS_FILE, &weights)?;
        write_file(directory, CONFIG_FILE, perigee_demo::CONFIG.as_bytes())?;
        progress(bytes, bytes);
        return Ok(());
    }
    write_checkpoint(directory, &WeightSource::open(spec)?, progress)
}

/// Writes config.json and model.safetensors of a random source into a new or empty directory. `progress` is told, after
/// every tensor, the bytes of weights written and their total.
///
/// # Errors
/// The source is a checkpoint already, the directory has something in it, or writing fails. What was written until then
/// stays; the weights have their final name only when they are complete, and the configuration comes last.
pub fn write_checkpoint(directory: &Path, source: &WeightSource, progress: &mut dyn FnMut(u64, u64)) -> Result<()> {
    let Origin::Random { config_text, seed } = source.origin() else {
        return Err(ModelError::file(directory, "random weights to write", "a model that is a checkpoint already"));
    };
    claim(directory)?;
    write_weights(source.config(), *seed, directory, progress)?;
    write_file(directory, CONFIG_FILE, config_text.as_bytes())
}

fn write_file(directory: &Path, name: &str, contents: &[u8]) -> Result<()> {
    let path = directory.join(name);
    std::fs::write(&path, contents).map_err(ModelError::io("write", &path))
}

/// Makes the directory if need be, and makes sure that nothing is in it.
fn claim(directory: &Path) -> Result<()> {
    std::fs::create_dir_all(directory).map_err(ModelError::io("create", directory))?;
    let mut entries = std::fs::read_dir(directory).map_err(ModelError::io("read", directory))?;
    match entries.next() {
        None => Ok(()),
        Some(Err(error)) => Err(ModelError::io("read", directory)(error)),
        Some(Ok(entry)) => Err(ModelError::file(
            directory,
            "an empty or new directory",
            format!("{} in it", entry.file_name().to_string_lossy()),
        )),
    }
}

fn write_weights(config: &ModelConfig, seed: u64, directory: &Path, progress: &mut dyn FnMut(u64, u64)) -> Result<()> {
    // float32 first, so that elements stay aligned to their size whatever the shapes are.
    let mut tensors = inventory::tensors(config);
    tensors.sort_by_key(|spec| spec.dtype != DType::Fp32);
    let total = tensors.iter().map(TensorSpec::bytes).sum();

    let path = directory.join(WEIGHTS_FILE);
    let partial = directory.join(format!("{WEIGHTS_FILE}.partial"));
    let file = File::create_new(&partial).map_err(ModelError::io("create", &partial))?;
    let mut out = BufWriter::with_capacity(1 << 20, file);
    let mut written = 0;
    out.write_all(&header(&tensors)).map_err(ModelError::io("write", &partial))?;
    for spec in &tensors {
        write_tensor(spec, seed, &mut out).map_err(ModelError::io("write", &partial))?;
        written += spec.bytes();
        progress(written, total);
    }
    let file = out.into_inner().map_err(|error| ModelError::io("write", &partial)(error.into_error()))?;
    file.sync_all().map_err(ModelError::io("write", &partial))?;
    std::fs::rename(&partial, &path).map_err(ModelError::io("rename", &partial))
}

/// The header for tensors in this order: its length, then JSON padded with spaces to a multiple of 8 bytes.
fn header(tensors: &[TensorSpec]) -> Vec<u8> {
    let mut object = serde_json::Map::new();
    object.insert("__metadata__".into(), json!({ "format": "pt" }));
    let mut start = 0;
    for spec in tensors {
        let end = start + spec.bytes();
        let entry = json!({ "dtype": format_name(spec.dtype), "shape": spec.shape, "data_offsets": [start, end] });
        object.insert(spec.name.clone(), entry);
        start = end;
    }
    let mut text = serde_json::Value::Object(object).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut text);
    bytes
}

fn write_tensor(spec: &TensorSpec, seed: u64, out: &mut impl Write) -> std::io::Result<()> {
    let key = tensor_key(seed, &spec.name);
    let count = spec.elements() as u64;
    let mut bytes = Vec::with_capacity(CHUNK as usize * spec.dtype.bytes());
    for start in (0..count).step_by(CHUNK as usize) {
        bytes.clear();
        for index in start..count.min(start + CHUNK) {
            let value = element(key, spec.distribution, index);
            match spec.dtype {
                DType::Bf16 => bytes.extend_from_slice(&bf16::from_f32(value).to_le_bytes()),
                DType::Fp32 => bytes.extend_from_slice(&value.to_le_bytes()),
            }
        }
        out.write_all(&bytes)?;
    }
    Ok(())
}
