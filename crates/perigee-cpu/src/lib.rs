//! The CPU backend: every op of the model in plain Rust, readable first, since it is the reference that other backends are
//! held to. Matrix products go through `ndarray`; inner loops are written for the compiler's vectoriser and dispatched to
//! the widest instruction set by `pulp`. It has no `unsafe` and no device.

mod ahead;
mod backend;
mod formula;
mod latents;
mod matrix;
mod ops;
mod pair;
mod simd;
mod states;
mod tensor;
mod workers;

pub use backend::{CpuBackend, CpuOptions};
pub use formula::Fault;
pub use latents::{LatentSlab, attend_segment};
pub use pair::Loopback;
pub use tensor::Tensor;
