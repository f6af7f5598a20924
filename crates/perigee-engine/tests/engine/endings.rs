//! How sessions end: each stop rule, aborts, deadlines, and routers that go away.

use std::sync::Arc;
use std::time::Duration;

use perigee_engine::request::{FinishReason, Request, SessionId, StopRule, Usage};
use perigee_engine::testing::{ManualClock, ModelExecutor, ModelSizes, greedy_request};
use perigee_engine::{Clock, EngineConfig, Turn};

use crate::support::{Answer, Driver, EOS, ROUTER, config};

fn driver() -> Driver {
    Driver::new(ModelExecutor::new(ModelSizes::default()), config())
}

/// A request with text whose every token is one of `bias`, the one with the largest bias first.
fn biased(bias: &[(u32, f32)], stop: StopRule) -> Request {
    let mut request = greedy_request("s", vec![1, 2, 3], stop.max_tokens);
    request.sampling.logit_bias = bias.to_vec();
    request.stop = stop;
    request.text = true;
    request
}

fn run(request: &Request) -> Answer {
    let mut driver = driver();
    driver.submit(request);
    driver.finish();
    driver.assert_nothing_is_held();
    driver.answer("s").clone()
}

#[test]
fn max_tokens_ends_with_length_and_counts() {
    let answer = run(&biased(&[(97, 100.0)], StopRule { max_tokens: 5, ..StopRule::default() }));
    assert_eq!((answer.text.as_str(), answer.reason()), ("aaaaa", FinishReason::Length));
    let end = answer.end.unwrap();
    assert_eq!(end.usage, Some(Usage { prompt: 3, completion: 5, cached: 0 }));
    assert_eq!((end.index, end.token), (4, Some(97)), "the end comes with the last token");
}

#[test]
fn the_end_of_sequence_stops_without_text() {
    let bias = [(EOS, 100.0), (97, 50.0)];
    let answer = run(&biased(&bias, StopRule { max_tokens: 9, ..StopRule::default() }));
    assert_eq!((answer.tokens, answer.text.as_str()), (vec![EOS], ""));
    assert_eq!(answer.end.unwrap().finish, Some(FinishReason::Stop));
}

#[test]
fn min_tokens_keeps_ends_away() {
    let bias = [(EOS, 100.0), (98, 80.0), (97, 50.0)];
    let stop = StopRule { max_tokens: 9, min_tokens: 3, stop_token_ids: vec![98], ..StopRule::default() };
    let answer = run(&biased(&bias, stop));
    assert_eq!((answer.tokens, answer.text.as_str()), (vec![97, 97, 97, EOS], "aaa"));
}

#[test]
fn a_stop_token_stops_and_ignore_eos_does_not() {
    let stop = StopRule { max_tokens: 4, ignore_eos: true, ..StopRule::default() };
    let answer = run(&biased(&[(EOS, 100.0)], stop));
    assert_eq!((answer.tokens.len(), answer.reason()), (4, FinishReason::Length));
    let stop = StopRule { max_tokens: 4, stop_token_ids: vec![98], ..StopRule::default() };
    let answer = run(&biased(&[(98, 100.0)], stop));
    assert_eq!((answer.tokens.len(), answer.text.as_str(), answer.reason()), (1, "", FinishReason::Stop));
}

#[test]
fn a_stop_string_is_cut_off_and_what_only_looked_like_one_is_not() {
    // Logits lie between -4 and 4, so with this bias every token is a letter.
    let letters: Vec<(u32, f32)> = (97..123).map(|letter| (letter, 9.0)).collect();
    let with_stop =
        |stop: &str| run(&biased(&letters, StopRule { max_tokens: 12, stop: vec![stop.into()], ..Default::default() }));
    let free = with_stop("not there");
    assert_eq!((free.text.len(), free.reason()), (12, FinishReason::Length));

    let stop = &free.text[3..5];
    let stopped = with_stop(stop);
    let before = free.text.find(stop).unwrap();
    assert_eq!((stopped.text.as_str(), stopped.reason()), (&free.text[..before], FinishReason::Stop));
    assert_eq!(stopped.tokens.len(), before + 2);

    // The start of a stop string at the end of the output is text after all.
    let unfinished = with_stop(&format!("{}~~~", &free.text[10..]));
    assert_eq!((unfinished.text.as_str(), unfinished.reason()), (free.text.as_str(), FinishReason::Length));
}

