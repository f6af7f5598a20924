//! Sessions whose router goes away: those that may outlive it stand still for the grace time, and another router that the
//! client has turned to gets what the client has not.

use std::sync::Arc;
use std::time::Duration;

use perigee_engine::moves::TakeOver;
use perigee_engine::request::{EventBatch, FinishReason, Request, RouterId, SessionEvent, SessionId};
use perigee_engine::testing::{ManualClock, ModelExecutor, ModelSizes, greedy_request};
use perigee_engine::{Clock, EngineConfig, Turn};
use perigee_migration::epochs::{Failure, Phase, first_after};
use tokio::sync::mpsc::UnboundedReceiver;

use crate::handing::moving;
use crate::support::{Driver, ROUTER};

const OTHER: RouterId = RouterId(2);
const TOKENS: u32 = 40;

struct Scene {
    driver: Driver,
    clock: Arc<ManualClock>,
}

impl Scene {
    /// A session with ten tokens or so.
    fn new(resumable: bool) -> Self {
        Self::over(ModelExecutor::new(ModelSizes::default()), resumable)
    }

    fn over(executor: ModelExecutor, resumable: bool) -> Self {
        let clock = Arc::new(ManualClock::default());
        let settings = EngineConfig { clock: clock.clone() as Arc<dyn Clock>, ..moving("a", Arc::default()) };
        let mut driver = Driver::new(executor, settings);
        driver.submit(&Request { resumable, ..request() });
        (0..10).for_each(|_| assert_eq!(driver.turn(), Turn::Stepped));
        Self { driver, clock }
    }

    /// What another router hears when it takes the session over, the client having `next` tokens: how that ended, and the
    /// events.
    fn take_over(&mut self, first: u64, next: u64) -> (Phase, Vec<SessionEvent>) {
        let mut events = self.driver.handle.attach(OTHER);
        let epoch = first_after(1);
        let order = TakeOver { session: SessionId("s".into()), epoch, first, next, deadline: None };
        self.driver.handle.take_over(OTHER, order);
        self.driver.finish();
        self.driver.core.audit().unwrap();
        heard(&mut events)
    }
}

fn request() -> Request {
    greedy_request("s", vec![7; 70], TOKENS)
}

fn heard(events: &mut UnboundedReceiver<EventBatch>) -> (Phase, Vec<SessionEvent>) {
    let (mut phase, mut all) = (None, Vec::new());
    while let Ok(batch) = events.try_recv() {
        // The answer comes before anything else of the session.
        phase = phase.or(batch.reports.first().map(|reported| reported.report.phase));
        assert!(phase.is_some() || batch.events.is_empty(), "{:?}", batch.events);
        all.extend(batch.events);
    }
    (phase.expect("an answer"), all)
}

/// The tokens where nothing happens.
fn undisturbed() -> Vec<u32> {
    let mut driver = Driver::new(ModelExecutor::new(ModelSizes::default()), moving("a", Arc::default()));
    driver.submit(&request());
    driver.finish();
    driver.answer("s").tokens.clone()
}

#[test]
fn a_resumable_session_waits_and_goes_on_under_another_router() {
    // The client told its tokens, or only how many it has.
    for (first, next) in [(6, 6), (0, 6), (0, 0)] {
        let mut scene = Scene::new(true);
        scene.driver.handle.detach(ROUTER);
        scene.driver.turn();
        let load = scene.driver.core.load();
        assert_eq!((load.running, load.parked, load.slots_free), (0, 1, load.slots_total - 1));
        let fed = scene.driver.counters.tokens.load(std::sync::atomic::Ordering::Relaxed);
        assert_eq!(scene.driver.turn(), Turn::Idle, "nobody runs it");
        let (phase, events) = scene.take_over(first, next);
        assert_eq!(phase, Phase::Started);
        let indices: Vec<u64> = events.iter().map(|event| event.index).collect();
        assert_eq!(indices, (first..TOKENS.into()).collect::<Vec<_>>());
        let tokens: Vec<u32> = events.iter().filter_map(|event| event.token).collect();
        assert_eq!(tokens, undisturbed()[first as usize..]);
        assert!(events.iter().all(|event| event.epoch == first_after(1)));
        assert_eq!(events.last().and_then(|event| event.finish), Some(FinishReason::Length));
        // One token a step from there on: nothing was computed twice.
        let more = scene.driver.counters.tokens.load(std::sync::atomic::Ordering::Relaxed) - fed;
        assert!(more < u64::from(TOKENS), "{more} tokens were fed");
        scene.driver.assert_nothing_is_held();
    }
}

