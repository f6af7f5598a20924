//! What leaves on a stream. A token's answer is some hundred bytes, and lies in the piece itself: to allocate and free memory
//! for each would take longer than to move it.

use std::fmt;

use perigee_proto::codec::FRAME_BYTES;
use prost::bytes::{Buf, Bytes};

/// Most bytes that a piece holds itself.
const SHORT_BYTES: usize = 190;

/// Bytes to send.
pub(crate) enum Piece {
    /// Those from `begin` to `end`.
    Short { bytes: [u8; SHORT_BYTES], begin: u8, end: u8 },
    /// Any number.
    Long(Bytes),
}

impl Piece {
    /// A message of at most so many bytes, as `write` has it, in its frame.
    pub(crate) fn framed(most: usize, write: impl FnOnce(&mut &mut [u8])) -> Self {
        let room = FRAME_BYTES + most;
        if room <= SHORT_BYTES {
            let mut bytes = [0; SHORT_BYTES];
            let end = frame(&mut bytes[..room], write) as u8;
            return Self::Short { bytes, begin: 0, end };
        }
        let mut bytes = vec![0; room];
        let end = frame(&mut bytes, write);
        bytes.truncate(end);
        Self::Long(bytes.into())
    }
}

/// Has a message written behind its frame, and says where it ends.
fn frame(bytes: &mut [u8], write: impl FnOnce(&mut &mut [u8])) -> usize {
    let (frame, mut rest) = bytes.split_at_mut(FRAME_BYTES);
    let room = rest.len();
    write(&mut rest);
    let length = room - rest.len();
    frame[1..].copy_from_slice(&(length as u32).to_be_bytes());
    FRAME_BYTES + length
}

impl From<Bytes> for Piece {
    fn from(bytes: Bytes) -> Self {
        Self::Long(bytes)
    }
}

impl fmt::Debug for Piece {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Piece({} bytes)", self.remaining())
    }
}

impl Buf for Piece {
    fn remaining(&self) -> usize {
        self.chunk().len()
    }

    fn chunk(&self) -> &[u8] {
        match self {
            Self::Short { bytes, begin, end } => &bytes[usize::from(*begin)..usize::from(*end)],
            Self::Long(bytes) => bytes,
        }
    }

    fn advance(&mut self, count: usize) {
        match self {
            Self::Short { begin, end, .. } => {
                assert!(count <= usize::from(*end - *begin), "a piece has no {count} bytes left");
                *begin += count as u8;
            }
            Self::Long(bytes) => bytes.advance(count),
        }
    }
}

#[cfg(test)]
mod tests {
    use prost::bytes::BufMut;

    use super::*;

    #[test]
    fn a_message_of_any_length_is_framed_and_goes_in_parts() {
        for length in [0, 1, 100, SHORT_BYTES - FRAME_BYTES, SHORT_BYTES - FRAME_BYTES + 1, 1000, 100_000] {
            let message: Vec<u8> = (0..length).map(|at| at as u8).collect();
            let mut piece = Piece::framed(length + 3, |into| into.put_slice(&message));
            assert_eq!(piece.remaining(), FRAME_BYTES + length);
            let head = piece.copy_to_bytes(FRAME_BYTES);
            assert_eq!((head[0], &head[1..]), (0, (length as u32).to_be_bytes().as_slice()));
            let begun = piece.copy_to_bytes(length / 2);
            assert_eq!([begun, piece.copy_to_bytes(length - length / 2)].concat(), message);
            assert_eq!((piece.has_remaining(), piece.chunk().len()), (false, 0));
        }
    }

    #[test]
    #[should_panic(expected = "a piece has no 9 bytes left")]
    fn nothing_is_read_beyond_its_end() {
        Piece::framed(3, |into| into.put_slice(b"abc")).advance(9);
    }
}
