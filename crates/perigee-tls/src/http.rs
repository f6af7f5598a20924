//! HTTP/1.1 over a listener: as `axum::serve` does it, and with an end for connections that ask for nothing. Their clients may be
//! gone without a word, or hold files open on purpose.

use std::net::SocketAddr;
use std::pin::pin;
use std::time::Duration;

use axum::Router;
use axum::serve::Listener;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use tokio::sync::watch;

use crate::{Listening, Stream};

/// How long the head of a request may take to come, counted from the answer before it. Clients that keep connections do so for
/// less by default.
const HEAD: Duration = Duration::from_secs(75);

/// Serves until `shutdown` completes; then takes no more connections, and returns once those that are there have their answers.
pub async fn serve_http(mut listening: Listening, routes: Router, shutdown: impl Future<Output = ()>) {
    // Every connection has a receiver: when the last one is gone, all have ended.
    let (end, ends) = watch::channel(false);
    let mut shutdown = pin!(shutdown);
    loop {
        let (stream, address) = tokio::select! {
            connection = listening.accept() => connection,
            () = &mut shutdown => break,
        };
        tokio::spawn(converse(stream, address, routes.clone(), ends.clone()));
    }
    drop((listening, ends));
    end.send_replace(true);
    end.closed().await;
}

/// Answers what comes over a connection, to its end or to the server's.
async fn converse(stream: Stream, address: SocketAddr, routes: Router, mut ends: watch::Receiver<bool>) {
    // Which version it is would be read from the first bytes, without a limit of time.
    let mut builder = Builder::new(TokioExecutor::new()).http1_only();
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEAD);
    let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(routes)));
    let ended = tokio::select! {
        ended = connection.as_mut() => Some(ended),
        // An error would mean the end as well.
        _ = ends.wait_for(|ends| *ends) => None,
    };
    let ended = match ended {
        Some(ended) => ended,
        None => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%address, error, "HTTP connection ended");
    }
}
