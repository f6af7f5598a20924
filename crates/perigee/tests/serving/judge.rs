//! Compares an answer that was given under load with the one that the same request has alone. They are equal token by
//! token; where they are not, the draw must have been so close that rounding may decide it, which is computed from the
//! model's own logits at that position by the sampler itself. Such excuses are counted, and rare.

use perigee_proto::v1::{FinishReason, GenerateRequest, PositionLogprobs};
use perigee_sampling::{Draw, SamplingParams, Scratch, TokenCounts, sample};
use perigee_testkit::tensors::{self, Tensor, Tensors, Values};
use perigee_testkit::{Numbers, ScoreRun};

use crate::answer::{Answer, Choice, End};
use crate::work::EOS;

/// A draw closer than this (top-2 scores, or a filter's cut) may fall either way.
const MARGIN: f32 = 1e-4;
/// What log-probabilities of the same token may differ by.
const LOGPROB: f32 = 1e-4;

/// Judges answers of one model.
pub(crate) struct Judge {
    model: String,
    judged: usize,
    excuses: Vec<String>,
}

impl Judge {
    pub(crate) fn new(model: impl Into<String>) -> Self {
        Self { model: model.into(), judged: 0, excuses: Vec::new() }
    }

    /// Panics where an answer under load is not what it is alone, without an excuse.
    pub(crate) fn compare(&mut self, request: &GenerateRequest, got: &Answer, alone: &Answer) {
        assert_eq!(got.choices.len(), alone.choices.len());
        for (number, (got_choice, alone_choice)) in got.choices.iter().zip(&alone.choices).enumerate() {
            self.judged += 1;
            let whole = matches!(got.end, End::Finished);
            self.compare_choice((request, number as u32), got_choice, alone_choice, whole);
        }
    }

    fn compare_choice(&mut self, of: (&GenerateRequest, u32), got: &Choice, alone: &Choice, whole: bool) {
        let name = format!("{} choice {}", of.0.request_id, of.1);
        close(&format!("{name}, prompt"), &got.prompt_logprobs, &alone.prompt_logprobs, got.responded());
        let same = got.tokens.iter().zip(&alone.tokens).take_while(|(a, b)| a == b).count();
        close(&name, &got.logprobs[..got.logprobs.len().min(same)], &alone.logprobs, true);
        if same < got.tokens.len() && same < alone.tokens.len() {
            let excuse = self.margin(of, &alone.tokens[..same], alone.tokens[same]);
            let told = format!("{name}: token {same} is {}, alone {}", got.tokens[same], alone.tokens[same]);
            assert!(excuse < MARGIN, "{told}, and the margin alone was {excuse}");
            println!("excused by a margin of {excuse:e}: {told}");
            self.excuses.push(told);
            return;
        }
        assert!(same == got.tokens.len(), "{name} has {} tokens, alone only {same}", got.tokens.len());
        if whole {
            assert_eq!((got.finish, &got.tokens, &got.text), (alone.finish, &alone.tokens, &alone.text), "{name}");
            assert_ne!(got.finish, Some(FinishReason::Aborted), "{name} was aborted by nobody");
        } else {
            assert!(alone.text.starts_with(&got.text), "{name}: {:?} does not begin {:?}", got.text, alone.text);
        }
    }

    /// How close the draw of `token` after `before` was, by the logits of the prompt scored alone.
    fn margin(&self, (request, choice): (&GenerateRequest, u32), before: &[u32], token: u32) -> f32 {
        let tokens: Vec<u32> = request.token_ids.iter().chain(before).copied().collect();
        let logits = last_logits(&self.model, &tokens);
        let sampling = params(request);
        let mut counts = TokenCounts::from_prompt(&request.token_ids);
        before.iter().for_each(|&token| counts.record_output(token));
        let asked = request.sampling.clone().unwrap_or_default();
        let mut ends = asked.stop_token_ids;
        ends.extend((!asked.ignore_eos).then_some(EOS));
        let banned = if (before.len() as u32) < asked.min_tokens { ends } else { Vec::new() };
        let position = tokens.len() as u64;
        let draw = Draw { params: &sampling, choice, position, counts: &counts, banned: &banned, allowed: None };
        let drawn = sample(&logits, &draw, &mut Scratch::new()).expect("logits of a working model");
        assert!(drawn.token == token || drawn.margin < MARGIN, "scored, {} is drawn and not {token}", drawn.token);
        drawn.margin
    }

