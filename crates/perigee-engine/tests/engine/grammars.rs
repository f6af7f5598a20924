//! Sessions whose text must follow a grammar: what is drawn fits, ends where nothing can follow, and goes on the same after
//! a replay.

use std::sync::{Arc, OnceLock};

use perigee_engine::request::{FinishReason, Request, SessionId, StartGrammar};
use perigee_engine::testing::{ModelExecutor, ModelSizes, greedy_request};
use perigee_text::grammar::{GrammarCompiler, GrammarSource};

use crate::support::{Driver, EOS, config, tokenizer};

fn compiler() -> &'static GrammarCompiler {
    static COMPILER: OnceLock<GrammarCompiler> = OnceLock::new();
    COMPILER.get_or_init(|| GrammarCompiler::new(&tokenizer(), ModelSizes::default().limits.vocab).unwrap())
}

fn request(session: &str, source: &GrammarSource, delivered: &[u32]) -> Request {
    let start = Arc::new(compiler().compile_after(source, delivered).unwrap());
    let mut request = greedy_request(session, vec![7; 10], 200);
    request.sampling.temperature = 1.0;
    request.sampling.seed = 5;
    request.stop.ignore_eos = false;
    request.text = true;
    request.delivered = delivered.to_vec();
    request.grammar = Some(StartGrammar { source: source.clone(), start });
    request
}

fn driver() -> Driver {
    Driver::new(ModelExecutor::new(ModelSizes::default()), config())
}

#[test]
fn every_choice_follows_the_grammar_by_itself_and_ends_with_it() {
    let mut request = request("0", &GrammarSource::Regex("[a-f]{5}-[0-9]{3,}".into()), &[]);
    request.sessions = (0..4).map(|choice| SessionId(choice.to_string())).collect();
    let mut driver = driver();
    driver.submit(&request);
    driver.finish();
    let mut texts = Vec::new();
    for choice in ["0", "1", "2", "3"] {
        let answer = driver.answer(choice);
        let (letters, digits) = answer.text.split_once('-').expect("both parts");
        assert!(letters.len() == 5 && letters.bytes().all(|byte| (b'a'..=b'f').contains(&byte)), "{}", answer.text);
        assert!(digits.bytes().all(|byte| byte.is_ascii_digit()), "{}", answer.text);
        // Digits may follow digits, so only an end token or the length limit ends it.
        match answer.reason() {
            FinishReason::Stop => assert!(digits.len() >= 3 && answer.tokens.last() == Some(&EOS), "{}", answer.text),
            other => assert_eq!((other, answer.tokens.len()), (FinishReason::Length, 200)),
        }
        texts.push(answer.text.clone());
    }
    texts.dedup();
    assert!(texts.len() > 1, "the choices differ: {texts:?}");
    driver.assert_nothing_is_held();
}

#[test]
fn the_last_token_of_a_grammar_is_the_last_of_its_session() {
    let mut driver = driver();
    driver.submit(&request("three", &GrammarSource::Regex("[a-f]{3}".into()), &[]));
    driver.submit(&request("none", &GrammarSource::Regex(String::new()), &[]));
    // Without end tokens, and where the text is shorter than it is to be.
    let mut endless = request("endless", &GrammarSource::Regex("[a-f]{4}".into()), &[]);
    endless.stop.ignore_eos = true;
    let mut least = request("least", &GrammarSource::Regex("[a-f]{4}".into()), &[]);
    least.stop.min_tokens = 100;
    driver.submit(&endless);
    driver.submit(&least);
    driver.finish();
    for (session, length) in [("three", 3), ("none", 0), ("endless", 4), ("least", 4)] {
        let answer = driver.answer(session);
        assert_eq!((answer.tokens.len(), answer.text.len(), answer.reason()), (length, length, FinishReason::Stop));
    }
    driver.assert_nothing_is_held();
}

#[test]
fn a_replayed_session_goes_on_in_its_grammar() {
    let schema = r#"{"type": "object", "properties": {"a": {"type": "string", "maxLength": 9}, "b": {"enum": [1, 22]}},
                     "required": ["a", "b"], "additionalProperties": false}"#;
    let source = GrammarSource::JsonSchema(schema.into());
    let mut whole = driver();
    whole.submit(&request("s", &source, &[]));
    whole.finish();
    let tokens = whole.answer("s").tokens.clone();
    assert!(serde_json::from_str::<serde_json::Value>(&whole.answer("s").text).unwrap()["a"].is_string());
    for cut in 1..tokens.len() {
        let mut after = driver();
        after.submit(&request("s", &source, &tokens[..cut]));
        after.finish();
        assert_eq!(after.answer("s").tokens, tokens[cut..], "after {cut} tokens");
    }
}
