//! What a session's move from one replica to another is made of: the handoff's format and digests, the table of segments
//! that stay behind, the queries and answers of split attention, and the rules of epochs for both sides and the router.
//! Everything here is a pure function or a state machine: no I/O, no clock, no threads, no device. The README has the
//! protocol.

pub mod attend;
mod codec;
pub mod digest;
pub mod epochs;
pub mod geometry;
pub mod handoff;
pub mod merge;
pub mod segments;
#[cfg(test)]
mod testing;

pub use attend::{AnswerBatch, AnswerStatus, AttendError, AttendShape, QueryBatch, attention_bytes};
pub use codec::{Crc, FieldError};
pub use digest::{Digest, DigestMismatch, TensorDigests};
pub use epochs::{Coordinator, Party};
pub use geometry::{Geometry, GeometryError, Layout, PAGE_POSITIONS, STATE_KINDS, Tensor};
pub use handoff::{
    Expected, HandoffDecoder, HandoffEncoder, HandoffError, Header, HeldState, PageSlice, Part, StateSlice,
};
pub use merge::{MergeError, merge};
pub use segments::{Arrival, Mode, Place, Segment, SegmentError, SegmentTable};
