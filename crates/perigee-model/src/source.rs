//! Where weights come from: a checkpoint, mapped or part of the program, or a random rule, behind one way to ask for a part of a tensor. Asking
//! for rows of a checkpoint borrows the map, asking for columns copies them; random parts stay rules until a device
//! fills them in.

use std::borrow::Cow;
use std::collections::HashMap;
use std::ops::Range;

use perigee_backend::random::{RandomFill, tensor_key};
use perigee_backend::{TensorSlice, TensorSource};

use crate::checkpoint::Checkpoint;
use crate::config::ModelConfig;
use crate::error::{ModelError, Result};
use crate::inventory::{self, TensorSpec};
use crate::presets::ModelSpec;

/// A model's weights, opened.
#[derive(Debug)]
pub struct WeightSource {
    config: ModelConfig,
    tensors: HashMap<String, TensorSpec>,
    origin: Origin,
}

/// What stands behind a source.
#[derive(Debug)]
pub(crate) enum Origin {
    Checkpoint(Box<Checkpoint>),
    Random { config_text: String, seed: u64 },
}

impl WeightSource {
    /// Opens what a model's name stands for.
    ///
    /// # Errors
    /// Those of [`Checkpoint::open`]; none for what is part of the program.
    pub fn open(spec: &ModelSpec) -> Result<Self> {
        match spec {
            ModelSpec::Directory(path) => Ok(Self::checkpoint(Checkpoint::open(path)?)),
            ModelSpec::Demo => Ok(Self::checkpoint(Checkpoint::demo()?)),
            ModelSpec::Random { preset, seed } => Self::random(preset.config_json()?, *seed),
        }
    }

    /// The weights of an open checkpoint.
    pub fn checkpoint(checkpoint: Checkpoint) -> Self {
        let config = checkpoint.config().clone();
        Self { tensors: by_name(&config), config, origin: Origin::Checkpoint(Box::new(checkpoint)) }
    }

    /// Random weights in the shape that the text of a config.json describes.
    ///
    /// # Errors
    /// The configuration is not supported.
    pub fn random(config_text: String, seed: u64) -> Result<Self> {
        let config = ModelConfig::parse(&config_text)?;
        Ok(Self { tensors: by_name(&config), config, origin: Origin::Random { config_text, seed } })
    }

    /// The configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// What the weights are made of.
    pub(crate) fn origin(&self) -> &Origin {
        &self.origin
    }

    /// The inventory's entry for a tensor.
    ///
    /// # Errors
    /// The model has no such tensor.
    pub fn spec(&self, name: &str) -> Result<&TensorSpec> {
        self.tensors.get(name).ok_or_else(|| ModelError::tensor(name, "a tensor of this model", "no such tensor"))
    }

    /// A whole tensor, viewed as [`TensorSpec::view`] says.
    ///
    /// # Errors
    /// The model has no such tensor.
    pub fn whole(&self, name: &str) -> Result<TensorSlice<'_>> {
        let (rows, columns) = self.spec(name)?.extent();
        self.slice(name, 0..rows, 0..columns)
    }

    /// The part of a tensor that `rank` of `tp`, a possible degree, holds.
    ///
    /// # Errors
    /// The model has no such tensor.
    pub fn part(&self, name: &str, rank: usize, tp: usize) -> Result<TensorSlice<'_>> {
        let (rows, columns) = self.spec(name)?.part(&self.config, rank, tp);
        self.slice(name, rows, columns)
    }

    /// Some rows and columns of a tensor's view. A vector has one column and gives a vector.
    ///
    /// # Errors
    /// The model has no such tensor, or the ranges lie outside of it.
    pub fn slice(&self, name: &str, rows: Range<usize>, columns: Range<usize>) -> Result<TensorSlice<'_>> {
        let spec = self.spec(name)?;
        let (height, width) = spec.extent();
        if rows.start > rows.end || rows.end > height || columns.start > columns.end || columns.end > width {
            return Err(ModelError::tensor(
                name,
                format!("a part of {height} rows and {width} columns"),
                format!("rows {rows:?}, columns {columns:?}"),
            ));
        }
        let is_vector = spec.view().len() == 1;
        let shape = if is_vector { vec![rows.len()] } else { vec![rows.len(), columns.len()] };
        let source = match &self.origin {
            Origin::Random { seed, .. } => TensorSource::Random(RandomFill {
                key: tensor_key(*seed, name),
                distribution: spec.distribution,
                first: (rows.start * width + columns.start) as u64,
                row_stride: width as u64,
            }),
            Origin::Checkpoint(checkpoint) => {
                let bytes = checkpoint
                    .bytes(name)
                    .ok_or_else(|| ModelError::tensor(name, "its bytes in the checkpoint", "none"))?;
                TensorSource::Bytes(cut(bytes, width * spec.dtype.bytes(), spec.dtype.bytes(), rows, columns))
            }
        };
        Ok(TensorSlice { name: name.to_owned(), shape, dtype: spec.dtype, source })
    }
}

/// The bytes of some rows and columns of a row-major matrix whose rows take `pitch` bytes and elements `element`.
fn cut(bytes: &[u8], pitch: usize, element: usize, rows: Range<usize>, columns: Range<usize>) -> Cow<'_, [u8]> {
    let band = &bytes[rows.start * pitch..rows.end * pitch];
    if columns == (0..pitch / element) {
        return Cow::Borrowed(band);
    }
    let mut copy = Vec::with_capacity(rows.len() * columns.len() * element);
    for row in band.chunks_exact(pitch) {
        copy.extend_from_slice(&row[columns.start * element..columns.end * element]);
    }
    Cow::Owned(copy)
}

fn by_name(config: &ModelConfig) -> HashMap<String, TensorSpec> {
    inventory::tensors(config).into_iter().map(|spec| (spec.name.clone(), spec)).collect()
}
