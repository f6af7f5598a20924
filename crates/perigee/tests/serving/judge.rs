//! Compares an answer that was given under load with the one that the same request has alone. They are equal token by
//! token; where they are not, the draw, or a choice of experts before it, must have been so close that rounding may decide
//! it. Both are computed by the sampler and the model themselves. Such excuses are counted, and rare.

use perigee_proto::v1::{FinishReason, GenerateRequest, PositionLogprobs};
use perigee_sampling::{Draw, SamplingParams, Scratch, TokenCounts, sample};
use perigee_testkit::Numbers;
use perigee_testkit::solo::SoloRun;

use crate::answer::{Answer, Choice, End};
use crate::work::EOS;

/// A draw closer than this (top-2 scores, or a filter's cut) may fall either way.
const MARGIN: f32 = 1e-4;
/// A choice of experts closer than this (k-th minus next score) may fall either way.
const ROUTER_GAP: f32 = 2e-5;
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
        let same = got.tokens.iter().zip(&alone.tokens).take_while(|(a, b)| a == b).count();
        let compared = same.min(got.logprobs.len());
        // A position's logits come from the one before it.
        let far = differs(&got.prompt_logprobs, &alone.prompt_logprobs).map(|position| (position, "prompt"));
        let first = of.0.token_ids.len();
        let far =
            far.or_else(|| differs(&got.logprobs[..compared], &alone.logprobs).map(|index| (first + index, "output")));
        if let Some((position, part)) = far {
            let excuse = self.run(of, &alone.tokens[..position.saturating_sub(first)]).router_gap(position);
            return self.excuse(&format!("{name}: {part} log-probabilities at position {position}"), excuse);
        }
        if same < got.tokens.len() && same < alone.tokens.len() {
            let excuse = self.close_call(of, &alone.tokens[..same], alone.tokens[same]);
            let told = format!("{name}: token {same} is {}, alone {}", got.tokens[same], alone.tokens[same]);
            return self.excuse(&told, excuse);
        }
        assert!(same == got.tokens.len(), "{name} has {} tokens, alone only {same}", got.tokens.len());
        if whole {
            assert_eq!((got.finish, &got.tokens, &got.text), (alone.finish, &alone.tokens, &alone.text), "{name}");
            assert_ne!(got.finish, Some(FinishReason::Aborted), "{name} was aborted by nobody");
        } else {
            assert!(alone.text.starts_with(&got.text), "{name}: {:?} does not begin {:?}", got.text, alone.text);
        }
    }

    /// Takes note of a difference that has an excuse, and panics where there is none.
    fn excuse(&mut self, what: &str, excuse: Excuse) {
        assert!(excuse.holds(), "{what}, without an excuse: {excuse:?}");
        println!("{what}, excused: {excuse:?}");
        self.excuses.push(what.to_owned());
    }

    fn run(&self, (request, _): (&GenerateRequest, u32), before: &[u32]) -> Run {
        let tokens: Vec<u32> = request.token_ids.iter().chain(before).copied().collect();
        Run { solo: SoloRun::compute(&self.model, &tokens).unwrap(), tokens }
    }

    /// How close the draw of `token` after `before` was, and the choices of experts up to there.
    fn close_call(&self, of: (&GenerateRequest, u32), before: &[u32], token: u32) -> Excuse {
        let (request, choice) = of;
        let Run { solo, tokens } = self.run(of, before);
        let sampling = params(request);
        let mut counts = TokenCounts::from_prompt(&request.token_ids);
        before.iter().for_each(|&token| counts.record_output(token));
        let asked = request.sampling.clone().unwrap_or_default();
        let mut ends = asked.stop_token_ids;
        ends.extend((!asked.ignore_eos).then_some(EOS));
        let banned = if (before.len() as u32) < asked.min_tokens { ends } else { Vec::new() };
        let position = tokens.len() as u64;
        let draw = Draw { params: &sampling, choice, position, counts: &counts, banned: &banned, allowed: None };
        let drawn = sample(&solo.logits, &draw, &mut Scratch::new()).expect("logits of a working model");
        let excuse = Excuse { margin: drawn.margin, router_gap: least(&solo.router_gaps) };
        assert!(drawn.token == token || excuse.holds(), "by the logits {} is drawn and not {token}", drawn.token);
        excuse
    }

    /// Panics where more than one answer in a hundred needed an excuse, or too few were judged for that to mean anything.
    pub(crate) fn verdict(&self, at_least: usize) {
        println!("{} of {} answers needed an excuse", self.excuses.len(), self.judged);
        assert!(self.judged >= at_least, "only {} answers were judged", self.judged);
        assert!(self.excuses.len() * 100 <= self.judged, "too many excuses: {:#?}", self.excuses);
    }
}

/// Why a difference may be one of rounding.
#[derive(Debug, Clone, Copy)]
struct Excuse {
    /// How close the draw was.
    margin: f32,
    /// How close a choice of experts was, there or before.
    router_gap: f32,
}

impl Excuse {
    fn holds(self) -> bool {
        self.margin < MARGIN || self.router_gap < ROUTER_GAP
    }
}

/// A sequence, and what is computed for it alone.
struct Run {
    solo: SoloRun,
    tokens: Vec<u32>,
}

impl Run {
    /// For numbers that come with the token at a position: those before it led to them.
    fn router_gap(&self, position: usize) -> Excuse {
        Excuse { margin: f32::INFINITY, router_gap: least(&self.solo.router_gaps[..position]) }
    }
}

fn least(values: &[f32]) -> f32 {
    values.iter().copied().fold(f32::INFINITY, f32::min)
}

/// The first position whose log-probabilities are not nearly the same.
fn differs(got: &[PositionLogprobs], alone: &[PositionLogprobs]) -> Option<usize> {
    assert!(got.len() <= alone.len(), "{} positions, alone {}", got.len(), alone.len());
    got.iter().zip(alone).position(|(got, alone)| {
        assert_eq!(got.top.len(), alone.top.len());
        let near = |a: f32, b: f32| (a - b).abs() <= LOGPROB;
        let chosen = match (got.chosen, alone.chosen) {
            (Some(one), Some(other)) => one.token_id == other.token_id && near(one.logprob, other.logprob),
            (one, other) => one.is_none() && other.is_none(),
        };
        // Alternatives that are nearly equal may change places; their values stay.
        !chosen || !got.top.iter().zip(&alone.top).all(|(a, b)| near(a.logprob, b.logprob))
    })
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

/// The judge itself: an answer that a fault has changed is not excused.
#[test]
fn a_wrong_token_is_no_close_call() {
    let mut numbers = Numbers::new(9);
    // Few positions: among many there is always a close choice of experts.
    let request = crate::greedy(crate::work::prompt(&mut numbers, 3), 4);
    let solo = SoloRun::compute("random:tiny", &request.token_ids).unwrap();
    let logits = &solo.logits;
    let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap() as u32;
    let excuse = Judge::new("random:tiny").close_call((&request, 0), &[], best);
    let mut sorted = logits.clone();
    sorted.sort_by(|a, b| b.total_cmp(a));
    assert!((excuse.margin - (sorted[0] - sorted[1])).abs() < 1e-6, "{excuse:?}");
    assert_eq!((solo.router_gaps.len(), least(&solo.router_gaps)), (3, excuse.router_gap));
    assert!(solo.router_gaps.iter().all(|gap| *gap > 0.0 && *gap < 1.0), "{:?}", solo.router_gaps);
    assert!(!excuse.holds(), "{excuse:?}");
}
