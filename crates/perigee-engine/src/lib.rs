//! The engine of one replica: sessions in, token events out. The scheduler plans steps, the executor runs each one on
//! every rank, the sampler draws, and events leave by the handle. It knows no gRPC and no device.

mod ahead;
mod batch;
pub mod cache;
pub mod config;
mod door;
pub mod executor;
mod grammars;
pub mod handle;
pub mod homes;
mod intake;
pub mod link;
pub mod moves;
pub mod observer;
mod outbox;
pub mod protocol;
pub mod rank;
pub mod ranks;
pub mod remote;
pub mod request;
pub mod scheduler;
pub mod sequence;
pub mod step;
pub mod testing;
pub mod traces;
mod turns;

pub use config::{Clock, EngineConfig, StartError, SystemClock};
pub use handle::{Engine, EngineHandle, EngineHealth, ScoreError, ScoreRequest, Scores};
pub use observer::EngineObserver;
pub use step::{EngineCore, Turn};
