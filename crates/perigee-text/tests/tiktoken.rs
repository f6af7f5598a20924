//! A small tiktoken.model against what the `tiktoken` package makes of it (tests/tools/tiktoken_vectors.py), and round
//! trips.

use std::path::Path;

use perigee_text::{DetokenizeStream, SpecialTokens, TextError, Tokenizer};
use proptest::prelude::*;
use serde::Deserialize;

const RANKS: u32 = 800;

fn fixture() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/tiktoken"))
}

fn tokenizer() -> Tokenizer {
    Tokenizer::load(fixture()).expect("the fixture loads")
}

#[derive(Deserialize)]
struct Vector {
    text: String,
    ids: Vec<u32>,
    /// With control tokens parsed, where that differs.
    parsed: Option<Vec<u32>>,
}

#[test]
fn ids_are_those_of_the_tiktoken_package() {
    let vectors: Vec<Vector> =
        serde_json::from_slice(&std::fs::read(fixture().join("vectors.json")).unwrap()).expect("well formed");
    assert!(vectors.len() > 100 && vectors.iter().any(|vector| vector.parsed.is_some()));
    let tokenizer = tokenizer();
    for Vector { text, ids, parsed } in vectors {
        assert_eq!(tokenizer.encode(&text, SpecialTokens::AsText).unwrap(), ids, "{text:?}");
        let expected = parsed.as_ref().unwrap_or(&ids);
        assert_eq!(&tokenizer.encode(&text, SpecialTokens::Parse).unwrap(), expected, "{text:?}");
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), text);
    }
}

#[test]
fn special_ids_follow_the_ranks() {
    let tokenizer = tokenizer();
    assert_eq!(tokenizer.vocab_size(), 1056);
    assert_eq!(tokenizer.token_id("<|im_end|>"), Some(RANKS + 2));
    assert_eq!(tokenizer.token_id("<|reserved_token_807|>"), Some(807));
    assert_eq!(tokenizer.token_id("<|reserved_token_802|>"), None);
    assert!(tokenizer.is_special(RANKS + 2) && tokenizer.is_special(807) && !tokenizer.is_special(RANKS + 11));
    let ids = [RANKS + 2, RANKS + 13, 1055, 1056, u32::MAX];
    assert_eq!(tokenizer.decode(&ids, false).unwrap(), "<|im_end|><|tool_call_begin|><|reserved_token_1055|>");
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "<|tool_call_begin|>");
    assert_eq!(tokenizer.token_bytes(0xE4), [0xE4]);
}

#[test]
fn special_ids_named_elsewhere_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(Tokenizer::load(dir.path()), Err(TextError::NoTokenizer { .. })));
    std::fs::copy(fixture().join("tiktoken.model"), dir.path().join("tiktoken.model")).unwrap();
    assert_eq!(Tokenizer::load(dir.path()).unwrap().token_id("<|reserved_token_802|>"), Some(802));
    for id in ["799", "1056", "x"] {
        let config = format!(r#"{{"added_tokens_decoder": {{"{id}": {{"content": "<|x|>"}}}}}}"#);
        std::fs::write(dir.path().join("tokenizer_config.json"), config).unwrap();
        let error = Tokenizer::load(dir.path()).unwrap_err().to_string();
        assert!(error.contains("special ids are 800 to 1055"), "{error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(500) })]

    /// Any Unicode, and text that looks like control tokens; streamed token by token it is the same text.
    #[test]
    fn any_text_round_trips_and_streams(text in "((?s:.)|<\\|im_end\\|>|[ \\n'a-z你]){0,40}") {
        thread_local! { static TOKENIZER: Tokenizer = tokenizer(); }
        TOKENIZER.with(|tokenizer| {
            let ids = tokenizer.encode(&text, SpecialTokens::AsText).unwrap();
            prop_assert!(ids.iter().all(|&id| id < RANKS));
            prop_assert_eq!(tokenizer.decode(&ids, true).unwrap(), text.as_str());
            let mut stream = DetokenizeStream::new(tokenizer, true);
            let mut streamed: String = ids.iter().map(|&id| stream.push(tokenizer, id).unwrap()).collect();
            streamed += &stream.finish(tokenizer).unwrap();
            prop_assert_eq!(streamed, text);
            Ok(())
        })?;
    }
}
