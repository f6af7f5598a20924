//! An operator's order to empty a replica: it is told to drain, and watched until it has left. What has its sessions move is
//! `evacuate`, on every router.

use std::collections::BTreeSet;
use std::time::Duration;

use perigee_proto::internal::{Drain, router_message::Body};
use perigee_proto::status::WireError;
use perigee_proto::v1;

use crate::cluster_service::ClusterService;
use crate::error;

/// How often the sessions of a draining replica are asked for.
const LOOK: Duration = Duration::from_millis(100);
/// Looks in a row that find no stream to it, after which it has left: one that only broke is opened again sooner.
const MISSES: u32 = 5;

impl ClusterService {
    /// Has a replica leave, and waits until it has.
    pub(crate) async fn empty(&self, replica: &str) -> Result<v1::DrainResponse, WireError> {
        let attached = self.attachments(replica)?;
        let attachment = attached.into_iter().next().ok_or_else(|| error::replica_lost(replica, "it has no stream"))?;
        if !self.replicas.has_other(&attachment) {
            let message =
                format!("no other replica is ready to take the sessions of {replica}; SIGTERM ends it even so");
            return Err(error::cannot_drain("NO_OTHER_REPLICA", message));
        }
        let lost = |_| error::replica_lost(replica, "its stream broke");
        attachment.send(Body::Drain(Drain {})).map_err(lost)?;
        tracing::info!(replica, "a replica is to leave");

        // Who was there: sessions may still have come while the order was on its way.
        let mut seen = BTreeSet::new();
        let mut misses = 0;
        while misses < MISSES {
            match self.replicas.live(&attachment) {
                Some(live) => {
                    misses = 0;
                    // A long step delays the answer; the end of the stream ends the wait for it.
                    if let Ok(Ok(sessions)) = tokio::time::timeout(self.patience, live.list_sessions()).await {
                        seen.extend(sessions.into_iter().map(|session| session.session));
                    }
                }
                None => misses += 1,
            }
            tokio::time::sleep(LOOK).await;
        }
        let mut elsewhere = BTreeSet::new();
        for other in self.replicas.attachments("").unwrap_or_default() {
            let sessions = self.in_time(&other, other.list_sessions()).await.unwrap_or_default();
            elsewhere.extend(sessions.into_iter().map(|session| session.session));
        }
        let moved = seen.intersection(&elsewhere).count() as u32;
        tracing::info!(replica, moved, "a replica has left");
        Ok(v1::DrainResponse { moved, ended: seen.len() as u32 - moved })
    }
}
