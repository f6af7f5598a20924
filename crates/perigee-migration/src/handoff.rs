//! The handoff: one session's record, state and latents as a stream of chunks, written by the source and checked by the
//! target part by part. A handoff that is not exactly what the target's model needs is an error, never a start from
//! zeros. What is in a record is the engine's business, and nothing here reads or writes a slot.
//!
//! A stream begins with the mark `PRGM` and a version, then has these parts in this order: header; any number of runs of
//! token ids, which may leave while the source still steps; the frozen record; the segment table; state slices and pages
//! in any order; the trailer. The segment table comes before everything large, so that a target knows which pages are
//! due, and can refuse, before they arrive. Where the target reaches the source's memory, one part with the number of a slot
//! and its digests stands for all state slices, and the target copies the slot. Each part is
//!
//! | bytes | field |
//! | --- | --- |
//! | 1 | kind of part |
//! | 2 | length of its head |
//! | 8 | length of its body |
//! | head | fields; see `part.rs` |
//! | 4 | CRC-32 of all of the above |
//! | body | under a CRC-32 in the head, or a digest where it is a tensor's |
//!
//! The stream is cut into chunks of bounded size, each with its number and a CRC-32 (`chunk.rs`), wherever cuts fall.

mod chunk;
mod decode;
mod due;
mod encode;
mod error;
mod ledger;
mod part;
mod slice;
#[cfg(test)]
mod tests;

pub use chunk::{CHUNK_BYTES, CHUNK_LIMIT};
pub use decode::HandoffDecoder;
pub use encode::HandoffEncoder;
pub use error::{ChunkError, HandoffError, PartName};
pub use slice::{HeldState, PageSlice, RankSlice, StateSlice};

use crate::digest::TensorDigests;
use crate::geometry::Geometry;
use crate::segments::{Mode, Place, SegmentTable};

/// Version of the format. A target reads this version only; a source whose target does not speak it has the session
/// replayed.
pub const HANDOFF_VERSION: u16 = 1;

/// What a handoff is about, known before the session is frozen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// The session.
    pub session: String,
    /// Its epoch at the source.
    pub epoch: u64,
    /// The epoch that it would have at the target.
    pub next_epoch: u64,
    /// Digest of the model's configuration and weights, as replicas publish it.
    pub model: String,
    /// Shapes and element types.
    pub geometry: Geometry,
    /// The source, with its tensor-parallel degree and latent layout.
    pub source: Place,
    /// What moves.
    pub mode: Mode,
}

/// The session as it was when it stopped, without its tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frozen {
    /// Positions that state and latents cover.
    pub context: u64,
    /// Tokens known, prompt and output together; all of them have been sent.
    pub tokens: u64,
    /// Everything else, in the engine's own encoding.
    pub record: Vec<u8>,
}

/// A part of a handoff that arrived whole and is right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    /// The first one.
    Header(Header),
    /// The next token ids.
    Tokens(Vec<u32>),
    /// The session as it was when it stopped.
    Frozen(Frozen),
    /// Where the latents are that do not come along.
    Segments(SegmentTable),
    /// Some heads of a state tensor.
    State(StateSlice),
    /// The whole state, which the target takes out of the source's slot.
    Held(HeldState),
    /// A page of an MLA layer, or the filled part of the last one.
    Page(PageSlice),
    /// The last one: everything that was due has arrived.
    End(Summary),
}

/// Bytes that moved, by kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    /// Recurrent states.
    pub recurrent: u64,
    /// Convolution tails.
    pub tails: u64,
    /// The unfilled last page of every layer.
    pub partial_pages: u64,
    /// Full pages.
    pub pages: u64,
    /// Token ids, 4 bytes each.
    pub tokens: u64,
    /// The session's record.
    pub record: u64,
}

impl Totals {
    /// What a split move cannot do without, whatever the context's length: states, tails and unfilled pages.
    pub fn state(&self) -> u64 {
        self.recurrent + self.tails + self.partial_pages
    }
}

/// What a handoff came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Summary {
    /// Bytes by kind.
    pub totals: Totals,
    /// Digests of whole tensors at the source; those of latents over the positions that travelled. The target compares
    /// its own, taken over its slots and pages after writing.
    pub digests: TensorDigests,
}

/// What a target takes.
#[derive(Debug, Clone)]
pub struct Expected {
    /// Digest of its model.
    pub model: String,
    /// Its shapes and element types.
    pub geometry: Geometry,
    /// Most positions and tokens of a session.
    pub context: u64,
    /// Most bytes of a record.
    pub record: u64,
}
