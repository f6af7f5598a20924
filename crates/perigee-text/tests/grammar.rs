//! Grammars: texts drawn at random within the masks are what the source asks for, end where they may, and are followed
//! again from their tokens; sources made to explode are refused in time.

use std::path::Path;
use std::time::{Duration, Instant};

use perigee_text::grammar::{Grammar, GrammarCompiler, GrammarError, GrammarSource};
use perigee_text::tool_calls::{CallableTool, calls_grammar};
use perigee_text::{GenerationConfig, SpecialIds, Tokenizer, ToolCallParser, ToolEvent, byte_level_tokenizer};
use serde_json::{Value, json};

const EOS: u32 = 2;

fn byte_level() -> (Tokenizer, GrammarCompiler) {
    let special = SpecialIds { bos: Some(1), eos: Some(EOS), pad: Some(0) };
    let json = byte_level_tokenizer(500, special).expect("room").to_string();
    let path = Path::new("tokenizer.json").into();
    let tokenizer = Tokenizer::from_json(json.as_bytes(), path, GenerationConfig::default()).expect("valid");
    let compiler = GrammarCompiler::new(&tokenizer, 500).expect("byte-level");
    (tokenizer, compiler)
}

fn tiktoken() -> (Tokenizer, GrammarCompiler) {
    let tokenizer = Tokenizer::load(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tiktoken")).expect("valid");
    let compiler = GrammarCompiler::new(&tokenizer, tokenizer.vocab_size()).expect("byte-level");
    (tokenizer, compiler)
}

/// Random numbers, the same every time.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % limit
    }
}

fn allowed(mask: &[u64]) -> Vec<u32> {
    (0..mask.len() as u32 * 64).filter(|&token| mask[token as usize / 64] >> (token % 64) & 1 == 1).collect()
}

fn mask<'a>(grammar: &'a mut Grammar, ends: &[u32]) -> &'a [u64] {
    grammar.prepare(ends).expect("a mask");
    grammar.allowed()
}

/// Draws a text within the masks, until its end.
fn draw(grammar: &mut Grammar, dice: &mut Dice) -> Vec<u32> {
    let mut tokens = Vec::new();
    while !grammar.is_finished() {
        let choices = allowed(mask(grammar, &[EOS]));
        assert!(!choices.is_empty() && tokens.len() < 3000, "{} tokens", tokens.len());
        let token = choices[dice.below(choices.len())];
        if token == EOS {
            break;
        }
        grammar.accept(token).expect("allowed");
        tokens.push(token);
    }
    tokens
}

fn person() -> Value {
    json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "tags": {"type": "array", "items": {"enum": ["a", "bé", "你"]}, "maxItems": 3},
            "home": {"$ref": "#/$defs/place"},
        },
        "required": ["name", "age", "tags", "home"],
        "additionalProperties": false,
        "$defs": {"place": {"type": "object", "properties": {"x": {"type": "boolean"}}, "required": ["x"],
                            "additionalProperties": false}},
    })
}

#[test]
fn drawn_texts_meet_the_schema() {
    let mut dice = Dice(14);
    for (tokenizer, compiler) in [byte_level(), tiktoken()] {
        let compiled = compiler.compile(&GrammarSource::JsonSchema(person().to_string())).unwrap();
        for _ in 0..40 {
            let tokens = draw(&mut compiled.fork(), &mut dice);
            let text = tokenizer.decode(&tokens, false).unwrap();
            let value: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
            assert!(value["name"].is_string() && value["home"]["x"].is_boolean(), "{text}");
            assert!(value["age"].as_u64().is_some_and(|age| age <= 150), "{text}");
            assert_eq!(value.as_object().map(serde_json::Map::len), Some(4), "{text}");
        }
    }
}

