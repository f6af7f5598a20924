//! `perigee.v1.Cluster`: what operators see of replicas and sessions. Moving sessions is not offered yet.

use std::sync::Arc;
use std::time::Duration;

use perigee_proto::internal::Session;
use perigee_proto::status::{ErrorKind, WireError};
use perigee_proto::v1::{self, cluster_server::Cluster};
use tonic::{Request, Response, Status};

use crate::attachment::{Attachment, Lost};
use crate::error;
use crate::replicas::Replicas;

/// The operators' door.
#[derive(Clone)]
pub(crate) struct ClusterService {
    pub(crate) replicas: Arc<Replicas>,
    /// How long a replica may take to answer.
    pub(crate) patience: Duration,
}

impl ClusterService {
    fn attachments(&self, replica: &str) -> Result<Vec<Arc<Attachment>>, WireError> {
        self.replicas.attachments(replica).ok_or_else(|| {
            WireError::new(ErrorKind::NotFound, format!("no replica {replica:?} is known: see `perigee replicas`"))
        })
    }

    async fn in_time<T>(
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
        Ok(Response::new(v1::ListSessionsResponse { sessions: all }))
    }

    async fn migrate(&self, _request: Request<v1::MigrateRequest>) -> Result<Response<v1::MigrateResponse>, Status> {
        Err(error::unimplemented("Migrate").into())
    }

    async fn drain(&self, _request: Request<v1::DrainRequest>) -> Result<Response<v1::DrainResponse>, Status> {
        Err(error::unimplemented("Drain").into())
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
