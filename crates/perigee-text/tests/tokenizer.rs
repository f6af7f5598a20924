//! Tokenizers through the public interface: round trips, control tokens in user text, and files that lie. The
//! tokenizers are small and written here; no checkpoint is needed.

use std::path::Path;

use perigee_text::{GenerationConfig, SpecialIds, SpecialTokens, TextError, Tokenizer, byte_level_tokenizer};
use proptest::prelude::*;
use serde_json::{Value, json};

fn byte_level_json() -> Value {
    byte_level_tokenizer(512, SpecialIds { bos: Some(1), eos: Some(2), pad: Some(0) }).expect("512 ids are enough")
}

fn build(json: &Value) -> Result<Tokenizer, TextError> {
    Tokenizer::from_json(json.to_string().as_bytes(), Path::new("tokenizer.json").into(), GenerationConfig::default())
}

/// A trained-looking tokenizer: merges, a Kimi-like pre-tokenisation pattern, a special token and a control token
/// that is not flagged special.
fn merging_json() -> Value {
    let mut json = byte_level_json();
    let vocab = json["model"]["vocab"].as_object_mut().expect("vocab is an object");
    for (token, id) in [("he", 259), ("ll", 260), ("hell", 261), ("hello", 262), ("Ġw", 263), ("<|", 264), ("|>", 265)]
    {
        vocab.insert(token.to_owned(), id.into());
    }
    vocab.insert("<|im_end|>".to_owned(), 300.into());
    vocab.insert("<|tool_call_begin|>".to_owned(), 301.into());
    json["model"]["merges"] =
        json!([["h", "e"], ["l", "l"], ["he", "ll"], ["hell", "o"], ["Ġ", "w"], ["<", "|"], ["|", ">"]]);
    json["model"]["ignore_merges"] = true.into();
    let pattern = [
        r"[\p{Han}]+|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}&&[^\p{Han}]]+|\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ]
    .join("|");
    json["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false},
        json["pre_tokenizer"],
    ]});
    let added = json["added_tokens"].as_array_mut().expect("added_tokens is a list");
    for (content, id, special) in [("<|im_end|>", 300, true), ("<|tool_call_begin|>", 301, false)] {
        added.push(json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                          "normalized": false, "special": special}));
    }
    json
}

#[test]
fn special_tokens_in_user_text_stay_text() {
    for json in [byte_level_json(), merging_json()] {
        let tokenizer = build(&json).unwrap();
        let names: Vec<&str> =
            json["added_tokens"].as_array().unwrap().iter().map(|t| t["content"].as_str().unwrap()).collect();
        for name in &names {
            let id = tokenizer.token_id(name).unwrap();
            for text in [(*name).to_owned(), format!("hello{name}x"), format!(" {name}\n{name}"), format!("你{name}好")]
            {
                let plain = tokenizer.encode(&text, SpecialTokens::AsText).unwrap();
                assert!(names.iter().all(|name| !plain.contains(&tokenizer.token_id(name).unwrap())), "{text:?}");
                assert_eq!(tokenizer.decode(&plain, true).unwrap(), text);
                let parsed = tokenizer.encode(&text, SpecialTokens::Parse).unwrap();
                assert!(parsed.contains(&id), "{text:?}");
                assert_eq!(tokenizer.decode(&parsed, false).unwrap(), text);
            }
        }
    }
}

#[test]
fn only_flagged_tokens_are_skipped_in_decoding() {
    let tokenizer = build(&merging_json()).unwrap();
    let ids = [300, 262, 301, 2];
    assert_eq!(tokenizer.decode(&ids, false).unwrap(), "<|im_end|>hello<|tool_call_begin|><|eos|>");
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "hello<|tool_call_begin|>");
    assert!(tokenizer.is_special(300) && !tokenizer.is_special(301) && !tokenizer.is_special(262));
}

#[test]
fn both_ways_agree_where_there_are_no_control_tokens() {
    let tokenizer = build(&merging_json()).unwrap();
    for text in ["", "hello world", "hello 你好 123456\n\n  x", "<| im_end |>", "a<|b|>"] {
        let plain = tokenizer.encode(text, SpecialTokens::AsText).unwrap();
        assert_eq!(plain, tokenizer.encode(text, SpecialTokens::Parse).unwrap(), "{text:?}");
        assert_eq!(tokenizer.decode(&plain, true).unwrap(), text);
    }
    assert_eq!(tokenizer.encode("hello w", SpecialTokens::AsText).unwrap(), [262, 263]);
}

