//! A target that reaches stub replicas through a router, and reads nothing of the answers but their tokens: what a client
//! spends on the rest would count as the router's.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicUsize, Ordering};

use perigee_proto::codec::Codec;
use perigee_proto::v1::{GenerateRequest, SamplingParams};
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::Channel;
use tonic::{Request, Status};

use super::VOCABULARY;
use crate::target::{Ask, BoxFuture, Counts, Failure, Hear, Heard, Target, failure};

const GENERATE: &str = "/perigee.v1.Inference/Generate";

/// A router over one or several connections.
#[derive(Debug)]
pub struct RelayedTarget {
    clients: Vec<Grpc<Channel>>,
    next: AtomicUsize,
}

/// A `perigee.v1.GenerateResponse`, of which all other fields are passed over.
#[derive(Clone, PartialEq, prost::Message)]
struct Glance {
    #[prost(uint32, optional, tag = "4")]
    token_id: Option<u32>,
    #[prost(int32, tag = "7")]
    finish_reason: i32,
}

impl RelayedTarget {
    /// Requests go to the connections in turn, of which there must be one.
    pub fn new(channels: Vec<Channel>) -> Self {
        Self { clients: channels.into_iter().map(Grpc::new).collect(), next: AtomicUsize::new(0) }
    }

    async fn generate(&self, ask: Ask<'_>, hear: Hear<'_>) -> Result<Counts, Failure> {
        let index = self.next.fetch_add(1, Ordering::Relaxed) % self.clients.len().max(1);
        let no_connection = || failure(Status::unavailable("there is no connection to the router"));
        let mut client = self.clients.get(index).cloned().ok_or_else(no_connection)?;
        let sampling =
            SamplingParams { temperature: ask.temperature, ignore_eos: ask.ignore_eos, ..SamplingParams::default() };
        let request = GenerateRequest {
            request_id: ask.name.to_owned(),
            token_ids: ask.dialogue.token_ids(VOCABULARY),
            sampling: Some(sampling),
            max_tokens: Some(ask.max_tokens),
            ..GenerateRequest::default()
        };
        client.ready().await.map_err(|error| failure(Status::unavailable(error.to_string())))?;
        let codec = Codec::<GenerateRequest, Glance>::default();
        let answer = client
            .server_streaming(Request::new(request), PathAndQuery::from_static(GENERATE), codec)
            .await
            .map_err(failure)?;
        let mut stream = answer.into_inner();
        let (mut tokens, mut is_finished) = (0, false);
        while let Some(glance) = stream.message().await.map_err(failure)? {
            is_finished |= glance.finish_reason != 0;
            tokens += u64::from(glance.token_id.is_some());
            let ids = glance.token_id.as_slice();
            if hear(Heard { tokens: ids.len() as u32, ids, ..Heard::default() }) == ControlFlow::Break(()) {
                break;
            }
        }
        if is_finished { Ok(Counts { output: Some(tokens), ..Counts::default() }) } else { Err(Failure::cut_off()) }
    }
}

impl Target for RelayedTarget {
    fn ask<'a>(&'a self, ask: Ask<'a>, hear: Hear<'a>) -> BoxFuture<'a, Result<Counts, Failure>> {
        Box::pin(self.generate(ask, hear))
    }

    fn describe(&self) -> String {
        "a router".to_owned()
    }
}

#[cfg(test)]
mod tests {
    use perigee_proto::v1::{FinishReason, GenerateResponse};
    use prost::Message;

    use super::*;

    #[test]
    fn a_glance_sees_token_and_end_of_a_response() {
        let mut response = GenerateResponse {
            session_id: "s".to_owned(),
            token_id: Some(1 << 31),
            text: "text".to_owned(),
            replica: "r".to_owned(),
            ..GenerateResponse::default()
        };
        let glance = |response: &GenerateResponse| Glance::decode(response.encode_to_vec().as_slice());
        assert_eq!(glance(&response), Ok(Glance { token_id: Some(1 << 31), finish_reason: 0 }));
        response.set_finish_reason(FinishReason::Length);
        let finish_reason = FinishReason::Length.into();
        assert_eq!(glance(&response), Ok(Glance { token_id: Some(1 << 31), finish_reason }));
    }
}
