//! Steps that are launched before the one before is read: what a session gives, and when, over a modelled executor that holds
//! results back until they are collected.

use std::sync::atomic::Ordering;

use perigee_engine::Turn;
use perigee_engine::request::{FinishReason, Request, RouterId, SessionId, StopRule};
use perigee_engine::testing::{ModelExecutor, ModelSizes, greedy_request};
use perigee_sampling::SamplingParams;

use crate::support::{Answer, Driver, EOS, config};

fn driver(sizes: ModelSizes) -> Driver {
    Driver::new(ModelExecutor::new(sizes).running_ahead(0), config())
}

/// What a request's only session gives where every step is read before the next.
fn stepwise(request: &Request) -> Answer {
    let mut driver = Driver::new(ModelExecutor::new(ModelSizes::default()), config());
    driver.submit(request);
    driver.finish();
    driver.answers.remove(&request.sessions[0]).unwrap()
}

fn fed(driver: &Driver) -> u64 {
    driver.counters.fed.load(Ordering::Relaxed)
}

#[test]
fn a_token_leaves_while_the_next_step_is_in_flight() {
    let mut driver = driver(ModelSizes::default());
    driver.submit(&greedy_request("s", vec![1, 2, 3], 100));
    // The prompt; a step that is launched; from then on a turn launches one and reads one.
    let steps = |driver: &Driver| driver.counters.steps.load(Ordering::Relaxed);
    driver.turn();
    driver.turn();
    for token in 2..90 {
        driver.turn();
        assert_eq!((driver.answer("s").tokens.len(), steps(&driver)), (token, token as u64 + 1));
    }
    driver.finish();
    // The last token's step is not followed by another: its number is known.
    assert_eq!((steps(&driver), fed(&driver)), (100, 98));
    assert_eq!(*driver.answer("s"), stepwise(&greedy_request("s", vec![1, 2, 3], 100)));
    driver.assert_nothing_is_held();
}

#[test]
fn sessions_that_end_leave_a_row_behind_and_the_others_go_on() {
    let mut driver = driver(ModelSizes::default());
    let mut requests = Vec::new();
    for index in 0..6u32 {
        let mut request = greedy_request(&format!("s{index}"), vec![index + 1; 40 + index as usize], 60);
        // Some end where it is not known before.
        request.sampling = SamplingParams { temperature: 1.0, seed: u64::from(index), ..SamplingParams::default() };
        request.sampling.logit_bias = vec![(EOS, 4.0)];
        request.stop = StopRule { ignore_eos: index % 2 == 0, ..request.stop };
        driver.submit(&request);
        requests.push(request);
    }
    driver.finish();
    driver.assert_nothing_is_held();
    assert!(fed(&driver) > 20, "{} steps were fed", fed(&driver));
    let answers: Vec<Answer> = requests.iter().map(stepwise).collect();
    assert!(answers.iter().any(|answer| answer.reason() == FinishReason::Stop && answer.tokens.len() > 2));
    for (request, answer) in requests.iter().zip(answers) {
        assert_eq!(driver.answers[&request.sessions[0]], answer, "{}", request.request_id);
    }
}

#[test]
fn slots_and_pages_of_a_session_that_ended_serve_the_next_at_once() {
    let mut sizes = ModelSizes::default();
    (sizes.limits.slots, sizes.limits.pages) = (2, 4);
    let mut driver = driver(sizes);
    let requests: Vec<Request> = (0..8u32)
        .map(|index| {
            let mut request = greedy_request(&format!("s{index}"), vec![index + 1; 20], 90);
            request.sampling = SamplingParams { temperature: 1.0, seed: u64::from(index), ..SamplingParams::default() };
            request.sampling.logit_bias = vec![(EOS, 3.0)];
            request.stop.ignore_eos = false;
            request
        })
        .collect();
    requests.iter().for_each(|request| driver.submit(request));
    driver.finish();
    driver.assert_nothing_is_held();
    assert!(fed(&driver) > 20, "{} steps were fed", fed(&driver));
    for request in &requests {
        assert_eq!(driver.answers[&request.sessions[0]], stepwise(request), "{}", request.request_id);
    }
}

#[test]
fn an_abort_takes_effect_within_two_steps() {
    let mut driver = driver(ModelSizes::default());
    driver.submit(&greedy_request("s", vec![1; 70], 1000));
    (0..9).for_each(|_| assert_eq!(driver.turn(), Turn::Stepped));
    let before = driver.answer("s").tokens.len();
    driver.handle.abort(SessionId("s".into()), 0);
    driver.turn();
    driver.turn();
    assert_eq!(driver.answer("s").reason(), FinishReason::Aborted);
    assert!(driver.answer("s").tokens.len() <= before + 1);
    driver.assert_nothing_is_held();
}

#[test]
fn leases_that_are_renewed_keep_no_step_on_the_ground() {
    let mut driver = driver(ModelSizes::default());
    driver.submit(&greedy_request("s", vec![1; 70], 100));
    let far = std::time::Instant::now() + std::time::Duration::from_secs(3600);
    while driver.answers.get(&SessionId("s".into())).is_none_or(|answer| answer.end.is_none()) {
        driver.handle.renew(crate::support::ROUTER, far);
        driver.turn();
    }
    assert_eq!(fed(&driver), 98);
}

#[test]
fn what_the_host_must_see_first_is_not_launched() {
    for change in [
        |request: &mut Request| request.sampling.repetition_penalty = 1.3,
        |request: &mut Request| request.sampling.prompt_logprobs = Some(1),
    ] {
        let mut request = greedy_request("s", vec![1; 20], 30);
        change(&mut request);
        let mut driver = driver(ModelSizes::default());
        driver.submit(&request);
        driver.finish();
        assert_eq!(*driver.answer("s"), stepwise(&request));
        // With the prompt's logits its last token has a step of its own, the first that is launched.
        let penalised = request.sampling.needs_counts();
        assert_eq!(fed(&driver), if penalised { 0 } else { 29 });
    }
}

#[test]
fn a_router_that_goes_away_is_noticed_after_the_step_in_flight() {
    let mut driver = driver(ModelSizes::default());
    let other = driver.handle.attach(RouterId(2));
    driver.handle.submit(RouterId(2), greedy_request("of the other", vec![1], 1000)).unwrap();
    let own = greedy_request("own", vec![1], 40);
    driver.submit(&own);
    (0..6).for_each(|_| assert_eq!(driver.turn(), Turn::Stepped));
    drop(other);
    driver.finish();
    assert_eq!(*driver.answer("own"), stepwise(&own));
    driver.assert_nothing_is_held();
}
