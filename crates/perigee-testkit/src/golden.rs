//! The committed golden cases: checkpoints with random weights and what transformers computes from them. What is in a
//! case, and how it was made, is written in tests/cases/README.md.

use std::path::{Path, PathBuf};

use crate::error::Result;
use crate::tensors::{self, Tensors, Values};

/// Names of the committed cases.
pub const COMMITTED: [&str; 4] = ["tiny", "q_lora", "first_mla", "groups"];

/// The expected outputs' file name.
const EXPECTED_FILE: &str = "expected.safetensors";

/// A checkpoint with its prompts and expected outputs.
#[derive(Debug, Clone)]
pub struct GoldenCase {
    /// The case's directory, which is also a checkpoint.
    pub directory: PathBuf,
    /// Prompts and outputs, under the names that `perigee score` writes.
    pub expected: Tensors,
}

impl GoldenCase {
    /// Opens a case's directory.
    ///
    /// # Errors
    /// The expected outputs cannot be read.
    pub fn open(directory: impl Into<PathBuf>) -> Result<Self> {
        let directory = directory.into();
        let expected = tensors::read(&directory.join(EXPECTED_FILE))?;
        Ok(Self { directory, expected })
    }

    /// One of the [`COMMITTED`] cases.
    ///
    /// # Errors
    /// As for [`Self::open`].
    pub fn committed(name: &str) -> Result<Self> {
        Self::open(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/cases").join(name))
    }

    /// The checkpoint as `--model` takes it.
    pub fn model(&self) -> String {
        self.directory.display().to_string()
    }

    /// The file of prompts, tokens to feed and experts to force: the expected outputs are all of these.
    pub fn expected_file(&self) -> PathBuf {
        self.directory.join(EXPECTED_FILE)
    }

    /// Length of the greedy continuations.
    pub fn greedy(&self) -> usize {
        self.expected.get("greedy_0").map_or(0, tensors::Tensor::rows)
    }

    /// Token ids of a prompt, empty where there is no such prompt.
    pub fn prompt(&self, number: usize) -> Vec<i64> {
        match self.expected.get(&format!("prompt_{number}")).map(|tensor| &tensor.values) {
            Some(Values::Integers(tokens)) => tokens.clone(),
            _ => Vec::new(),
        }
    }
}
