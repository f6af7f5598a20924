//! Streams against the whole: detokenised pieces against one decode, stop matching against a search over the full text,
//! both for any cutting and with the state sent through serialisation midway.

use std::path::Path;

use perigee_text::{
    DetokenizeStream, GenerationConfig, SpecialIds, StopError, StopMatcher, StopOutput, TextError, Tokenizer,
    byte_level_tokenizer,
};
use proptest::prelude::*;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::json;

fn byte_level() -> Tokenizer {
    let json =
        byte_level_tokenizer(512, SpecialIds { bos: Some(1), eos: Some(2), pad: Some(0) }).expect("512 ids are enough");
    from_json(&json)
}

fn from_json(json: &serde_json::Value) -> Tokenizer {
    let path = Path::new("tokenizer.json").into();
    Tokenizer::from_json(json.to_string().as_bytes(), path, GenerationConfig::default()).expect("a tokenizer")
}

/// A tokenizer whose decoder looks at neighbours: it strips the first space and joins byte tokens.
fn sentence_piece() -> Tokenizer {
    let mut vocab = serde_json::Map::new();
    vocab.insert("<s>".to_owned(), 0.into());
    for byte in 0..256u32 {
        vocab.insert(format!("<0x{byte:02X}>"), (byte + 1).into());
    }
    for (token, id) in [("▁hello", 257), ("▁", 258), ("world", 259), ("▁你", 260), ("!", 261)] {
        vocab.insert(token.to_owned(), id.into());
    }
    from_json(&json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [{"id": 0, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false,
                          "normalized": false, "special": true}],
        "normalizer": null, "pre_tokenizer": null, "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": true, "vocab": vocab, "merges": []},
    }))
}

/// Sends a value through the bytes in which a session travels.
fn travel<T: Serialize + DeserializeOwned>(value: &T) -> T {
    let bytes = postcard::to_stdvec(value).expect("serialises");
    postcard::from_bytes(&bytes).expect("comes back")
}

fn pieces(tokenizer: &Tokenizer, skip_special: bool, ids: &[u32]) -> Vec<String> {
    let mut stream = DetokenizeStream::new(tokenizer, skip_special);
    let mut pieces = Vec::new();
    for &id in ids {
        pieces.push(stream.push(tokenizer, id).expect("decodes"));
        stream = travel(&stream);
    }
    pieces.push(stream.finish(tokenizer).expect("decodes"));
    pieces
}

/// The ids of the byte tokens of [`byte_level`].
fn byte_ids(bytes: &[u8]) -> Vec<u32> {
    bytes.iter().map(|&byte| u32::from(byte) + 3).collect()
}

#[test]
fn characters_are_never_split() {
    let tokenizer = byte_level();
    let text = "a你好🦀é";
    let found = pieces(&tokenizer, true, &byte_ids(text.as_bytes()));
    let expected = ["a", "", "", "你", "", "", "好", "", "", "", "🦀", "", "é", ""];
    assert_eq!(found, expected);
}

#[test]
fn incomplete_and_invalid_bytes_become_replacement_characters() {
    let tokenizer = byte_level();
    let cases: [(&[u8], &[&str]); 5] = [
        (&[0xE4, 0xBD], &["", "", "\u{FFFD}"]),
        (&[0xE4, b'x'], &["", "\u{FFFD}x", ""]),
        (&[0xFF, 0x80, b'y'], &["\u{FFFD}", "\u{FFFD}", "y", ""]),
        // A lead byte after a lead byte: the first is certain to be wrong, the second not yet.
        (&[0xE4, 0xE4, 0xBD, 0xA0], &["", "\u{FFFD}", "", "你", ""]),
        // A genuine U+FFFD is a character like any other.
        ("\u{FFFD}".as_bytes(), &["", "", "\u{FFFD}", ""]),
    ];
    for (bytes, expected) in cases {
        assert_eq!(pieces(&tokenizer, true, &byte_ids(bytes)), expected, "{bytes:x?}");
    }
}

#[test]
fn special_tokens_are_text_or_skipped_and_unnamed_ones_nothing() {
    let tokenizer = byte_level();
    let ids = [1, 3 + 65, 400, 2];
    assert_eq!(pieces(&tokenizer, true, &ids), ["", "A", "", "", ""]);
    assert_eq!(pieces(&tokenizer, false, &ids), ["<|bos|>", "A", "", "<|eos|>", ""]);
    // A skipped token inside a character leaves the character whole, as one decode does.
    assert_eq!(pieces(&tokenizer, true, &[0xC3 + 3, 2, 0xA9 + 3]).concat(), "é");
}

