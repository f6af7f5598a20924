//! A model's tokenizer, read from tokenizer.json or tiktoken.model. Control tokens in user text stay text, nothing is
//! truncated or padded, and ids are what the files say. It adds no begin or end token by itself; templates and callers
//! do.

use std::path::{Path, PathBuf};

use crate::control::{ControlTokens, Piece};
use crate::error::TextError;
use crate::generation_config::GenerationConfig;
use crate::json_tokenizer::JsonTokenizer;
use crate::template::Rendered;
use crate::tiktoken::{SPECIAL_IDS, Tiktoken};
use crate::tool_calls;

/// What becomes of the text of control tokens (such as `<|im_end|>`) when text is encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpecialTokens {
    /// It is text like any other. For everything that a user wrote: otherwise user text could end a turn or forge a
    /// tool call.
    AsText,
    /// It becomes the control token. For callers who are allowed to write control tokens.
    Parse,
}

/// A tokenizer with the model's end tokens and defaults. Shareable between threads.
#[derive(Debug)]
pub struct Tokenizer {
    vocabulary: Vocabulary,
    /// Every added token.
    control: ControlTokens,
    byte_level: bool,
    vocab_size: usize,
    generation: GenerationConfig,
}

#[derive(Debug)]
enum Vocabulary {
    Json(Box<JsonTokenizer>),
    Tiktoken(Tiktoken),
}

impl Tokenizer {
    /// Reads tokenizer.json, or tiktoken.model with tokenizer_config.json where there is none, and generation_config.json
    /// and config.json as far as [`GenerationConfig`] says, from a model directory.
    ///
    /// # Errors
    /// [`TextError::NoTokenizer`] where neither is there (the model can still be used with token ids),
    /// [`TextError::Read`] and [`TextError::Malformed`] for files that are there but bad.
    pub fn load(dir: &Path) -> Result<Self, TextError> {
        let path = dir.join("tokenizer.json");
        if let Some(json) = read_if_there(&path)? {
            return Self::from_json(&json, path, GenerationConfig::load(dir)?);
        }
        let ranks = dir.join("tiktoken.model");
        let Some(content) = read_if_there(&ranks)? else { return Err(TextError::NoTokenizer { path }) };
        let tiktoken = Tiktoken::parse(&content, &ranks)?;
        let mut tokens = tiktoken.control_tokens(dir)?;
        // Skipped in decoding, a call of a tool would lose its marks, and with them what it is.
        tokens.values_mut().filter(|token| tool_calls::MARKS.contains(&token.name.as_str())).for_each(|token| {
            token.special = false;
        });
        let vocab_size = (tiktoken.len() + SPECIAL_IDS) as usize;
        let control = control_tokens(tokens, &ranks)?;
        let generation = GenerationConfig::load(dir)?;
        Ok(Self { vocabulary: Vocabulary::Tiktoken(tiktoken), control, byte_level: true, vocab_size, generation })
    }

    /// Builds a tokenizer from the content of a tokenizer.json; `path` is only named in errors.
    ///
    /// # Errors
    /// [`TextError::Malformed`] where the content is no tokenizer, or lists added tokens under other ids than the
    /// vocabulary gives them.
    pub fn from_json(json: &[u8], path: PathBuf, generation: GenerationConfig) -> Result<Self, TextError> {
        let inner = JsonTokenizer::parse(json, path.clone())?;
        let control = control_tokens(inner.control_tokens(), &path)?;
        let (byte_level, vocab_size) = (inner.is_byte_level(), inner.vocab_size());
        Ok(Self { vocabulary: Vocabulary::Json(Box::new(inner)), control, byte_level, vocab_size, generation })
    }

    /// The token ids of a text, without added begin or end tokens.
    ///
    /// # Errors
    /// [`TextError::Encode`] where the tokenizer refuses the text; with [`SpecialTokens::AsText`],
    /// [`TextError::SpecialInText`] where its vocabulary maps a control token's text to nothing but that token.
    pub fn encode(&self, text: &str, special: SpecialTokens) -> Result<Vec<u32>, TextError> {
        match (special, &self.vocabulary) {
            (SpecialTokens::AsText, _) => {
                let mut ids = Vec::new();
                self.encode_text(text, &mut ids)?;
                Ok(ids)
            }
            (SpecialTokens::Parse, Vocabulary::Json(json)) => json.encode_parsed(text),
            (SpecialTokens::Parse, Vocabulary::Tiktoken(_)) => self.encode_pieces(text, |text| text.to_owned()),
        }
    }

