//! Why a handoff cannot be read or written. Each error names the part, what was expected and what was found; all of them
//! mean that the target has nothing and the source still has everything.

use std::fmt;

use perigee_backend::{DType, StateKind};

use crate::codec::{Crc, FieldError};
use crate::digest::{Digest, DigestMismatch};
use crate::geometry::{GeometryError, Tensor};
use crate::segments::SegmentError;

/// Which part of a handoff.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PartName {
    /// Mark and version.
    Mark,
    /// The header.
    Header,
    /// Token ids from this one on.
    Tokens {
        /// Index of the first.
        first: u64,
    },
    /// The frozen record.
    Record,
    /// The segment table.
    Segments,
    /// A slice of a state tensor.
    State {
        /// Index among the KDA layers.
        layer: u32,
        /// Which tensor.
        kind: StateKind,
        /// First head, counted over the whole model.
        first_head: u32,
    },
    /// The number of the slot that has the state.
    Held,
    /// A page.
    Page {
        /// Index among the MLA layers.
        layer: u32,
        /// Its first position.
        first: u64,
    },
    /// The trailer.
    Trailer,
    /// The head of a part that is not known yet.
    Next,
}

impl fmt::Display for PartName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Mark => f.write_str("mark and version"),
            Self::Header => f.write_str("header"),
            Self::Tokens { first } => write!(f, "token ids from {first}"),
            Self::Record => f.write_str("session record"),
            Self::Segments => f.write_str("segment table"),
            Self::State { layer, kind, first_head } => {
                write!(f, "{} from head {first_head}", Tensor::State { layer, kind })
            }
            Self::Held => f.write_str("state in its slot"),
            Self::Page { layer, first } => write!(f, "{} from position {first}", Tensor::Latents { layer }),
            Self::Trailer => f.write_str("trailer"),
            Self::Next => f.write_str("next part"),
        }
    }
}

/// What is wrong with a chunk.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChunkError {
    /// It has another number than is due: one is missing, doubled or out of order.
    #[error("number {found}, expected {expected}")]
    Sequence {
        /// The number that is due.
        expected: u32,
        /// The number that it has.
        found: u32,
    },
    /// It says that it is empty or longer than chunks are.
    #[error("{found} bytes, expected 1 to {limit}")]
    Length {
        /// Most bytes of a chunk.
        limit: u32,
        /// Bytes that it says it has.
        found: u32,
    },
    /// Its bytes changed on the way.
    #[error("checksum {found}, expected {expected}")]
    Crc {
        /// The checksum that it carries.
        expected: Crc,
        /// The checksum of what arrived.
        found: Crc,
    },
}

