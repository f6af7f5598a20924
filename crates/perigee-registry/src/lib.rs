//! Who is in the cluster: records that replicas publish, and a stream of changes for those who route to them, behind one
//! trait. It knows addresses and names; it opens no connection to a replica and knows no gRPC.

mod error;
#[cfg(feature = "etcd")]
pub mod etcd;
pub mod file;
pub mod in_process;
mod open;
mod options;
mod record;
mod watch;

use std::{future::Future, pin::Pin};

pub use error::RegistryError;
#[cfg(feature = "etcd")]
pub use etcd::{EtcdConfig, EtcdRegistry};
pub use file::FileRegistry;
pub use in_process::InProcessRegistry;
pub use open::open;
pub use options::EtcdOptions;
pub use record::{ReplicaRecord, ReplicaStatus};
pub use watch::{Change, Snapshot, Watch, WatchSource};

/// A future that a trait object returns.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Membership of a cluster. Nothing on the path of tokens waits on it: while it is away, the last known set stands.
pub trait Registry: Send + Sync {
    /// Publishes this process's replica until the publication is dropped or the process ends.
    ///
    /// # Errors
    /// [`RegistryError`] where the record is not valid, its name is taken by a live replica, or the registry cannot be
    /// reached.
    fn publish(&self, record: ReplicaRecord) -> BoxFuture<'_, Result<Box<dyn Publication>, RegistryError>>;

    /// The replicas from now on, beginning with those that are there.
    fn watch(&self) -> Watch;
}

/// A published record. Dropping it withdraws the record.
pub trait Publication: Send + Sync {
    /// Replaces the record, usually by one with a new status.
    ///
    /// # Errors
    /// [`RegistryError`] where the record is not valid, names another replica or incarnation, or was taken over.
    fn update(&self, record: ReplicaRecord) -> BoxFuture<'_, Result<(), RegistryError>>;
}
