//! `perigee.v1.Inference` as a target. Prompts are token ids, so that their lengths are exact.

use std::sync::atomic::{AtomicUsize, Ordering};

use perigee_proto::v1::inference_client::InferenceClient;
use perigee_proto::v1::{FinishReason, GenerateRequest, GetModelInfoRequest, SamplingParams};
use tonic::transport::Channel;
use tonic::{Code, Status};

use super::{Ask, BoxFuture, Counts, Failure, Hear, Heard, Target};
use crate::LoadError;

/// A router of Perigee over one or several connections.
#[derive(Debug)]
pub struct GrpcTarget {
    clients: Vec<InferenceClient<Channel>>,
    next: AtomicUsize,
    vocabulary: u32,
    model: String,
}

impl GrpcTarget {
    /// Asks what is served. Requests go to the connections in turn.
    ///
    /// # Errors
    /// [`LoadError::Target`] without a connection, or where nothing is served.
    pub async fn new(channels: Vec<Channel>) -> Result<Self, LoadError> {
        let clients: Vec<_> = channels.into_iter().map(InferenceClient::new).collect();
        let Some(mut first) = clients.first().cloned() else {
            return Err(LoadError::Target("there is no connection to the router".to_owned()));
        };
        let info = first.get_model_info(GetModelInfoRequest {}).await;
        let info =
            info.map_err(|status| LoadError::Target(format!("GetModelInfo: {}", status.message())))?.into_inner();
        Ok(Self { clients, next: AtomicUsize::new(0), vocabulary: info.vocab_size, model: info.model })
    }

    async fn generate(&self, ask: Ask<'_>, hear: Hear<'_>) -> Result<Counts, Failure> {
        let index = self.next.fetch_add(1, Ordering::Relaxed) % self.clients.len();
        let mut client = self.clients[index].clone();
        let request = GenerateRequest {
            request_id: ask.name.to_owned(),
            token_ids: ask.dialogue.token_ids(self.vocabulary),
            sampling: Some(SamplingParams {
                temperature: ask.temperature,
                ignore_eos: ask.ignore_eos,
                ..SamplingParams::default()
            }),
            max_tokens: Some(ask.max_tokens),
            ..GenerateRequest::default()
        };
        let mut stream = client.generate(request).await.map_err(failure)?.into_inner();
        let mut counts = Counts::default();
        let mut is_finished = false;
        while let Some(response) = stream.message().await.map_err(failure)? {
            is_finished |= response.finish_reason() != FinishReason::Unspecified;
            if let Some(usage) = &response.usage {
                let (prompt, cached, output) = (usage.prompt, usage.cached, usage.completion);
                counts = Counts { prompt: Some(prompt), cached: Some(cached), output: Some(output) };
            }
            let heard = Heard {
                tokens: u32::from(response.token_id.is_some()),
                ids: response.token_id.as_slice(),
                text: &response.text,
                replica: &response.replica,
                epoch: response.epoch,
            };
            if hear(heard).is_break() {
                return Ok(counts);
            }
        }
        if is_finished { Ok(counts) } else { Err(Failure::cut_off()) }
    }
}

impl Target for GrpcTarget {
    fn ask<'a>(&'a self, ask: Ask<'a>, hear: Hear<'a>) -> BoxFuture<'a, Result<Counts, Failure>> {
        Box::pin(self.generate(ask, hear))
    }

    fn describe(&self) -> String {
        format!("{} over gRPC", self.model)
    }
}

/// A status that is not OK.
pub(crate) fn failure(status: Status) -> Failure {
    let code = match status.code() {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    };
    Failure { code: code.to_owned(), message: status.message().to_owned() }
}
