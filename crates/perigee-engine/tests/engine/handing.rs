//! When a session stands still: not before its target has room for all of it, so that a move that is refused costs it
//! nothing. Two engines by hand, the handoff carried by the test.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use perigee_engine::EngineConfig;
use perigee_engine::homes::HomeDirectory;
use perigee_engine::moves::{
    FollowPolicy, HandoffConnector, Incoming, MoveConfig, Outgoing, Prepare, Room, Target, Way,
};
use perigee_engine::request::SessionId;
use perigee_engine::testing::{ModelExecutor, ModelSizes, greedy_request};
use perigee_migration::handoff::CHUNK_BYTES;
use perigee_migration::{AttendShape, Layout, Mode, Place};

use crate::support::{Driver, ROUTER, config};

/// More than a page.
const PROMPT: usize = 100;
const TOKENS: u32 = 60;

/// Keeps handoffs for the test.
#[derive(Default)]
pub(crate) struct Kept(Mutex<Vec<Outgoing>>);

impl HandoffConnector for Kept {
    fn open(&self, _target: Target, outgoing: Outgoing) {
        self.0.lock().unwrap().push(outgoing);
    }
}

/// Settings of replica `name`, which hands over by `connector`.
pub(crate) fn moving(name: &str, connector: Arc<Kept>) -> EngineConfig {
    let moves = MoveConfig {
        place: Place { replica: name.into(), incarnation: "1".into(), ranks: 1, layout: Layout::Replicated },
        endpoint: name.into(),
        model: "modelled".into(),
        homes: HomeDirectory::new(),
        can_answer: true,
        connector,
        silence: Duration::from_secs(2),
        grace: Duration::from_secs(10),
        patience: Duration::from_millis(250),
        misses: 3,
        shape: AttendShape { layers: 1, heads: 1, latent: 1, rope: 0, tokens: 1 },
        follow: FollowPolicy::Never,
        ways: vec![Way::Slots],
    };
    EngineConfig { moves: Some(moves), ..config() }
}

fn target(slots: usize, pages: usize) -> Driver {
    let mut sizes = ModelSizes::default();
    (sizes.limits.slots, sizes.limits.pages) = (slots, pages);
    Driver::new(ModelExecutor::new(sizes), moving("target", Arc::default()))
}

/// A source with the session under way, and the handoff that it has just begun.
fn source(mode: Mode) -> (Driver, Outgoing) {
    source_of(PROMPT, ModelSizes::default(), mode)
}

/// The same with a prompt of so many tokens, which fits into a step of such a source.
fn source_of(prompt: usize, sizes: ModelSizes, mode: Mode) -> (Driver, Outgoing) {
    let kept = Arc::<Kept>::default();
    let mut source = Driver::new(ModelExecutor::new(sizes), moving("source", kept.clone()));
    source.submit(&greedy_request("s", vec![3; prompt], TOKENS));
    draws(&mut source, 5);
    let target = Target { replica: "target".into(), incarnation: "1".into(), endpoint: "target".into() };
    source.handle.prepare(ROUTER, Prepare { session: SessionId("s".into()), epoch: 1, next: 2, target, mode });
    draws(&mut source, 1);
    let outgoing = kept.0.lock().unwrap().pop().expect("a handoff");
    (source, outgoing)
}

/// Makes so many turns, each of which draws a token.
fn draws(driver: &mut Driver, turns: usize) {
    let count = |driver: &Driver| driver.answers.values().map(|answer| answer.tokens.len()).sum::<usize>();
    for turn in 0..turns {
        let before = count(driver);
        driver.turn();
        assert_eq!(count(driver), before + 1, "turn {turn}");
    }
}

/// Brings the target what is out so far.
async fn bring(outgoing: &mut Outgoing, incoming: &mut Incoming, target: &mut Driver) -> Result<(), String> {
    let chunk = outgoing.next_chunk().await.expect("header and tokens");
    let push = incoming.push(&chunk);
    tokio::pin!(push);
    loop {
        tokio::select! {
            biased;
            pushed = &mut push => return pushed.map_err(|refused| refused.to_string()),
            () = tokio::task::yield_now() => {
                target.turn();
            }
        }
    }
}

#[tokio::test]
async fn a_move_that_is_refused_costs_no_step() {
    // One slot where two are needed; fewer pages than the session can come to; pages that are another one's.
    for (mode, slots, pages, is_busy) in
        [(Mode::Split, 1, 64, false), (Mode::Whole, 2, 1, false), (Mode::Whole, 3, 3, true)]
    {
        let (mut source, mut outgoing) = source(mode);
        let mut target = target(slots, pages);
        if is_busy {
            target.submit(&greedy_request("other", vec![5; PROMPT], 40));
            draws(&mut target, 2);
        }
        let mut incoming = target.handle.incoming();
        incoming.demands(outgoing.demand());
        let told = format!("{mode:?} to {slots} slots and {pages} pages");
        let refused = bring(&mut outgoing, &mut incoming, &mut target).await.expect_err(&told);
        assert!(refused.contains("no room") && !incoming.has_room(), "{told}: {refused}");
        draws(&mut source, 3);
        outgoing.answer(Err(refused));
        draws(&mut source, 3);
        source.handle.abort_move(ROUTER, SessionId("s".into()), 2, 3);
        draws(&mut source, 3);
        source.finish();
        assert_eq!(source.answer("s").tokens.len(), TOKENS as usize, "{told}");
        source.assert_nothing_is_held();
        drop(incoming);
        target.finish();
        target.assert_nothing_is_held();
    }
}

