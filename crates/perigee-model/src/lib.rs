//! The Kimi Linear architecture, once, over the coarse ops of a backend: config, checkpoint, shards, forward.

pub mod config;
pub mod error;
pub mod inventory;
pub mod presets;

pub use config::{LayerConfig, LayerKind, ModelConfig};
pub use error::{ModelError, Result};
pub use presets::{ModelSpec, Preset};
