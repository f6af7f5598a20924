//! Server-sent events: a stream of JSON objects, `data: [DONE]` at its end. An error after the first event is an event too,
//! since the status is gone by then. The client's going away drops the stream, and with it what it reads.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use perigee_proto::v1;
use serde_json::Value;
use tokio_stream::{Stream, StreamExt};

use super::answers::Answers;
use super::error::HttpError;

/// A comment goes out where nothing else does for that long, so that a connection that is gone is noticed.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// Sends objects as events.
pub(crate) fn respond(objects: impl Stream<Item = Result<Value, HttpError>> + Send + 'static) -> Response {
    let objects = objects.map(|object| object.unwrap_or_else(|error| error.body()).to_string());
    let events = objects.chain(tokio_stream::once("[DONE]".to_owned()));
    let events = events.map(|data| Ok::<_, Infallible>(Event::default().data(data)));
    Sse::new(events).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response()
}

/// Objects that `write` makes of each response, and at the end, where it gets none.
pub(crate) fn objects(
    answers: Answers,
    write: impl FnMut(&Answers, Option<(usize, v1::GenerateResponse)>) -> Vec<Value> + Unpin,
) -> impl Stream<Item = Result<Value, HttpError>> {
    Objects { answers, write, ready: VecDeque::new(), has_ended: false }
}

struct Objects<W> {
    answers: Answers,
    write: W,
    ready: VecDeque<Value>,
    has_ended: bool,
}

impl<W> Stream for Objects<W>
where
    W: FnMut(&Answers, Option<(usize, v1::GenerateResponse)>) -> Vec<Value> + Unpin,
{
    type Item = Result<Value, HttpError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        loop {
            if let Some(object) = this.ready.pop_front() {
                return Poll::Ready(Some(Ok(object)));
            }
            if this.has_ended {
                return Poll::Ready(None);
            }
            let item = match ready!(Pin::new(&mut this.answers).poll_next(context)) {
                Some(Ok(item)) => Some(item),
                Some(Err(error)) => {
                    this.has_ended = true;
                    return Poll::Ready(Some(Err(error)));
                }
                None => None,
            };
            this.has_ended = item.is_none();
            this.ready.extend((this.write)(&this.answers, item));
        }
    }
}
