//! A model's tokenizer, read from tokenizer.json. It adds to the `tokenizers` crate what a server needs: control tokens
//! in user text stay text, nothing is truncated or padded, and ids are what the file says. It adds no begin or end
//! token by itself; templates and callers do.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use tokenizers::{DecoderWrapper, Encoding, Model, Normalizer, OffsetType, PreTokenizedString, PreTokenizer};

use crate::byte_level::byte_of;
use crate::error::TextError;
use crate::generation_config::GenerationConfig;

/// What becomes of the text of control tokens (such as `<|im_end|>`) when text is encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpecialTokens {
    /// It is text like any other. For everything that a user wrote: otherwise user text could end a turn or forge a
    /// tool call.
    AsText,
    /// It becomes the control token. For templates, and for callers who are allowed to write control tokens.
    Parse,
}

/// A tokenizer with the model's end tokens and defaults. Shareable between threads.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// Every added token. Checkpoints flag only some of them as special (markers of tool calls often are not, so that
    /// they survive decoding), but all of them are control tokens here: text has the model's own vocabulary.
    added: BTreeMap<u32, String>,
    /// The added tokens that are flagged as special, which decoding may skip.
    special: BTreeSet<u32>,
    byte_level: bool,
    vocab_size: usize,
    generation: GenerationConfig,
}

impl Tokenizer {
    /// Reads tokenizer.json, and generation_config.json and config.json as far as [`GenerationConfig`] says, from a
    /// model directory.
    ///
    /// # Errors
    /// [`TextError::NoTokenizer`] where there is no tokenizer.json (the model can still be used with token ids),
    /// [`TextError::Read`] and [`TextError::Malformed`] for files that are there but bad.
    pub fn load(dir: &Path) -> Result<Self, TextError> {
        let path = dir.join("tokenizer.json");
        let json = match std::fs::read(&path) {
            Ok(json) => json,
            Err(source) if source.kind() == std::io::ErrorKind::NotFound => {
                return Err(TextError::NoTokenizer { path });
            }
            Err(source) => return Err(TextError::Read { path, source }),
        };
        Self::from_json(&json, path, GenerationConfig::load(dir)?)
    }

