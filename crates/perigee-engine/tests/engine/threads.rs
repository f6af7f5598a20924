//! The engine on its own thread: the same behaviour through the async handle, and an end to everything.

use std::time::Duration;

use perigee_engine::request::{FinishReason, RouterId, SessionId};
use perigee_engine::testing::{Faults, ModelExecutor, ModelSizes, greedy_request};
use perigee_engine::{Engine, EngineHealth, StartError};
use tokio::time::timeout;

use crate::support::{ROUTER, config};

/// Far longer than anything here takes; only a hang reaches it.
const PATIENCE: Duration = Duration::from_secs(20);

#[tokio::test]
async fn many_sessions_stream_through_the_thread() {
    let handle = Engine::start(Box::new(ModelExecutor::new(ModelSizes::default())), config()).unwrap();
    let mut routers = Vec::new();
    for router in 0..2u64 {
        let events = handle.attach(RouterId(router));
        for session in 0..30u32 {
            let name = format!("{router}/{session}");
            handle.submit(RouterId(router), greedy_request(&name, vec![session; 50], 20)).unwrap();
        }
        routers.push(events);
    }
    for mut events in routers {
        let (mut tokens, mut ends) = (0, 0);
        while ends < 30 {
            let batch = timeout(PATIENCE, events.recv()).await.unwrap().unwrap();
            tokens += batch.events.iter().filter(|event| event.token.is_some()).count();
            ends += batch.events.iter().filter(|event| event.finish.is_some()).count();
        }
        assert_eq!(tokens, 600);
    }
    let mut health = handle.health();
    handle.shutdown();
    timeout(PATIENCE, health.wait_for(|health| *health == EngineHealth::Stopped)).await.unwrap().unwrap();
    assert_eq!(handle.load().slots_free, handle.load().slots_total);
    assert!(handle.sessions().await.is_empty());
}

#[tokio::test]
async fn an_idle_thread_keeps_telling_its_load() {
    let handle = Engine::start(Box::new(ModelExecutor::new(ModelSizes::default())), config()).unwrap();
    let mut events = handle.attach(ROUTER);
    for _ in 0..2 {
        assert!(timeout(PATIENCE, events.recv()).await.unwrap().unwrap().events.is_empty());
    }
    drop(handle);
    let ended = async { while events.recv().await.is_some() {} };
    timeout(PATIENCE, ended).await.unwrap();
}

#[tokio::test]
async fn a_failure_closes_the_streams_after_the_last_events() {
    let executor =
        ModelExecutor::new(ModelSizes::default()).with_faults(Faults { fatal_step: Some(5), ..Faults::default() });
    let handle = Engine::start(Box::new(executor), config()).unwrap();
    let mut events = handle.attach(ROUTER);
    handle.submit(ROUTER, greedy_request("s", vec![1; 9], 100)).unwrap();
    let mut last = None;
    while let Some(batch) = timeout(PATIENCE, events.recv()).await.unwrap() {
        last = batch.events.last().cloned().or(last);
    }
    assert_eq!(last.unwrap().finish, Some(FinishReason::Error));
    assert!(matches!(&*handle.health().borrow(), EngineHealth::Failed { .. }));
    handle.abort(SessionId("s".into()), 0);
    assert!(timeout(PATIENCE, handle.attach(ROUTER).recv()).await.unwrap().is_none());
}

#[test]
fn sizes_with_which_nothing_could_run_are_refused() {
    let mut sizes = ModelSizes::default();
    sizes.limits.pages = 0;
    let refused = Engine::start(Box::new(ModelExecutor::new(sizes)), config()).unwrap_err();
    assert!(matches!(refused, StartError::Limit { what: "latent pages", found: 0 }));
}
