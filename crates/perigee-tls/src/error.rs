//! Why TLS cannot be set up or a connection not be made, as kinds; each message names the option or the address at fault.

use std::path::PathBuf;

/// A file, a pair of files or an address that is not as it should be.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// Options that contradict each other, one a line.
    #[error("{0}")]
    Options(String),
    /// A file cannot be read.
    #[error("{option}: {}: {source}", path.display())]
    Read {
        /// The option that named it.
        option: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file does not hold what its option asks for.
    #[error("{option}: {}: {reason}", path.display())]
    Content {
        /// The option that named it.
        option: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Certificate and key do not make an identity.
    #[error("--tls-cert and --tls-key: {0}")]
    Identity(#[from] rustls::Error),
    /// An address has not the shape host:port.
    #[error("{address:?}: expected host:port")]
    Address {
        /// What was given.
        address: String,
    },
    /// A connection could not be made.
    #[error("{address}: {reason}")]
    Connect {
        /// Where to.
        address: String,
        /// What the system or the other side said, and what that may mean.
        reason: String,
    },
}
