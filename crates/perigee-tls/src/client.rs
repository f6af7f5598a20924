//! Connections to gRPC servers, with TLS or without, and why one could not be made in words that help. Each connection
//! uses the certificates as they are then.

use std::sync::Arc;

use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::transport::{Channel, Endpoint};

use crate::{Tls, TlsError};

/// Opens connections.
#[derive(Debug, Clone, Default)]
pub struct Dialer {
    tls: Option<Arc<Tls>>,
}

impl Dialer {
    /// Plain TCP.
    pub fn plain() -> Self {
        Self::default()
    }

    /// With TLS where there is some.
    pub fn new(tls: Option<Arc<Tls>>) -> Self {
        Self { tls }
    }

    /// An endpoint for an address host:port, to be set up further and given to [`Dialer::connect`].
    ///
    /// # Errors
    /// [`TlsError::Address`].
    pub fn endpoint(&self, address: &str) -> Result<Endpoint, TlsError> {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        let wrong = |_| TlsError::Address { address: address.to_owned() };
        // The connection's own scheme is http: TLS is below it, and not tonic's to add. Servers see the real one.
        let endpoint = Endpoint::from_shared(format!("http://{address}")).map_err(wrong)?;
        let origin = format!("{scheme}://{address}").parse();
        let origin = origin.map_err(|_| TlsError::Address { address: address.to_owned() })?;
        Ok(endpoint.origin(origin).tcp_nodelay(true))
    }

    /// Connects. A channel whose connection breaks connects again by itself.
    ///
    /// # Errors
    /// [`TlsError`] names the address and what failed.
    pub async fn connect(&self, address: &str, endpoint: Endpoint) -> Result<Channel, TlsError> {
        let Some(tls) = self.tls.clone() else {
            return endpoint.connect().await.map_err(|error| refused(address, &error));
        };
        let (host, _) = address.rsplit_once(':').ok_or_else(|| TlsError::Address { address: address.to_owned() })?;
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        let name =
            ServerName::try_from(bare.to_owned()).map_err(|_| TlsError::Address { address: address.to_owned() })?;
        let to = address.to_owned();
        let connector = tower::service_fn(move |_| dial(tls.clone(), to.clone(), name.clone()));
        endpoint.connect_with_connector(connector).await.map_err(|error| refused(address, &error))
    }
}

async fn dial(
    tls: Arc<Tls>,
    address: String,
    name: ServerName<'static>,
) -> std::io::Result<TokioIo<TlsStream<TcpStream>>> {
    let stream = TcpStream::connect(&address).await?;
    stream.set_nodelay(true)?;
    let connector = TlsConnector::from(tls.material().client.clone());
    Ok(TokioIo::new(connector.connect(name, stream).await?))
}

fn refused(address: &str, error: &dyn std::error::Error) -> TlsError {
    TlsError::Connect { address: address.to_owned(), reason: with_causes(&error.to_string(), error) }
}

/// What is said of an error, and the whole chain of its causes, each told once: tonic's own texts name none of them, and a
/// certificate that was refused is only there.
pub fn with_causes(said: &str, error: &dyn std::error::Error) -> String {
    let mut told = said.to_owned();
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        if !told.contains(&text) {
            told = format!("{told}: {text}");
        }
        cause = error.source();
    }
    told
}
