//! What tests share: golden cases and the comparison that judges them, what the demo model is known to say, ranks that run
//! as threads of the test, undisturbed runs, checkpoints with odd shapes or damage, certificates, a real etcd, whole
//! clusters of real processes, and processes that are watched to their end. It is a dev-dependency only and no part of a
//! shipped binary.

pub mod certificates;
pub mod checkpoints;
pub mod compare;
pub mod demo;
pub mod error;
pub mod etcd;
pub mod golden;
pub mod in_process;
pub mod numbers;
pub mod processes;
pub mod reference;
pub mod sandbox;
pub mod solo;
pub mod tensors;
pub mod world;

pub use compare::{Limits, Report, compare};
pub use error::{Result, TestkitError};
pub use golden::GoldenCase;
pub use in_process::ScoreRun;
pub use numbers::Numbers;
pub use perigee_backend::DType;
pub use sandbox::Sandbox;
pub use tensors::{Tensor, Tensors, Values};
