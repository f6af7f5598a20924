//! What each draw is made of: seed, choice, absolute position, counts and bans, as an executor in between sees them.

use std::sync::{Arc, Mutex};

use perigee_backend::StatePart;
use perigee_engine::executor::{Executor, ExecutorError, ExecutorLimits, StepOutput, StepPlan};
use perigee_engine::request::{Request, SessionId};
use perigee_engine::testing::{ModelExecutor, ModelSizes, greedy_request};
use perigee_sampling::{Draw, TokenCounts};

use crate::support::{Driver, EOS, config};

/// A draw with what it borrowed.
#[derive(Debug, Clone)]
struct Drawn {
    choice: u32,
    position: u64,
    seed: u64,
    counts: TokenCounts,
    banned: Vec<u32>,
}

/// Notes every draw on its way to the modelled executor.
struct Recorder {
    inner: ModelExecutor,
    drawn: Arc<Mutex<Vec<Drawn>>>,
}

impl Executor for Recorder {
    fn limits(&self) -> ExecutorLimits {
        self.inner.limits()
    }
    fn step(&mut self, plan: &StepPlan, draws: &[Draw<'_>], want_logits: bool) -> Result<StepOutput, ExecutorError> {
        let note = |draw: &Draw<'_>| Drawn {
            choice: draw.choice,
            position: draw.position,
            seed: draw.params.seed,
            counts: draw.counts.clone(),
            banned: draw.banned.to_vec(),
        };
        self.drawn.lock().unwrap().extend(draws.iter().map(note));
        self.inner.step(plan, draws, want_logits)
    }
    fn park(&mut self, key: u64, slot: u32, pages: &[u32]) -> Result<(), ExecutorError> {
        self.inner.park(key, slot, pages)
    }
    fn unpark(&mut self, key: u64, slot: u32, pages: &[u32]) -> Result<(), ExecutorError> {
        self.inner.unpark(key, slot, pages)
    }
    fn drop_parked(&mut self, key: u64) -> Result<(), ExecutorError> {
        self.inner.drop_parked(key)
    }
    fn export_state(&mut self, slot: u32, part: &StatePart) -> Result<Vec<u8>, ExecutorError> {
        self.inner.export_state(slot, part)
    }
    fn weight_bytes(&self) -> Vec<u64> {
        self.inner.weight_bytes()
    }
}

fn recorded(request: &Request) -> (Vec<Drawn>, Driver) {
    let inner = ModelExecutor::new(ModelSizes::default());
    let counters = inner.counters();
    let drawn = Arc::new(Mutex::new(Vec::new()));
    let recorder = Recorder { inner, drawn: Arc::clone(&drawn) };
    let mut driver = Driver::over(Box::new(recorder), counters, config());
    driver.submit(request);
    driver.finish();
    let drawn = drawn.lock().unwrap().clone();
    (drawn, driver)
}

#[test]
fn every_choice_draws_with_its_own_number_at_absolute_positions() {
    let mut request = greedy_request("0", vec![7; 70], 5);
    request.sessions = (0..3).map(|choice| SessionId(choice.to_string())).collect();
    request.sampling.temperature = 1.0;
    request.sampling.seed = 99;
    let (drawn, driver) = recorded(&request);
    let got: Vec<_> = drawn.iter().map(|draw| (draw.position, draw.choice, draw.seed)).collect();
    let expected: Vec<_> = (70..75).flat_map(|position| (0..3).map(move |choice| (position, choice, 99))).collect();
    assert_eq!(got, expected);
    assert_ne!(driver.answer("0").tokens, driver.answer("1").tokens);
}

#[test]
fn a_replayed_choice_keeps_its_number_and_position() {
    let mut request = greedy_request("s", vec![7; 10], 5);
    request.first_choice = 2;
    request.delivered = vec![1, 2, 3];
    let (drawn, driver) = recorded(&request);
    let got: Vec<_> = drawn.iter().map(|draw| (draw.position, draw.choice)).collect();
    assert_eq!(got, [(13, 2), (14, 2)]);
    assert_eq!(driver.answer("s").end.as_ref().unwrap().index, 4);
}

#[test]
fn counts_hold_prompt_and_output_where_penalties_need_them() {
    let mut request = greedy_request("s", vec![7, 8], 3);
    request.delivered = vec![9];
    request.sampling.repetition_penalty = 1.5;
    let (drawn, driver) = recorded(&request);
    let output = &driver.answer("s").tokens;
    for (count, draw) in drawn.iter().enumerate() {
        let mut expected = TokenCounts::from_prompt(&[7, 8]);
        expected.record_output(9);
        output[..count].iter().for_each(|token| expected.record_output(*token));
        assert_eq!(draw.counts, expected);
    }
    request.sampling.repetition_penalty = 1.0;
    let (drawn, _) = recorded(&request);
    assert!(drawn.iter().all(|draw| draw.counts.is_empty()), "nobody pays for counts that are not needed");
}

#[test]
fn ends_are_banned_until_min_tokens() {
    let mut request = greedy_request("s", vec![7], 4);
    request.stop.min_tokens = 2;
    request.stop.ignore_eos = false;
    request.stop.stop_token_ids = vec![5];
    request.sampling.logit_bias = vec![(60, 100.0)];
    let (drawn, _) = recorded(&request);
    let banned: Vec<_> = drawn.iter().map(|draw| draw.banned.clone()).collect();
    assert_eq!(banned, [vec![5, EOS], vec![5, EOS], vec![], vec![]]);
}