#[test]
fn an_abort_takes_effect_at_once_and_frees_everything() {
    let mut driver = driver();
    driver.submit(&greedy_request("kept", vec![1; 70], 50));
    driver.submit(&greedy_request("aborted", vec![2; 70], 1000));
    for _ in 0..5 {
        driver.turn();
    }
    let held = driver.core.load();
    driver.handle.abort(SessionId("aborted".into()), 0);
    driver.turn();
    let answer = driver.answer("aborted");
    assert_eq!(answer.reason(), FinishReason::Aborted);
    let load = driver.core.load();
    assert_eq!((load.slots_free, load.pages_free), (held.slots_free + 1, held.pages_free + 2));
    driver.handle.abort(SessionId("unknown".into()), 0);
    driver.finish();
    assert_eq!(driver.answer("kept").tokens.len(), 50);
    driver.assert_nothing_is_held();
}

#[test]
fn a_deadline_ends_running_and_waiting_sessions() {
    let clock = Arc::new(ManualClock::default());
    let mut sizes = ModelSizes::default();
    sizes.limits.slots = 1;
    let settings = EngineConfig { clock: Arc::clone(&clock) as Arc<dyn Clock>, ..config() };
    let mut driver = Driver::new(ModelExecutor::new(sizes), settings);
    let deadline = Some(clock.now() + Duration::from_secs(5));
    driver.submit(&Request { deadline, ..greedy_request("running", vec![1], 1000) });
    driver.submit(&Request { deadline, ..greedy_request("waiting", vec![1], 1000) });
    driver.turn();
    driver.turn();
    assert!(driver.answer("running").end.is_none());
    clock.advance(Duration::from_secs(5));
    driver.turn();
    for session in ["running", "waiting"] {
        assert_eq!(driver.answer(session).reason(), FinishReason::DeadlineExceeded, "{session}");
    }
    assert_eq!(driver.turn(), Turn::Idle);
    driver.assert_nothing_is_held();
}

#[test]
fn a_router_that_goes_away_takes_its_sessions_along() {
    let mut driver = driver();
    let others = perigee_engine::request::RouterId(2);
    let gone = driver.handle.attach(others);
    driver.handle.submit(others, greedy_request("of the other", vec![1], 1000)).unwrap();
    driver.submit(&greedy_request("own", vec![1], 20));
    driver.turn();
    assert_eq!(driver.core.load().running, 2);
    drop(gone);
    driver.turn();
    driver.turn();
    assert_eq!(driver.core.load().running, 1);
    driver.handle.detach(ROUTER);
    driver.turn();
    driver.assert_nothing_is_held();
}

#[test]
fn no_step_begins_after_a_lease_and_a_renewal_that_came_in_time_counts() {
    let clock = Arc::new(ManualClock::default());
    let settings = EngineConfig { clock: Arc::clone(&clock) as Arc<dyn Clock>, ..config() };
    let mut driver = Driver::new(ModelExecutor::new(ModelSizes::default()), settings);
    let lease = Duration::from_secs(2);
    driver.submit(&greedy_request("s", vec![1], 1000));
    driver.handle.renew(ROUTER, clock.now() + lease);
    driver.turn();
    // The step was long; a renewal came meanwhile.
    clock.advance(lease);
    driver.handle.renew(ROUTER, clock.now() + lease);
    driver.turn();
    assert_eq!((driver.core.load().running, driver.core.load().steps), (1, 2));
    // The process stood still, and no word had come before.
    clock.advance(lease);
    assert_eq!(driver.turn(), Turn::Idle);
    assert_eq!((driver.core.load().running, driver.core.load().steps), (0, 2));
    driver.assert_nothing_is_held();
}

#[test]
fn a_session_whose_delivered_tokens_already_end_it_only_ends() {
    let bias = [(EOS, 100.0)];
    let mut request = biased(&bias, StopRule { max_tokens: 9, ..StopRule::default() });
    request.delivered = vec![97, EOS];
    let answer = run(&request);
    assert_eq!((answer.tokens.len(), answer.reason()), (0, FinishReason::Stop));
    assert_eq!(answer.end.unwrap().usage, Some(Usage { prompt: 3, completion: 2, cached: 0 }));
}

#[test]
fn a_repeated_request_is_dropped() {
    let mut driver = driver();
    driver.submit(&greedy_request("s", vec![1], 5));
    driver.submit(&greedy_request("s", vec![1], 5));
    driver.finish();
    assert_eq!(driver.answer("s").tokens.len(), 5);
    driver.assert_nothing_is_held();
}
