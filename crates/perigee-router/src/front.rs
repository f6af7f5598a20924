//! Where calls come in: those of `perigee.v1.Inference` go straight to their service, all others through the router of
//! routes. That one wraps an answer three times, and each layer costs every token that passes it.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use axum::http::{HeaderValue, Request, Response};
use perigee_proto::v1::inference_server::InferenceServer;
use tonic::Code;
use tonic::body::Body;
use tonic::server::NamedService;
use tonic::service::Routes;
use tower::{Service, ServiceExt};

use crate::service::InferenceService;

type Inference = InferenceServer<InferenceService>;
type Answering = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

/// All gRPC services of a router.
#[derive(Clone)]
pub(crate) struct Front {
    inference: Inference,
    others: Routes,
}

impl Front {
    /// Inference, and the others.
    pub(crate) fn new(inference: Inference, others: Routes) -> Self {
        Self { inference, others: others.prepare() }
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
        if is_of(Inference::NAME, request.uri().path()) {
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
