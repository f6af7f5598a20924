//! What is refused at the door, with the field named, and what is not.

use perigee_engine::EngineConfig;
use perigee_engine::request::{RefusedRequest, Request, SessionId};
use perigee_engine::testing::{ModelExecutor, ModelSizes, greedy_request};

use crate::support::{Driver, ROUTER, config};

fn small() -> ModelExecutor {
    let mut sizes = ModelSizes::default();
    sizes.limits.slots = 4;
    sizes.limits.pages = 3;
    sizes.limits.max_model_len = 1000;
    ModelExecutor::new(sizes)
}

fn refusal(settings: EngineConfig, change: impl FnOnce(&mut Request)) -> RefusedRequest {
    let driver = Driver::new(small(), settings);
    let mut request = greedy_request("s", vec![1, 2], 10);
    change(&mut request);
    driver.handle.submit(ROUTER, request).unwrap_err()
}

fn field(change: impl FnOnce(&mut Request)) -> &'static str {
    match refusal(config(), change) {
        RefusedRequest::Invalid { field, message } => {
            assert!(!message.is_empty());
            field
        }
        other => panic!("{other}"),
    }
}

#[test]
fn every_bad_field_is_named() {
    assert_eq!(field(|r| r.prompt.clear()), "token_ids");
    assert_eq!(field(|r| r.prompt[1] = 300), "token_ids");
    assert_eq!(field(|r| r.prompt = vec![1; 1000]), "token_ids");
    assert_eq!(field(|r| r.prompt = vec![1; 193]), "token_ids");
    assert_eq!(field(|r| r.delivered = vec![300]), "delivered");
    assert_eq!(field(|r| r.stop.max_tokens = 0), "max_tokens");
    assert_eq!(field(|r| r.stop.max_tokens = 999), "max_tokens");
    assert_eq!(field(|r| r.stop.max_tokens = 192), "max_tokens");
    assert_eq!(field(|r| r.stop.min_tokens = 11), "min_tokens");
    assert_eq!(field(|r| r.stop.stop_token_ids = vec![300]), "stop_token_ids");
    assert_eq!(field(|r| r.stop.stop_token_ids = vec![1; 257]), "stop_token_ids");
    assert_eq!(field(|r| r.stop.stop = vec![String::new()]), "stop");
    assert_eq!(field(|r| r.sampling.top_p = 2.0), "top_p");
    assert_eq!(field(|r| r.sampling.logit_bias = vec![(300, 1.0)]), "logit_bias");
    assert_eq!(field(|r| r.prompt_logprobs = Some(21)), "prompt_logprobs");
    assert_eq!(field(|r| r.sessions.clear()), "n");
    assert_eq!(field(|r| r.sessions.push(SessionId("s".into()))), "n");
    assert_eq!(field(|r| r.sessions = (0..5).map(|n| SessionId(n.to_string())).collect()), "n");
    let replayed_choices = |r: &mut Request| {
        r.sessions.push(SessionId("t".into()));
        r.delivered = vec![1];
    };
    assert_eq!(field(replayed_choices), "n");
}

#[test]
fn text_needs_a_tokenizer() {
    let without = || EngineConfig { tokenizer: None, ..config() };
    let named =
        |refused| matches!(refused, RefusedRequest::Invalid { field, .. } if field == "text" || field == "stop");
    assert!(named(refusal(without(), |request| request.text = true)));
    assert!(named(refusal(without(), |request| request.stop.stop = vec!["x".into()])));
    let mut driver = Driver::new(small(), without());
    driver.submit(&greedy_request("s", vec![1], 5));
    driver.finish();
    assert_eq!(driver.answer("s").tokens.len(), 5);
}

#[test]
fn what_just_fits_is_served() {
    let mut driver = Driver::new(small(), config());
    // 192 positions of three pages are fed, and one more token is drawn.
    driver.submit(&greedy_request("whole cache", vec![1; 100], 93));
    let many = (0..4).map(|n| SessionId(n.to_string())).collect();
    driver.submit(&Request { sessions: many, ..greedy_request("four", vec![1; 60], 60) });
    driver.finish();
    assert_eq!(driver.answer("whole cache").tokens.len(), 93);
    assert_eq!(driver.answer("3").tokens.len(), 60);
    driver.assert_nothing_is_held();
}

#[test]
fn a_full_queue_refuses_and_empties_as_requests_start() {
    let settings = EngineConfig { queue_limit: 6, ..config() };
    let mut driver = Driver::new(small(), settings);
    for name in 0..6 {
        driver.submit(&greedy_request(&name.to_string(), vec![1], 3));
    }
    let refused = driver.handle.submit(ROUTER, greedy_request("seventh", vec![1], 3)).unwrap_err();
    assert_eq!(refused, RefusedRequest::Full { waiting: 6, limit: 6 });
    driver.turn();
    driver.submit(&greedy_request("seventh", vec![1], 3));
    driver.handle.abort(SessionId("seventh".into()), 0);
    driver.finish();
    for name in 10..16 {
        driver.submit(&greedy_request(&name.to_string(), vec![1], 3));
    }
    driver.finish();
    driver.assert_nothing_is_held();
}

#[test]
fn an_engine_that_drains_takes_nothing_new_and_ends_what_it_has() {
    let mut driver = Driver::new(small(), config());
    driver.submit(&greedy_request("before", vec![1], 5));
    driver.handle.drain();
    let refused = driver.handle.submit(ROUTER, greedy_request("after", vec![1], 5)).unwrap_err();
    assert!(matches!(refused, RefusedRequest::Unavailable(message) if message.contains("draining")));
    driver.finish();
    assert_eq!(driver.answer("before").tokens.len(), 5);
}
