//! Answers as the bytes that gRPC sends. All but the first and the last event of a session are a token and its text: those
//! are written as they are, without the response that everything else is made into, which is a large value to carry and has
//! names of its own to allocate and to free.

use perigee_proto::internal::{Finish, SessionEvent};
use prost::Message;
use prost::bytes::{BufMut, Bytes};

use crate::reply::Read;

/// Bytes before a message: whether it is compressed, and its length.
const FRAME_BYTES: usize = 5;

/// A `perigee.v1.GenerateResponse` in its gRPC frame.
pub(crate) fn response(read: Read<'_>) -> Bytes {
    if !read.is_first && read.seal.is_none() && is_plain(&read.event) {
        return token(&read.event, &read.replica);
    }
    let response = read.into_response();
    let mut message = Vec::with_capacity(FRAME_BYTES + response.encoded_len());
    message.resize(FRAME_BYTES, 0);
    // A vector grows as it must, so this cannot fail.
    response.encode(&mut message).unwrap_or_default();
    framed(message)
}

/// Whether a token and its text are all that a client is told of an event that is not the first of its choice.
pub(crate) fn is_plain(event: &SessionEvent) -> bool {
    event.finish == Finish::Unspecified as i32
        && event.usage.is_none()
        && event.logprobs.is_none()
        && event.prompt_logprobs.is_empty()
        // The router's own word for the end of a session.
        && !event.session.is_empty()
}

/// The framed response that consists of these, as protobuf has it: fields by number, none that has its default.
pub(crate) fn token(event: &SessionEvent, replica: &str) -> Bytes {
    let strings = event.session.len() + event.text.len() + replica.len();
    // Each field has a key, and a length or number of at most ten bytes.
    let mut message = Vec::with_capacity(FRAME_BYTES + strings + 7 * 11);
    let into = &mut message;
    into.resize(FRAME_BYTES, 0);
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
    framed(message)
}

/// A message behind room for its frame, with that.
fn framed(mut message: Vec<u8>) -> Bytes {
    let length = (message.len() - FRAME_BYTES) as u32;
    message[1..FRAME_BYTES].copy_from_slice(&length.to_be_bytes());
    message.into()
}

fn put_string(field: u8, text: &str, into: &mut Vec<u8>) {
    if !text.is_empty() {
        into.put_u8(field << 3 | 2);
        put_varint(text.len() as u64, into);
        into.put_slice(text.as_bytes());
    }
}

fn put_number(field: u8, number: u64, into: &mut Vec<u8>) {
    if number != 0 {
        into.put_u8(field << 3);
        put_varint(number, into);
    }
}

/// Seven bits a byte, the least first; all but the last byte have the eighth one set.
fn put_varint(mut number: u64, into: &mut Vec<u8>) {
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

    /// The message in a frame, which must be a whole one that is not compressed.
    fn unframed(mut frame: Bytes) -> Bytes {
        let message = frame.split_off(FRAME_BYTES);
        assert_eq!(frame, [&[0], (message.len() as u32).to_be_bytes().as_slice()].concat());
        message
    }

    proptest! {
        #[test]
        fn tokens_are_encoded_as_protobuf_does(
            session in "[a-z0-9]{1,40}",
            (choice, index, epoch) in (any::<u32>(), any::<u64>(), any::<u64>()),
            token_id in proptest::option::of(any::<u32>()),
            text in "\\PC{0,200}",
            replica in "\\PC{0,20}",
        ) {
            let event = SessionEvent {
                session: session.clone(),
                epoch,
                choice,
                index,
                token: token_id,
                text: text.clone(),
                ..SessionEvent::default()
            };
            let encoded = unframed(token(&event, &replica));
            let response = GenerateResponse {
                session_id: session, choice, index, token_id, text, replica, epoch, ..GenerateResponse::default()
            };
            prop_assert_eq!(encoded, response.encode_to_vec());
        }
    }

    #[test]
    fn defaults_are_left_out_and_a_token_0_is_not() {
        for token_id in [None, Some(0), Some(1), Some(u32::MAX)] {
            let event = SessionEvent { session: "s".to_owned(), token: token_id, ..SessionEvent::default() };
            let encoded = unframed(token(&event, ""));
            let response = GenerateResponse { session_id: "s".to_owned(), token_id, ..GenerateResponse::default() };
            assert_eq!(GenerateResponse::decode(encoded), Ok(response));
        }
    }
}
