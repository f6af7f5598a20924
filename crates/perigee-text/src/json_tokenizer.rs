//! Vocabularies in the form of tokenizer.json, over the `tokenizers` crate. It adds what a server needs: nothing is
//! truncated or padded, ids are what the file says, and text can be encoded with control tokens left as text.

use std::collections::BTreeMap;
use std::path::PathBuf;

use tokenizers::{DecoderWrapper, Encoding, Model, Normalizer, OffsetType, PreTokenizedString, PreTokenizer};

use crate::byte_level::byte_of;
use crate::control::{ControlToken, ControlTokens};
use crate::error::TextError;

/// A tokenizer.json.
#[derive(Debug)]
pub(crate) struct JsonTokenizer {
    inner: tokenizers::Tokenizer,
}

impl JsonTokenizer {
    /// Builds it from a file's content; `path` is only named in errors.
    pub(crate) fn parse(json: &[u8], path: PathBuf) -> Result<Self, TextError> {
        let malformed = |reason: String| TextError::Malformed { path: path.clone(), reason };
        let mut inner = tokenizers::Tokenizer::from_bytes(json).map_err(|error| malformed(error.to_string()))?;
        // A saved tokenizer may carry the settings of its last training batch. They would cut prompts silently.
        inner.with_truncation(None).map_err(|error| malformed(error.to_string()))?;
        inner.with_padding(None);
        check_added_ids(json, &inner).map_err(malformed)?;
        Ok(Self { inner })
    }

    pub(crate) fn control_tokens(&self) -> BTreeMap<u32, ControlToken> {
        let token = |token: tokenizers::AddedToken| ControlToken {
            name: token.content,
            special: token.special,
            strips_left: token.lstrip,
            strips_right: token.rstrip,
        };
        self.inner.get_added_tokens_decoder().into_iter().map(|(id, added)| (id, token(added))).collect()
    }

    /// True where the text of tokens is the concatenation of their bytes.
    pub(crate) fn is_byte_level(&self) -> bool {
        matches!(self.inner.get_decoder(), Some(DecoderWrapper::ByteLevel(_)))
    }

    /// One more than the largest id.
    pub(crate) fn vocab_size(&self) -> usize {
        self.inner.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1)
    }

    pub(crate) fn id(&self, name: &str) -> Option<u32> {
        self.inner.token_to_id(name)
    }

    /// Token ids, with control tokens where their names stand.
    pub(crate) fn encode_parsed(&self, text: &str) -> Result<Vec<u32>, TextError> {
        Ok(self.inner.encode_fast(text, false).map_err(refused)?.get_ids().to_vec())
    }

    /// Token ids, none of them a control token that the text names.
    pub(crate) fn encode_as_text(&self, text: &str, control: &ControlTokens) -> Result<Vec<u32>, TextError> {
        let ids = self.encoding(text, OffsetType::None).map_err(refused)?.get_ids().to_vec();
        if ids.iter().any(|&id| control.get(id).is_some()) {
            refuse_control_tokens(&self.encoding(text, OffsetType::Byte).map_err(refused)?, text, control)?;
        }
        Ok(ids)
    }

    pub(crate) fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, TextError> {
        self.inner.decode(ids, skip_special).map_err(|error| TextError::Decode { reason: error.to_string() })
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
    fn encoding(&self, text: &str, offsets: OffsetType) -> tokenizers::Result<Encoding> {
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
}

fn refused(error: tokenizers::Error) -> TextError {
    TextError::Encode { reason: error.to_string() }
}

/// Refuses an encoding in which the text of a control token became that token, which vocabularies of whole words
/// allow. An unknown word that became the (added) unknown token is no such case.
fn refuse_control_tokens(encoding: &Encoding, text: &str, control: &ControlTokens) -> Result<(), TextError> {
    for (&id, &(start, end)) in encoding.get_ids().iter().zip(encoding.get_offsets()) {
        if let Some(token) = control.get(id)
            && text.get(start..end).is_some_and(|source| source.contains(token.name.as_str()))
        {
            return Err(TextError::SpecialInText { token: token.name.clone() });
        }
    }
    Ok(())
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