#[tokio::test]
async fn a_session_stands_still_once_its_target_has_room_and_not_before() {
    let (mut source, mut outgoing) = source(Mode::Whole);
    // As many pages as it may come to; it needs two now.
    let mut target = target(2, 3);
    let mut incoming = target.handle.incoming();
    incoming.demands(outgoing.demand());
    let on_room = outgoing.on_room().expect("given out once");
    bring(&mut outgoing, &mut incoming, &mut target).await.expect("room");
    assert!(incoming.has_room());
    let load = target.core.load();
    assert_eq!((load.slots_free, load.pages_free), (1, 1), "a slot and its pages are reserved");
    draws(&mut source, 5);
    on_room.send(Room::default()).expect("it waits for that");
    // The engine hears it when more is asked for.
    let nothing = tokio::time::timeout(Duration::from_millis(1), outgoing.next_chunk()).await;
    assert!(nothing.is_err(), "nothing is out before it stands still");
    let before = source.answer("s").tokens.len();
    source.turn();
    assert_eq!(source.answer("s").tokens.len(), before, "it stands still");
    drop((outgoing, incoming));
    target.turn();
    target.assert_nothing_is_held();
}

/// A source that holds sessions of so many positions and reads their prompts in one step.
fn long(positions: usize) -> ModelSizes {
    let mut sizes = ModelSizes::default();
    (sizes.limits.max_model_len, sizes.limits.step_tokens) = (positions, positions);
    sizes.limits.pages = positions.div_ceil(64) + 4;
    sizes
}

/// The next chunk, for which the source makes turns.
async fn next(outgoing: &mut Outgoing, source: &mut Driver) -> Option<Vec<u8>> {
    let next = outgoing.next_chunk();
    tokio::pin!(next);
    loop {
        tokio::select! {
            biased;
            chunk = &mut next => return chunk,
            () = tokio::task::yield_now() => {
                source.turn();
            }
        }
    }
}

/// Bytes of a split handoff that leave before the session stands still, and after that.
async fn bytes_of(prompt: usize) -> (usize, usize) {
    let (mut source, mut outgoing) = source_of(prompt, long(prompt + 128), Mode::Split);
    let on_room = outgoing.on_room().expect("given out once");
    let before = outgoing.next_chunk().await.expect("header and tokens").len();
    on_room.send(Room::default()).expect("it waits for that");
    let mut frozen = 0;
    while let Some(chunk) = next(&mut outgoing, &mut source).await {
        frozen += chunk.len();
    }
    assert!(!outgoing.is_cancelled(), "all of it is out");
    (before, frozen)
}

#[tokio::test]
async fn what_leaves_while_a_session_stands_still_does_not_grow_with_its_context() {
    let (short, long) = (bytes_of(1024).await, bytes_of(32 * 1024).await);
    assert!(long.0 - short.0 >= 4 * 31 * 1024, "tokens go before: {short:?}, {long:?}");
    // Numbers of positions are longer by a byte each.
    assert!(short.1 > 0 && long.1.abs_diff(short.1) < 16, "{short:?}, {long:?}");
}

#[tokio::test]
async fn a_target_has_room_once_the_tokens_of_a_long_context_are_there() {
    // More token ids than a chunk has.
    let tokens = CHUNK_BYTES / size_of::<u32>() + 1000;
    let sizes = long(tokens + 128);
    let (mut source, mut outgoing) = source_of(tokens, sizes, Mode::Split);
    let mut target = Driver::new(ModelExecutor::new(sizes), moving("target", Arc::default()));
    let mut incoming = target.handle.incoming();
    incoming.demands(outgoing.demand());
    bring(&mut outgoing, &mut incoming, &mut target).await.expect("it fits");
    assert_eq!(target.core.load().slots_free, target.core.load().slots_total - 2, "its slots are reserved");
    assert!(!incoming.has_room(), "tokens are still on their way");
    draws(&mut source, 2);
    bring(&mut outgoing, &mut incoming, &mut target).await.expect("all tokens so far");
    assert!(incoming.has_room());
    drop((outgoing, incoming));
    target.turn();
    target.assert_nothing_is_held();
}

#[tokio::test]
async fn what_comes_with_the_end_of_a_handoff_takes_one_turn_of_the_target() {
    let (mut source, mut outgoing) = source(Mode::Split);
    let mut target = target(2, 3);
    let mut incoming = target.handle.incoming();
    incoming.demands(outgoing.demand());
    let on_room = outgoing.on_room().expect("given out once");
    bring(&mut outgoing, &mut incoming, &mut target).await.expect("room");
    on_room.send(Room::default()).expect("it waits for that");
    let end = next(&mut outgoing, &mut source).await.expect("all that is frozen, at once");
    assert_eq!(next(&mut outgoing, &mut source).await, None);
    tokio::select! {
        biased;
        pushed = incoming.push(&end) => pushed.expect("taken"),
        () = std::future::ready(()) => panic!("the target had to make a turn"),
    }
    let finish = incoming.finish();
    tokio::pin!(finish);
    let mut turns = 0;
    let prepared = loop {
        tokio::select! {
            biased;
            prepared = &mut finish => break prepared.expect("verified"),
            () = tokio::task::yield_now() => {
                target.turn();
                turns += 1;
            }
        }
    };
    assert_eq!((prepared.session.as_str(), prepared.epoch, turns), ("s", 2, 1));
    outgoing.answer(Ok(prepared.digests));
    source.turn();
}
