//! A target that reaches stub replicas through a router, and reads nothing of the answers but their tokens: what a client
//! spends on the rest would count as the router's. For the same reason it reads gRPC's frames itself.

use std::future::poll_fn;
use std::ops::ControlFlow;
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use http_body_util::Full;
use hyper::body::Body as _;
use hyper::http::{HeaderMap, HeaderValue, Method, Request, Uri};
use perigee_proto::codec::FRAME_BYTES;
use perigee_proto::v1::{GenerateRequest, SamplingParams};
use perigee_tls::with_causes;
use prost::Message;
use tonic::body::Body;
use tonic::transport::Channel;
use tonic::{Code, Status};
use tower::{Service, ServiceExt};

use super::VOCABULARY;
use crate::target::{Ask, BoxFuture, Counts, Failure, Hear, Heard, Target, failure};

const GENERATE: &str = "/perigee.v1.Inference/Generate";

/// A router over one or several connections.
#[derive(Debug)]
pub struct RelayedTarget {
    clients: Vec<Channel>,
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
        Self { clients: channels, next: AtomicUsize::new(0) }
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
        let broken =
            |error: &dyn std::error::Error| failure(Status::unavailable(with_causes(&error.to_string(), error)));
        let answer = client.ready().await.map_err(|error| broken(&error))?.call(call(&request));
        let (head, body) = answer.await.map_err(|error| broken(&error))?.into_parts();
        refusal(&head.headers)?;
        let mut body = pin!(body);
        let (mut tokens, mut is_finished) = (0, false);
        let mut frames = Frames::default();
        'answer: while let Some(part) = poll_fn(|context| body.as_mut().poll_frame(context)).await {
            let data = match part.map_err(failure)?.into_data() {
                Ok(data) => data,
                Err(part) => {
                    refusal(&part.into_trailers().unwrap_or_default())?;
                    break;
                }
            };
            frames.add(data);
            while let Some(message) = frames.next() {
                let glance = Glance::decode(message).map_err(|error| failure(Status::internal(error.to_string())))?;
                is_finished |= glance.finish_reason != 0;
                tokens += u64::from(glance.token_id.is_some());
                let ids = glance.token_id.as_slice();
                if hear(Heard { tokens: ids.len() as u32, ids, ..Heard::default() }) == ControlFlow::Break(()) {
                    break 'answer;
                }
            }
        }
        if is_finished { Ok(Counts { output: Some(tokens), ..Counts::default() }) } else { Err(Failure::cut_off()) }
    }
}

/// A call of Generate.
fn call(request: &GenerateRequest) -> Request<Body> {
    let length = request.encoded_len();
    let mut message = BytesMut::with_capacity(FRAME_BYTES + length);
    message.put_u8(0);
    message.put_u32(length as u32);
    // A buffer grows as it must, so this cannot fail.
    request.encode(&mut message).unwrap_or_default();
    let mut call = Request::new(Body::new(Full::new(message.freeze())));
    *call.method_mut() = Method::POST;
    *call.uri_mut() = Uri::from_static(GENERATE);
    let headers = call.headers_mut();
    headers.insert("content-type", HeaderValue::from_static("application/grpc"));
    headers.insert("te", HeaderValue::from_static("trailers"));
    call
}

/// The error that an answer's head or end says, if any.
fn refusal(headers: &HeaderMap) -> Result<(), Failure> {
    match Status::from_header_map(headers) {
        Some(status) if status.code() != Code::Ok => Err(failure(status)),
        _ => Ok(()),
    }
}

/// Messages of an answer, each with its gRPC frame in front.
#[derive(Debug, Default)]
struct Frames {
    data: Bytes,
}

impl Frames {
    fn add(&mut self, data: Bytes) {
        // Rarely anything is left: each token's answer comes as a whole.
        self.data = if self.data.is_empty() { data } else { [&self.data[..], &data].concat().into() };
    }

    fn next(&mut self) -> Option<Bytes> {
        let length = u32::from_be_bytes(self.data.get(1..FRAME_BYTES)?.try_into().ok()?) as usize;
        if self.data.len() < FRAME_BYTES + length {
            return None;
        }
        self.data.advance(FRAME_BYTES);
        Some(self.data.split_to(length))
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

    #[test]
    fn messages_are_found_however_they_come() {
        let messages: Vec<Vec<u8>> = (0..5_usize).map(|length| vec![length as u8; length * 100]).collect();
        let framed = |message: &Vec<u8>| [&[0][..], &(message.len() as u32).to_be_bytes(), message].concat();
        let all: Vec<u8> = messages.iter().flat_map(framed).collect();
        for part in [1, 3, 6, 250, all.len()] {
            let mut frames = Frames::default();
            let mut found = Vec::new();
            for part in all.chunks(part) {
                frames.add(Bytes::copy_from_slice(part));
                found.extend(std::iter::from_fn(|| frames.next()));
            }
            assert_eq!(found, messages);
        }
    }
}
