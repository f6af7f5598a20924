//! Why a worker process ends other than by being told to.

use perigee_backend::BackendError;
use perigee_collectives::CollectiveError;
use perigee_engine::executor::ExecutorError;
use perigee_engine::link::LinkError;
use perigee_model::ModelError;

/// The result of running a worker.
pub type Result<T> = std::result::Result<T, WorkerError>;

/// A worker that cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The options contradict themselves or the model.
    #[error("{0}")]
    Options(String),
    /// The model cannot be opened or loaded.
    #[error("model: {0}")]
    Model(#[from] ModelError),
    /// The device has no room or refused.
    #[error("device: {0}")]
    Backend(#[from] BackendError),
    /// The ranks did not come together.
    #[error("forming the replica: {0}")]
    Group(#[from] CollectiveError),
    /// Ranks disagree about what they run.
    #[error("forming the replica: rank {rank} has {what} {found}, the leader {expected}")]
    Disagreement {
        /// The rank.
        rank: usize,
        /// What differs.
        what: &'static str,
        /// The rank's.
        found: String,
        /// The leader's.
        expected: String,
    },
    /// A rank failed or was lost.
    #[error("{0}")]
    Rank(#[from] ExecutorError),
    /// The leader's connection broke.
    #[error("leader: {0}")]
    Link(#[from] LinkError),
    /// The files of TLS cannot be used.
    #[error(transparent)]
    Tls(#[from] perigee_tls::TlsError),
    /// A file or socket failed.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: String,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A score job's files or tensors are not as they should be.
    #[error("score: {0}")]
    Score(String),
    /// A benchmark could not be run.
    #[error("bench: {0}")]
    Bench(String),
    /// The serving side ended badly.
    #[error("serving: {0}")]
    Serve(String),
}

impl WorkerError {
    /// For `map_err` of a system call.
    pub fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }
}