    /// The token ids of a rendered conversation: control tokens where the template wrote them, text elsewhere.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_rendered(&self, rendered: &Rendered) -> Result<Vec<u32>, TextError> {
        self.encode_pieces(&rendered.marked, |text| text.replace(rendered.mark, ""))
    }

    /// The text of token ids. Ids without a name decode to nothing; bytes that are no UTF-8 decode to U+FFFD.
    /// With `skip_special`, tokens that the checkpoint flags as special are left out.
    ///
    /// # Errors
    /// [`TextError::Decode`] where the tokenizer's decoder fails.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, TextError> {
        if let Vocabulary::Json(json) = &self.vocabulary {
            return json.decode(ids, skip_special);
        }
        let kept = ids.iter().filter(|&&id| !(skip_special && self.control.is_special(id)));
        let bytes: Vec<u8> = kept.flat_map(|&id| self.token_bytes(id)).collect();
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// One more than the largest id that has a name. A model's vocabulary is at least this; it may be larger.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The id of a token by its exact name, such as `<|im_end|>`.
    pub fn token_id(&self, name: &str) -> Option<u32> {
        match &self.vocabulary {
            Vocabulary::Json(json) => json.id(name),
            Vocabulary::Tiktoken(tiktoken) => self.control.id(name).or_else(|| tiktoken.id(name)),
        }
    }

    /// True for a token that decoding may skip.
    pub fn is_special(&self, id: u32) -> bool {
        self.control.is_special(id)
    }

    /// The tokens that end a sequence.
    pub fn eos_token_ids(&self) -> &[u32] {
        &self.generation.eos_token_ids
    }

    /// The model's generation defaults.
    pub fn generation_config(&self) -> &GenerationConfig {
        &self.generation
    }

    /// The bytes that a token stands for, by itself: half a character where the vocabulary has such tokens, the name of
    /// a control token, nothing for an id without a name.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        match &self.vocabulary {
            Vocabulary::Json(json) if self.byte_level => json.token_bytes(id),
            // These have no bytes of their own; what one decodes to alone is the nearest.
            Vocabulary::Json(json) => json.decode(&[id], false).unwrap_or_default().into_bytes(),
            Vocabulary::Tiktoken(tiktoken) => match (tiktoken.bytes(id), self.control.get(id)) {
                (Some(bytes), _) => bytes.to_vec(),
                (None, Some(token)) => token.name.clone().into_bytes(),
                (None, None) => Vec::new(),
            },
        }
    }

    /// True where the text of tokens is the concatenation of their bytes.
    pub(crate) fn is_byte_level(&self) -> bool {
        self.byte_level
    }

    /// Its control tokens.
    pub(crate) fn control(&self) -> &ControlTokens {
        &self.control
    }

    fn encode_text(&self, text: &str, ids: &mut Vec<u32>) -> Result<(), TextError> {
        match &self.vocabulary {
            Vocabulary::Json(json) => ids.extend(json.encode_as_text(text, &self.control)?),
            Vocabulary::Tiktoken(tiktoken) => tiktoken.encode(text, ids),
        }
        Ok(())
    }

    /// Encodes a text that is cut at control tokens; `text_of` gives what is between them its last form.
    fn encode_pieces(&self, text: &str, text_of: impl Fn(&str) -> String) -> Result<Vec<u32>, TextError> {
        let mut ids = Vec::new();
        let pieces: Vec<Piece<'_>> = self.control.cut(text).collect();
        let strips = |at: Option<usize>, side: fn(&crate::control::ControlToken) -> bool| match pieces.get(at?)? {
            Piece::Control(id) => self.control.get(*id).filter(|token| side(token)),
            Piece::Text(_) => None,
        };
        for (at, piece) in pieces.iter().enumerate() {
            match piece {
                Piece::Control(id) => ids.push(*id),
                Piece::Text(text) => {
                    let mut text = text_of(text);
                    if strips(at.checked_sub(1), |token| token.strips_right).is_some() {
                        text = text.trim_start().to_owned();
                    }
                    if strips(Some(at + 1), |token| token.strips_left).is_some() {
                        text.truncate(text.trim_end().len());
                    }
                    if !text.is_empty() {
                        self.encode_text(&text, &mut ids)?;
                    }
                }
            }
        }
        Ok(ids)
    }
}

fn read_if_there(path: &Path) -> Result<Option<Vec<u8>>, TextError> {
    match std::fs::read(path) {
        Ok(content) => Ok(Some(content)),
        Err(source) if source.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(TextError::Read { path: path.to_owned(), source }),
    }
}

fn control_tokens(
    tokens: std::collections::BTreeMap<u32, crate::control::ControlToken>,
    path: &Path,
) -> Result<ControlTokens, TextError> {
    ControlTokens::new(tokens)
        .map_err(|error| TextError::Malformed { path: path.to_owned(), reason: format!("special tokens: {error}") })
}
