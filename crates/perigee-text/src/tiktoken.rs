//! Vocabularies in the form of tiktoken.model, one `base64(token) rank` a line, and the names of the special ids that
//! follow the ranks, from tokenizer_config.json. Text is cut into pieces by the pattern of the Kimi checkpoints, and each
//! piece is encoded by itself.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use regex::Regex;
use serde::Deserialize;

use crate::control::ControlToken;
use crate::error::TextError;
use crate::merge::merge;

/// Ids after the ranks that are kept for special tokens.
pub(crate) const SPECIAL_IDS: u32 = 256;

/// Pieces of text, in the order in which they are tried. The published pattern has `\s+(?!\S)` before the last one; it
/// needs a look ahead, which [`Tiktoken::next_piece`] does without, so that matching takes linear time.
const PATTERN: &str = concat!(
    r"[\p{Han}]+|",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|",
    r"\p{N}{1,3}|",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|",
    r"\s*[\r\n]+|",
    r"\s+",
);

/// A vocabulary of byte strings by rank.
#[derive(Debug)]
pub(crate) struct Tiktoken {
    ranks: HashMap<Vec<u8>, u32>,
    /// By rank.
    tokens: Vec<Vec<u8>>,
    pattern: Regex,
}

impl Tiktoken {
    /// Reads the content of a tiktoken.model; `path` is only named in errors.
    ///
    /// # Errors
    /// [`TextError::Malformed`] where a line is not a token and its rank, ranks are not 0, 1, 2, ..., or a single byte has
    /// no token.
    pub(crate) fn parse(content: &[u8], path: &Path) -> Result<Self, TextError> {
        let malformed = |reason: String| TextError::Malformed { path: path.to_owned(), reason };
        let mut tokens: Vec<Vec<u8>> = Vec::new();
        for (number, line) in content.split(|&byte| byte == b'\n').enumerate() {
            let line = line.trim_ascii();
            if line.is_empty() {
                continue;
            }
            let wrong = |what: &str| malformed(format!("line {}: {what}", number + 1));
            let space =
                line.iter().position(|&byte| byte == b' ').ok_or_else(|| wrong("expected a token and a rank"))?;
            let token = STANDARD.decode(&line[..space]).map_err(|error| wrong(&error.to_string()))?;
            let rank = std::str::from_utf8(&line[space + 1..]).ok().and_then(|rank| rank.parse::<u32>().ok());
            // Ids are ranks, and the special ids begin after them: a gap would shift what the model means by each.
            if token.is_empty() || rank != Some(tokens.len() as u32) {
                return Err(wrong(&format!("expected a token of at least one byte with rank {}", tokens.len())));
            }
            tokens.push(token);
        }
        let ranks: HashMap<Vec<u8>, u32> = tokens.iter().cloned().zip(0..).collect();
        if ranks.len() < tokens.len() {
            return Err(malformed("a token is listed twice".to_owned()));
        }
        if let Some(byte) = (0..=255u8).find(|&byte| !ranks.contains_key(&[byte][..])) {
            return Err(malformed(format!("byte {byte:#04x} has no token, so not every text could be encoded")));
        }
        let pattern = Regex::new(PATTERN).map_err(|error| malformed(error.to_string()))?;
        Ok(Self { ranks, tokens, pattern })
    }

    /// How many ranks there are; special ids follow.
    pub(crate) fn len(&self) -> u32 {
        self.tokens.len() as u32
    }

    /// The tokens of a text, none of them special.
    pub(crate) fn encode(&self, text: &str, tokens: &mut Vec<u32>) {
        let mut at = 0;
        while let Some(piece) = self.next_piece(text, at) {
            merge(text[piece.clone()].as_bytes(), |bytes| self.ranks.get(bytes).copied(), tokens);
            at = piece.end;
        }
    }

    /// The next piece of a text from a place on.
    fn next_piece(&self, text: &str, at: usize) -> Option<Range<usize>> {
        let piece = self.pattern.find_at(text, at)?.range();
        // Only the last alternative ends with whitespace that breaks no line. Where text follows, it leaves its last
        // character to that, if it has another one: this is what the published `\s+(?!\S)` does.
        let end = match text[piece.clone()].char_indices().next_back() {
            Some((last, character)) if last > 0 && is_blank(character) && piece.end < text.len() => piece.start + last,
            _ => piece.end,
        };
        Some(piece.start..end)
    }

    /// The bytes of a token; none for special ids and beyond.
    pub(crate) fn bytes(&self, id: u32) -> Option<&[u8]> {
        self.tokens.get(id as usize).map(Vec::as_slice)
    }

    /// The id of a token by its exact text.
    pub(crate) fn id(&self, text: &str) -> Option<u32> {
        self.ranks.get(text.as_bytes()).copied()
    }

