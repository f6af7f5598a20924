//! The demo model: a Kimi Linear model of 0.7 million parameters, trained on the King James Version, as the files of a
//! checkpoint that are part of the program. How it was made and what its licence is: `train/README.md`. It knows
//! nothing of what reads it.

/// Its name for `--model`.
pub const NAME: &str = "demo";
/// config.json.
pub const CONFIG: &str = include_str!("../model/config.json");
/// model.safetensors, bf16.
pub const WEIGHTS: &[u8] = include_bytes!("../model/model.safetensors");
/// tokenizer.json: byte-level BPE, 512 tokens.
pub const TOKENIZER: &str = include_str!("../model/tokenizer.json");
/// tokenizer_config.json: what other programs read the names of special tokens from.
pub const TOKENIZER_CONFIG: &str = include_str!("../model/tokenizer_config.json");
/// generation_config.json: how its text is drawn where a request does not say.
pub const GENERATION_CONFIG: &str = include_str!("../model/generation_config.json");
/// chat_template.jinja: a conversation as the text would tell it.
pub const CHAT_TEMPLATE: &str = include_str!("../model/chat_template.jinja");
