//! A tokenizer for models without one: every byte is a token, so any text can be encoded and random weights can be
//! served with text. It also holds the byte-level alphabet, which the decoding of trained byte-level tokenizers needs.
//! It learns nothing and merges nothing.

use serde_json::{Value, json};

use crate::error::TextError;

/// The special ids of a model, from its config.json; those it lacks are `None`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SpecialIds {
    /// `bos_token_id`, named `<|bos|>`.
    pub bos: Option<u32>,
    /// `eos_token_id` (the first, where it is a list), named `<|eos|>`.
    pub eos: Option<u32>,
    /// `pad_token_id`, named `<|pad|>`.
    pub pad: Option<u32>,
}

/// The content of a tokenizer.json for a model of `vocab_size` tokens.
///
/// Special ids keep their place and their name (an id given twice has the first name of bos, eos, pad). Byte b is the
/// b-th lowest id that is not special, written as in GPT-2's byte-level alphabet. Ids above those have no name: they
/// decode to nothing.
///
/// # Errors
/// [`TextError::SpecialIdOutOfRange`], and [`TextError::VocabularyTooSmall`] where the bytes and special ids do not fit
/// (below 259 with three special ids).
pub fn byte_level_tokenizer(vocab_size: u32, special: SpecialIds) -> Result<Value, TextError> {
    let special = named_special_ids(vocab_size, special)?;
    let needed = 256 + special.len() as u32;
    if vocab_size < needed {
        return Err(TextError::VocabularyTooSmall { vocab_size, needed });
    }

    let byte_ids = (0..vocab_size).filter(|id| special.iter().all(|(_, special_id)| special_id != id));
    let mut vocab: serde_json::Map<String, Value> =
        ALPHABET.iter().zip(byte_ids).map(|(symbol, id)| (symbol.to_string(), Value::from(id))).collect();
    // The model's own vocabulary must have the special tokens too: loaders number added tokens by looking them up
    // there.
    vocab.extend(special.iter().map(|&(name, id)| (name.to_owned(), Value::from(id))));

    let added: Vec<Value> = special
        .iter()
        .map(|(name, id)| {
            json!({"id": id, "content": name, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": true})
        })
        .collect();
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": byte_level,
        "post_processor": null,
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": [],
        },
    }))
}

/// The tokenizer_config.json beside [`byte_level_tokenizer`]: which special token is what, for programs of others that load
/// the directory (their evaluations begin texts with one of them).
///
/// # Errors
/// [`TextError::SpecialIdOutOfRange`].
pub fn byte_level_config(vocab_size: u32, special: SpecialIds) -> Result<Value, TextError> {
    let mut config = json!({"tokenizer_class": "PreTrainedTokenizerFast"});
    for (name, _) in named_special_ids(vocab_size, special)? {
        let field = format!("{}_token", name.trim_matches(['<', '|', '>']));
        config[field] = name.into();
    }
    Ok(config)
}

