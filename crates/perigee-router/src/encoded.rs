//! Answers as the bytes that gRPC sends. Tokens with their text that leave as they come, which are nearly all, are written as they
//! are, without the response that everything else is made into: a large value to carry, with names of its own to allocate and to
//! free.

use prost::Message;
use prost::bytes::BufMut;

use crate::batch::Token;
use crate::grpc::Piece;
use crate::reply::Read;

/// A `perigee.v1.GenerateResponse`.
pub(crate) fn response(read: Read<'_>) -> Piece {
    let response = read.into_response();
    // There is room for all of it, so this cannot fail.
    Piece::framed(response.encoded_len(), |into| response.encode(into).unwrap_or_default())
}

/// The response that consists of a token of a choice, as protobuf has it: fields by number, none that has its default.
pub(crate) fn token(token: &Token<'_>, choice: usize, replica: &str) -> Piece {
    let strings = token.session.len() + token.text.len() + replica.len();
    // Each field has a key, and a length or number of at most ten bytes.
    Piece::framed(strings + 7 * 11, |into| {
        put_string(1, token.session, into);
        put_number(2, choice as u64, into);
        put_number(3, token.index, into);
        // A field that may be absent is there even where it is 0.
        into.put_u8(4 << 3);
        put_varint(u64::from(token.token), into);
        put_string(5, token.text, into);
        put_string(10, replica, into);
        put_number(11, token.epoch, into);
    })
}

fn put_string(field: u8, text: &str, into: &mut &mut [u8]) {
    if !text.is_empty() {
        into.put_u8(field << 3 | 2);
        put_varint(text.len() as u64, into);
        into.put_slice(text.as_bytes());
    }
}

fn put_number(field: u8, number: u64, into: &mut &mut [u8]) {
    if number != 0 {
        into.put_u8(field << 3);
        put_varint(number, into);
    }
}

/// Seven bits a byte, the least first; all but the last byte have the eighth one set.
fn put_varint(mut number: u64, into: &mut &mut [u8]) {
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
    use prost::bytes::Buf;

    use super::*;

    /// The message in a frame, which must be a whole one that is not compressed.
    fn message(mut piece: Piece) -> Vec<u8> {
        let frame = piece.copy_to_bytes(5);
        let message = piece.copy_to_bytes(piece.remaining()).to_vec();
        assert_eq!(*frame, *[&[0], (message.len() as u32).to_be_bytes().as_slice()].concat());
        message
    }

    fn response(from: &Token<'_>, choice: usize, replica: &str) -> GenerateResponse {
        GenerateResponse {
            session_id: from.session.to_owned(),
            choice: choice as u32,
            index: from.index,
            token_id: Some(from.token),
            text: from.text.to_owned(),
            replica: replica.to_owned(),
            epoch: from.epoch,
            ..GenerateResponse::default()
        }
    }

    proptest! {
        #[test]
        fn tokens_are_encoded_as_protobuf_does(
            session in "[a-z0-9]{0,40}",
            (choice, index, epoch, id) in (any::<u32>(), any::<u64>(), any::<u64>(), any::<u32>()),
            text in "\\PC{0,200}",
            replica in "\\PC{0,20}",
        ) {
            let from = Token { session: &session, epoch, index, token: id, text: &text };
            let choice = choice as usize;
            prop_assert_eq!(message(token(&from, choice, &replica)), response(&from, choice, &replica).encode_to_vec());
        }
    }

    #[test]
    fn defaults_are_left_out_and_a_token_0_is_not() {
        for id in [0, 1, u32::MAX] {
            let from = Token { session: "s", epoch: 0, index: 0, token: id, text: "" };
            let encoded = message(token(&from, 0, ""));
            assert_eq!(GenerateResponse::decode(encoded.as_slice()), Ok(response(&from, 0, "")));
            assert_eq!(encoded.len(), response(&from, 0, "").encoded_len());
        }
    }
}
