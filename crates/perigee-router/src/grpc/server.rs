//! Accepts clients' connections until it is told to stop, and ends when the last of them has.

use std::future::Future;
use std::io;
use std::pin::pin;

use h2::server::Builder;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;
use tokio_stream::{Stream, StreamExt};
use tonic::transport::server::Connected;

use super::connection;
use crate::config::Limits;
use crate::front::Front;

/// Bytes of requests that a client may send ahead, on a stream and on its connection.
const WINDOW_BYTES: u32 = 1 << 20;
/// Bytes of answers that wait for a stream's window.
const SEND_BYTES: usize = 400 << 10;
/// Streams that a client may have reset for errors of its own before its connection ends.
const RESET_STREAMS: usize = 1024;

/// How connections are served.
#[derive(Debug, Clone)]
pub(crate) struct GrpcServer {
    builder: Builder,
}

impl GrpcServer {
    /// A server with the limits of connections.
    pub(crate) fn new(limits: &Limits) -> Self {
        let mut builder = Builder::new();
        builder
            .initial_window_size(WINDOW_BYTES)
            .initial_connection_window_size(WINDOW_BYTES)
            .max_send_buffer_size(SEND_BYTES)
            .max_concurrent_streams(limits.streams_per_connection)
            .max_header_list_size(limits.header_bytes)
            .max_pending_accept_reset_streams(limits.pending_resets)
            .max_local_error_reset_streams(Some(RESET_STREAMS));
        Self { builder }
    }

    /// Serves connections until `stop` completes, also where no more come, then waits for those that are open: they take no
    /// more calls, and end with their last one.
    pub(crate) async fn serve<C>(
        self,
        front: Front,
        incoming: impl Stream<Item = io::Result<C>>,
        stop: impl Future<Output = ()>,
    ) where
        C: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
    {
        let (stopping, stopped) = watch::channel(false);
        {
            // The port closes before the wait, so that nobody waits there for a router that has left.
            let (mut incoming, mut stop) = (pin!(incoming), pin!(stop));
            loop {
                let accepted = tokio::select! {
                    () = &mut stop => break,
                    accepted = incoming.next() => accepted,
                };
                match accepted {
                    Some(Ok(io)) => {
                        let serving = connection::serve(io, self.builder.clone(), front.clone(), stopped.clone());
                        tokio::spawn(serving);
                    }
                    Some(Err(error)) => tracing::debug!(%error, "a connection was not accepted"),
                    None => {
                        stop.as_mut().await;
                        break;
                    }
                }
            }
        }
        drop(stopped);
        stopping.send_replace(true);
        stopping.closed().await;
    }
}