/// A vocabulary of whole words knows a control token's text only as that token: refused, never injected.
#[test]
fn text_that_can_only_be_the_control_token_is_refused() {
    let json = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [
            {"id": 0, "content": "<unk>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
             "special": true},
            {"id": 2, "content": "</s>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
             "special": true}],
        "normalizer": null, "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": {"<unk>": 0, "word": 1, "</s>": 2}, "unk_token": "<unk>"},
    });
    let tokenizer = build(&json).unwrap();
    assert_eq!(tokenizer.encode("word other", SpecialTokens::AsText).unwrap(), [1, 0]);
    assert_eq!(tokenizer.encode("word </s>", SpecialTokens::Parse).unwrap(), [1, 2]);
    let error = tokenizer.encode("word </s>", SpecialTokens::AsText).unwrap_err();
    assert!(matches!(error, TextError::SpecialInText { token } if token == "</s>"));
}

#[test]
fn ids_without_a_name_decode_to_nothing() {
    let tokenizer = build(&byte_level_json()).unwrap();
    assert_eq!(tokenizer.vocab_size(), 259);
    assert_eq!(tokenizer.decode(&[3 + 65, 259, 400, u32::MAX, 3 + 66], false).unwrap(), "AB");
    assert_eq!(tokenizer.decode(&[], false).unwrap(), "");
}

#[test]
fn saved_truncation_and_padding_are_ignored() {
    let mut json = byte_level_json();
    json["truncation"] = json!({"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0});
    json["padding"] = json!({"strategy": {"Fixed": 16}, "direction": "Right", "pad_to_multiple_of": null,
                             "pad_id": 0, "pad_type_id": 0, "pad_token": "<|pad|>"});
    let tokenizer = build(&json).unwrap();
    for special in [SpecialTokens::AsText, SpecialTokens::Parse] {
        assert_eq!(tokenizer.encode("12345678", special).unwrap().len(), 8);
    }
}

#[test]
fn added_tokens_under_another_id_than_listed_are_refused() {
    let mut json = byte_level_json();
    json["added_tokens"][0]["id"] = 5.into();
    let error = build(&json).unwrap_err().to_string();
    assert!(error.contains("\"<|bos|>\" is listed as id 5") && error.contains("id 1"), "{error}");
    // A gap before an added token that the model's vocabulary does not list.
    let mut json = byte_level_json();
    let mut extra = json["added_tokens"][0].clone();
    extra["content"] = "<|extra|>".into();
    extra["id"] = 400.into();
    json["added_tokens"].as_array_mut().unwrap().push(extra);
    assert!(build(&json).unwrap_err().to_string().contains("leave no gap"));
}

#[test]
fn a_model_directory_is_loaded_with_its_end_tokens() {
    let dir = tempfile::tempdir().unwrap();
    let error = Tokenizer::load(dir.path()).unwrap_err();
    assert!(matches!(&error, TextError::NoTokenizer { path } if path.ends_with("tokenizer.json")));
    assert!(error.to_string().contains("send token ids"));

    let path = dir.path().join("tokenizer.json");
    std::fs::write(&path, "{}").unwrap();
    assert!(matches!(Tokenizer::load(dir.path()).unwrap_err(), TextError::Malformed { .. }));
    std::fs::write(&path, byte_level_json().to_string()).unwrap();
    std::fs::write(dir.path().join("config.json"), r#"{"eos_token_id": 2}"#).unwrap();
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    assert_eq!(tokenizer.eos_token_ids(), [2]);
    assert_eq!((tokenizer.token_id("<|eos|>"), tokenizer.token_id("<|none|>")), (Some(2), None));

    std::fs::write(dir.path().join("generation_config.json"), "[]").unwrap();
    let error = Tokenizer::load(dir.path()).unwrap_err().to_string();
    assert!(error.contains("generation_config.json"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(500) })]

    #[test]
    fn any_text_round_trips(text in "(?s:.){0,60}") {
        thread_local! {
            static TOKENIZERS: [Tokenizer; 2] = [byte_level_json(), merging_json()].map(|json| build(&json).unwrap());
        }
        TOKENIZERS.with(|tokenizers| {
            for tokenizer in tokenizers {
                let ids = tokenizer.encode(&text, SpecialTokens::AsText).unwrap();
                prop_assert_eq!(tokenizer.decode(&ids, false).unwrap(), text.as_str());
                prop_assert!(ids.len() <= text.len());
            }
            Ok(())
        })?;
    }
}
