//! Masks over a vocabulary as large as the published one, 163,840 tokens: what is drawn within them is JSON of the schema,
//! and their times are printed. They mean something in a release build:
//! `cargo test --release -p perigee-text --test masks -- --nocapture`.

use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use perigee_text::Tokenizer;
use perigee_text::grammar::{GrammarCompiler, GrammarSource};
use serde_json::{Value, json};

const VOCAB: usize = 163_840;
/// What follows the ranks.
const SPECIAL: usize = 256;
/// Of `perigee bench engine` with the 48B shape on one H200, 8 × 1k: what a step of such a batch takes there.
const STEP: Duration = Duration::from_micros(7690);
const DOCUMENTS: usize = 20;

/// Random numbers, the same every time.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % limit
    }
}

/// Ranks as in a trained vocabulary by kind: every byte, punctuation of JSON, numbers of up to three digits, pieces of Han,
/// and words of syllables, with a space before them or not.
fn ranks() -> Vec<Vec<u8>> {
    const SYLLABLES: [&str; 16] =
        ["a", "be", "con", "de", "er", "ing", "ly", "men", "ti", "on", "re", "sta", "tor", "un", "ver", "zi"];
    let mut ranks: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
    ranks.extend(
        ["{\"", "\":", "\",", "\", \"", "\": \"", "}}", "]}", "[{", "},", "  ", "\n  "].map(|text| text.into()),
    );
    ranks.extend((10..1000).map(|number| number.to_string().into_bytes()));
    ranks.extend(('\u{4e00}'..='\u{9fa5}').map(|character| character.to_string().into_bytes()));
    let mut seen: std::collections::HashSet<Vec<u8>> = ranks.iter().cloned().collect();
    let mut dice = Dice(1);
    while ranks.len() < VOCAB - SPECIAL {
        let mut word = if dice.below(2) == 0 { " ".to_owned() } else { String::new() };
        for _ in 0..2 + dice.below(4) {
            word.push_str(SYLLABLES[dice.below(SYLLABLES.len())]);
        }
        if seen.insert(word.clone().into_bytes()) {
            ranks.push(word.into_bytes());
        }
    }
    ranks
}

fn tokenizer(folder: &Path) -> Tokenizer {
    let mut file = std::io::BufWriter::new(std::fs::File::create(folder.join("tiktoken.model")).expect("a file"));
    for (rank, bytes) in ranks().iter().enumerate() {
        writeln!(file, "{} {rank}", STANDARD.encode(bytes)).expect("room for a rank");
    }
    file.into_inner().expect("room for the ranks").sync_all().expect("room for the ranks");
    Tokenizer::load(folder).expect("a tokenizer")
}

fn schema() -> Value {
    json!({
        "type": "object",
        "properties": {
            "title": {"type": "string", "maxLength": 200},
            "kind": {"enum": ["message", "order", "note"]},
            "size": {"type": "integer", "minimum": 0, "maximum": 100_000},
            "items": {
                "type": "array", "minItems": 2, "maxItems": 5,
                "items": {
                    "type": "object",
                    "properties": {
                        "name": {"type": "string", "pattern": "^[a-z ]{3,60}$"},
                        // Not any number: the grammar's may be larger than a reader takes.
                        "price": {"type": "integer", "minimum": 0, "maximum": 99_999},
                    },
                    "required": ["name", "price"],
                    "additionalProperties": false,
                },
            },
        },
        "required": ["title", "kind", "size", "items"],
        "additionalProperties": false,
    })
}

fn allowed(mask: &[u64]) -> Vec<u32> {
    (0..mask.len() as u32 * 64).filter(|&token| mask[token as usize / 64] >> (token % 64) & 1 == 1).collect()
}

/// Token that a text of reasonable length would have next: not always another digit or letter.
fn choose(choices: &[u32], tokenizer: &Tokenizer, dice: &mut Dice) -> u32 {
    let closes = |id: &&u32| matches!(tokenizer.token_bytes(**id).first(), Some(b'"' | b',' | b'}' | b']'));
    match choices.iter().find(closes) {
        Some(&id) if dice.below(4) == 0 => id,
        _ => choices[dice.below(choices.len())],
    }
}

#[test]
fn masks_of_the_published_size_are_right_and_their_times_are_told() {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = tokenizer(folder.path());
    assert_eq!(tokenizer.vocab_size(), VOCAB);
    let began = Instant::now();
    let compiler = GrammarCompiler::new(&tokenizer, VOCAB).expect("byte-level");
    let vocabulary = began.elapsed();
    let end = tokenizer.token_id("<|reserved_token_163600|>").expect("a control token");
    let mut dice = Dice(7);
    let (mut times, mut compiled, mut widest) = (Vec::new(), Vec::new(), 0);
    for _ in 0..DOCUMENTS {
        let began = Instant::now();
        let mut grammar = compiler.compile(&GrammarSource::JsonSchema(schema().to_string())).expect("a grammar");
        compiled.push(began.elapsed());
        let mut tokens = Vec::new();
        loop {
            let began = Instant::now();
            grammar.prepare(&[end]).expect("a mask");
            times.push(began.elapsed());
            if grammar.is_finished() {
                break;
            }
            let choices = allowed(grammar.allowed());
            assert!(!choices.is_empty() && tokens.len() < 5000, "{} tokens", tokens.len());
            widest = widest.max(choices.len());
            let token = choose(&choices, &tokenizer, &mut dice);
            if token == end {
                break;
            }
            grammar.accept(token).expect("allowed");
            tokens.push(token);
        }
        let text = tokenizer.decode(&tokens, false).unwrap();
        let value: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
        assert_eq!(value.as_object().unwrap().len(), 4, "{text}");
    }
    assert!(widest > 100_000, "strings allow most of the vocabulary: {widest}");
    times.sort();
    compiled.sort();
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize];
    let ratio = |time: Duration| 100.0 * time.as_secs_f64() / STEP.as_secs_f64();
    println!(
        "{} masks of {VOCAB} tokens: p50 {:?} ({:.2} % of a step of {STEP:?}), p99 {:?} ({:.2} %), most {:?}; a grammar in {:?}, \
         the vocabulary in {vocabulary:?}",
        times.len(),
        at(0.5),
        ratio(at(0.5)),
        at(0.99),
        ratio(at(0.99)),
        at(1.0),
        compiled[compiled.len() / 2],
    );
}
