//! One client's connection: takes in its calls, each of which gets a task, and notices when nobody is there any more.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
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
use crate::gather::{Gathered, Heard};

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
    let io = Gathered::new(io);
    let heard = io.heard();
    let handshake = builder.handshake::<_, Piece>(io);
    let mut connection = match tokio::time::timeout(HANDSHAKE, handshake).await {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => return tracing::debug!(%error, "a connection does not speak HTTP/2"),
        Err(_) => return tracing::debug!("a connection did not begin to speak HTTP/2 within {HANDSHAKE:?}"),
    };
    let mut pulse = connection.ping_pong().map(|pings| Pulse::new(pings, heard));
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
            // Its calls end with it. Nothing is said to a client of which nothing is heard.
            Next::Silent => return tracing::debug!("a client did not answer a ping within {PONG_WITHIN:?}"),
        }
    }
}

/// What a connection has next.
enum Next<T> {
    Call(T),
    Silent,
}

/// Asks a client of which nothing is heard whether it is there. Whatever comes is an answer: that to the ping itself may have to
/// wait behind a long prompt.
struct Pulse {
    pings: PingPong,
    heard: Arc<Heard>,
    /// When to ask, or until when something must have come.
    timer: Pin<Box<Sleep>>,
    /// When it was asked, if it was.
    asked: Option<Instant>,
}

impl Pulse {
    fn new(pings: PingPong, heard: Arc<Heard>) -> Self {
        Self { pings, timer: Box::pin(tokio::time::sleep_until(heard.last() + PING_EVERY)), heard, asked: None }
    }

    /// Ready once the client did not answer in time.
    fn poll_lost(&mut self, context: &mut Context<'_>) -> Poll<()> {
        // Taken in, so that another ping may be sent; what came with it is heard anyway. An error is the connection's to tell.
        let _ = self.pings.poll_pong(context);
        while self.timer.as_mut().poll(context).is_ready() {
            let last = self.heard.last();
            if self.asked.take().is_some_and(|asked| last < asked) {
                return Poll::Ready(());
            }
            let now = Instant::now();
            let due = last + PING_EVERY;
            if due > now {
                self.timer.as_mut().reset(due);
                continue;
            }
            // Refused where the answer to the last one is still on its way behind what came.
            let _ = self.pings.send_ping(Ping::opaque());
            self.asked = Some(now);
            self.timer.as_mut().reset(now + PONG_WITHIN);
        }
        Poll::Pending
    }
}
