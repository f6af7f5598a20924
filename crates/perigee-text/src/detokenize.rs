//! Incremental detokenisation: tokens in, text out, never half a character. The state is small and serialisable, so it
//! moves with its session. It knows nothing of stop strings.

use serde::{Deserialize, Serialize};

use crate::error::TextError;
use crate::tokenizer::Tokenizer;

/// How many tokens a decoder other than byte-level may hold back before they are given out as they are. A character has
/// four bytes at most; more held tokens are bytes that will never form one.
const MAX_HELD_TOKENS: usize = 8;

/// The text of a growing sequence of tokens. The concatenation of all pieces, with that of
/// [`DetokenizeStream::finish`], is what [`Tokenizer::decode`] gives for all tokens at once: always for byte-level
/// tokenizers, for others as long as their decoder does not rewrite text already given out (byte fallback does, where
/// invalid bytes follow valid ones).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DetokenizeStream {
    skip_special: bool,
    state: State,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum State {
    /// Byte-level tokenizers: the start of a character, 3 bytes at most. What a token adds does not depend on its
    /// neighbours.
    Bytes(Vec<u8>),
    /// Other decoders, where a token's text depends on its neighbours (leading spaces, byte fallback): the tokens of
    /// the last piece, which only give context, up to `read`, then those not yet given out. As in
    /// text-generation-inference's prefix and read offsets.
    Window { tokens: Vec<u32>, read: usize },
}

impl DetokenizeStream {
    /// A stream before its first token. With `skip_special`, special tokens add no text.
    pub fn new(tokenizer: &Tokenizer, skip_special: bool) -> Self {
        let state = if tokenizer.is_byte_level() {
            State::Bytes(Vec::new())
        } else {
            State::Window { tokens: Vec::new(), read: 0 }
        };
        Self { skip_special, state }
    }

    /// Adds a token and returns the text that is now certain; empty while a character is incomplete.
    ///
    /// # Errors
    /// [`TextError::StateMismatch`] where the state was made with another kind of tokenizer, [`TextError::Decode`]
    /// where its decoder fails.
    pub fn push(&mut self, tokenizer: &Tokenizer, token: u32) -> Result<String, TextError> {
        self.check(tokenizer)?;
        if self.skip_special && tokenizer.is_special(token) {
            return Ok(String::new());
        }
        match &mut self.state {
            State::Bytes(held) => {
                held.extend(tokenizer.token_bytes(token));
                Ok(take_certain_text(held))
            }
            State::Window { tokens, read } => {
                tokens.push(token);
                let held = tokens.len() - *read;
                let piece = text_after(tokenizer, tokens, *read)?;
                if held < MAX_HELD_TOKENS && (piece.is_empty() || piece.ends_with(char::REPLACEMENT_CHARACTER)) {
                    return Ok(String::new());
                }
                tokens.drain(..*read);
                *read = tokens.len();
                Ok(piece)
            }
        }
    }

    /// Ends the stream and returns what was held back; an incomplete character as U+FFFD.
    ///
    /// # Errors
    /// As [`DetokenizeStream::push`].
    pub fn finish(&mut self, tokenizer: &Tokenizer) -> Result<String, TextError> {
        self.check(tokenizer)?;
        match &mut self.state {
            State::Bytes(held) => Ok(String::from_utf8_lossy(&std::mem::take(held)).into_owned()),
            State::Window { tokens, read } => {
                let piece = text_after(tokenizer, tokens, *read)?;
                tokens.clear();
                *read = 0;
                Ok(piece)
            }
        }
    }

    /// A state comes from another process: it must fit the tokenizer, and its offset its tokens.
    fn check(&self, tokenizer: &Tokenizer) -> Result<(), TextError> {
        let fits = match &self.state {
            State::Bytes(_) => tokenizer.is_byte_level(),
            State::Window { tokens, read } => !tokenizer.is_byte_level() && *read <= tokens.len(),
        };
        if fits { Ok(()) } else { Err(TextError::StateMismatch) }
    }
}

/// Takes the text off the front of `held`, all but an incomplete character at its end. Invalid bytes become U+FFFD
/// exactly as in [`String::from_utf8_lossy`], whose output for a prefix never changes but at such an end.
fn take_certain_text(held: &mut Vec<u8>) -> String {
    let mut text = String::with_capacity(held.len());
    let mut used = 0;
    for chunk in held.utf8_chunks() {
        text.push_str(chunk.valid());
        used += chunk.valid().len();
        let invalid = chunk.invalid();
        if invalid.is_empty() || (used + invalid.len() == held.len() && is_incomplete(invalid)) {
            break;
        }
        text.push(char::REPLACEMENT_CHARACTER);
        used += invalid.len();
    }
    held.drain(..used);
    text
}

/// True where more bytes could make a character of these.
fn is_incomplete(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_err_and(|error| error.valid_up_to() == 0 && error.error_len().is_none())
}

/// The text that the tokens from `read` on add after those before.
fn text_after(tokenizer: &Tokenizer, tokens: &[u32], read: usize) -> Result<String, TextError> {
    let before = tokenizer.decode(&tokens[..read], false)?;
    let text = tokenizer.decode(tokens, false)?;
    // A decoder may render context differently once more follows (byte fallback does); what was given out stays.
    Ok(text.get(before.len()..).unwrap_or_default().to_owned())
}