#[test]
fn a_session_that_was_launched_ahead_stands_still_where_its_tokens_end() {
    for next in [0, 5, 9] {
        let mut scene = Scene::over(ModelExecutor::new(ModelSizes::default()).running_ahead(0), true);
        scene.driver.handle.detach(ROUTER);
        // The step in flight is read first.
        assert_eq!((scene.driver.turn(), scene.driver.turn()), (Turn::Stepped, Turn::Idle));
        assert_eq!(scene.driver.core.load().parked, 1);
        let (phase, events) = scene.take_over(0, next);
        assert_eq!(phase, Phase::Started);
        let tokens: Vec<u32> = events.iter().filter_map(|event| event.token).collect();
        assert_eq!(tokens, undisturbed());
        scene.driver.assert_nothing_is_held();
    }
}

#[test]
fn a_session_whose_router_lives_goes_to_the_one_that_its_client_turned_to() {
    let mut scene = Scene::new(true);
    let had = scene.driver.answer("s").tokens.len() as u64;
    let (phase, events) = scene.take_over(had, had);
    assert_eq!((phase, events.len() as u64), (Phase::Started, u64::from(TOKENS) - had));
    let end = scene.driver.answer("s").end.clone().expect("the former router hears of an end");
    assert_eq!((end.finish, end.epoch, end.index), (Some(FinishReason::Aborted), 1, had));
    scene.driver.assert_nothing_is_held();
}

#[test]
fn a_session_that_nobody_asks_for_is_free_after_the_grace_time() {
    let mut scene = Scene::new(true);
    scene.driver.handle.detach(ROUTER);
    scene.driver.turn();
    scene.clock.advance(Duration::from_secs(9));
    scene.driver.turn();
    assert_eq!(scene.driver.core.load().parked, 1);
    scene.clock.advance(Duration::from_secs(2));
    scene.driver.turn();
    scene.driver.assert_nothing_is_held();
    assert_eq!(scene.take_over(0, 0).0, Phase::Failed(Failure::NotHere));
}

#[test]
fn a_session_that_may_not_outlive_its_router_ends_with_it() {
    let mut scene = Scene::new(false);
    scene.driver.handle.detach(ROUTER);
    scene.driver.turn();
    scene.driver.assert_nothing_is_held();
    assert_eq!(scene.take_over(0, 0).0, Phase::Failed(Failure::NotHere));
}

#[test]
fn a_deadline_holds_while_a_session_waits_and_a_new_one_from_when_it_goes_on() {
    let clock = Arc::new(ManualClock::default());
    let settings = EngineConfig { clock: clock.clone() as Arc<dyn Clock>, ..moving("a", Arc::default()) };
    let mut driver = Driver::new(ModelExecutor::new(ModelSizes::default()), settings);
    for name in ["left", "taken"] {
        let deadline = Some(clock.now() + Duration::from_secs(3));
        driver.submit(&Request { resumable: true, deadline, ..greedy_request(name, vec![7; 9], 1000) });
    }
    (0..5).for_each(|_| assert_eq!(driver.turn(), Turn::Stepped));
    driver.handle.detach(ROUTER);
    let mut events = driver.handle.attach(OTHER);
    let deadline = Some(clock.now() + Duration::from_secs(6));
    let session = SessionId("taken".into());
    driver.handle.take_over(OTHER, TakeOver { session, epoch: first_after(1), first: 0, next: 0, deadline });
    clock.advance(Duration::from_secs(4));
    driver.turn();
    assert_eq!((driver.core.load().running, driver.core.load().parked), (1, 0), "one is over");
    clock.advance(Duration::from_secs(3));
    driver.turn();
    driver.assert_nothing_is_held();
    let (phase, events) = heard(&mut events);
    assert_eq!(phase, Phase::Started);
    assert_eq!(events.last().and_then(|event| event.finish), Some(FinishReason::DeadlineExceeded));
}
