//! One client's connection: takes in its calls, each of which gets a task, and notices when nobody is there any more.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::task::{Context, Poll};
use std::time::Duration;

use h2::server::Builder;
use h2::{Ping, PingPong};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;
use tokio::time::{Instant, Sleep};
use tonic::transport::server::Connected;

use super::{Piece, call};
use crate::front::Front;
use crate::gather::Gathered;

/// How long a client may take to begin to speak HTTP/2.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// A client whose machine vanished is noticed within these two.
const PING_EVERY: Duration = Duration::from_secs(10);
const PONG_WITHIN: Duration = Duration::from_secs(5);

/// Serves a connection to its end; once `stopping` says so, it takes no more calls and ends with the last one.
pub(super) async fn serve<C>(io: C, builder: Builder, front: Front, mut stopping: watch::Receiver<bool>)
where
    C: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
{
    let peer = io.connect_info();
    let handshake = builder.handshake::<_, Piece>(Gathered::new(io));
    let mut connection = match tokio::time::timeout(HANDSHAKE, handshake).await {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => return tracing::debug!(%error, "a connection does not speak HTTP/2"),
        Err(_) => return tracing::debug!("a connection did not begin to speak HTTP/2 within {HANDSHAKE:?}"),
    };
    let mut pulse = connection.ping_pong().map(Pulse::new);
    let mut stopped = pin!(stopping.wait_for(|stop| *stop));
    let mut is_stopping = false;
    loop {
        let next = poll_fn(|context| {
            if !is_stopping && stopped.as_mut().poll(context).is_ready() {
                is_stopping = true;
                connection.graceful_shutdown();
            }
            if pulse.as_mut().is_some_and(|pulse| pulse.poll_lost(context).is_ready()) {
                return Poll::Ready(Next::Silent);
            }
            connection.poll_accept(context).map(Next::Call)
        });
        match next.await {
            Next::Call(Some(Ok((mut request, respond)))) => {
                request.extensions_mut().insert(peer.clone());
                tokio::spawn(call::answer(front.clone(), request, respond));
            }
            Next::Call(Some(Err(error))) => return tracing::debug!(%error, "a connection broke"),
            Next::Call(None) => return,
            // Its calls end with it.
            Next::Silent => return tracing::debug!("a client did not answer a ping within {PONG_WITHIN:?}"),
        }
    }
}

/// What a connection has next.
enum Next<T> {
    Call(T),
    Silent,
}

/// Asks a client now and then whether it is there.
struct Pulse {
    pings: PingPong,
    /// When to ask, or until when the answer must have come.
    timer: Pin<Box<Sleep>>,
    is_asked: bool,
}

impl Pulse {
    fn new(pings: PingPong) -> Self {
        Self { pings, timer: Box::pin(tokio::time::sleep(PING_EVERY)), is_asked: false }
    }

    /// Ready once the client did not answer in time, or its connection is broken.
    fn poll_lost(&mut self, context: &mut Context<'_>) -> Poll<()> {
        loop {
            if self.is_asked
                && let Poll::Ready(answer) = self.pings.poll_pong(context)
            {
                if answer.is_err() {
                    // The connection itself says how it ended.
                    return Poll::Pending;
                }
                self.is_asked = false;
                self.timer.as_mut().reset(Instant::now() + PING_EVERY);
            }
            if self.timer.as_mut().poll(context).is_pending() {
                return Poll::Pending;
            }
            if self.is_asked {
                return Poll::Ready(());
            }
            if self.pings.send_ping(Ping::opaque()).is_err() {
                return Poll::Pending;
            }
            self.is_asked = true;
            self.timer.as_mut().reset(Instant::now() + PONG_WITHIN);
        }
    }
}
