//! What can go wrong between a model's name and its running layers. An error names the key, tensor or file, what was
//! expected and what was found; whether to retry and which status to report is decided elsewhere.

use std::path::{Path, PathBuf};

use perigee_backend::BackendError;

/// The result of everything in this crate.
pub type Result<T> = std::result::Result<T, ModelError>;

/// A model that cannot be opened, split or run.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A file or directory could not be read or written.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// What was attempted, as a verb ("read", "write").
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The operating system's reason.
        source: std::io::Error,
    },
    /// The demo model that is part of this program.
    #[error(transparent)]
    Demo(#[from] perigee_demo::Damaged),
    /// config.json is not JSON.
    #[error("config.json: not valid JSON: {0}")]
    ConfigSyntax(serde_json::Error),
    /// A key of config.json is missing, or has a value that this program does not run.
    #[error("config.json: {key}: expected {expected}, found {found}")]
    Config {
        /// The key; nested keys are joined by a dot.
        key: String,
        /// What would be accepted.
        expected: String,
        /// What is there.
        found: String,
    },
    /// A count that has to be shared out evenly is not a multiple of the tensor-parallel degree.
    #[error("tensor-parallel degree {tp} does not divide {what}: expected a multiple of {tp}, found {count}")]
    Indivisible {
        /// The tensor-parallel degree.
        tp: usize,
        /// The count's name and its key in config.json.
        what: &'static str,
        /// The count.
        count: usize,
    },
    /// A rank or a tensor-parallel degree outside of what exists.
    #[error("expected a rank below the tensor-parallel degree, found rank {rank} of {tp}")]
    Rank {
        /// The rank.
        rank: usize,
        /// The tensor-parallel degree.
        tp: usize,
    },
    /// A file of the checkpoint is truncated or contradicts itself.
    #[error("{}: expected {expected}, found {found}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What a sound file has.
        expected: String,
        /// What this one has.
        found: String,
    },
    /// A tensor is missing, superfluous, or has another shape or type than the configuration implies.
    #[error("tensor {name}: expected {expected}, found {found}")]
    Tensor {
        /// The tensor's name in the checkpoint.
        name: String,
        /// What the configuration implies.
        expected: String,
        /// What the checkpoint has.
        found: String,
    },
    /// The model's name is neither a directory nor a random preset.
    #[error("model {name}: expected {expected}, found {found}")]
    Spec {
        /// The name as given.
        name: String,
        /// What would be accepted.
        expected: String,
        /// What the name has instead.
        found: String,
    },
    /// A backend refused a load or an op.
    #[error(transparent)]
    Backend(#[from] BackendError),
}

impl ModelError {
    /// A fault of one configuration key.
    pub(crate) fn config(key: impl Into<String>, expected: impl Into<String>, found: impl Into<String>) -> Self {
        Self::Config { key: key.into(), expected: expected.into(), found: found.into() }
    }

    /// A fault of one file of the checkpoint.
    pub(crate) fn file(path: &Path, expected: impl Into<String>, found: impl Into<String>) -> Self {
        Self::File { path: path.to_owned(), expected: expected.into(), found: found.into() }
    }

    /// A fault of one tensor.
    pub(crate) fn tensor(name: impl Into<String>, expected: impl Into<String>, found: impl Into<String>) -> Self {
        Self::Tensor { name: name.into(), expected: expected.into(), found: found.into() }
    }

    /// A failed operation of the file system, for `map_err`.
    pub(crate) fn io<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(std::io::Error) -> Self + use<'a> {
        move |source| Self::Io { action, path: path.to_owned(), source }
    }
}
