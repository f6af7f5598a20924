//! What can go wrong below the seam. An error names the op, what it expected and what it found; it never carries a status
//! code, which is the rim's business.

/// The result of every op.
pub type Result<T> = std::result::Result<T, BackendError>;

/// A failed op or load.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// A tensor or an argument has another shape than the op needs.
    #[error("{what}: expected shape {expected}, found {found}")]
    Shape {
        /// The tensor or argument.
        what: String,
        /// The shape that the op needs.
        expected: String,
        /// The shape that it was given.
        found: String,
    },
    /// An index (slot, page, token id, layer) lies outside of what exists.
    #[error("{what} {index} is out of range: there are {limit}")]
    Range {
        /// What the index counts.
        what: &'static str,
        /// The index given.
        index: u64,
        /// How many there are.
        limit: u64,
    },
    /// The step batch contradicts itself.
    #[error("step batch: {0}")]
    Batch(String),
    /// The device has no room for an allocation.
    #[error("out of memory: {what} needs {bytes} bytes{hint}")]
    Memory {
        /// What was to be allocated.
        what: String,
        /// Its size in bytes.
        bytes: u64,
        /// What to do about it, beginning with "; ", or empty.
        hint: String,
    },
    /// Exchange among the ranks of the group failed.
    #[error("collective: {0}")]
    Collective(String),
    /// The device or its driver reported a fault.
    #[error("device: {0}")]
    Device(String),
    /// Sampling refused the logits or the parameters.
    #[error("sampling: {0}")]
    Sampling(String),
    /// This backend cannot do that.
    #[error("not supported by this backend: {0}")]
    Unsupported(String),
}

impl BackendError {
    /// A shape error with both shapes printed the same way.
    pub fn shape(what: impl Into<String>, expected: &[usize], found: &[usize]) -> Self {
        Self::Shape { what: what.into(), expected: format!("{expected:?}"), found: format!("{found:?}") }
    }
}