    /// The special tokens: named by tokenizer_config.json, the others `<|reserved_token_ID|>` as in the checkpoints' own
    /// code. Without that file all are reserved.
    ///
    /// # Errors
    /// [`TextError::Read`] and [`TextError::Malformed`] for a file that is there but bad, or names other ids.
    pub(crate) fn control_tokens(&self, dir: &Path) -> Result<BTreeMap<u32, ControlToken>, TextError> {
        let path = dir.join("tokenizer_config.json");
        let malformed = |reason: String| TextError::Malformed { path: path.clone(), reason };
        let config: TokenizerConfig = match std::fs::read(&path) {
            Ok(json) => serde_json::from_slice(&json).map_err(|error| malformed(error.to_string()))?,
            Err(source) if source.kind() == std::io::ErrorKind::NotFound => TokenizerConfig::default(),
            Err(source) => return Err(TextError::Read { path, source }),
        };
        let ids = self.len()..self.len() + SPECIAL_IDS;
        let mut tokens: BTreeMap<u32, ControlToken> = ids.clone().map(|id| (id, reserved(id))).collect();
        for (id, token) in config.added_tokens_decoder {
            let Some(id) = id.parse::<u32>().ok().filter(|id| ids.contains(id)) else {
                return Err(malformed(format!(
                    "added_tokens_decoder names id {id}, but special ids are {} to {}",
                    ids.start,
                    ids.end - 1
                )));
            };
            tokens.insert(
                id,
                ControlToken {
                    name: token.content,
                    special: token.special,
                    strips_left: token.lstrip,
                    strips_right: token.rstrip,
                },
            );
        }
        Ok(tokens)
    }
}

/// Whitespace that breaks no line.
fn is_blank(character: char) -> bool {
    character.is_whitespace() && !matches!(character, '\r' | '\n')
}

fn reserved(id: u32) -> ControlToken {
    ControlToken { name: format!("<|reserved_token_{id}|>"), special: true, strips_left: false, strips_right: false }
}

/// The part of tokenizer_config.json that is read.
#[derive(Default, Deserialize)]
struct TokenizerConfig {
    #[serde(default)]
    added_tokens_decoder: HashMap<String, AddedToken>,
}

#[derive(Deserialize)]
struct AddedToken {
    content: String,
    #[serde(default)]
    special: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Single bytes only.
    fn bytes() -> Tiktoken {
        let lines: String = (0..=255u8).map(|byte| format!("{} {byte}\n", STANDARD.encode([byte]))).collect();
        Tiktoken::parse(lines.as_bytes(), Path::new("tiktoken.model")).unwrap()
    }

    fn pieces(text: &str) -> Vec<String> {
        let vocabulary = bytes();
        let mut at = 0;
        let mut pieces = Vec::new();
        while let Some(piece) = vocabulary.next_piece(text, at) {
            assert_eq!(piece.start, at, "something is in no piece");
            at = piece.end;
            pieces.push(text[piece].to_owned());
        }
        pieces
    }

    #[test]
    fn pieces_follow_the_published_pattern() {
        assert_eq!(pieces("Hello wOrld, I'll 12345"), ["Hello", " w", "Orld", ",", " I'll", " ", "123", "45"]);
        assert_eq!(pieces("你好world世界"), ["你好", "world", "世界"]);
        assert_eq!(pieces("a   b"), ["a", "  ", " b"]);
        assert_eq!(pieces("a  1"), ["a", " ", " ", "1"]);
        assert_eq!(pieces("a \n\n b  "), ["a", " \n\n", " b", "  "]);
        assert_eq!(pieces("!!\r\nx"), ["!!\r\n", "x"]);
        assert_eq!(pieces("\u{3000}\u{3000}한"), ["\u{3000}", "\u{3000}한"]);
    }

    #[test]
    fn bad_files_are_refused_by_line() {
        let parse = |content: &str| Tiktoken::parse(content.as_bytes(), Path::new("tiktoken.model")).unwrap_err();
        for (content, part) in [
            ("IQ==", "line 1: expected a token and a rank"),
            ("IQ== x", "with rank 0"),
            ("IQ== 1", "with rank 0"),
            ("IQ== 0\nIg== 2", "line 2: expected a token of at least one byte with rank 1"),
            ("?? 0", "line 1"),
            (" 0", "line 1"),
            ("IQ== 0\nIQ== 1", "listed twice"),
            ("IQ== 0", "byte 0x00 has no token"),
        ] {
            let error = parse(content).to_string();
            assert!(error.contains("tiktoken.model is malformed") && error.contains(part), "{content:?}: {error}");
        }
    }
}
