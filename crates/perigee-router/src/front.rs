//! Where calls come in: those of `perigee.v1.Inference` go straight to their service, all others through the router of
//! routes. A stream of tokens is answered with what its connection is to send, not with a body that is asked for it.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use axum::http::{HeaderMap, HeaderValue, Request, Response};
use parking_lot::Mutex;
use perigee_proto::codec::Codec;
use perigee_proto::v1::inference_server::{Inference as _, InferenceServer};
use perigee_proto::v1::{GenerateRequest, GenerateResponse, ResumeRequest};
use prost::Message;
use tokio_stream::Empty;
use tonic::body::Body;
use tonic::server::{Grpc, NamedService, ServerStreamingService};
use tonic::service::Routes;
use tonic::{Code, Status};
use tower::{Service, ServiceExt};

use crate::admission;
use crate::error;
use crate::reply::Reply;
use crate::service::InferenceService;

type Inference = InferenceServer<InferenceService>;
type Boxed<T> = Pin<Box<dyn Future<Output = T> + Send>>;

const GENERATE: &str = "/perigee.v1.Inference/Generate";
const RESUME: &str = "/perigee.v1.Inference/Resume";

/// All gRPC services of a router.
#[derive(Clone)]
pub(crate) struct Front {
    service: Arc<InferenceService>,
    inference: Inference,
    /// Most bytes of a request.
    message_bytes: usize,
    others: Routes,
}

/// The answer to a call.
pub(crate) struct Answer {
    pub(crate) response: Response<Body>,
    /// What follows the response's head instead of its body, where that is a stream of tokens.
    pub(crate) tokens: Option<Reply>,
}

impl Answer {
    /// One that is no stream of tokens.
    fn of(response: Response<Body>) -> Self {
        Self { response, tokens: None }
    }
}

impl Front {
    /// Inference, whose requests may have so many bytes, and the others.
    pub(crate) fn new(service: InferenceService, message_bytes: usize, others: Routes) -> Self {
        let service = Arc::new(service);
        let inference = InferenceServer::from_arc(service.clone()).max_decoding_message_size(message_bytes);
        Self { service, inference, message_bytes, others: others.prepare() }
    }

    /// Answers a call, within the time that it has: for a stream of tokens that is until it begins, and then its own business.
    pub(crate) async fn answer(self, request: Request<Body>) -> Answer {
        let time = time_left(request.headers());
        let answered = match time {
            Some(time) => tokio::time::timeout(time, self.answer_in_time(request)).await,
            None => Ok(self.answer_in_time(request).await),
        };
        let too_late = |_| Answer::of(Status::from(error::deadline_exceeded()).into_http());
        answered.unwrap_or_else(too_late)
    }

    async fn answer_in_time(mut self, request: Request<Body>) -> Answer {
        let path = request.uri().path();
        if path == GENERATE {
            let call: Call<GenerateRequest> = |service, call| Box::pin(async move { service.generate(call).await });
            return self.stream(request, call).await;
        }
        if path == RESUME {
            let call: Call<ResumeRequest> = |service, call| Box::pin(async move { service.resume(call).await });
            return self.stream(request, call).await;
        }
        let answered = if is_of(Inference::NAME, path) {
            self.inference.call(request).await
        } else {
            self.others.oneshot(request).await
        };
        // The services themselves never fail.
        let Ok(response) = answered;
        Answer::of(with_told_size(response))
    }

    /// Answers a call with a stream of tokens.
    async fn stream<T>(&self, request: Request<Body>, call: Call<T>) -> Answer
    where
        T: Message + Default + Send + 'static,
    {
        let reply = Arc::default();
        let call = Streamed { service: self.service.clone(), call, reply: Arc::clone(&reply) };
        let codec = Codec::<GenerateResponse, T>::default();
        let mut grpc = Grpc::new(codec).max_decoding_message_size(self.message_bytes);
        let response = with_told_size(grpc.server_streaming(call, request).await);
        let tokens = reply.lock().take();
        Answer { response, tokens }
    }
}

/// A call whose answer is a stream of tokens.
type Call<T> = fn(Arc<InferenceService>, tonic::Request<T>) -> Boxed<Result<tonic::Response<Reply>, Status>>;

struct Streamed<T> {
    service: Arc<InferenceService>,
    call: Call<T>,
    /// Where the answer is left. What tonic has is a head, or an error.
    reply: Arc<Mutex<Option<Reply>>>,
}

impl<T> ServerStreamingService<T> for Streamed<T> {
    type Response = GenerateResponse;
    type ResponseStream = Empty<Result<GenerateResponse, Status>>;
    type Future = Boxed<Result<tonic::Response<Self::ResponseStream>, Status>>;

    fn call(&mut self, request: tonic::Request<T>) -> Self::Future {
        let (answer, left) = ((self.call)(self.service.clone(), request), self.reply.clone());
        Box::pin(async move {
            let answer = answer.await?;
            Ok(answer.map(|reply| {
                *left.lock() = Some(reply);
                tokio_stream::empty()
            }))
        })
    }
}

/// The time that a call has left by its header. A bad one is for the services to refuse that care.
fn time_left(headers: &HeaderMap) -> Option<Duration> {
    headers.get("grpc-timeout").and_then(|value| value.to_str().ok()).and_then(admission::parse_timeout)
}

/// Whether a path is that of a call of a service: /NAME/CALL.
fn is_of(service: &str, path: &str) -> bool {
    let call = path.strip_prefix('/').and_then(|path| path.strip_prefix(service));
    call.is_some_and(|call| call.starts_with('/'))
}

/// A refusal of a message for its size is RESOURCE_EXHAUSTED, as gRPC has it; tonic calls it OUT_OF_RANGE, which nothing
/// here means otherwise.
fn with_told_size(mut answer: Response<Body>) -> Response<Body> {
    if let Some(status) = answer.headers_mut().get_mut("grpc-status")
        && *status == HeaderValue::from(Code::OutOfRange as i32)
    {
        *status = HeaderValue::from(Code::ResourceExhausted as i32);
    }
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_of_a_service_are_told_from_those_of_others() {
        for (path, is_inference) in [
            ("/perigee.v1.Inference/Generate", true),
            ("/perigee.v1.Inference/NoSuchCall", true),
            ("/perigee.v1.Inference", false),
            ("/perigee.v1.InferenceX/Generate", false),
            ("/perigee.v1.Cluster/Migrate", false),
            ("perigee.v1.Inference/Generate", false),
            ("/", false),
        ] {
            assert_eq!(is_of(Inference::NAME, path), is_inference, "{path}");
        }
    }
}
