//! What can be wrong with a scenario or a trace, each with the place and what would do.

use std::path::PathBuf;

/// A load test that cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A file cannot be read.
    #[error("{path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A scenario is not what it should be.
    #[error("{path}: {reason}")]
    Scenario {
        /// The file.
        path: PathBuf,
        /// What is wrong, one fault a line.
        reason: String,
    },
    /// A line of a trace is not what it should be.
    #[error("{path}, line {line}: {reason}")]
    Trace {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong.
        reason: String,
    },
    /// The server cannot be asked at all.
    #[error("{0}")]
    Target(String),
}
