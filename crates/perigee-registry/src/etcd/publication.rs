//! The guard of a published record. All talk with etcd is its keeper's, on another thread; dropping the guard ends both.

use std::sync::{Arc, Mutex, mpsc as blocking};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use super::EtcdConfig;
use super::keeper::{Change, Keeper};
use super::members::encode;
use crate::{BoxFuture, Publication, RegistryError, ReplicaRecord};

/// How long a dropped publication may take to remove its record; etcd removes it at the end of the lease anyway.
const WITHDRAWAL: Duration = Duration::from_secs(1);

/// A record in etcd.
pub(super) struct EtcdPublication {
    replica: String,
    incarnation: String,
    changes: mpsc::Sender<Change>,
    /// Dropped to end the keeper.
    withdraw: Option<oneshot::Sender<()>>,
    /// Disconnected once the keeper's thread is at its end.
    ended: Mutex<blocking::Receiver<()>>,
}

/// Starts a keeper and waits until the record stands.
pub(super) async fn publish(config: Arc<EtcdConfig>, record: ReplicaRecord) -> Result<EtcdPublication, RegistryError> {
    let value = encode(&record)?;
    let (changes, changed) = mpsc::channel(16);
    let (withdraw, withdrawn) = oneshot::channel();
    let (ending, ended) = blocking::channel();
    let (published, standing) = oneshot::channel();
    let (replica, incarnation) = (record.replica.clone(), record.incarnation.clone());
    let keep = move || {
        // Lives as long as this thread's work.
        let _ending: blocking::Sender<()> = ending;
        let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime,
            Err(source) => {
                // Nobody listens where the publishing was given up.
                let _ = published.send(Err(RegistryError::System { what: "a runtime for etcd", source }));
                return;
            }
        };
        runtime.block_on(Keeper::new(config, record, value).keep(changed, published, withdrawn));
    };
    std::thread::Builder::new()
        .name("perigee-lease".to_owned())
        .spawn(keep)
        .map_err(|source| RegistryError::System { what: "a thread for etcd", source })?;
    // From here on, giving up drops the guard and so ends the keeper.
    let publication =
        EtcdPublication { replica, incarnation, changes, withdraw: Some(withdraw), ended: Mutex::new(ended) };
    match standing.await {
        Ok(result) => result.map(|()| publication),
        Err(_) => Err(publication.not_published()),
    }
}

impl EtcdPublication {
    fn not_published(&self) -> RegistryError {
        RegistryError::NotPublished { replica: self.replica.clone(), incarnation: self.incarnation.clone() }
    }
}

impl Publication for EtcdPublication {
    /// Completes when etcd has the record, or with [`RegistryError::Unreachable`] after one attempt: it is written all the
    /// same as soon as etcd answers.
    fn update(&self, record: ReplicaRecord) -> BoxFuture<'_, Result<(), RegistryError>> {
        Box::pin(async move {
            if record.replica != self.replica || record.incarnation != self.incarnation {
                return Err(RegistryError::NotPublished { replica: record.replica, incarnation: record.incarnation });
            }
            let value = encode(&record)?;
            let (done, result) = oneshot::channel();
            if self.changes.send(Change { record, value, done }).await.is_err() {
                return Err(self.not_published());
            }
            result.await.unwrap_or_else(|_| Err(self.not_published()))
        })
    }
}

impl Drop for EtcdPublication {
    /// Waits for the record to be removed, up to a second: a process that ends now would leave it to the lease's end.
    fn drop(&mut self) {
        self.withdraw = None;
        if let Ok(ended) = self.ended.get_mut() {
            // Disconnection is the signal; running out of time is no one's concern here.
            let _ = ended.recv_timeout(WITHDRAWAL);
        }
    }
}
