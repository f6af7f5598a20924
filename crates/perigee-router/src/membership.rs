//! From changes in the registry to streams: a client for every replica that serves, and none for those that left. A
//! replica that leaves the registry while its stream lives keeps the stream; only nothing new goes there.

use std::collections::HashMap;
use std::sync::Arc;

use perigee_registry::{Change, ReplicaRecord, Watch};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::replica_client::{ClientContext, keep_attached};

/// A replica's client. Dropping it ends its stream at once.
struct Client {
    internal: String,
    incarnation: String,
    leaving: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Drop for Client {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Follows the registry until it is gone; all streams end with this future.
pub(crate) async fn follow(mut watch: Watch, context: Arc<ClientContext>) {
    let mut clients: HashMap<String, Client> = HashMap::new();
    while let Some(changes) = watch.next().await {
        for change in changes {
            match change {
                Change::Added(record) | Change::Updated(record) => {
                    context.replicas.insert(record.clone());
                    keep(&mut clients, &context, record);
                }
                Change::Removed { replica, .. } => {
                    context.replicas.leave(&replica);
                    if let Some(client) = clients.get(&replica) {
                        client.leaving.send_replace(true);
                    }
                }
            }
        }
        clients.retain(|_, client| !client.task.is_finished());
    }
    tracing::warn!("the registry is gone; the replicas stay as they are");
    std::future::pending::<()>().await;
}

/// Sees to it that a serving replica has a client to its current address and incarnation.
fn keep(clients: &mut HashMap<String, Client>, context: &Arc<ClientContext>, record: ReplicaRecord) {
    if !record.status.is_attachable() {
        return;
    }
    let current = clients.get(&record.replica).is_some_and(|client| {
        client.internal == record.internal
            && client.incarnation == record.incarnation
            && !*client.leaving.borrow()
            && !client.task.is_finished()
    });
    if current {
        return;
    }
    let (leaving, gone) = watch::channel(false);
    let (internal, incarnation) = (record.internal.clone(), record.incarnation.clone());
    let replica = record.replica.clone();
    // A former client of that name spoke to a process that is gone: dropping it ends what it still waits for.
    clients.remove(&replica);
    let task = tokio::spawn(keep_attached(context.clone(), record, gone));
    clients.insert(replica, Client { internal, incarnation, leaving, task });
}
