//! Sessions that change replicas, with the test as their router: both modes, there and back, aborts, and what becomes of
//! everything when one of the three is lost at the worst time.

use std::time::Duration;

use perigee_engine::request::SessionId;
use perigee_proto::internal::{MoveMode, MovePhase, MoveReport, router_message};

use super::replica::{
    LONG, PROMPT, Replica, ReplicaOptions, Story, TOKENS, abort_move, eventually, long_session, over, release, start,
    undisturbed,
};
use super::sandbox::HandMade;

/// Tokens after which the session is asked to move.
const BEFORE: usize = 20;

/// Two replicas, the router's streams to them, and a session that runs on the first.
pub(super) struct Pair {
    pub(super) a: Replica,
    pub(super) b: Replica,
    pub(super) to_a: HandMade,
    pub(super) to_b: HandMade,
    pub(super) story: Story,
}

impl Pair {
    pub(super) async fn start(options: ReplicaOptions) -> Self {
        let a = Replica::start("a", options.clone()).await;
        let b = Replica::start("b", options).await;
        let (mut to_a, to_b) = (a.attach().await, b.attach().await);
        to_a.send(router_message::Body::Submit(long_session("s")));
        let mut story = Story::default();
        story.follow_to(&mut to_a, BEFORE).await;
        Self { a, b, to_a, to_b, story }
    }

    /// Moves the session up to the point where both sides wait for the router.
    pub(super) async fn prepare(&mut self, mode: MoveMode) -> MoveReport {
        self.to_a.send(router_message::Body::Prepare(self.b.invite("s", mode)));
        let report = self.story.follow_to_report(&mut self.to_a).await;
        assert_eq!(report.phase(), MovePhase::Ready, "{report:?}");
        assert_eq!((report.session.as_str(), report.epoch, report.mode()), ("s", 1, mode));
        assert!(self.story.tokens().len() < TOKENS as usize, "it ended before it moved");
        report
    }

    /// The router's decision: the session is b's.
    pub(super) async fn commit(&mut self) {
        self.to_b.send(start(2));
        self.to_a.send(release(1, &self.b, 2));
        let report = self.story.follow_to_report(&mut self.to_b).await;
        assert_eq!((report.phase(), report.epoch), (MovePhase::Started, 2), "{report:?}");
        let report = Story::default().follow_to_report(&mut self.to_a).await;
        assert_eq!((report.phase(), report.epoch), (MovePhase::Released, 1), "{report:?}");
    }
}

