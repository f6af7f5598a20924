//! What can go wrong with membership, as kinds that callers tell apart.

use std::path::PathBuf;

/// Why a registry refused, or could not answer.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// A record's field has a bad value.
    #[error("replica record: {field} {rule}, found {found:?}")]
    InvalidRecord {
        /// The field.
        field: &'static str,
        /// What it must be.
        rule: &'static str,
        /// What it is.
        found: String,
    },
    /// Another live replica has that name.
    #[error("replica {replica} is already registered with incarnation {incarnation}: stop it, or choose another name")]
    NameTaken {
        /// The name.
        replica: String,
        /// Who has it.
        incarnation: String,
    },
    /// An update for a replica that this publication is not about.
    #[error("replica {replica} of incarnation {incarnation} is not what was published; publish it anew")]
    NotPublished {
        /// The name.
        replica: String,
        /// Its incarnation.
        incarnation: String,
    },
    /// A file could not be read.
    #[error("registry file {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file is not what it should be.
    #[error("registry file {}: {reason}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A static registry does not list a replica that wants to publish.
    #[error("registry file {} does not list replica {replica}: add it, with its internal address", path.display())]
    NotListed {
        /// The file.
        path: PathBuf,
        /// The replica.
        replica: String,
    },
}
