//! The strong test of the engine: under random arrivals, lengths, sampling, cancellations, choices, chunk sizes, scarce
//! pages and failing moves to and from host memory, every session gives exactly what it gives alone. The modelled executor makes logits of
//! what a row sees, so a wrong slot, page or position shows in the tokens.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;

use perigee_engine::request::{FinishReason, Request, SessionId, StopRule};
use perigee_engine::testing::{Faults, ModelExecutor, ModelSizes};
use perigee_engine::{EngineConfig, Turn};
use perigee_sampling::SamplingParams;

use crate::support::{Answer, Driver, Numbers, config};

/// Letters that sampling is biased towards, so that stop strings of them occur.
const LETTERS: std::ops::Range<u32> = 97..101;

fn request(numbers: &mut Numbers, name: usize) -> Request {
    let choices = if numbers.one_in(4) { numbers.between(2, 4) } else { 1 };
    let prompt_length = match numbers.below(4) {
        0 => numbers.between(1, 3),
        1 => numbers.between(62, 67),
        2 => numbers.between(1, 60),
        _ => numbers.between(1, 150),
    };
    let max_tokens = numbers.between(1, 170) as u32;
    let greedy = numbers.one_in(3);
    let sampling = SamplingParams {
        temperature: if greedy { 0.0 } else { 0.8 },
        top_k: if numbers.one_in(2) { 20 } else { 0 },
        top_p: if numbers.one_in(2) { 0.9 } else { 1.0 },
        repetition_penalty: if numbers.one_in(3) { 1.3 } else { 1.0 },
        presence_penalty: if numbers.one_in(3) { 0.5 } else { 0.0 },
        logit_bias: LETTERS.map(|letter| (letter, 3.0)).collect(),
        seed: numbers.next(),
        logprobs: numbers.one_in(2).then_some(2),
        ..SamplingParams::default()
    };
    let stop = StopRule {
        max_tokens,
        min_tokens: if numbers.one_in(2) { numbers.below(u64::from(max_tokens)) as u32 } else { 0 },
        ignore_eos: !numbers.one_in(3),
        stop_token_ids: if numbers.one_in(8) { vec![98] } else { Vec::new() },
        stop: if numbers.one_in(5) { vec!["abc".into(), "dd".into()] } else { Vec::new() },
    };
    Request {
        request_id: format!("request {name}"),
        sessions: (0..choices).map(|choice| SessionId(format!("{name}/{choice}"))).collect(),
        first_choice: 0,
        epoch: 1,
        prompt: (0..prompt_length).map(|_| numbers.below(256) as u32).collect(),
        delivered: Vec::new(),
        sampling,
        stop,
        prompt_logprobs: numbers.one_in(4).then_some(1),
        priority: numbers.below(3) as i32 - 1,
        deadline: None,
        cache_salt: String::new(),
        grammar: None,
        resumable: false,
        trace: None,
        text: numbers.one_in(2),
    }
}

/// One choice of a request, on a replica of its own.
fn alone(request: &Request, choice: usize) -> Answer {
    let session = request.sessions[choice].clone();
    let single = Request { sessions: vec![session.clone()], first_choice: choice as u32, ..request.clone() };
    let mut driver = Driver::new(ModelExecutor::new(ModelSizes::default()), config());
    driver.submit(&single);
    driver.finish();
    driver.assert_nothing_is_held();
    driver.answers.remove(&session).unwrap()
}

/// A replica that is short of something, differently for each seed.
fn scarce(numbers: &mut Numbers) -> (ModelSizes, Faults, EngineConfig) {
    let mut sizes = ModelSizes::default();
    sizes.limits.slots = numbers.between(4, 10) as usize;
    sizes.limits.pages = numbers.between(5, 12) as usize;
    sizes.limits.step_tokens = numbers.between(6, 150) as usize;
    sizes.limits.step_rows = numbers.between(4, 10) as usize;
    let faults = Faults {
        park_every: numbers.one_in(3).then_some(3),
        unpark_every: numbers.one_in(3).then_some(3),
        ..Faults::default()
    };
    let park_bytes = [0, 3000, u64::MAX / 4][numbers.below(3) as usize];
    (sizes, faults, EngineConfig { park_bytes, ..config() })
}

#[derive(Default)]
struct Seen {
    fed: u64,
    parks: u64,
    unparks: u64,
    forks: u64,
    fed_again: u64,
    reasons: BTreeSet<String>,
}

