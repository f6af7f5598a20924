//! Where an answer's tokens leave: the sending half of its HTTP/2 stream. What is sent while the client takes it goes straight
//! to what its connection writes next; otherwise it stays with the request, whose limits it counts against.

use std::task::{Context, Poll, ready};

use axum::http::{HeaderMap, HeaderValue};
use h2::SendStream;
use prost::bytes::Buf;
use tonic::{Code, Status};

use super::Piece;

/// Bytes that are sent without a look at whether the client takes them. A look has h2 wake the stream's task, once the room
/// that was asked for is there, so one at each token would cost a task's run at each token.
const LOOK_BYTES: usize = 4 << 10;

/// A stream of answers whose head was sent.
#[derive(Debug)]
pub(crate) struct Outlet {
    stream: SendStream<Piece>,
    /// Bytes sent since the last look.
    unseen: usize,
}

/// The client reset the stream, or its connection is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Gone;

impl Outlet {
    pub(crate) fn new(stream: SendStream<Piece>) -> Self {
        Self { stream, unseen: 0 }
    }

    /// Whether the client takes something now, but for [`LOOK_BYTES`] that its connection keeps. To be asked with a message
    /// at hand only: room that is kept for later would be missing on the connection's other streams.
    pub(crate) fn has_room(&mut self) -> bool {
        if self.unseen < LOOK_BYTES {
            return true;
        }
        self.stream.reserve_capacity(1);
        if self.stream.capacity() == 0 {
            return false;
        }
        self.unseen = 0;
        true
    }

    /// Ready once the client takes something.
    pub(crate) fn poll_room(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Gone>> {
        while !self.has_room() {
            match ready!(self.stream.poll_capacity(context)) {
                Some(Ok(_)) => {}
                Some(Err(_)) | None => return Poll::Ready(Err(Gone)),
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Ready once the client does not want the answer any more.
    pub(crate) fn poll_gone(&mut self, context: &mut Context<'_>) -> Poll<Gone> {
        self.stream.poll_reset(context).map(|_| Gone)
    }

    /// Sends a message, as far as there is room; the connection keeps the rest.
    pub(crate) fn send(&mut self, message: Piece) {
        self.unseen += message.remaining();
        // Refused where the client is gone, which `poll_gone` tells.
        let _ = self.stream.send_data(message, false);
    }

    /// Ends the stream after what was sent.
    pub(crate) fn end(mut self, end: Result<(), Status>) {
        let status = end.err().unwrap_or_else(|| Status::new(Code::Ok, ""));
        let mut trailers = HeaderMap::new();
        if status.add_header(&mut trailers).is_err() {
            // A message that no header can hold; the code can.
            trailers.clear();
            trailers.insert("grpc-status", HeaderValue::from(status.code() as i32));
        }
        self.stream.reserve_capacity(0);
        // As above.
        let _ = self.stream.send_trailers(trailers);
    }
}
