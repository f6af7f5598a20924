//! A connection that knows when it was last read from. A token counts as received when its bytes have left the socket: what the
//! client takes to decode a hundred tokens that came together is not the router's. Where the connection is read again before a
//! token is looked at, the later time counts, so none counts as received too early.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::{Context, Poll, ready};

use hyper_util::rt::TokioIo;
use perigee_tls::Dialer;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::transport::Channel;

use super::Clock;
use crate::LoadError;

/// When a connection was last read from, by a clock.
#[derive(Debug, Clone)]
pub(super) struct Stamp {
    clock: Clock,
    at: Arc<AtomicU32>,
}

impl Stamp {
    pub(super) fn new(clock: Clock) -> Self {
        Self { clock, at: Arc::new(AtomicU32::new(clock.read())) }
    }

    /// The clock's reading then.
    pub(super) fn read(&self) -> u32 {
        self.at.load(Ordering::Relaxed)
    }
}

/// Opens a connection to a gRPC server, of which the stamp tells.
pub(super) async fn connect(dialer: &Dialer, address: &str, clock: Clock) -> Result<(Channel, Stamp), LoadError> {
    let refused = |error: &dyn std::fmt::Display| LoadError::Target(format!("{address}: {error}"));
    let stamp = Stamp::new(clock);
    let (dialer, to, stamps) = (dialer.clone(), address.to_owned(), stamp.clone());
    let endpoint = dialer.endpoint(address).map_err(|error| refused(&error))?;
    let connector = tower::service_fn(move |_| {
        let (dialer, to, stamp) = (dialer.clone(), to.clone(), stamps.clone());
        async move { dialer.stream(&to).await.map(|stream| TokioIo::new(Stamped::new(stream, stamp))) }
    });
    let channel = endpoint.connect_with_connector(connector).await.map_err(|error| refused(&error))?;
    Ok((channel, stamp))
}

/// A connection with a stamp.
pub(super) struct Stamped<S> {
    stream: S,
    stamp: Stamp,
}

impl<S> Stamped<S> {
    pub(super) fn new(stream: S, stamp: Stamp) -> Self {
        Self { stream, stamp }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Stamped<S> {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = into.filled().len();
        ready!(Pin::new(&mut this.stream).poll_read(context, into))?;
        if into.filled().len() > before {
            this.stamp.at.store(this.stamp.clock.read(), Ordering::Relaxed);
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Stamped<S> {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, from: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(context, from)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        from: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write_vectored(context, from)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn the_stamp_is_the_time_of_the_last_read_that_brought_something() {
        let (mut theirs, ours) = tokio::io::duplex(64);
        let stamp = Stamp::new(Clock::start());
        let mut ours = Stamped::new(ours, stamp.clone());
        let made = stamp.read();
        let passes = |since: u32| {
            let stamp = stamp.clone();
            async move {
                while stamp.clock.since(since) < Duration::from_millis(1) {
                    tokio::task::yield_now().await;
                }
            }
        };
        passes(made).await;
        assert_eq!(stamp.read(), made, "nothing was read yet");
        theirs.write_all(b"a").await.expect("written");
        let mut byte = [0];
        ours.read_exact(&mut byte).await.expect("read");
        let first = stamp.read();
        assert!(first > made);
        passes(first).await;
        drop(theirs);
        assert_eq!(ours.read(&mut byte).await.expect("the end"), 0);
        assert_eq!(stamp.read(), first, "an end brings nothing");
    }
}
