//! The Kimi Linear architecture, once, over the coarse ops of a backend: config, checkpoint, shards, forward.

pub mod checkpoint;
pub mod config;
pub mod digest;
pub mod error;
pub mod forward;
pub mod init;
pub mod inventory;
mod load;
pub mod presets;
pub mod shard;
pub mod source;
#[cfg(test)]
mod test_support;

pub use config::{LayerConfig, LayerKind, ModelConfig};
pub use digest::model_digest;
pub use error::{ModelError, Result};
pub use forward::{Model, StepHooks, StepLimits};
pub use init::init_model;
pub use presets::{ModelSpec, Preset};
pub use shard::Shard;
pub use source::WeightSource;
