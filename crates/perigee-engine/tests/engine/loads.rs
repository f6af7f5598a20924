//! What the engine says of itself: load, sessions, measurements, and a session's record.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use perigee_engine::observer::{EngineObserver, Preemption, StepPhase, TokenKind};
use perigee_engine::request::{FinishReason, RouterId, SegmentInfo};
use perigee_engine::testing::{ManualClock, ModelExecutor, ModelSizes, greedy_request};
use perigee_engine::{Clock, EngineConfig, Turn};

use crate::support::{Driver, config};

/// An engine whose every step takes 10 ms of a clock that is set by hand.
fn timed(sizes: ModelSizes, settings: EngineConfig) -> (Driver, Arc<ManualClock>) {
    let clock = Arc::new(ManualClock::default());
    let ticking = Arc::clone(&clock);
    let executor = ModelExecutor::new(sizes).with_step_hook(move |_| ticking.advance(Duration::from_millis(10)));
    let settings = EngineConfig { clock: Arc::clone(&clock) as Arc<dyn Clock>, ..settings };
    (Driver::new(executor, settings), clock)
}

#[test]
fn load_follows_what_happens() {
    let mut sizes = ModelSizes::default();
    sizes.limits.slots = 2;
    sizes.limits.step_tokens = 64;
    let (mut driver, _) = timed(sizes, config());
    for name in ["a", "b", "c"] {
        driver.submit(&greedy_request(name, vec![1; 100], 50));
    }
    driver.turn();
    let load = driver.handle.load();
    assert_eq!(load, driver.core.load());
    assert_eq!((load.running, load.waiting, load.slots_free, load.slots_total), (2, 1, 0, 2));
    assert_eq!((load.steps, load.step_ms), (1, 10.0));
    assert_eq!(load.queued_tokens, 300 - 64);
    driver.finish();
    assert!((driver.handle.load().step_ms - 10.0).abs() < 0.01);
    driver.assert_nothing_is_held();
}

#[test]
fn an_idle_engine_tells_its_load_twice_a_second() {
    let (mut driver, clock) = timed(ModelSizes::default(), config());
    let mut events = driver.handle.attach(RouterId(9));
    assert_eq!(driver.turn(), Turn::Idle);
    assert!(events.try_recv().unwrap().events.is_empty(), "at once");
    driver.turn();
    assert!(events.try_recv().is_err(), "not in every turn");
    for _ in 0..3 {
        clock.advance(Duration::from_millis(500));
        driver.turn();
        assert!(events.try_recv().is_ok());
    }
}

#[tokio::test]
async fn sessions_are_listed_with_their_places() {
    let mut sizes = ModelSizes::default();
    sizes.limits.slots = 2;
    sizes.limits.step_tokens = 140;
    let (mut driver, _) = timed(sizes, config());
    driver.submit(&greedy_request("decodes", vec![1; 70], 50));
    driver.turn();
    driver.submit(&greedy_request("prefills", vec![1; 500], 5));
    driver.submit(&greedy_request("waits", vec![1; 10], 5));
    driver.turn();
    let handle = driver.handle.clone();
    let listed = tokio::spawn(async move { (handle.sessions().await, handle.flush_cache().await) });
    for _ in 0..2 {
        tokio::task::yield_now().await;
        driver.turn();
    }
    tokio::task::yield_now().await;
    driver.turn();
    let (sessions, flushed) = listed.await.unwrap();
    let brief: Vec<_> = sessions
        .iter()
        .map(|info| (info.session.0.as_str(), info.status, info.context, info.segments.as_slice()))
        .collect();
    assert_eq!(brief[0].1, "decode");
    assert_eq!((brief[0].0, brief[0].3), ("decodes", &[here(0, brief[0].2 - 1)][..]));
    assert_eq!((brief[1].0, brief[1].1, brief[1].2), ("prefills", "prefill", 500));
    assert_eq!(brief[1].3[0].tokens % 64, 0, "chunks end at pages");
    assert_eq!(brief[2], ("waits", "waiting", 10, &[][..]));
    assert_eq!(flushed, 0);
}

#[derive(Default)]
struct Notes {
    prompt: AtomicU64,
    completion: AtomicU64,
    parked: AtomicU64,
    steps: AtomicU64,
    waits: Mutex<Vec<Duration>>,
    first_tokens: Mutex<Vec<Duration>>,
    gaps: Mutex<Vec<Duration>>,
    phases: Mutex<Vec<StepPhase>>,
    ends: Mutex<Vec<FinishReason>>,
}

impl EngineObserver for Notes {
    fn queued(&self, wait: Duration) {
        self.waits.lock().unwrap().push(wait);
    }
    fn first_token(&self, since_arrival: Duration) {
        self.first_tokens.lock().unwrap().push(since_arrival);
    }
    fn next_token(&self, since_last: Duration) {
        self.gaps.lock().unwrap().push(since_last);
    }
    fn stepped(&self, phase: StepPhase, time: Duration) {
        assert_eq!(time, Duration::from_millis(10));
        self.steps.fetch_add(1, Ordering::Relaxed);
        self.phases.lock().unwrap().push(phase);
    }
    fn preempted(&self, how: Preemption) {
        assert_eq!(how, Preemption::Parked);
        self.parked.fetch_add(1, Ordering::Relaxed);
    }
    fn tokens(&self, kind: TokenKind, count: u64) {
        let counter = if kind == TokenKind::Prompt { &self.prompt } else { &self.completion };
        counter.fetch_add(count, Ordering::Relaxed);
    }
    fn finished(&self, reason: FinishReason) {
        self.ends.lock().unwrap().push(reason);
    }
}

#[test]
fn the_observer_hears_of_everything() {
    let notes = Arc::new(Notes::default());
    let mut sizes = ModelSizes::default();
    sizes.limits.pages = 4;
    let settings = EngineConfig { observer: Arc::clone(&notes) as Arc<dyn EngineObserver>, ..config() };
    let (mut driver, _) = timed(sizes, settings);
    driver.submit(&greedy_request("a", vec![1; 60], 100));
    driver.turn();
    driver.submit(&greedy_request("b", vec![2; 60], 100));
    driver.finish();
    let millis = |times: &Mutex<Vec<Duration>>| {
        times.lock().unwrap().iter().map(|time| time.as_millis() as u64).collect::<Vec<u64>>()
    };
    assert_eq!(millis(&notes.waits), [0, 0]);
    assert_eq!(millis(&notes.first_tokens), [10, 10]);
    let gaps = millis(&notes.gaps);
    assert_eq!(gaps.len(), 198);
    assert!(gaps.iter().any(|gap| *gap > 100), "a parked session has a long gap");
    assert_eq!(notes.parked.load(Ordering::Relaxed), 1);
    assert_eq!((notes.prompt.load(Ordering::Relaxed), notes.completion.load(Ordering::Relaxed)), (120, 200));
    let phases = notes.phases.lock().unwrap();
    assert_eq!((phases[0], phases[1], phases[2]), (StepPhase::Prefill, StepPhase::Mixed, StepPhase::Decode));
    assert_eq!(*notes.ends.lock().unwrap(), [FinishReason::Length; 2]);
}

/// Positions whose latents are at the replica itself.
fn here(first: u64, tokens: u64) -> SegmentInfo {
    SegmentInfo { home: String::new(), incarnation: String::new(), first, tokens }
}
