//! A gRPC server on a free port whose only service is health, open to everybody or to operators.

use std::net::SocketAddr;
use std::sync::Arc;

use perigee_testkit::certificates::{Authority, Identity};
use perigee_tls::{Dialer, Listening, Purpose, Tls, TlsError, TlsFiles, require_certificate};
use tokio::net::TcpListener;
use tokio::task::AbortHandle;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Server;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

pub(crate) struct Health {
    pub(crate) address: SocketAddr,
    task: AbortHandle,
}

impl Drop for Health {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Health {
    pub(crate) async fn start(tls: Option<Arc<Tls>>, purpose: Purpose) -> Self {
        Self::serve(tls, purpose, false).await
    }

    /// Behind the rule for operators' services.
    pub(crate) async fn for_operators(tls: Option<Arc<Tls>>) -> Self {
        Self::serve(tls, Purpose::Public, true).await
    }

    async fn serve(tls: Option<Arc<Tls>>, purpose: Purpose, operators: bool) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let incoming = Listening::new(listener, tls, purpose).incoming();
        let (_, health) = tonic_health::server::health_reporter();
        let mut server = Server::builder();
        let router = if operators {
            server.add_service(InterceptedService::new(health, require_certificate))
        } else {
            server.add_service(health)
        };
        let task = tokio::spawn(async move { router.serve_with_incoming(incoming).await.unwrap() });
        Self { address, task: task.abort_handle() }
    }

    /// `localhost` resolves where the certificate says so; the port is this server's.
    pub(crate) fn at(&self, host: &str) -> String {
        format!("{host}:{}", self.address.port())
    }
}

/// One call; the error is that of the connection, or of the call, as text.
pub(crate) async fn call(dialer: &Dialer, address: &str) -> Result<(), String> {
    let endpoint = dialer.endpoint(address).map_err(|error| error.to_string())?;
    let channel = dialer.connect(address, endpoint).await.map_err(|error| error.to_string())?;
    let answer = HealthClient::new(channel).check(HealthCheckRequest::default()).await;
    answer.map(drop).map_err(|status| format!("{:?}: {}", status.code(), status.message()))
}

pub(crate) fn load(authority: Option<&Authority>, identity: Option<&Identity>) -> Arc<Tls> {
    Arc::new(try_load(authority, identity).unwrap())
}

pub(crate) fn try_load(authority: Option<&Authority>, identity: Option<&Identity>) -> Result<Tls, TlsError> {
    Tls::load(TlsFiles {
        cert: identity.map(|identity| identity.certificate.clone()),
        key: identity.map(|identity| identity.key.clone()),
        ca: authority.map(|authority| authority.certificate.clone()),
    })
}

pub(crate) fn dialer(authority: Option<&Authority>, identity: Option<&Identity>) -> Dialer {
    Dialer::new(Some(load(authority, identity)))
}
