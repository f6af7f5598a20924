//! `perigee.v1.Cluster`: what operators see of replicas and sessions, moving sessions and emptying replicas. It speaks the wire's words;
//! whether and how a session moves is decided behind it.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use perigee_migration::Mode;
use perigee_proto::ids::SessionId;
use perigee_proto::internal::Session;
use perigee_proto::status::{ErrorKind, WireError};
use perigee_proto::v1::{self, cluster_server::Cluster};
use tonic::{Request, Response, Status};

use crate::attachment::{Attachment, Lost};
use crate::error;
use crate::relay::Relay;
use crate::replicas::Replicas;

/// The operators' door.
#[derive(Clone)]
pub(crate) struct ClusterService {
    pub(crate) relay: Arc<Relay>,
    pub(crate) replicas: Arc<Replicas>,
    /// How long a replica may take to answer.
    pub(crate) patience: Duration,
}

impl ClusterService {
    pub(crate) fn attachments(&self, replica: &str) -> Result<Vec<Arc<Attachment>>, WireError> {
        self.replicas.attachments(replica).ok_or_else(|| error::unknown_replica(replica))
    }

    /// Why a session that is not this router's cannot be moved here: another router has its client's stream, or it does
    /// not run at all, as far as replicas answer.
    async fn foreign(&self, session: &str) -> WireError {
        for attachment in self.replicas.attachments("").unwrap_or_default() {
            let Ok(sessions) = self.in_time(&attachment, attachment.list_sessions()).await else { continue };
            if let Some(found) = sessions.into_iter().find(|found| found.session == session) {
                let owner = &*attachment.identity.replica;
                let message = format!(
                    "{session} runs on {owner}, but another router holds its client's stream: ask that one to move it"
                );
                let error = error::cannot_move("OTHER_ROUTER", message);
                return error.with_fact("owner", owner).with_fact("epoch", found.epoch.to_string());
            }
        }
        WireError::new(ErrorKind::NotFound, format!("no session {session} runs: see `perigee sessions`"))
    }

    pub(crate) async fn in_time<T>(
        &self,
        attachment: &Attachment,
        answer: impl Future<Output = Result<T, Lost>>,
    ) -> Result<T, WireError> {
        match tokio::time::timeout(self.patience, answer).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(Lost)) => Err(error::replica_lost(&attachment.identity.replica, "its stream broke")),
            Err(_) => Err(error::replica_lost(&attachment.identity.replica, "it does not answer")),
        }
    }
}

#[tonic::async_trait]
impl Cluster for ClusterService {
    async fn list_replicas(
        &self,
        _request: Request<v1::ListReplicasRequest>,
    ) -> Result<Response<v1::ListReplicasResponse>, Status> {
        Ok(Response::new(v1::ListReplicasResponse { replicas: self.replicas.describe() }))
    }

    async fn list_sessions(
        &self,
        request: Request<v1::ListSessionsRequest>,
    ) -> Result<Response<v1::ListSessionsResponse>, Status> {
        let mut all = Vec::new();
        for attachment in self.attachments(&request.into_inner().replica)? {
            let mut sessions = self.in_time(&attachment, attachment.list_sessions()).await?;
            sessions.sort_by(|a, b| a.session.cmp(&b.session));
            all.extend(sessions.into_iter().map(|session| describe(session, &attachment.identity.replica)));
        }
        // For a moment both sides of a move may say that a session is theirs: the later epoch is right.
        let mut latest: HashMap<String, u64> = HashMap::new();
        for found in &all {
            let epoch = latest.entry(found.session.clone()).or_default();
            *epoch = found.epoch.max(*epoch);
        }
        all.retain(|found| latest.get(&found.session) == Some(&found.epoch));
        Ok(Response::new(v1::ListSessionsResponse { sessions: all }))
    }

    async fn migrate(&self, request: Request<v1::MigrateRequest>) -> Result<Response<v1::MigrateResponse>, Status> {
        let request = request.into_inner();
        let mode = match request.mode() {
            v1::MigrateMode::Unspecified => None,
            v1::MigrateMode::Split => Some(Mode::Split),
            v1::MigrateMode::Whole => Some(Mode::Whole),
        };
        let v1::MigrateRequest { session_id: session, to, .. } = request;
        SessionId::parse(&session).map_err(|error| WireError::invalid("session_id", error.to_string()))?;
        if to.is_empty() {
            return Err(WireError::invalid("to", "it must name a replica").into());
        }
        match self.relay.migrate(&session, &to, mode)? {
            Some(ticket) => Ok(Response::new(ticket.answer().await?)),
            None => Err(self.foreign(&session).await.into()),
        }
    }

    async fn drain(&self, request: Request<v1::DrainRequest>) -> Result<Response<v1::DrainResponse>, Status> {
        let replica = request.into_inner().replica;
        if replica.is_empty() {
            return Err(WireError::invalid("replica", "it must name a replica").into());
        }
        Ok(Response::new(self.empty(&replica).await?))
    }

    async fn flush_cache(
        &self,
        request: Request<v1::FlushCacheRequest>,
    ) -> Result<Response<v1::FlushCacheResponse>, Status> {
        let mut replicas = Vec::new();
        for attachment in self.attachments(&request.into_inner().replica)? {
            self.in_time(&attachment, attachment.flush()).await?;
            replicas.push(attachment.identity.replica.to_string());
        }
        Ok(Response::new(v1::FlushCacheResponse { replicas }))
    }
}

fn describe(session: Session, owner: &str) -> v1::SessionInfo {
    let segments = session.segments.into_iter().map(|segment| v1::SegmentInfo {
        // A replica does not name itself.
        home: if segment.home.is_empty() { owner.to_owned() } else { segment.home },
        first: segment.first,
        tokens: segment.tokens,
    });
    v1::SessionInfo {
        session: session.session,
        owner: owner.to_owned(),
        epoch: session.epoch,
        status: session.status,
        context: session.context,
        segments: segments.collect(),
        request_id: session.request_id,
    }
}
