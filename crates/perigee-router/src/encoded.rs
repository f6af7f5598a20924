//! Answers as the bytes that gRPC sends. All but the first and the last event of a session are a token and its text: those
//! are written as they are, without the response that everything else is made into, which is a large value to carry through
//! three layers and has names of its own to allocate and to free.

use std::pin::Pin;
use std::task::{Context, Poll};

use perigee_proto::internal::{Finish, SessionEvent};
use prost::Message;
use prost::bytes::{BufMut, Bytes, BytesMut};
use tokio_stream::Stream;
use tonic::Status;

use crate::reply::{Read, Reply};

/// Bytes of an answer's buffer, in which it goes round; a longer response has it grow.
const BUFFER_BYTES: usize = 256;

/// A stream of encoded `perigee.v1.GenerateResponse`.
#[derive(Debug)]
pub(crate) struct EncodedReply {
    reply: Reply,
    buffer: BytesMut,
}

impl EncodedReply {
    pub(crate) fn new(reply: Reply) -> Self {
        Self { reply, buffer: BytesMut::with_capacity(BUFFER_BYTES) }
    }
}

impl Stream for EncodedReply {
    type Item = Result<Bytes, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        let buffer = &mut this.buffer;
        let encode = |read: Read<'_>| match plain(&read) {
            Some(event) => put_token(event, read.replica, buffer),
            // A buffer grows as it must, so this cannot fail.
            None => read.into_response().encode(buffer).unwrap_or_default(),
        };
        let polled = this.reply.poll_with(context, encode);
        polled.map(|item| item.map(|read| read.map(|()| this.buffer.split().freeze()).map_err(Status::from)))
    }
}

/// The event, if a token and its text are all that its client is told.
fn plain<'a>(read: &'a Read<'_>) -> Option<&'a SessionEvent> {
    let event = &read.event;
    let says_more = read.is_first
        || read.seal.is_some()
        || event.finish() != Finish::Unspecified
        || event.usage.is_some()
        || event.logprobs.is_some()
        || !event.prompt_logprobs.is_empty()
        // The router's own word for the end of a session.
        || event.session.is_empty();
    if says_more { None } else { Some(event) }
}

/// Encodes the response that consists of these, as protobuf does: fields by number, none that has its default.
fn put_token(event: &SessionEvent, replica: &str, into: &mut BytesMut) {
    let strings = event.session.len() + event.text.len() + replica.len();
    // Each field has a key, and a length or number of at most ten bytes.
    into.reserve(strings + 7 * 11);
    put_string(1, &event.session, into);
    put_number(2, u64::from(event.choice), into);
    put_number(3, event.index, into);
    if let Some(token) = event.token {
        // A field that may be absent is there even where it is 0.
        into.put_u8(4 << 3);
        put_varint(u64::from(token), into);
    }
    put_string(5, &event.text, into);
    put_string(10, replica, into);
    put_number(11, event.epoch, into);
}

fn put_string(field: u8, text: &str, into: &mut BytesMut) {
    if !text.is_empty() {
        into.put_u8(field << 3 | 2);
        put_varint(text.len() as u64, into);
        into.put_slice(text.as_bytes());
    }
}

fn put_number(field: u8, number: u64, into: &mut BytesMut) {
    if number != 0 {
        into.put_u8(field << 3);
        put_varint(number, into);
    }
}

/// Seven bits a byte, the least first; all but the last byte have the eighth one set.
fn put_varint(mut number: u64, into: &mut BytesMut) {
    while number >= 0x80 {
        into.put_u8(number as u8 | 0x80);
        number >>= 7;
    }
    into.put_u8(number as u8);
}

#[cfg(test)]
mod tests {
    use perigee_proto::v1::GenerateResponse;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn tokens_are_encoded_as_protobuf_does(
            session in "[a-z0-9]{1,40}",
            (choice, index, epoch) in (any::<u32>(), any::<u64>(), any::<u64>()),
            token in proptest::option::of(any::<u32>()),
            text in "\\PC{0,200}",
            replica in "\\PC{0,20}",
        ) {
            let event = SessionEvent {
                session: session.clone(), epoch, choice, index, token, text: text.clone(), ..SessionEvent::default()
            };
            let mut encoded = BytesMut::new();
            put_token(&event, &replica, &mut encoded);
            let response = GenerateResponse {
                session_id: session, choice, index, token_id: token, text, replica, epoch, ..GenerateResponse::default()
            };
            prop_assert_eq!(encoded.freeze(), response.encode_to_vec());
        }
    }

    #[test]
    fn defaults_are_left_out_and_a_token_0_is_not() {
        for token in [None, Some(0), Some(1), Some(u32::MAX)] {
            let event = SessionEvent { session: "s".to_owned(), token, ..SessionEvent::default() };
            let mut encoded = BytesMut::new();
            put_token(&event, "", &mut encoded);
            let response =
                GenerateResponse { session_id: "s".to_owned(), token_id: token, ..GenerateResponse::default() };
            assert_eq!(GenerateResponse::decode(encoded.freeze()), Ok(response));
        }
    }
}