#[test]
fn expressions_are_matched_whole_and_ends_come_only_where_they_may() {
    let (tokenizer, compiler) = byte_level();
    let mut grammar = compiler.compile(&GrammarSource::Regex("(ab)+c?".to_owned())).unwrap();
    let is_end_allowed = |grammar: &mut Grammar| allowed(mask(grammar, &[EOS])).contains(&EOS);
    let id = |text: &str| tokenizer.encode(text, perigee_text::SpecialTokens::AsText).unwrap()[0];
    assert_eq!(allowed(mask(&mut grammar, &[EOS])), [id("a")]);
    grammar.accept(id("a")).unwrap();
    assert!(!is_end_allowed(&mut grammar));
    grammar.accept(id("b")).unwrap();
    assert_eq!(allowed(mask(&mut grammar, &[EOS])), [EOS, id("a"), id("c")]);
    assert_eq!(allowed(mask(&mut grammar, &[])), [id("a"), id("c")]);
    let mut other = grammar.fork();
    assert!(matches!(other.accept(id("x")), Err(GrammarError::Broken(_))));
    assert!(matches!(other.prepare(&[EOS]), Err(GrammarError::Broken(_))), "broken for good");
    grammar.accept(id("c")).unwrap();
    assert!(grammar.is_finished());
    assert_eq!(allowed(mask(&mut grammar, &[EOS])), [EOS]);
}

#[test]
fn a_grammar_is_made_anew_from_its_source_and_the_tokens() {
    let (_, compiler) = tiktoken();
    let source = GrammarSource::JsonSchema(person().to_string());
    let mut dice = Dice(3);
    let tokens = draw(&mut compiler.compile(&source).unwrap(), &mut dice);
    for cut in 0..tokens.len() {
        let mut anew = compiler.compile(&source).unwrap();
        let mut first = compiler.compile(&source).unwrap();
        for (at, &token) in tokens[..cut].iter().enumerate() {
            // One computed masks on the way, the other did not.
            assert!(allowed(mask(&mut first, &[EOS])).contains(&token), "token {at}");
            first.accept(token).unwrap();
            anew.accept(token).unwrap();
        }
        assert_eq!(mask(&mut anew, &[EOS]), mask(&mut first, &[EOS]), "after {cut} tokens");
    }
}

#[test]
fn control_tokens_are_not_text() {
    let (tokenizer, compiler) = tiktoken();
    let mut grammar = compiler.compile(&GrammarSource::Regex("(?s:.*)".to_owned())).unwrap();
    let choices = allowed(mask(&mut grammar, &[]));
    assert!(choices.len() > 500 && choices.iter().all(|&token| token < 800), "{choices:?}");
    let source = "start: <|im_user|> \"x\" <|im_end|>".to_owned();
    let mut grammar = compiler.compile(&GrammarSource::Lark(source)).unwrap();
    assert_eq!(allowed(mask(&mut grammar, &[])), [tokenizer.token_id("<|im_user|>").unwrap()]);
}

/// A schema whose alternatives multiply, expressions that repeat repetitions, references without an end; and whether it
/// must be refused.
fn explosive() -> Vec<(&'static str, GrammarSource, bool)> {
    let either = |at: usize| {
        let branch =
            |value: usize| json!({"properties": {format!("p{at}"): {"const": value}}, "required": [format!("p{at}")]});
        json!({"anyOf": (0..8).map(branch).collect::<Vec<_>>()})
    };
    let product = json!({"type": "object", "allOf": (0..14).map(either).collect::<Vec<_>>()});
    let mut nested = json!({"type": "string", "pattern": "^(a|b|ab){1,500}$"});
    for _ in 0..5 {
        nested = json!({"anyOf": [nested, {"type": "object", "properties": {"x": nested, "y": nested}}]});
    }
    let many = (0..2000).map(|at| (format!("property{at}"), json!({"enum": [at]})));
    let wide = json!({"type": "object", "properties": many.collect::<serde_json::Map<String, Value>>()});
    let overlapping = (1..300).map(|n| "ab".repeat(n)).collect::<Vec<_>>().join("|");
    let schema = |value: &Value| GrammarSource::JsonSchema(value.to_string());
    let regex = |text: &str| GrammarSource::Regex(text.to_owned());
    vec![
        ("a product of alternatives", schema(&product), true),
        ("nested alternatives", schema(&nested), false),
        ("many properties", schema(&wide), false),
        ("an endless reference", schema(&json!({"$ref": "#"})), true),
        ("a reference elsewhere", schema(&json!({"$ref": "https://example.org/x.json"})), true),
        ("a long string", schema(&json!({"type": "string", "minLength": 100_000, "maxLength": 10_000_000})), false),
        ("a long list", schema(&json!({"type": "array", "minItems": 1_000_000, "items": {"type": "integer"}})), false),
        ("repeated repetitions", regex("((a{1,1000}){1,1000}){1,1000}"), false),
        ("a far look back", regex("(a|b)*a(a|b){200}"), false),
        ("overlapping alternatives", regex(&format!("({overlapping})*x")), false),
        ("too long", regex(&"a".repeat(200_000)), true),
        ("no JSON", GrammarSource::JsonSchema("{".to_owned()), true),
        ("no expression", regex("("), true),
    ]
}

