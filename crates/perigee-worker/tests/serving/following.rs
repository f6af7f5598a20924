//! Latents after a split move: they follow the session where that costs less than asking, a home keeps them only for an owner
//! that lives, and a home that is to end is not waited for.

use std::time::Duration;

use perigee_engine::moves::FollowPolicy;
use perigee_engine::request::SessionId;
use perigee_proto::internal::replica_client::ReplicaClient;
use perigee_proto::internal::{FetchPagesRequest, KeepHomesRequest, KeptSession, MoveMode, PageChunk, ReplicaRun};
use tonic::{Code, Status};

use super::moves::{Pair, segments};
use super::replica::{LONG, Replica, ReplicaOptions, eventually, undisturbed};

fn following() -> ReplicaOptions {
    ReplicaOptions { follow: FollowPolicy::ByCost, ..ReplicaOptions::default() }
}

/// A session of epoch 2 at b, with its first pages at a.
async fn split(options: ReplicaOptions) -> Pair {
    let mut pair = Pair::start(options).await;
    pair.prepare(MoveMode::Split).await;
    pair.commit().await;
    pair
}

/// Waits until nothing of the session is left at a.
async fn a_is_rid_of_it(pair: &Pair) {
    let load = || pair.a.engine.load();
    let is_rid = || load().homes == 0 && load().pages_free == load().pages_total;
    assert!(eventually(is_rid).await, "{:?}", load());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pages_follow_a_session_that_goes_on_for_long() {
    let expected = undisturbed().await;
    let mut pair = split(following()).await;
    a_is_rid_of_it(&pair).await;
    let here = segments(&pair.b).await;
    assert_eq!((here.len(), here[0].0.as_str(), here[0].1), (1, "", 0), "all of it is local: {here:?}");
    assert!(pair.story.tokens().len() < expected.len(), "it still runs");
    let load = pair.b.engine.load();
    assert_eq!(load.slots_total - load.slots_free, 1, "the shadow slot is free");
    let metrics = pair.b.metrics.text().expect("written");
    let followed = "perigee_migration_bytes_total{kind=\"followed\"}";
    assert!(metrics.lines().any(|line| line.starts_with(followed) && !line.ends_with(" 0")), "{metrics}");
    // Nobody is asked any more.
    pair.a.kill().await;
    pair.story.follow_to_end(&mut pair.to_b).await;
    assert_eq!(pair.story.tokens(), expected);
    pair.b.assert_free().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_home_that_is_to_end_is_rid_of_its_pages() {
    let expected = undisturbed().await;
    let mut pair = split(ReplicaOptions::default()).await;
    pair.story.follow_to(&mut pair.to_b, pair.story.tokens().len() + 5).await;
    assert_eq!(pair.a.engine.load().homes, 1, "nobody brings them for the sake of cost");
    pair.a.engine.drain();
    a_is_rid_of_it(&pair).await;
    pair.a.kill().await;
    pair.story.follow_to_end(&mut pair.to_b).await;
    assert_eq!(pair.story.tokens(), expected);
    pair.b.assert_free().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_home_hears_when_its_session_ends() {
    let mut pair = split(ReplicaOptions::default()).await;
    pair.story.follow_to_end(&mut pair.to_b).await;
    a_is_rid_of_it(&pair).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_home_outlives_a_pause_but_not_its_owner() {
    let grace = Duration::from_millis(400);
    let mut pair = split(ReplicaOptions { grace, ..ReplicaOptions::default() }).await;
    pair.story.follow_to(&mut pair.to_b, pair.story.tokens().len() + 5).await;
    let expires = || pair.a.engine.load().homes == 0;
    pair.b.kill().await;
    assert!(eventually(expires).await, "{:?}", pair.a.engine.load());
    pair.a.assert_free().await;
}

fn run(replica: &Replica, of: &str) -> Option<ReplicaRun> {
    Some(ReplicaRun { replica: replica.name.to_owned(), incarnation: of.to_owned() })
}

/// Asks a for a page of the session, as b in an epoch.
async fn fetch(pair: &Pair, incarnation: &str, epoch: u64, tokens: u64) -> Result<Vec<PageChunk>, Status> {
    let mut client = ReplicaClient::connect(format!("http://{}", pair.a.internal)).await.expect("connected");
    let request = FetchPagesRequest {
        home: run(&pair.a, incarnation),
        owner: run(&pair.b, "first run of b"),
        session: "s".to_owned(),
        epoch,
        first: 0,
        tokens,
    };
    let mut stream = client.fetch_pages(request).await?.into_inner();
    let mut chunks = Vec::new();
    while let Some(chunk) = stream.message().await? {
        chunks.push(chunk);
    }
    Ok(chunks)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pages_are_given_to_the_owner_of_this_run_only() {
    let pair = split(ReplicaOptions { grace: LONG, ..ReplicaOptions::default() }).await;
    let code = |result: Result<Vec<PageChunk>, Status>| result.expect_err("refused").code();
    let mine = "first run of a";
    assert_eq!(code(fetch(&pair, "an earlier run", 2, 64).await), Code::FailedPrecondition);
    assert_eq!(code(fetch(&pair, mine, 1, 64).await), Code::Aborted, "an owner of the past");
    assert_eq!(code(fetch(&pair, mine, 2, 65).await), Code::InvalidArgument);
    assert_eq!(code(fetch(&pair, mine, 2, 64 * 1000).await), Code::FailedPrecondition, "pages that are not there");
    let chunks = fetch(&pair, mine, 2, 128).await.expect("given");
    let pages: Vec<(u64, u32)> =
        chunks.iter().flat_map(|chunk| &chunk.pages).map(|page| (page.first, page.layer)).collect();
    assert_eq!(pages, [(0, 0), (64, 0)], "this model has one MLA layer");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leases_are_of_this_run_and_tell_what_is_missing() {
    let pair = split(ReplicaOptions::default()).await;
    let mut client = ReplicaClient::connect(format!("http://{}", pair.a.internal)).await.expect("connected");
    let kept = |session: &str, epoch| KeptSession { session: session.to_owned(), epoch };
    let request = |incarnation: &str, renewed, given_up| KeepHomesRequest {
        home: run(&pair.a, incarnation),
        owner: run(&pair.b, "first run of b"),
        renewed,
        given_up,
    };
    let refused = client.keep_homes(request("an earlier run", vec![kept("s", 2)], vec![])).await;
    assert_eq!(refused.expect_err("another run").code(), Code::FailedPrecondition);
    let renewed = vec![kept("s", 2), kept("t", 2)];
    let answer = client.keep_homes(request("first run of a", renewed, vec![])).await.expect("told").into_inner();
    assert_eq!((answer.missing, answer.call_back), (vec![kept("t", 2)], false));
    let stale = vec![kept("s", 1)];
    client.keep_homes(request("first run of a", vec![], stale)).await.expect("told");
    let sessions = pair.a.engine.sessions().await;
    assert!(sessions.iter().all(|session| session.session != SessionId("s".to_owned())), "{sessions:?}");
    assert_eq!(pair.a.engine.load().homes, 1, "a word of the past gives nothing up");
    client.keep_homes(request("first run of a", vec![], vec![kept("s", 2)])).await.expect("told");
    a_is_rid_of_it(&pair).await;
}
