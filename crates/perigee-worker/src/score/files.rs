//! The safetensors files of a score job: prompts, tokens to feed and experts to force coming in; logits, states and traces
//! going out. Every fault names the file and the tensor.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use safetensors::tensor::{Dtype, SafeTensors, View};

use super::job::ScoreJob;
use crate::error::{Result, WorkerError};

/// A prompt's number and tokens.
pub(crate) type Prompt = (usize, Vec<u32>);

/// Everything that a job reads.
pub struct Inputs {
    pub(crate) prompts: Vec<Prompt>,
    /// Tokens to feed, in the order of the prompts.
    pub(crate) feed: Option<Vec<Vec<u32>>>,
    /// Forced experts by tensor name, [rows, k].
    pub(crate) experts: Option<BTreeMap<String, Vec<u32>>>,
}

impl Inputs {
    /// Reads the files that a job names.
    ///
    /// # Errors
    /// A file or a tensor is missing or malformed.
    pub fn read(job: &ScoreJob) -> Result<Self> {
        let prompts = read_prompts(&job.tokens)?;
        let feed = job.feed.as_deref().map(|path| read_feed(path, &prompts)).transpose()?;
        let experts = job.experts.as_deref().map(read_experts).transpose()?;
        Ok(Self { prompts, feed, experts })
    }

    /// Most tokens that the file feeds to one of the prompts.
    pub(crate) fn longest_feed(path: &Path, prompts: &[Prompt]) -> Result<usize> {
        Ok(read_feed(path, prompts)?.iter().map(Vec::len).max().unwrap_or(0))
    }
}

/// All `prompt_<i>` of a file, by number.
pub(crate) fn read_prompts(path: &Path) -> Result<Vec<Prompt>> {
    let bytes = read(path)?;
    let file = parse(path, &bytes)?;
    let mut prompts = Vec::new();
    for name in file.names() {
        let Some(number) = name.strip_prefix("prompt_").and_then(|number| number.parse().ok()) else { continue };
        let tokens = integers(path, &file, name)?;
        if tokens.is_empty() {
            return Err(fault(path, name, "expected at least one token, found none"));
        }
        prompts.push((number, tokens));
    }
    if prompts.is_empty() {
        return Err(WorkerError::Score(format!("{}: no tensor named prompt_<i>", path.display())));
    }
    prompts.sort_unstable_by_key(|(number, _)| *number);
    Ok(prompts)
}

fn read_feed(path: &Path, prompts: &[Prompt]) -> Result<Vec<Vec<u32>>> {
    let bytes = read(path)?;
    let file = parse(path, &bytes)?;
    prompts.iter().map(|(number, _)| integers(path, &file, &format!("greedy_{number}"))).collect()
}

fn read_experts(path: &Path) -> Result<BTreeMap<String, Vec<u32>>> {
    let bytes = read(path)?;
    let file = parse(path, &bytes)?;
    let names = file.names().into_iter().filter(|name| name.contains("experts_"));
    names.map(|name| Ok((name.to_string(), integers(path, &file, name)?))).collect()
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(WorkerError::io(path.display().to_string()))
}

fn parse<'a>(path: &Path, bytes: &'a [u8]) -> Result<SafeTensors<'a>> {
    SafeTensors::deserialize(bytes)
        .map_err(|error| WorkerError::Score(format!("{}: not a safetensors file: {error}", path.display())))
}

fn fault(path: &Path, name: &str, message: impl std::fmt::Display) -> WorkerError {
    WorkerError::Score(format!("{}: {name}: {message}", path.display()))
}

/// An integer tensor as unsigned 32-bit numbers, row-major.
fn integers(path: &Path, file: &SafeTensors<'_>, name: &str) -> Result<Vec<u32>> {
    let tensor = file.tensor(name).map_err(|_| fault(path, name, "expected this tensor, found none"))?;
    let wide: Vec<i64> = match tensor.dtype() {
        Dtype::I64 => tensor.data().as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b)).collect(),
        Dtype::I32 => tensor.data().as_chunks::<4>().0.iter().map(|b| i32::from_le_bytes(*b).into()).collect(),
        other => return Err(fault(path, name, format!("expected int64 or int32, found {other:?}"))),
    };
    let narrow = wide
        .into_iter()
        .map(|value| u32::try_from(value).map_err(|_| fault(path, name, format!("expected an id, found {value}"))));
    narrow.collect()
}

/// Everything that a job writes.
#[derive(Default)]
pub struct Outputs {
    tensors: BTreeMap<String, Output>,
}

struct Output {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl View for &Output {
    fn dtype(&self) -> Dtype {
        self.dtype
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.bytes)
    }
    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

impl Outputs {
    /// Appends float32 rows of this width to a tensor.
    pub(crate) fn append(&mut self, name: String, width: usize, values: &[f32]) {
        let output = self.rows(name, Dtype::F32, width);
        output.bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        output.shape[0] += values.len() / width.max(1);
    }

    /// Appends int32 rows of this width to a tensor.
    pub(crate) fn append_integers(&mut self, name: String, width: usize, values: &[u32]) {
        let output = self.rows(name, Dtype::I32, width);
        output.bytes.extend(values.iter().flat_map(|&value| (value as i32).to_le_bytes()));
        output.shape[0] += values.len() / width.max(1);
    }

    /// The last row of a float32 tensor, empty where there is none.
    pub(crate) fn last_row(&self, name: &str) -> Vec<f32> {
        let Some(output) = self.tensors.get(name) else { return Vec::new() };
        let row = output.shape[1] * 4;
        let start = output.bytes.len().saturating_sub(row);
        output.bytes[start..].as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
    }

    /// A whole tensor of float32 bytes.
    pub(crate) fn put(&mut self, name: String, shape: Vec<usize>, bytes: Vec<u8>) {
        self.tensors.insert(name, Output { dtype: Dtype::F32, shape, bytes });
    }

    /// A vector of int64.
    pub(crate) fn put_tokens(&mut self, name: String, tokens: &[u32]) {
        let bytes = tokens.iter().flat_map(|&token| i64::from(token).to_le_bytes()).collect();
        self.tensors.insert(name, Output { dtype: Dtype::I64, shape: vec![tokens.len()], bytes });
    }

    /// The file's bytes.
    ///
    /// # Errors
    /// None in practice: every tensor has the bytes that its shape says.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let views = self.tensors.iter().map(|(name, output)| (name.as_str(), output));
        safetensors::serialize(views, None).map_err(|error| WorkerError::Score(error.to_string()))
    }

    /// Writes the file: whole, or not at all.
    pub(crate) fn write(&self, path: &Path) -> Result<()> {
        let part = path.with_extension("part");
        let views = self.tensors.iter().map(|(name, output)| (name.as_str(), output));
        safetensors::serialize_to_file(views, None, &part)
            .map_err(|error| WorkerError::Score(format!("{}: {error}", part.display())))?;
        std::fs::rename(&part, path).map_err(WorkerError::io(path.display().to_string()))
    }

    fn rows(&mut self, name: String, dtype: Dtype, width: usize) -> &mut Output {
        self.tensors.entry(name).or_insert_with(|| Output { dtype, shape: vec![0, width], bytes: Vec::new() })
    }
}