/// Why a handoff cannot be read or written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HandoffError {
    /// A chunk is not the one that is due, or not what was sent.
    #[error("chunk {due} of the handoff, within the {part}: {error}")]
    Chunk {
        /// The number that is due.
        due: u32,
        /// The part that it goes on with.
        part: PartName,
        /// What is wrong.
        error: ChunkError,
    },
    /// The stream ended too early.
    #[error("the handoff ends before its {part} is complete")]
    Truncated {
        /// The part that is missing or incomplete.
        part: PartName,
    },
    /// The stream goes on after the trailer.
    #[error("{bytes} bytes after the handoff's trailer")]
    Trailing {
        /// How many bytes.
        bytes: u64,
    },
    /// It is no handoff at all.
    #[error("a handoff begins with {expected:08x}, this one with {found:08x}")]
    Mark {
        /// The mark.
        expected: u32,
        /// What is there.
        found: u32,
    },
    /// Another version of the format.
    #[error("version {found} of the handoff, this replica reads version {expected}; replay the session instead")]
    Version {
        /// The version of this build.
        expected: u16,
        /// The version of the stream.
        found: u16,
    },
    /// A kind of part that this version does not have.
    #[error("a part of kind {found}, which this version does not have")]
    Kind {
        /// Its number.
        found: u8,
    },
    /// A field cannot be read.
    #[error("{part}: {error}")]
    Field {
        /// The part.
        part: PartName,
        /// What is wrong with the field.
        error: FieldError,
    },
    /// A part's bytes are not those that its checksum was taken of.
    #[error("{part}: checksum {found}, expected {expected}")]
    Crc {
        /// The part.
        part: PartName,
        /// The checksum that it carries.
        expected: Crc,
        /// The checksum of what arrived.
        found: Crc,
    },
    /// The session runs on another model.
    #[error("the session's model has digest {found}, this replica's {expected}; move it to a replica of its model")]
    Model {
        /// Digest of this replica's model.
        expected: String,
        /// Digest in the handoff.
        found: String,
    },
    /// A size of the model differs.
    #[error("{found} {what} in the handoff, {expected} here; move the session to a replica of its model")]
    Geometry {
        /// What is counted.
        what: &'static str,
        /// Here.
        expected: u64,
        /// In the handoff.
        found: u64,
    },
    /// The geometry makes no sense, or the heads do not divide among ranks.
    #[error(transparent)]
    Sizes(#[from] GeometryError),
    /// An element type differs.
    #[error(
        "{what} in {found:?} in the handoff, in {expected:?} here; move the session to a replica of the same types"
    )]
    Dtype {
        /// Whose elements.
        what: &'static str,
        /// Here.
        expected: DType,
        /// In the handoff.
        found: DType,
    },
    /// A later epoch of the session is known here.
    #[error("session {session} comes from epoch {epoch} for epoch {next}, but epoch {known} is known here")]
    Epoch {
        /// The session.
        session: String,
        /// Its epoch at the source.
        epoch: u64,
        /// Its epoch at the target.
        next: u64,
        /// The highest known.
        known: u64,
    },
    /// A part that is not due.
    #[error("{found} where the handoff should go on with {due}")]
    Order {
        /// What should come.
        due: &'static str,
        /// What came.
        found: PartName,
    },
    /// A part has another size or place than its tensor allows.
    #[error("{part}: {what} {found}, expected {expected}")]
    Shape {
        /// The part.
        part: PartName,
        /// What is counted.
        what: &'static str,
        /// What it should be, or may be at most.
        expected: u64,
        /// What it is.
        found: u64,
    },
    /// More than this replica takes.
    #[error("{part}: {found} {what}, this replica takes {limit}")]
    Limit {
        /// The part.
        part: PartName,
        /// What is counted.
        what: &'static str,
        /// Most of it.
        limit: u64,
        /// What it is.
        found: u64,
    },
    /// A head arrived twice.
    #[error("{tensor}: head {head} comes twice")]
    DuplicateHead {
        /// The tensor.
        tensor: Tensor,
        /// The head, counted over the whole model.
        head: u32,
    },
    /// A head did not arrive.
    #[error("{tensor}: head {head} is missing; one rank's slice did not come")]
    MissingHead {
        /// The tensor.
        tensor: Tensor,
        /// The head, counted over the whole model.
        head: u32,
    },
    /// A page arrived twice.
    #[error("latents of MLA layer {layer}: the page from position {first} comes twice")]
    DuplicatePage {
        /// Index among the MLA layers.
        layer: u32,
        /// Its first position.
        first: u64,
    },
    /// A page did not arrive.
    #[error("latents of MLA layer {layer}: the page from position {first} is missing")]
    MissingPage {
        /// Index among the MLA layers.
        layer: u32,
        /// Its first position.
        first: u64,
    },
    /// A page arrived that is another replica's.
    #[error("latents of MLA layer {layer}: the page from position {first} is in a segment and should not come")]
    UnduePage {
        /// Index among the MLA layers.
        layer: u32,
        /// Its first position.
        first: u64,
    },
    /// A split move leaves full pages without a home.
    #[error("positions from {first} are in full pages, but a split move names no home for them")]
    Homeless {
        /// The first of them.
        first: u64,
    },
    /// The segment table is wrong in itself.
    #[error("segment table: {0}")]
    Segments(#[from] SegmentError),
    /// A part of a tensor is not what its digest was taken of.
    #[error("{part}: digest {found}, expected {expected}")]
    PartDigest {
        /// The part.
        part: PartName,
        /// The digest that it carries.
        expected: Digest,
        /// The digest of what arrived.
        found: Digest,
    },
    /// Parts do not add up to the tensor that the source had.
    #[error(transparent)]
    Digest(#[from] DigestMismatch),
    /// The trailer counts something else than arrived.
    #[error("trailer: {expected} {what}, but {found} came")]
    Totals {
        /// What is counted.
        what: &'static str,
        /// What the source counted.
        expected: u64,
        /// What arrived.
        found: u64,
    },
    /// It failed before; nothing more is read.
    #[error("the handoff failed before; begin a new one")]
    Failed,
}
