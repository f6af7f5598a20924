//! What can go wrong between text and token ids, except for stop strings, whose limits have an error of their own. The
//! messages name the file or the token and say what to do; how they map to a status is decided at the rim.

use std::path::PathBuf;

/// Why text could not be turned into tokens, or back.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// The model directory has no tokenizer.
    #[error("{} does not exist: this model has no tokenizer; send token ids, or add tokenizer.json or tiktoken.model", path.display())]
    NoTokenizer {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// A file could not be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file is not what it should be.
    #[error("{} is malformed: {reason}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong, with the field where there is one.
        reason: String,
    },
    /// The tokenizer refused a text.
    #[error("the tokenizer cannot encode this text: {reason}")]
    Encode {
        /// What it said.
        reason: String,
    },
    /// The tokenizer refused token ids.
    #[error("the tokenizer cannot decode these tokens: {reason}")]
    Decode {
        /// What it said.
        reason: String,
    },
    /// Plain text would have become a control token.
    #[error(
        "the text contains {token:?}, which this tokenizer cannot express as plain text; remove it, or send token ids"
    )]
    SpecialInText {
        /// The control token's text.
        token: String,
    },
    /// A chat template refused a conversation, or took too much work.
    #[error("the chat template cannot render this: {reason}")]
    Template {
        /// What it said.
        reason: String,
    },
    /// A detokeniser's state met a tokenizer of another kind.
    #[error("the detokeniser's state belongs to another kind of tokenizer; both must come from the same model")]
    StateMismatch,
    /// A byte-level tokenizer does not fit the vocabulary.
    #[error("a byte-level tokenizer needs {needed} token ids, but the model has {vocab_size}; raise vocab_size")]
    VocabularyTooSmall {
        /// The model's vocabulary.
        vocab_size: u32,
        /// 256 and the special ids.
        needed: u32,
    },
    /// A special id that the model does not have.
    #[error("{name} is {id}, but the model has only {vocab_size} tokens; correct config.json")]
    SpecialIdOutOfRange {
        /// The field of config.json.
        name: &'static str,
        /// The id.
        id: u32,
        /// The model's vocabulary.
        vocab_size: u32,
    },
}
