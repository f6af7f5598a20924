//! The seam between the model and a device: ops as a trait in the model's words, the host-side types that cross it, and
//! the conformance suite that every backend passes. It holds no arithmetic of its own outside that suite.

pub mod batch;
#[cfg(any(test, feature = "conformance"))]
pub mod conformance;
pub mod error;
pub mod ops;
pub mod pairs;
pub mod random;
pub mod shapes;
pub mod weights;

pub use batch::{Row, Segment, StepBatch};
pub use error::{BackendError, Result};
pub use ops::{
    Asked, Backend, LatentReader, OtherPart, PagePart, PageWrite, Partials, Precision, Recorded, Routing, StateKind,
    StatePart,
};
pub use pairs::{PairEnd, PairOrder, PairState};
pub use shapes::{CacheShape, KdaShape, MlaShape, MlpShape, MoeShape, PAGE_TOKENS};
pub use weights::{DType, TensorSlice, TensorSource};
