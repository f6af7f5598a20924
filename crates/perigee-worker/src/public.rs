//! The leader's public port: beside health and reflection it tells what model it serves. Clients' requests go to a router;
//! here they are answered with that advice.

use std::sync::{Arc, OnceLock};

use perigee_proto::status::{ErrorKind, WireError};
use perigee_proto::v1::{self, inference_server::Inference};
use tokio_stream::Empty;
use tonic::{Request, Response, Status};

use crate::identity::ReplicaIdentity;

/// `perigee.v1.Inference` on a leader.
#[derive(Debug, Clone)]
pub(crate) struct PublicService {
    /// Empty until the replica is loaded.
    pub(crate) identity: Arc<OnceLock<Arc<ReplicaIdentity>>>,
}

fn ask_a_router() -> Status {
    WireError::new(ErrorKind::Unimplemented, "this is a replica's leader: send requests to a router").into()
}

type NoResponses = Empty<Result<v1::GenerateResponse, Status>>;

#[tonic::async_trait]
impl Inference for PublicService {
    type GenerateStream = NoResponses;
    type ResumeStream = NoResponses;

    async fn generate(&self, _: Request<v1::GenerateRequest>) -> Result<Response<NoResponses>, Status> {
        Err(ask_a_router())
    }

    async fn resume(&self, _: Request<v1::ResumeRequest>) -> Result<Response<NoResponses>, Status> {
        Err(ask_a_router())
    }

    async fn score(&self, _: Request<v1::ScoreRequest>) -> Result<Response<v1::ScoreResponse>, Status> {
        Err(ask_a_router())
    }

    async fn abort(&self, _: Request<v1::AbortRequest>) -> Result<Response<v1::AbortResponse>, Status> {
        Err(ask_a_router())
    }

    async fn tokenize(&self, _: Request<v1::TokenizeRequest>) -> Result<Response<v1::TokenizeResponse>, Status> {
        Err(ask_a_router())
    }

    async fn detokenize(&self, _: Request<v1::DetokenizeRequest>) -> Result<Response<v1::DetokenizeResponse>, Status> {
        Err(ask_a_router())
    }

    async fn get_model_info(
        &self,
        _: Request<v1::GetModelInfoRequest>,
    ) -> Result<Response<v1::GetModelInfoResponse>, Status> {
        let Some(identity) = self.identity.get() else {
            let message = "the replica is loading its model: ask again once it is ready";
            return Err(WireError::unavailable("NOT_READY", message).into());
        };
        Ok(Response::new(identity.model_info()))
    }
}
