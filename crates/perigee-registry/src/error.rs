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
    /// Options that contradict each other, one a line.
    #[error("{faults}")]
    Options {
        /// What is wrong.
        faults: String,
    },
    /// A static registry does not list a replica that wants to publish.
    #[error("registry file {} does not list replica {replica}: add it, with its internal address", path.display())]
    NotListed {
        /// The file.
        path: PathBuf,
        /// The replica.
        replica: String,
    },
    /// A registry's specification cannot be understood.
    #[error("registry {specification:?}: {reason}; expected file:PATH or etcd://HOST:PORT,HOST:PORT[/PREFIX]")]
    Specification {
        /// What was given.
        specification: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The program was built without this kind of registry.
    #[error(
        "registry {specification:?}: this program was built without cargo feature {feature}: build it with --features {feature}, or use file:PATH"
    )]
    NotBuilt {
        /// What was given.
        specification: String,
        /// The missing feature.
        feature: &'static str,
    },
    /// A record is too long to be published.
    #[error("record of replica {replica}: {bytes} bytes are more than the {limit} that a record may have")]
    RecordTooLarge {
        /// The replica.
        replica: String,
        /// Its size as JSON.
        bytes: usize,
        /// The most there may be.
        limit: usize,
    },
    /// The registry does not answer now. What was to be written is written once it does.
    #[error("etcd at {endpoints} does not answer: {reason}; it is asked again until it does")]
    Unreachable {
        /// Its addresses.
        endpoints: String,
        /// What the last attempt met.
        reason: String,
    },
    /// The system refused a thread or a runtime.
    #[error("{what}: {source}")]
    System {
        /// What was being done.
        what: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
}