#[test]
fn decoders_with_context_keep_spaces_and_characters() {
    let tokenizer = sentence_piece();
    // "▁hello" "▁" E4 BD A0 "world" "<s>" "▁hello" "▁你" "!"
    let ids = [257, 258, 0xE4 + 1, 0xBD + 1, 0xA0 + 1, 259, 0, 257, 260, 261];
    let found = pieces(&tokenizer, true, &ids);
    assert_eq!(found, ["hello", " ", "", "", "你", "world", "", " hello", " 你", "!", ""]);
    assert_eq!(found.concat(), tokenizer.decode(&ids, true).unwrap());
    // The first token's text may be empty: the space still comes.
    assert_eq!(pieces(&tokenizer, true, &[258, 257]).concat(), tokenizer.decode(&[258, 257], true).unwrap());
    assert_eq!(pieces(&tokenizer, true, &[261, 0xE4 + 1]), ["!", "", "\u{FFFD}"]);
}

/// Bytes that never form a character do not hold the stream, or its state, back for ever.
#[test]
fn held_back_tokens_are_bounded() {
    for (tokenizer, id) in [(byte_level(), 0xE4 + 3), (sentence_piece(), 0xE4 + 1)] {
        let mut stream = DetokenizeStream::new(&tokenizer, true);
        let mut text = String::new();
        for _ in 0..1000 {
            text += &stream.push(&tokenizer, id).unwrap();
            assert!(postcard::to_stdvec(&stream).unwrap().len() < 64);
        }
        text += &stream.finish(&tokenizer).unwrap();
        assert_eq!(text, "\u{FFFD}".repeat(1000));
    }
}

#[test]
fn a_state_for_another_kind_of_tokenizer_is_refused() {
    let (bytes, pieces) = (byte_level(), sentence_piece());
    let mut stream = DetokenizeStream::new(&bytes, true);
    assert!(matches!(stream.push(&pieces, 5), Err(TextError::StateMismatch)));
    let mut stream = DetokenizeStream::new(&pieces, true);
    assert!(matches!(stream.finish(&bytes), Err(TextError::StateMismatch)));
}

/// Feeds a text cut at the given places (byte offsets, moved to character borders); the state travels between pieces.
fn run_matcher(matcher: StopMatcher, text: &str, cuts: &[usize]) -> (String, Option<usize>) {
    let mut matcher = matcher;
    let mut cuts: Vec<usize> =
        cuts.iter().map(|cut| cut % (text.len() + 1)).filter(|&cut| text.is_char_boundary(cut)).collect();
    cuts.extend([0, text.len()]);
    cuts.sort_unstable();
    let mut out = String::new();
    for pair in cuts.windows(2) {
        out += &matcher.push(&text[pair[0]..pair[1]]).text;
        matcher = travel(&matcher);
    }
    out += &matcher.finish();
    (out, matcher.stopped())
}

/// Walks the full text character by character; the first place where some stop string ends, the longest there.
fn naive_stop(stops: &[String], include_stop: bool, text: &str) -> (String, Option<usize>) {
    let ends = text.char_indices().map(|(start, character)| start + character.len_utf8());
    for end in ends {
        let ending = stops.iter().enumerate().filter(|(_, stop)| text[..end].ends_with(stop.as_str()));
        if let Some((index, stop)) = ending.min_by_key(|(_, stop)| std::cmp::Reverse(stop.len())) {
            let cut = if include_stop { end } else { end - stop.len() };
            return (text[..cut].to_owned(), Some(index));
        }
    }
    (text.to_owned(), None)
}

fn matcher(stops: &[&str], include_stop: bool) -> StopMatcher {
    StopMatcher::new(stops.iter().map(|&stop| stop.to_owned()).collect(), include_stop).expect("within limits")
}

#[test]
fn text_that_may_start_a_stop_string_is_held_back_and_no_more() {
    let mut stream = matcher(&["</s>", "END"], false);
    let outputs: Vec<StopOutput> = ["ab<", "/", "x E", "N", "DLESS"].map(|text| stream.push(text)).to_vec();
    let texts: Vec<&str> = outputs.iter().map(|output| output.text.as_str()).collect();
    assert_eq!(texts, ["ab", "", "</x ", "", ""]);
    assert_eq!(outputs[4].stopped, Some(1));
    assert_eq!(stream.push("more"), StopOutput { text: String::new(), stopped: Some(1) });
    assert_eq!((stream.pass("more").as_str(), stream.finish().as_str()), ("", ""));

    let mut stream = matcher(&["</s>"], false);
    assert_eq!(stream.push("x</").text, "x");
    assert_eq!(stream.finish(), "</");
}

