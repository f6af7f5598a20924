//! Lingering close: what nobody reads of a request's body is still taken from the connection and thrown away, within bounds.
//!
//! A request may be refused by its length, its path or its method while its client is still writing. To end the connection
//! there would fail that write, and the reset that follows may take the answer along before the client reads it. So the
//! answer goes out at once, and the rest of the body is read behind it.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::{Body, BodyDataStream, Bytes, HttpBody};
use axum::extract::Request;
use axum::http::header;
use tokio::runtime::Handle;
use tokio_stream::{Stream, StreamExt};

/// Most bytes that are thrown away of one body. A client that has more to write finds the connection closed.
const BYTES: usize = 128 << 20;
/// Longest that this goes on.
const TIME: Duration = Duration::from_secs(30);

/// A layer's function: the rest of a request's body is thrown away wherever it is dropped before its end.
pub(super) async fn linger(request: Request) -> Request {
    let is_withheld = request.headers().contains_key(header::EXPECT);
    request.map(|body| {
        if body.is_end_stream() {
            return body;
        }
        Body::from_stream(Lingering { rest: Some(body.into_data_stream()), is_withheld })
    })
}

/// A body that is read to its end, if not by its owner then after it.
struct Lingering {
    /// None once its end, or an error, was seen.
    rest: Option<BodyDataStream>,
    /// The client sends the body once it is asked to (`Expect: 100-continue`), which the first look at it does. A final
    /// answer before that says not to send it, so there may be nothing to throw away but the next request.
    is_withheld: bool,
}

impl Stream for Lingering {
    type Item = Result<Bytes, axum::Error>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.is_withheld = false;
        let Some(rest) = &mut self.rest else { return Poll::Ready(None) };
        let item = ready!(Pin::new(rest).poll_next(context));
        if !matches!(item, Some(Ok(_))) {
            self.rest = None;
        }
        Poll::Ready(item)
    }
}

impl Drop for Lingering {
    fn drop(&mut self) {
        let Some(rest) = self.rest.take() else { return };
        // Outside a runtime there is no connection either.
        if let Ok(runtime) = Handle::try_current()
            && !self.is_withheld
        {
            runtime.spawn(tokio::time::timeout(TIME, throw_away(rest)));
        }
    }
}

async fn throw_away(mut rest: BodyDataStream) {
    let mut left = BYTES;
    while let Some(Ok(data)) = rest.next().await {
        let Some(further) = left.checked_sub(data.len()) else { return };
        left = further;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::sync::oneshot;

    use super::*;

    /// Drops a body of `pieces` unread; gives how many were thrown away once it is gone, and how long that took.
    async fn thrown_away(
        pieces: impl Stream<Item = Bytes> + Send + 'static,
        expect: Option<&str>,
    ) -> (usize, Duration) {
        let taken = Arc::new(AtomicUsize::new(0));
        let (gone, is_gone) = oneshot::channel::<()>();
        let counted = {
            let taken = taken.clone();
            pieces.map(move |piece| {
                let _until_dropped = &gone;
                taken.fetch_add(1, Ordering::Relaxed);
                Ok::<_, axum::Error>(piece)
            })
        };
        let mut request = Request::post("/").body(Body::from_stream(counted)).unwrap();
        if let Some(expect) = expect {
            request.headers_mut().insert(header::EXPECT, expect.parse().unwrap());
        }
        let began = tokio::time::Instant::now();
        drop(linger(request).await);
        is_gone.await.unwrap_err();
        (taken.load(Ordering::Relaxed), began.elapsed())
    }

    fn mebibytes(count: usize) -> impl Stream<Item = Bytes> {
        tokio_stream::iter(std::iter::repeat_n(Bytes::from(vec![b'x'; 1 << 20]), count))
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_nobody_reads_is_thrown_away_within_bounds() {
        assert_eq!(thrown_away(mebibytes(20), None).await, (20, Duration::ZERO));
        assert_eq!(thrown_away(mebibytes(1000), None).await, (129, Duration::ZERO), "the bound, and what shows it");
        let (taken, time) = thrown_away(mebibytes(3).chain(tokio_stream::pending()), None).await;
        assert_eq!((taken, time.as_secs()), (3, 30), "a client that stops writing and stays");
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_is_withheld_is_not_asked_for() {
        assert_eq!(thrown_away(mebibytes(20), Some("100-continue")).await, (0, Duration::ZERO));
    }
}