fn run(seed: u64, seen: &mut Seen, make: impl FnOnce(ModelSizes) -> ModelExecutor) {
    let mut numbers = Numbers(seed);
    let (sizes, faults, config) = scarce(&mut numbers);
    let mut driver = Driver::new(make(sizes).with_faults(faults), config);
    let requests: Vec<Request> = (0..20).map(|name| request(&mut numbers, name)).collect();
    let mut cancelled = BTreeSet::new();
    for request in &requests {
        driver.submit(request);
        for _ in 0..numbers.below(8) {
            driver.turn();
            if numbers.one_in(40) {
                let open: Vec<SessionId> = driver.delivered.keys().cloned().collect();
                let victim = open[numbers.below(open.len() as u64) as usize].clone();
                driver.handle.abort(victim.clone(), 0);
                cancelled.insert(victim);
            }
        }
    }
    driver.finish();
    driver.assert_nothing_is_held();

    let mut expected_tokens = 0;
    for request in &requests {
        expected_tokens += request.prompt.len() as u64;
        for (choice, session) in request.sessions.iter().enumerate() {
            let got = &driver.answers[session];
            let solo = alone(request, choice);
            expected_tokens += solo.tokens.len() as u64;
            seen.reasons.insert(format!("{:?}", got.reason()));
            if got.reason() == FinishReason::Aborted {
                assert!(cancelled.contains(session));
                assert!(solo.tokens.starts_with(&got.tokens), "seed {seed}, {session:?}");
                assert!(solo.text.starts_with(&got.text), "seed {seed}, {session:?}");
            } else {
                assert_eq!(*got, solo, "seed {seed}, {session:?}");
            }
        }
    }
    let count = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
    seen.fed += count(&driver.counters.fed);
    seen.parks += count(&driver.counters.parks);
    seen.unparks += count(&driver.counters.unparks);
    seen.forks += count(&driver.counters.slot_copies);
    seen.fed_again += u64::from(count(&driver.counters.tokens) > expected_tokens);
}

#[test]
fn every_session_gives_what_it_gives_alone() {
    let mut seen = Seen::default();
    for seed in 0..40 {
        run(seed, &mut seen, ModelExecutor::new);
    }
    assert_eq!(seen.fed, 0);
    assert!(seen.parks > 50, "{} parks", seen.parks);
    assert!(seen.unparks > 50, "{} unparks", seen.unparks);
    assert!(seen.forks > 50, "{} forks", seen.forks);
    assert!(seen.fed_again > 5, "{} runs with recomputation", seen.fed_again);
    let reasons: Vec<&str> = seen.reasons.iter().map(String::as_str).collect();
    assert_eq!(reasons, ["Aborted", "Length", "Stop"]);
}

#[test]
fn so_does_every_session_whose_steps_are_launched_ahead() {
    let mut seen = Seen::default();
    for seed in 100..130 {
        run(seed, &mut seen, |sizes| ModelExecutor::new(sizes).running_ahead(0));
    }
    for seed in 130..140 {
        run(seed, &mut seen, |sizes| ModelExecutor::new(sizes).running_ahead(40));
    }
    assert!(seen.fed > 1000, "{} steps were fed with draws that nobody had read", seen.fed);
    assert!(seen.parks > 50 && seen.forks > 50, "{} parks, {} forks", seen.parks, seen.forks);
}

#[test]
fn a_replayed_session_goes_on_as_if_nothing_had_happened() {
    let mut numbers = Numbers(77);
    for name in 0..30 {
        let request = request(&mut numbers, name);
        let choice = request.sessions.len() - 1;
        let whole = alone(&request, choice);
        let cut = numbers.below(whole.tokens.len() as u64 + 1) as usize;
        // The text of the delivered tokens, as the first run gave it out.
        let session = request.sessions[choice].clone();
        let first = Request { sessions: vec![session.clone()], first_choice: choice as u32, ..request.clone() };
        let mut before = Driver::new(ModelExecutor::new(ModelSizes::default()), config());
        before.submit(&first);
        while before.answers.get(&session).map_or(0, |answer| answer.tokens.len()) < cut {
            assert_eq!(before.turn(), Turn::Stepped);
        }
        let before = before.answers.remove(&session).unwrap_or_default();

        let mut after = Driver::new(ModelExecutor::new(ModelSizes::default()), config());
        after.submit(&Request { delivered: whole.tokens[..cut].to_vec(), ..first });
        after.finish();
        let after = after.answers.remove(&session).unwrap();
        assert_eq!([before.tokens, after.tokens.clone()].concat(), whole.tokens);
        assert_eq!(before.text + &after.text, whole.text);
        assert_eq!(after.reason(), whole.reason());
        let usage = |answer: &Answer| answer.end.as_ref().unwrap().usage;
        assert_eq!(usage(&after), usage(&whole));
        let no_prompt_twice = cut > 0;
        assert_eq!(after.prompt_logprobs.is_some(), request.prompt_logprobs.is_some() && !no_prompt_twice);
    }
}
