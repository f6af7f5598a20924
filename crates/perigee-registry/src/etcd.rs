//! Membership in etcd, 3.4 or newer: each replica writes one key under a lease, routers watch the keys. It keeps no
//! connection for anybody else, and nothing but membership is stored there.

mod calls;
mod config;
mod keeper;
mod members;
mod publication;
mod watcher;

use std::sync::{Arc, Mutex, PoisonError, Weak};

pub use config::EtcdConfig;

use crate::{BoxFuture, Publication, Registry, RegistryError, ReplicaRecord, Watch, WatchSource};

/// The source of changes while somebody watches; only the watching thread keeps it alive.
type Slot = Arc<Mutex<Weak<WatchSource>>>;

/// Membership in etcd. Every publication has a thread of its own that renews its lease, so that load elsewhere in the
/// process cannot end it; all watches share one thread. While etcd is away, the last known set stands, publications are
/// kept up as soon as it answers again, and new ones wait.
#[derive(Debug)]
pub struct EtcdRegistry {
    config: Arc<EtcdConfig>,
    watching: Slot,
}

impl EtcdRegistry {
    /// Checks the settings. etcd is contacted by the first publication or watch, and need not run yet.
    ///
    /// # Errors
    /// [`RegistryError::Specification`].
    pub fn connect(config: EtcdConfig) -> Result<Self, RegistryError> {
        config.validate()?;
        Ok(Self { config: Arc::new(config), watching: Slot::default() })
    }
}

impl Registry for EtcdRegistry {
    /// Waits for etcd where it is away, and up to [`EtcdConfig::name_wait`] for a name that another incarnation has. The
    /// record needs an incarnation. A dropped future leaves nothing behind.
    fn publish(&self, record: ReplicaRecord) -> BoxFuture<'_, Result<Box<dyn Publication>, RegistryError>> {
        Box::pin(async move {
            let publication = publication::publish(self.config.clone(), record).await?;
            Ok(Box::new(publication) as Box<dyn Publication>)
        })
    }

    /// The watch goes on when this registry is dropped. Before etcd has answered first, the set is empty.
    fn watch(&self) -> Watch {
        let mut watching = self.watching.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(source) = watching.upgrade() {
            return source.watch();
        }
        let source = Arc::new(WatchSource::default());
        let watch = source.watch();
        *watching = Arc::downgrade(&source);
        if let Err(error) = watcher::start(self.config.clone(), source, self.watching.clone()) {
            // The source went with the attempt, so the watch says that it has ended.
            tracing::error!(%error, "no thread to watch etcd");
        }
        watch
    }
}