    /// Panics where more than one answer in a hundred needed an excuse, or too few were judged for that to mean anything.
    pub(crate) fn verdict(&self, at_least: usize) {
        println!("{} of {} answers needed an excuse", self.excuses.len(), self.judged);
        assert!(self.judged >= at_least, "only {} answers were judged", self.judged);
        assert!(self.excuses.len() * 100 <= self.judged, "too many excuses: {:#?}", self.excuses);
    }
}

impl Choice {
    fn responded(&self) -> bool {
        !self.tokens.is_empty() || self.finish.is_some()
    }
}

/// Log-probabilities that belong together are close, and of the same tokens.
fn close(what: &str, got: &[PositionLogprobs], alone: &[PositionLogprobs], all: bool) {
    assert!(!all || got.len() <= alone.len(), "{what}: {} positions, alone {}", got.len(), alone.len());
    for (index, (got, alone)) in got.iter().zip(alone).enumerate() {
        let value = |position: &PositionLogprobs| position.chosen.map(|chosen| (chosen.token_id, chosen.logprob));
        let near = match (value(got), value(alone)) {
            (Some((token, logprob)), Some((other, expected))) => {
                token == other && (logprob - expected).abs() <= LOGPROB
            }
            (None, None) => true,
            _ => false,
        };
        assert!(near, "{what}, position {index}: {:?}, alone {:?}", got.chosen, alone.chosen);
        // Alternatives that are nearly equal may change places; their values stay.
        assert_eq!(got.top.len(), alone.top.len(), "{what}, position {index}");
        let near = got.top.iter().zip(&alone.top).all(|(a, b)| (a.logprob - b.logprob).abs() <= LOGPROB);
        assert!(near, "{what}, position {index}: {:?}, alone {:?}", got.top, alone.top);
    }
}

/// A request's sampling as the sampler takes it; the model has no defaults of its own.
fn params(request: &GenerateRequest) -> SamplingParams {
    let asked = request.sampling.clone().unwrap_or_default();
    let default = SamplingParams::default();
    SamplingParams {
        temperature: asked.temperature.unwrap_or(default.temperature),
        top_k: asked.top_k.unwrap_or(default.top_k),
        top_p: asked.top_p.unwrap_or(default.top_p),
        min_p: asked.min_p.unwrap_or(default.min_p),
        repetition_penalty: asked.repetition_penalty.unwrap_or(default.repetition_penalty),
        presence_penalty: asked.presence_penalty.unwrap_or(default.presence_penalty),
        frequency_penalty: asked.frequency_penalty.unwrap_or(default.frequency_penalty),
        logit_bias: asked.logit_bias.into_iter().collect(),
        seed: asked.seed.unwrap_or(default.seed),
        ..default
    }
}

/// Logits after the last of some tokens, computed by one rank in this process.
fn last_logits(model: &str, tokens: &[u32]) -> Vec<f32> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tokens.safetensors");
    let ids: Vec<i64> = tokens.iter().map(|&token| token.into()).collect();
    tensors::write(&file, &Tensors::from([("prompt_0".to_owned(), Tensor::integers(&[ids.len()], ids))])).unwrap();
    let scored = ScoreRun::new(model, &file).run().unwrap();
    let logits = &scored["logits_0"];
    match &logits.slice(logits.rows() - 1..logits.rows()).values {
        Values::Floats(values) => values.clone(),
        Values::Integers(_) => panic!("logits are floats"),
    }
}

/// The judge itself: an answer that a fault has changed is not excused.
#[test]
fn a_wrong_token_is_no_close_call() {
    let mut numbers = Numbers::new(5);
    let request = crate::greedy(crate::work::prompt(&mut numbers, 20), 4);
    let logits = last_logits("random:tiny", &request.token_ids);
    let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap() as u32;
    let judge = Judge::new("random:tiny");
    let margin = judge.margin((&request, 0), &[], best);
    let mut sorted = logits;
    sorted.sort_by(f32::total_cmp);
    let expected = sorted[sorted.len() - 1] - sorted[sorted.len() - 2];
    assert!((margin - expected).abs() < 1e-6 && margin > MARGIN, "{margin}, expected {expected}");
}
