//! What a service may know of who called it, and the rule for services that are not for everybody.

use perigee_proto::status::{ErrorKind, WireError};
use tonic::{Request, Status};

/// The other end of an accepted connection; a gRPC request carries it among its extensions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// Whether it showed a certificate of the named authority. Never on plain TCP or without an authority.
    pub has_certificate: bool,
}

/// An interceptor that lets only callers with a certificate pass.
///
/// # Errors
/// UNAUTHENTICATED, with what to do about it.
pub fn require_certificate(request: Request<()>) -> Result<Request<()>, Status> {
    if request.extensions().get::<Peer>().is_some_and(|peer| peer.has_certificate) {
        return Ok(request);
    }
    let message = "this service is for operators: connect with a certificate of the cluster's authority \
                   (--tls-cert and --tls-key)";
    Err(WireError::new(ErrorKind::Unauthenticated, message).into())
}
