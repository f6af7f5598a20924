//! A connection whose writes leave together. Whoever takes in a replica's tokens adds small messages to what the connections of
//! their clients are to send; a connection's task would run after every one or two of them where replicas' batches are small,
//! and a system call each would cost more than the whole rest of a token's way. So a flush first lets all tasks run that are
//! ready, and then writes what they have added as well.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;
use tonic::transport::server::Connected;

/// Bytes beyond which nothing more is gathered.
const MOST_BYTES: usize = 64 << 10;

/// A connection that gathers what is written until it is flushed, and until those who could add to it have run.
#[derive(Debug)]
pub(crate) struct Gathered<S> {
    stream: S,
    bytes: Vec<u8>,
    /// How many of these are written.
    written: usize,
    /// Whether the others had their turn since the flush was asked for.
    has_waited: bool,
    heard: Arc<Heard>,
}

/// When something last came on a connection, for who asks whether its client is there.
#[derive(Debug)]
pub(crate) struct Heard {
    opened: Instant,
    /// Nanoseconds after that.
    last: AtomicU64,
}

impl Heard {
    pub(crate) fn last(&self) -> Instant {
        self.opened + Duration::from_nanos(self.last.load(Ordering::Relaxed))
    }

    fn now(&self) {
        self.last.store(self.opened.elapsed().as_nanos() as u64, Ordering::Relaxed);
    }
}

impl<S> Gathered<S> {
    pub(crate) fn new(stream: S) -> Self {
        let heard = Arc::new(Heard { opened: Instant::now(), last: AtomicU64::new(0) });
        Self { stream, bytes: Vec::new(), written: 0, has_waited: false, heard }
    }

    pub(crate) fn heard(&self) -> Arc<Heard> {
        self.heard.clone()
    }
}

impl<S: AsyncWrite + Unpin> Gathered<S> {
    /// Writes what was gathered.
    fn poll_drain(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.written < self.bytes.len() {
            let written = ready!(Pin::new(&mut self.stream).poll_write(context, &self.bytes[self.written..]))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.written += written;
        }
        (self.written, self.has_waited) = (0, false);
        self.bytes.clear();
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Gathered<S> {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, from: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.bytes.len() >= MOST_BYTES {
            ready!(this.poll_drain(context))?;
        }
        let taken = from.len().min(MOST_BYTES - this.bytes.len());
        this.bytes.extend_from_slice(&from[..taken]);
        Poll::Ready(Ok(taken))
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.bytes.is_empty() && !this.has_waited {
            this.has_waited = true;
            // A task that wakes itself comes after all that are ready.
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        ready!(this.poll_drain(context))?;
        Pin::new(&mut this.stream).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_drain(context))?;
        Pin::new(&mut this.stream).poll_shutdown(context)
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Gathered<S> {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = into.filled().len();
        let polled = Pin::new(&mut this.stream).poll_read(context, into);
        if into.filled().len() > before {
            this.heard.now();
        }
        polled
    }
}

impl<S: Connected> Connected for Gathered<S> {
    type ConnectInfo = S::ConnectInfo;

    fn connect_info(&self) -> Self::ConnectInfo {
        self.stream.connect_info()
    }
}

#[cfg(test)]
mod tests {
    use parking_lot::Mutex;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

    use super::*;

    /// Counts the writes that reach it.
    struct Counted(DuplexStream, usize);

    impl AsyncWrite for Counted {
        fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, from: &[u8]) -> Poll<io::Result<usize>> {
            self.1 += 1;
            Pin::new(&mut self.0).poll_write(context, from)
        }

        fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.0).poll_flush(context)
        }

        fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.0).poll_shutdown(context)
        }
    }

    #[tokio::test]
    async fn what_ready_tasks_add_leaves_with_what_was_flushed() {
        let (ours, mut theirs) = tokio::io::duplex(1 << 20);
        let gathered = Arc::new(Mutex::new(Gathered::new(Counted(ours, 0))));
        let write = |number: u8| {
            let gathered = gathered.clone();
            async move {
                std::future::poll_fn(|context| Pin::new(&mut *gathered.lock()).poll_write(context, &[number])).await
            }
        };
        write(0).await.expect("written");
        let flush = {
            let gathered = gathered.clone();
            async move { std::future::poll_fn(|context| Pin::new(&mut *gathered.lock()).poll_flush(context)).await }
        };
        // It has its turn before any of those that write.
        let flush = tokio::spawn(flush);
        let tasks: Vec<_> = (1..100).map(|number| tokio::spawn(write(number))).collect();
        flush.await.expect("no panic").expect("flushed");
        let mut read = [0; 100];
        theirs.read_exact(&mut read).await.expect("all bytes");
        assert_eq!((read.to_vec(), gathered.lock().stream.1), ((0..100).collect::<Vec<u8>>(), 1));
        for task in tasks {
            task.await.expect("no panic").expect("written");
        }
    }

    #[tokio::test]
    async fn much_is_written_in_order_through_a_narrow_connection() {
        let (ours, mut theirs) = tokio::io::duplex(1000);
        let mut gathered = Gathered::new(ours);
        let sent: Vec<u8> = (0..5 * MOST_BYTES).map(|index| (index % 251) as u8).collect();
        let expected = sent.clone();
        let writing = tokio::spawn(async move {
            for piece in sent.chunks(777) {
                gathered.write_all(piece).await.expect("written");
            }
            gathered.shutdown().await.expect("ended");
        });
        let mut read = Vec::new();
        theirs.read_to_end(&mut read).await.expect("read");
        writing.await.expect("no panic");
        assert!(read == expected);
    }

    #[tokio::test]
    async fn a_broken_connection_is_an_error() {
        let (ours, theirs) = tokio::io::duplex(1000);
        drop(theirs);
        let mut gathered = Gathered::new(ours);
        gathered.write_all(b"lost").await.expect("gathered");
        assert!(gathered.flush().await.is_err());
    }
}
