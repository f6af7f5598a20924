//! Where calls come in: those of `perigee.v1.Inference` go straight to their service, all others through the router of
//! routes. That one wraps an answer three times, and each layer costs every token that passes it. Streams of tokens are
//! answered by the same service in bytes that it encodes itself (`encoded`).

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::http::{HeaderValue, Request, Response};
use perigee_proto::codec::Encoded;
use perigee_proto::v1::inference_server::{Inference as _, InferenceServer};
use perigee_proto::v1::{GenerateRequest, ResumeRequest};
use prost::Message;
use prost::bytes::Bytes;
use tonic::body::Body;
use tonic::server::{Grpc, NamedService, ServerStreamingService};
use tonic::service::Routes;
use tonic::{Code, Status};
use tower::{Service, ServiceExt};

use crate::encoded::EncodedReply;
use crate::reply::Reply;
use crate::service::InferenceService;

type Inference = InferenceServer<InferenceService>;
type Boxed<T> = Pin<Box<dyn Future<Output = T> + Send>>;
type Answering = Boxed<Result<Response<Body>, Infallible>>;

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

impl Front {
    /// Inference, whose requests may have so many bytes, and the others.
    pub(crate) fn new(service: InferenceService, message_bytes: usize, others: Routes) -> Self {
        let service = Arc::new(service);
        let inference = InferenceServer::from_arc(service.clone()).max_decoding_message_size(message_bytes);
        Self { service, inference, message_bytes, others: others.prepare() }
    }

    /// Answers a call with a stream of tokens.
    fn stream<T>(&self, request: Request<Body>, call: Call<T>) -> Answering
    where
        T: Message + Default + Send + 'static,
    {
        let (call, limit) = (Streamed { service: self.service.clone(), call }, self.message_bytes);
        Box::pin(async move {
            let mut grpc = Grpc::new(Encoded::<T>::default()).max_decoding_message_size(limit);
            Ok(with_told_size(grpc.server_streaming(call, request).await))
        })
    }
}

/// A call whose answer is a stream of tokens.
type Call<T> = fn(Arc<InferenceService>, tonic::Request<T>) -> Boxed<Result<tonic::Response<Reply>, Status>>;

struct Streamed<T> {
    service: Arc<InferenceService>,
    call: Call<T>,
}

impl<T> ServerStreamingService<T> for Streamed<T> {
    type Response = Bytes;
    type ResponseStream = EncodedReply;
    type Future = Boxed<Result<tonic::Response<EncodedReply>, Status>>;

    fn call(&mut self, request: tonic::Request<T>) -> Self::Future {
        let answer = (self.call)(self.service.clone(), request);
        Box::pin(async move { Ok(answer.await?.map(EncodedReply::new)) })
    }
}

impl Service<Request<Body>> for Front {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Answering;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        // Neither ever waits; how many requests run is admission's business.
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Answering {
        let path = request.uri().path();
        if path == GENERATE {
            self.stream::<GenerateRequest>(request, |service, call| {
                Box::pin(async move { service.generate(call).await })
            })
        } else if path == RESUME {
            self.stream::<ResumeRequest>(request, |service, call| Box::pin(async move { service.resume(call).await }))
        } else if is_of(Inference::NAME, path) {
            let answer = self.inference.call(request);
            Box::pin(async move { answer.await.map(with_told_size) })
        } else {
            let answer = self.others.clone().oneshot(request);
            Box::pin(async move { answer.await.map(with_told_size) })
        }
    }
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
