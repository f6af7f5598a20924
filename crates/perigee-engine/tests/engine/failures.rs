//! Failures of the executor: what ends, what goes on, and what the handle says.

use perigee_engine::request::{FinishReason, RefusedRequest};
use perigee_engine::testing::{Faults, ModelExecutor, ModelSizes, greedy_request};
use perigee_engine::{EngineHealth, ScoreError, ScoreRequest, Turn};

use crate::support::{Driver, ROUTER, config};

fn driver(faults: Faults) -> Driver {
    Driver::new(ModelExecutor::new(ModelSizes::default()).with_faults(faults), config())
}

#[test]
fn a_lost_rank_ends_every_session_and_the_engine() {
    let mut driver = driver(Faults { fatal_step: Some(4), ..Faults::default() });
    let health = driver.handle.health();
    driver.submit(&greedy_request("a", vec![1; 10], 100));
    driver.submit(&greedy_request("b", vec![2; 10], 100));
    let mut turns = 0;
    while driver.turn() != Turn::Stopped {
        turns += 1;
        assert!(turns < 10);
    }
    for session in ["a", "b"] {
        let answer = driver.answer(session);
        assert_eq!((answer.tokens.len(), answer.reason()), (3, FinishReason::Error));
        assert!(answer.end.as_ref().unwrap().error.as_ref().unwrap().contains("rank 1: lost"));
    }
    assert!(matches!(&*health.borrow(), EngineHealth::Failed { message } if message.contains("rank 1")));
    let refused = driver.handle.submit(ROUTER, greedy_request("c", vec![1], 1)).unwrap_err();
    assert!(matches!(refused, RefusedRequest::Unavailable(message) if message.contains("rank 1")));
    assert_eq!(driver.turn(), Turn::Stopped, "it stays so");
}

#[test]
fn a_refused_step_ends_only_its_own_sessions() {
    let mut driver = driver(Faults { refused_step: Some(3), ..Faults::default() });
    driver.submit(&greedy_request("unlucky", vec![1; 10], 100));
    driver.turn();
    driver.turn();
    driver.turn();
    let answer = driver.answer("unlucky");
    assert_eq!((answer.tokens.len(), answer.reason()), (2, FinishReason::Error));
    driver.assert_nothing_is_held();
    driver.submit(&greedy_request("next", vec![1; 10], 7));
    driver.finish();
    assert_eq!(driver.answer("next").tokens.len(), 7);
    assert_eq!(*driver.handle.health().borrow(), EngineHealth::Serving);
}

#[test]
fn a_shutdown_ends_sessions_with_an_error_that_says_so() {
    let mut driver = driver(Faults::default());
    driver.submit(&greedy_request("a", vec![1], 100));
    driver.turn();
    driver.handle.shutdown();
    assert_eq!(driver.turn(), Turn::Stopped);
    let end = driver.answer("a").end.as_ref().unwrap();
    assert_eq!(end.finish, Some(FinishReason::Error));
    assert!(end.error.as_ref().unwrap().contains("shut down"));
    assert_eq!(*driver.handle.health().borrow(), EngineHealth::Stopped);
    driver.assert_nothing_is_held();
}

#[tokio::test]
async fn scoring_fails_with_the_replica() {
    let mut driver = driver(Faults { fatal_step: Some(1), ..Faults::default() });
    let request =
        ScoreRequest { request_id: "score".into(), tokens: vec![1, 2, 3], top: 0, priority: 0, deadline: None };
    let (handle, again) = (driver.handle.clone(), request.clone());
    let scored = tokio::spawn(async move { handle.score(request).await });
    tokio::task::yield_now().await;
    assert_eq!(driver.turn(), Turn::Stopped);
    assert!(matches!(scored.await.unwrap(), Err(ScoreError::Failed(message)) if message.contains("rank 1")));
    assert!(matches!(driver.handle.score(again).await, Err(ScoreError::Refused(RefusedRequest::Unavailable(_)))));
}