    /// Builds a tokenizer from the content of a tokenizer.json; `path` is only named in errors.
    ///
    /// # Errors
    /// [`TextError::Malformed`] where the content is no tokenizer, or lists added tokens under other ids than the
    /// vocabulary gives them.
    pub fn from_json(json: &[u8], path: PathBuf, generation: GenerationConfig) -> Result<Self, TextError> {
        let malformed = |reason: String| TextError::Malformed { path: path.clone(), reason };
        let mut inner = tokenizers::Tokenizer::from_bytes(json).map_err(|error| malformed(error.to_string()))?;
        // A saved tokenizer may carry the settings of its last training batch. They would cut prompts silently.
        inner.with_truncation(None).map_err(|error| malformed(error.to_string()))?;
        inner.with_padding(None);
        check_added_ids(json, &inner).map_err(malformed)?;

        let decoder = inner.get_added_tokens_decoder();
        let special = decoder.iter().filter(|(_, token)| token.special).map(|(&id, _)| id).collect();
        let added = decoder.into_iter().map(|(id, token)| (id, token.content)).collect();
        let vocab_size = inner.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1);
        let byte_level = matches!(inner.get_decoder(), Some(DecoderWrapper::ByteLevel(_)));
        Ok(Self { inner, added, special, byte_level, vocab_size, generation })
    }

    /// The token ids of a text, without added begin or end tokens.
    ///
    /// # Errors
    /// [`TextError::Encode`] where the tokenizer refuses the text; with [`SpecialTokens::AsText`],
    /// [`TextError::SpecialInText`] where its vocabulary maps a control token's text to nothing but that token.
    pub fn encode(&self, text: &str, special: SpecialTokens) -> Result<Vec<u32>, TextError> {
        let refused = |error: tokenizers::Error| TextError::Encode { reason: error.to_string() };
        match special {
            SpecialTokens::Parse => Ok(self.inner.encode_fast(text, false).map_err(refused)?.get_ids().to_vec()),
            SpecialTokens::AsText => {
                let ids = self.encode_as_text(text, OffsetType::None).map_err(refused)?.get_ids().to_vec();
                if ids.iter().any(|id| self.added.contains_key(id)) {
                    self.refuse_control_tokens(&self.encode_as_text(text, OffsetType::Byte).map_err(refused)?, text)?;
                }
                Ok(ids)
            }
        }
    }

    /// The text of token ids. Ids without a name decode to nothing; bytes that are no UTF-8 decode to U+FFFD.
    /// With `skip_special`, tokens that the checkpoint flags as special are left out.
    ///
    /// # Errors
    /// [`TextError::Decode`] where the tokenizer's decoder fails.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, TextError> {
        self.inner.decode(ids, skip_special).map_err(|error| TextError::Decode { reason: error.to_string() })
    }

    /// One more than the largest id that has a name. A model's vocabulary is at least this; it may be larger.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The id of a token by its exact name, such as `<|im_end|>`.
    pub fn token_id(&self, name: &str) -> Option<u32> {
        self.inner.token_to_id(name)
    }

    /// True for a token that decoding may skip.
    pub fn is_special(&self, id: u32) -> bool {
        self.special.contains(&id)
    }

    /// The tokens that end a sequence.
    pub fn eos_token_ids(&self) -> &[u32] {
        &self.generation.eos_token_ids
    }

    /// The model's generation defaults.
    pub fn generation_config(&self) -> &GenerationConfig {
        &self.generation
    }

    /// True where the text of tokens is the concatenation of their bytes.
    pub(crate) fn is_byte_level(&self) -> bool {
        self.byte_level
    }

    /// The bytes that a token adds to the text of a byte-level tokenizer: none for an id without a name.
    pub(crate) fn token_bytes(&self, id: u32) -> Vec<u8> {
        let Some(token) = self.inner.id_to_token(id) else { return Vec::new() };
        // As the byte-level decoder does: names with a character outside the alphabet (added tokens) stand for
        // themselves.
        token.chars().map(byte_of).collect::<Option<Vec<u8>>>().unwrap_or_else(|| token.into_bytes())
    }

    /// The tokenizer's pipeline without its first stage, which would cut added tokens out of the text. (The crate's own
    /// `encode_special_tokens` switch spares only tokens flagged as special, and is a setting, not an argument.)
    fn encode_as_text(&self, text: &str, offsets: OffsetType) -> tokenizers::Result<Encoding> {
        let mut pieces = PreTokenizedString::from(text);
        if let Some(normalizer) = self.inner.get_normalizer() {
            pieces.normalize(|piece| normalizer.normalize(piece))?;
        }
        if let Some(pre_tokenizer) = self.inner.get_pre_tokenizer() {
            pre_tokenizer.pre_tokenize(&mut pieces)?;
        }
        let model = self.inner.get_model();
        pieces.tokenize(|piece| model.tokenize(piece.get()))?;
        pieces.into_encoding(None, 0, offsets)
    }

    /// Refuses an encoding in which the text of a control token became that token, which vocabularies of whole words
    /// allow. An unknown word that became the (added) unknown token is no such case.
    fn refuse_control_tokens(&self, encoding: &Encoding, text: &str) -> Result<(), TextError> {
        for (id, &(start, end)) in encoding.get_ids().iter().zip(encoding.get_offsets()) {
            if let Some(token) = self.added.get(id)
                && text.get(start..end).is_some_and(|source| source.contains(token.as_str()))
            {
                return Err(TextError::SpecialInText { token: token.clone() });
            }
        }
        Ok(())
    }
}

/// The part of tokenizer.json that the `tokenizers` crate reads but does not enforce.
#[derive(serde::Deserialize)]
struct AddedTokens {
    #[serde(default)]
    added_tokens: Vec<AddedTokenId>,
}

#[derive(serde::Deserialize)]
struct AddedTokenId {
    id: u32,
    content: String,
}

/// The crate numbers added tokens by its own rule and only warns where the file says otherwise; the model would see
/// wrong ids.
fn check_added_ids(json: &[u8], inner: &tokenizers::Tokenizer) -> Result<(), String> {
    let listed: AddedTokens = serde_json::from_slice(json).map_err(|error| error.to_string())?;
    for AddedTokenId { id, content } in listed.added_tokens {
        if inner.token_to_id(&content) != Some(id) {
            let found = inner.token_to_id(&content).map_or_else(|| "no id".to_owned(), |id| format!("id {id}"));
            return Err(format!(
                "added token {content:?} is listed as id {id} but the vocabulary gives it {found}; \
                 list it in the model's vocabulary, or leave no gap before it"
            ));
        }
    }
    Ok(())
}