#[test]
fn sources_made_to_explode_end_in_bounded_time() {
    let (_, compiler) = byte_level();
    for (name, source, must_refuse) in explosive() {
        let started = Instant::now();
        match compiler.compile(&source) {
            Ok(mut grammar) => {
                assert!(!must_refuse, "{name} was taken");
                // What is taken must be cheap to follow, too; or it ends.
                let mut dice = Dice(1);
                for _ in 0..200 {
                    if grammar.is_finished() || grammar.prepare(&[EOS]).is_err() {
                        break;
                    }
                    let choices = allowed(grammar.allowed());
                    let token = choices[dice.below(choices.len())];
                    if token == EOS || grammar.accept(token).is_err() {
                        break;
                    }
                }
            }
            Err(error) => assert!(!error.to_string().contains("non-verbose"), "{name}: {error}"),
        }
        let took = started.elapsed();
        assert!(took < Duration::from_secs(10), "{name} took {took:?}");
    }
}

/// Forced calls are what the parser of calls finds, whether the marks are tokens or not.
#[test]
fn forced_calls_are_calls() {
    let parameters = json!({"type": "object", "properties": {"city": {"enum": ["Z\u{fc}rich", "\"q\""]}}, "required": ["city"],
                            "additionalProperties": false});
    let tools = ["weather", "a.b"].map(|name| CallableTool { name: name.to_owned(), parameters: parameters.clone() });
    let mut dice = Dice(9);
    for (tokenizer, compiler) in [byte_level(), tiktoken()] {
        let source = calls_grammar(&tools, true, |mark| tokenizer.token_id(mark).is_some());
        let compiled = compiler.compile(&source).unwrap();
        let mut most = 0;
        for _ in 0..20 {
            let tokens = draw(&mut compiled.fork(), &mut dice);
            let text = tokenizer.decode(&tokens, true).unwrap();
            let mut parser = ToolCallParser::new();
            let mut arguments: Vec<String> = Vec::new();
            for event in parser.push(&text).into_iter().chain(parser.finish()) {
                match event {
                    ToolEvent::Begin { name, id, .. } => {
                        assert!(tools.iter().any(|tool| tool.name == name) && id.starts_with("functions."), "{id}");
                        arguments.push(String::new());
                    }
                    ToolEvent::Arguments { call, text } => arguments[call].push_str(&text),
                    ToolEvent::Text(text) => panic!("text beside the calls: {text}"),
                }
            }
            most = most.max(arguments.len());
            assert!((1..=8).contains(&arguments.len()), "{text}");
            for arguments in arguments {
                assert!(serde_json::from_str::<Value>(&arguments).unwrap()["city"].is_string(), "{arguments}");
            }
        }
        assert!(most > 1, "several calls may follow each other");
        let one = calls_grammar(&tools[..1], false, |_| false);
        let text = tokenizer.decode(&draw(&mut compiler.compile(&one).unwrap(), &mut dice), true).unwrap();
        assert_eq!(text.matches("<|tool_call_begin|>functions.weather:").count(), 1, "{text}");
    }
}

#[test]
fn an_empty_text_is_finished_at_once() {
    let (_, compiler) = byte_level();
    let mut grammar = compiler.compile(&GrammarSource::Regex(String::new())).unwrap();
    assert_eq!(allowed(mask(&mut grammar, &[EOS])), [EOS]);
    assert!(grammar.is_finished());
}
