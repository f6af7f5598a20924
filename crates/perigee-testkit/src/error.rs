//! What a harness reports instead of a result. A result that is wrong is no error here: that is for a test to judge.

use std::path::PathBuf;

use perigee_backend::BackendError;
use perigee_engine::executor::ExecutorError;
use perigee_engine::link::LinkError;
use perigee_model::ModelError;
use perigee_worker::WorkerError;

/// The result of everything in this crate.
pub type Result<T> = std::result::Result<T, TestkitError>;

/// A harness that could not run.
#[derive(Debug, thiserror::Error)]
pub enum TestkitError {
    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    File {
        /// The file or directory.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// Bytes that are no safetensors file of the types that tests use.
    #[error("not a safetensors file: {0}")]
    Safetensors(String),
    /// Text that is not the JSON document it should be.
    #[error("JSON: {0}")]
    Json(#[from] serde_json::Error),
    /// Options that the worker does not take.
    #[error("options: {0}")]
    Options(String),
    /// A rank could not start or the job could not run.
    #[error(transparent)]
    Worker(#[from] WorkerError),
    /// The model could not be made or opened.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The backend refused.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// A rank failed.
    #[error(transparent)]
    Rank(#[from] ExecutorError),
    /// A following rank lost its leader.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// A rank's thread ended in a panic.
    #[error("rank {0} panicked")]
    Panicked(usize),
    /// A process could not be started, or ended instead of serving.
    #[error("{what}: {message}")]
    Process {
        /// Which one, and its role.
        what: String,
        /// What happened, with what it wrote to standard error.
        message: String,
    },
    /// A server could not be reached.
    #[error("{address}: {source}")]
    Unreachable {
        /// Where it should be.
        address: String,
        /// The transport's reason.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A server refused a call that should succeed.
    #[error("{call}: {status}")]
    Call {
        /// Which call.
        call: &'static str,
        /// Its answer.
        status: Box<tonic::Status>,
    },
    /// Something did not happen in time.
    #[error("{what}: not within {seconds} s")]
    Deadline {
        /// What was waited for.
        what: String,
        /// How long.
        seconds: u64,
    },
}

impl TestkitError {
    /// For `map_err` of a system call on a file.
    pub fn file(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { path, source }
    }
}