/// Where b says that the session's latents are: (home, first, tokens).
pub(super) async fn segments(replica: &Replica) -> Vec<(String, u64, u64)> {
    let sessions = replica.engine.sessions().await;
    let session = sessions.into_iter().find(|session| session.session == SessionId("s".to_owned())).expect("it runs");
    session.segments.into_iter().map(|segment| (segment.home, segment.first, segment.tokens)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_split_move_leaves_full_pages_behind_and_nothing_else() {
    let expected = undisturbed().await;
    let mut pair = Pair::start(ReplicaOptions::default()).await;
    let ready = pair.prepare(MoveMode::Split).await;
    assert_eq!(ready.page_bytes, 0, "full pages stay");
    // All tokens but those that were drawn after the report was on its way.
    assert_eq!(ready.token_bytes, 4 * (PROMPT + pair.story.tokens().len()) as u64);
    assert!(ready.state_bytes > 0 && ready.export_us > 0 && ready.frozen_us >= ready.export_us, "{ready:?}");
    pair.commit().await;
    pair.story.follow_to(&mut pair.to_b, pair.story.tokens().len() + 5).await;
    let there = segments(&pair.b).await;
    assert_eq!((there[0].0.as_str(), there[0].1), ("a", 0), "{there:?}");
    assert!(there[0].2 >= 128 && there[0].2.is_multiple_of(64) && there[1].0.is_empty(), "{there:?}");
    let load = pair.a.engine.load();
    assert_eq!((load.homes, load.slots_free), (1, load.slots_total), "the slot is free, the pages are kept");
    assert!(load.pages_free < load.pages_total);
    pair.story.follow_to_end(&mut pair.to_b).await;
    assert_eq!(pair.story.tokens(), expected);
    assert_eq!(pair.story.last().epoch, 2);
    pair.to_a.send(over(2));
    pair.a.assert_free().await;
    pair.b.assert_free().await;
    let metrics = pair.a.metrics.text().expect("written");
    for line in [
        "perigee_migrations_total{mode=\"split\",result=\"done\"} 1".to_owned(),
        format!("perigee_migration_bytes_total{{kind=\"state\"}} {}", ready.state_bytes),
        "perigee_migration_stall_seconds_count 1".to_owned(),
    ] {
        assert!(metrics.lines().any(|found| found == line), "{line} is missing in {metrics}");
    }
    let asked = pair.b.metrics.text().expect("written");
    assert!(!asked.lines().any(|line| line == "perigee_remote_attention_seconds_count 0"), "{asked}");
    let link = pair.to_b.links.iter().find(|link| link.replica == "a").expect("its router hears of the way to a");
    assert!(link.round_trip_us > 0, "{link:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_whole_move_takes_everything_along() {
    let expected = undisturbed().await;
    let mut pair = Pair::start(ReplicaOptions::default()).await;
    let ready = pair.prepare(MoveMode::Whole).await;
    assert!(ready.page_bytes > 0 && ready.state_bytes > 0, "{ready:?}");
    pair.commit().await;
    pair.a.assert_free().await;
    // Nobody is asked: the source may go.
    pair.a.kill().await;
    pair.story.follow_to_end(&mut pair.to_b).await;
    assert_eq!(pair.story.tokens(), expected);
    pair.b.assert_free().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_that_comes_back_finds_its_pages() {
    let expected = undisturbed().await;
    let mut pair = Pair::start(ReplicaOptions::default()).await;
    pair.prepare(MoveMode::Split).await;
    pair.commit().await;
    pair.story.follow_to(&mut pair.to_b, pair.story.tokens().len() + 5).await;
    let mut back = pair.a.invite("s", MoveMode::Split);
    (back.epoch, back.next_epoch) = (2, 3);
    pair.to_b.send(router_message::Body::Prepare(back));
    let ready = pair.story.follow_to_report(&mut pair.to_b).await;
    assert_eq!((ready.phase(), ready.epoch, ready.page_bytes), (MovePhase::Ready, 2, 0), "{ready:?}");
    pair.to_a.send(start(3));
    pair.to_b.send(release(2, &pair.a, 3));
    let started = pair.story.follow_to_report(&mut pair.to_a).await;
    assert_eq!((started.phase(), started.epoch), (MovePhase::Started, 3), "{started:?}");
    pair.story.follow_to(&mut pair.to_a, pair.story.tokens().len() + 5).await;
    let here = segments(&pair.a).await;
    assert_eq!((here[0].0.as_str(), here[0].1), ("", 0), "its own pages are its own again: {here:?}");
    pair.story.follow_to_end(&mut pair.to_a).await;
    assert_eq!(pair.story.tokens(), expected);
    pair.to_b.send(over(3));
    pair.a.assert_free().await;
    pair.b.assert_free().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_aborted_move_goes_on_where_it_froze() {
    let expected = undisturbed().await;
    let mut pair = Pair::start(ReplicaOptions::default()).await;
    pair.prepare(MoveMode::Split).await;
    let frozen_at = pair.story.tokens().len();
    pair.to_a.send(abort_move(2, 3));
    pair.to_b.send(abort_move(2, 3));
    let report = pair.story.follow_to_report(&mut pair.to_a).await;
    assert_eq!((report.phase(), report.epoch), (MovePhase::Aborted, 3), "{report:?}");
    assert_eq!(pair.story.tokens().len(), frozen_at, "the report comes before the tokens of the new epoch");
    let report = Story::default().follow_to_report(&mut pair.to_b).await;
    assert_eq!((report.phase(), report.epoch), (MovePhase::Aborted, 3), "{report:?}");
    pair.b.assert_free().await;
    // Too late: the handoff is of the past.
    pair.to_b.send(start(2));
    let report = Story::default().follow_to_report(&mut pair.to_b).await;
    assert_eq!((report.phase(), report.known), (MovePhase::Failed, 3), "{report:?}");
    pair.story.follow_to_end(&mut pair.to_a).await;
    assert_eq!(pair.story.tokens(), expected);
    assert_eq!(pair.story.last().epoch, 3);
    pair.a.assert_free().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_dies_when_the_target_is_ready_takes_nothing_with_it() {
    let expected = undisturbed().await;
    let mut pair = Pair::start(ReplicaOptions { patience: Duration::from_millis(100), ..Default::default() }).await;
    pair.prepare(MoveMode::Split).await;
    pair.a.kill().await;
    pair.to_b.send(start(2));
    let report = pair.story.follow_to_report(&mut pair.to_b).await;
    assert_eq!((report.phase(), report.epoch), (MovePhase::Started, 2), "{report:?}");
    pair.story.follow_to_end(&mut pair.to_b).await;
    assert_eq!(pair.story.tokens(), expected, "its latents were computed again");
    pair.b.assert_free().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_router_lost_before_the_start_leaves_nothing_running_and_nothing_held() {
    let (silence, grace) = (Duration::from_millis(100), Duration::from_millis(400));
    let mut pair = Pair::start(ReplicaOptions { silence, grace, ..Default::default() }).await;
    pair.prepare(MoveMode::Split).await;
    let steps = || (pair.a.engine.load().steps, pair.b.engine.load().steps);
    // The freeze may still have to show in the load; from then on nothing steps.
    assert!(eventually(|| pair.a.engine.load().running == 0).await, "{:?}", pair.a.engine.load());
    let before = steps();
    drop((pair.to_a, pair.to_b));
    pair.a.assert_free().await;
    pair.b.assert_free().await;
    assert_eq!(steps(), before, "nobody may step a session whose router is gone");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_router_that_comes_back_in_time_starts_what_waits_for_it() {
    let expected = undisturbed().await;
    let silence = Duration::from_millis(50);
    let mut pair = Pair::start(ReplicaOptions { silence, grace: LONG, ..Default::default() }).await;
    pair.prepare(MoveMode::Split).await;
    drop((pair.to_a, pair.to_b));
    (pair.to_a, pair.to_b) = (pair.a.attach().await, pair.b.attach().await);
    pair.commit().await;
    pair.story.follow_to_end(&mut pair.to_b).await;
    assert_eq!(pair.story.tokens(), expected);
    pair.to_a.send(over(2));
    pair.a.assert_free().await;
    pair.b.assert_free().await;
}
