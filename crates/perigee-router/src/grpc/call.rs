//! One call: its request as the services read it, and its answer on the wire. The work for it ends when its client resets the
//! stream or goes away.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};

use axum::http::{HeaderMap, Request, Response};
use h2::server::SendResponse;
use h2::{Reason, RecvStream, SendStream};
use http_body::{Body as _, Frame, SizeHint};
use prost::bytes::Bytes;
use tonic::body::Body;

use super::{Outlet, Piece};
use crate::front::{Answer, Front};

/// Answers a call.
pub(super) async fn answer(front: Front, request: Request<RecvStream>, mut respond: SendResponse<Piece>) {
    let request = request.map(|body| Body::new(RequestBody { body, is_read: false }));
    let Answer { response, tokens } = {
        let mut answer = pin!(front.answer(request));
        let answered = poll_fn(|context| match answer.as_mut().poll(context) {
            Poll::Ready(answer) => Poll::Ready(Some(answer)),
            Poll::Pending => respond.poll_reset(context).map(|_| None),
        });
        // Nobody waits for it any more.
        let Some(answer) = answered.await else { return };
        answer
    };
    let (head, body) = response.into_parts();
    let is_whole = tokens.is_none() && body.is_end_stream();
    // An error here and below says that the client is gone, as does the end of the connection.
    let Ok(stream) = respond.send_response(Response::from_parts(head, ()), is_whole) else { return };
    match tokens {
        Some(reply) => reply.send_to(Outlet::new(stream)).await,
        None if is_whole => {}
        None => drop(send_body(stream, body).await),
    }
}

/// Sends an answer that is not a stream of tokens.
async fn send_body(mut stream: SendStream<Piece>, body: Body) -> Result<(), h2::Error> {
    let mut body = pin!(body);
    loop {
        let next = poll_fn(|context| match stream.poll_reset(context) {
            Poll::Ready(reset) => Poll::Ready(Err(reset.map_or_else(|error| error, h2::Error::from))),
            Poll::Pending => body.as_mut().poll_frame(context).map(Ok),
        });
        match next.await? {
            Some(Ok(frame)) => match frame.into_data() {
                Ok(data) => {
                    if !data.is_empty() {
                        room(&mut stream).await?;
                    }
                    stream.send_data(data.into(), false)?;
                }
                Err(frame) => return stream.send_trailers(frame.into_trailers().unwrap_or_default()),
            },
            Some(Err(_)) => {
                stream.send_reset(Reason::INTERNAL_ERROR);
                return Ok(());
            }
            None => return stream.send_data(Bytes::new().into(), true),
        }
    }
}

/// Waits until the client takes at least a byte.
async fn room(stream: &mut SendStream<Piece>) -> Result<(), h2::Error> {
    stream.reserve_capacity(1);
    while stream.capacity() == 0 {
        match poll_fn(|context| stream.poll_capacity(context)).await {
            Some(capacity) => drop(capacity?),
            None => return Err(Reason::CANCEL.into()),
        }
    }
    Ok(())
}

/// The body of a request, whose client may send more as it is read.
struct RequestBody {
    body: RecvStream,
    /// Whether trailers are what comes next.
    is_read: bool,
}

impl http_body::Body for RequestBody {
    type Data = Bytes;
    type Error = h2::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, h2::Error>>> {
        let this = &mut *self;
        if !this.is_read {
            if let Some(data) = ready!(this.body.poll_data(context)) {
                let taken = data.and_then(|data| {
                    this.body.flow_control().release_capacity(data.len())?;
                    Ok(Frame::data(data))
                });
                return Poll::Ready(Some(taken));
            }
            this.is_read = true;
        }
        let trailers: Option<HeaderMap> = ready!(this.body.poll_trailers(context))?;
        Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers))))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}
