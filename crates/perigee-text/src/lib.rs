//! Between text and token ids: tokenizers, chat templates, calls of tools, grammars, incremental detokenisation, stop
//! strings, and a model's generation defaults. Everything is a plain function or a small state, so a session's text travels
//! with it. Nothing here knows a network or a device.

pub mod byte_level;
mod control;
pub mod detokenize;
mod error;
pub mod generation_config;
pub mod grammar;
mod json_tokenizer;
mod merge;
pub mod stop;
pub mod template;
mod tiktoken;
pub mod tokenizer;
pub mod tool_calls;

pub use byte_level::{SpecialIds, byte_level_config, byte_level_tokenizer};
pub use detokenize::DetokenizeStream;
pub use error::TextError;
pub use generation_config::GenerationConfig;
pub use stop::{StopError, StopMatcher, StopOutput};
pub use template::{ChatInput, ChatTemplate, Rendered};
pub use tokenizer::{SpecialTokens, Tokenizer};
pub use tool_calls::{ToolCallParser, ToolEvent};
