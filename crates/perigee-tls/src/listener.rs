//! Accepts connections for a gRPC or HTTP server, with TLS or without. Handshakes run beside each other, within a limit of
//! time and number, so that a client which dawdles over one keeps nobody else out.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::Sleep;
use tokio_rustls::TlsAcceptor;

use crate::{Stream, Tls};

/// How long a handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Handshakes at once; further connections wait to be accepted.
const HANDSHAKES: usize = 256;
/// Pause after the system could not accept, for want of file descriptors mostly.
const PAUSE: Duration = Duration::from_millis(100);

/// What a listener is for, which decides whom it lets in where an authority was named.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// gRPC for clients: a certificate may be shown, and must be good then.
    Public,
    /// gRPC among routers and replicas: a certificate must be shown.
    Internal,
    /// HTTP: probes, metrics and a router's API: nobody is asked for a certificate.
    Http,
}

/// A listening port and how its connections begin.
#[derive(Debug)]
pub struct Listening {
    listener: TcpListener,
    tls: Option<Arc<Tls>>,
    purpose: Purpose,
    handshakes: JoinSet<Option<(Stream, SocketAddr)>>,
    pause: Option<Pin<Box<Sleep>>>,
}

impl Listening {
    /// A bound port, with TLS where there is some.
    pub fn new(listener: TcpListener, tls: Option<Arc<Tls>>, purpose: Purpose) -> Self {
        Self { listener, tls, purpose, handshakes: JoinSet::new(), pause: None }
    }

    /// As a stream of connections, which is what gRPC servers take.
    pub fn incoming(self) -> Incoming {
        Incoming(self)
    }

    fn poll_stream(&mut self, context: &mut Context<'_>) -> Poll<(Stream, SocketAddr)> {
        loop {
            match self.handshakes.poll_join_next(context) {
                Poll::Ready(Some(Ok(Some(connection)))) => return Poll::Ready(connection),
                // A handshake that failed, and was told of.
                Poll::Ready(Some(_)) => continue,
                Poll::Ready(None) | Poll::Pending => {}
            }
            if let Some(pause) = &mut self.pause {
                ready!(pause.as_mut().poll(context));
                self.pause = None;
            }
            if self.handshakes.len() >= HANDSHAKES {
                return Poll::Pending;
            }
            match ready!(self.listener.poll_accept(context)) {
                Ok((stream, address)) => {
                    // Without it small messages wait for each other; the connection works all the same.
                    let _ = stream.set_nodelay(true);
                    match self.acceptor() {
                        None => return Poll::Ready((Stream::Plain(stream), address)),
                        Some(acceptor) => {
                            self.handshakes.spawn(handshake(acceptor, stream, address));
                        }
                    }
                }
                Err(error) if is_of_the_connection(&error) => {}
                Err(error) => {
                    tracing::warn!(%error, "accepting a connection failed; pausing");
                    self.pause = Some(Box::pin(tokio::time::sleep(PAUSE)));
                }
            }
        }
    }

    fn acceptor(&self) -> Option<TlsAcceptor> {
        let material = self.tls.as_ref()?.material();
        let servers = material.servers.as_ref()?;
        Some(TlsAcceptor::from(servers.of(self.purpose).clone()))
    }
}

async fn handshake(acceptor: TlsAcceptor, stream: TcpStream, address: SocketAddr) -> Option<(Stream, SocketAddr)> {
    match tokio::time::timeout(HANDSHAKE, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => return Some((Stream::Tls(Box::new(stream)), address)),
        Ok(Err(error)) => tracing::debug!(%address, %error, "TLS handshake failed"),
        Err(_) => tracing::debug!(%address, "TLS handshake took too long"),
    }
    None
}

/// Whether only one connection failed, and not the listener.
fn is_of_the_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

impl axum::serve::Listener for Listening {
    type Io = Stream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Stream, SocketAddr) {
        std::future::poll_fn(|context| self.poll_stream(context)).await
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// Connections as a stream that does not end.
#[derive(Debug)]
pub struct Incoming(Listening);

impl tokio_stream::Stream for Incoming {
    type Item = io::Result<Stream>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_stream(context).map(|(stream, _)| Some(Ok(stream)))
    }
}