/// The distinct special ids with their names.
fn named_special_ids(vocab_size: u32, special: SpecialIds) -> Result<Vec<(&'static str, u32)>, TextError> {
    let fields = [
        ("<|bos|>", "bos_token_id", special.bos),
        ("<|eos|>", "eos_token_id", special.eos),
        ("<|pad|>", "pad_token_id", special.pad),
    ];
    let mut named: Vec<(&'static str, u32)> = Vec::with_capacity(fields.len());
    for (token, name, id) in fields {
        let Some(id) = id else { continue };
        if id >= vocab_size {
            return Err(TextError::SpecialIdOutOfRange { name, id, vocab_size });
        }
        if named.iter().all(|&(_, other)| other != id) {
            named.push((token, id));
        }
    }
    Ok(named)
}

/// The byte that a character of the byte-level alphabet stands for.
pub(crate) fn byte_of(symbol: char) -> Option<u8> {
    BYTES.get(symbol as usize).copied().flatten()
}

/// The character for each byte: printable ones stand for themselves, the others follow from U+0100 on in byte order
/// (`bytes_to_unicode` of GPT-2's encoder.py).
const ALPHABET: [char; 256] = alphabet();

/// The inverse of [`ALPHABET`], indexed by code point.
const BYTES: [Option<u8>; 0x144] = inverse_alphabet();

const fn alphabet() -> [char; 256] {
    let mut symbols = ['\0'; 256];
    let mut byte = 0;
    let mut next: u32 = 0x100;
    while byte < 256 {
        let code = match byte as u8 {
            b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => byte as u32,
            _ => {
                next += 1;
                next - 1
            }
        };
        // Always a character: codes stay below 0x144.
        if let Some(symbol) = char::from_u32(code) {
            symbols[byte] = symbol;
        }
        byte += 1;
    }
    symbols
}

const fn inverse_alphabet() -> [Option<u8>; 0x144] {
    let mut bytes = [None; 0x144];
    let mut byte = 0;
    while byte < 256 {
        bytes[ALPHABET[byte] as usize] = Some(byte as u8);
        byte += 1;
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_alphabet_is_gpt2s() {
        for (byte, symbol) in [(b'A', 'A'), (b' ', 'Ġ'), (b'\n', 'Ċ'), (0, 'Ā'), (0xAD, 'Ń'), (0xFF, 'ÿ')] {
            assert_eq!(ALPHABET[usize::from(byte)], symbol);
            assert_eq!(byte_of(symbol), Some(byte));
        }
        let inverse: Vec<Option<u8>> = ALPHABET.iter().map(|&symbol| byte_of(symbol)).collect();
        assert_eq!(inverse, (0..=255u8).map(Some).collect::<Vec<_>>());
        assert_eq!(byte_of(' '), None);
        assert_eq!(byte_of('你'), None);
    }

    #[test]
    fn bytes_take_the_lowest_ids_around_the_special_ones() {
        let special = SpecialIds { bos: Some(1), eos: Some(2), pad: Some(0) };
        let json = byte_level_tokenizer(512, special).unwrap();
        let vocab = &json["model"]["vocab"];
        assert_eq!(vocab["<|pad|>"], 0);
        assert_eq!(vocab["<|bos|>"], 1);
        assert_eq!(vocab["<|eos|>"], 2);
        assert_eq!(vocab["Ā"], 3);
        assert_eq!(vocab["A"], 3 + 65);
        assert_eq!(vocab["ÿ"], 258);
        assert_eq!(vocab.as_object().unwrap().len(), 259);
        let names = byte_level_config(512, special).unwrap();
        assert_eq!(
            (&names["bos_token"], &names["eos_token"], &names["pad_token"]),
            (&"<|bos|>".into(), &"<|eos|>".into(), &"<|pad|>".into())
        );

        let high = byte_level_tokenizer(163_840, SpecialIds { bos: Some(163_584), eos: Some(100), pad: None }).unwrap();
        assert_eq!(high["model"]["vocab"]["Ā"], 0);
        assert_eq!(high["model"]["vocab"]["c"], 99);
        assert_eq!(high["model"]["vocab"]["d"], 101);
    }

    #[test]
    fn an_id_given_twice_has_one_name() {
        let json = byte_level_tokenizer(258, SpecialIds { bos: Some(9), eos: Some(4), pad: Some(4) }).unwrap();
        assert_eq!(json["added_tokens"].as_array().unwrap().len(), 2);
        assert!(json["model"]["vocab"].get("<|pad|>").is_none());
    }

    #[test]
    fn too_small_and_out_of_range_are_refused() {
        let special = SpecialIds { bos: Some(1), eos: Some(2), pad: Some(0) };
        byte_level_tokenizer(259, special).unwrap();
        let error = byte_level_tokenizer(258, special).unwrap_err();
        assert!(matches!(error, TextError::VocabularyTooSmall { vocab_size: 258, needed: 259 }));
        let error = byte_level_tokenizer(512, SpecialIds { eos: Some(512), ..special }).unwrap_err();
        assert!(matches!(error, TextError::SpecialIdOutOfRange { name: "eos_token_id", id: 512, vocab_size: 512 }));
    }
}
