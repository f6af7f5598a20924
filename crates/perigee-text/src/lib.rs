//! Between text and token ids: tokenizers, incremental detokenisation, stop strings, and a model's generation defaults.
//! Everything is a plain function or a small serialisable state, so a session's text travels with it. Chat templates
//! and grammars are not here, nor is anything that knows a network or a device.

pub mod byte_level;
pub mod detokenize;
mod error;
pub mod generation_config;
pub mod stop;
pub mod tokenizer;

pub use byte_level::{SpecialIds, byte_level_tokenizer};
pub use detokenize::DetokenizeStream;
pub use error::TextError;
pub use generation_config::GenerationConfig;
pub use stop::{StopError, StopMatcher, StopOutput};
pub use tokenizer::{SpecialTokens, Tokenizer};