#[test]
fn the_first_complete_match_wins_and_the_longest_of_those() {
    assert_eq!(run_matcher(matcher(&["abcd", "c"], false), "abcd", &[]), ("ab".to_owned(), Some(1)));
    assert_eq!(run_matcher(matcher(&["bc", "abc"], false), "xabc", &[2]), ("x".to_owned(), Some(1)));
    assert_eq!(run_matcher(matcher(&["bc", "abc"], true), "xabcd", &[2]), ("xabc".to_owned(), Some(1)));
    assert_eq!(run_matcher(matcher(&["a", "a"], false), "ba", &[]), ("b".to_owned(), Some(0)));
    assert_eq!(run_matcher(matcher(&[], false), "ba", &[1]), ("ba".to_owned(), None));
}

#[test]
fn passed_text_is_given_out_and_starts_no_match() {
    let mut stream = matcher(&["END"], false);
    assert_eq!(stream.pass("END E"), "END E");
    assert_eq!(stream.push("ND").text, "ND");
    assert_eq!(stream.push(" EN").text, " ");
    assert_eq!(stream.pass("D"), "END");
    assert_eq!(stream.stopped(), None);
}

#[test]
fn limits_are_checked_for_requests_and_for_records() {
    let stops = |lengths: &[usize]| lengths.iter().map(|&length| "x".repeat(length)).collect::<Vec<_>>();
    StopMatcher::new(stops(&[1, 256]), false).unwrap();
    StopMatcher::new(stops(&[1; 16]), false).unwrap();
    assert_eq!(StopMatcher::new(stops(&[1; 17]), false), Err(StopError::TooMany { found: 17 }));
    assert_eq!(StopMatcher::new(stops(&[3, 0]), false), Err(StopError::Length { index: 1, bytes: 0 }));
    assert_eq!(StopMatcher::new(stops(&[257]), false), Err(StopError::Length { index: 0, bytes: 257 }));
    let forged = postcard::to_stdvec(&(vec![""], false, "", None::<usize>)).unwrap();
    assert!(postcard::from_bytes::<StopMatcher>(&forged).is_err());
    let genuine = postcard::to_stdvec(&(vec!["x"], false, "", None::<usize>)).unwrap();
    assert_eq!(postcard::from_bytes::<StopMatcher>(&genuine).unwrap(), matcher(&["x"], false));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(1000) })]

    #[test]
    fn pieces_make_up_the_whole_text(text in "(?s:.){0,40}", skip_special: bool) {
        thread_local! { static TOKENIZER: Tokenizer = byte_level(); }
        TOKENIZER.with(|tokenizer| {
            let found = pieces(tokenizer, skip_special, &byte_ids(text.as_bytes()));
            prop_assert_eq!(found.concat(), text.as_str());
            prop_assert_eq!(found.last().map(String::as_str), Some(""));
            Ok(())
        })?;
    }

    /// Tokens as a random model draws them: any bytes, special tokens, ids without a name.
    #[test]
    fn pieces_make_up_the_whole_decode_of_any_tokens(
        ids in prop::collection::vec(prop_oneof![0u32..520, 0x80u32 + 3..259, 0xC0u32 + 3..0xF5 + 3], 0..40),
        skip_special: bool,
    ) {
        thread_local! { static TOKENIZER: Tokenizer = byte_level(); }
        TOKENIZER.with(|tokenizer| {
            let found = pieces(tokenizer, skip_special, &ids).concat();
            prop_assert_eq!(found, tokenizer.decode(&ids, skip_special).unwrap());
            Ok(())
        })?;
    }

    /// Few different characters, so that partial and overlapping matches are common.
    #[test]
    fn stops_equal_a_search_over_the_full_text(
        text in "[ab你é🦀]{0,40}",
        stops in prop::collection::vec("[ab你é🦀]{1,5}", 0..5),
        cuts in prop::collection::vec(0usize..200, 0..20),
        include_stop: bool,
    ) {
        let matcher = StopMatcher::new(stops.clone(), include_stop).unwrap();
        prop_assert_eq!(run_matcher(matcher, &text, &cuts), naive_stop(&stops, include_stop, &text));
    }
}
