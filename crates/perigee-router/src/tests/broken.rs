//! Replicas that break, fall silent, fail, or are not who they should be, before a router that does not wait for others to
//! take their sessions over: what is noticed, and when.

use std::time::Duration;

use perigee_proto::internal::{Finish, ModelInfo, Welcome, router_message};
use perigee_registry::ReplicaRecord;
use tokio::time::Instant;
use tonic::Code;
use tonic_types::StatusExt;

use super::fake::{FakeReplica, LEASE, Sandbox, finished, impatient, token, welcome};
use super::streams::{generate, prompt};
use crate::RouterConfig;

fn reason(status: &tonic::Status) -> String {
    status.get_error_details().error_info().map(|info| info.reason.clone()).unwrap_or_default()
}

#[tokio::test(start_paused = true)]
async fn a_broken_stream_is_unavailable_at_once_and_the_replica_comes_back() {
    let sandbox = Sandbox::start(impatient()).await;
    let (mut replica, mut attached) = sandbox.add("a").await;
    let (submit, mut stream) = generate(&sandbox, &mut attached, prompt()).await;
    attached.step(vec![token(&submit, 0)]);
    let before = Instant::now();
    drop(attached);
    let response = stream.message().await.expect("no error").expect("what came before is read");
    assert_eq!(response.index, 0);
    let status = stream.message().await.expect_err("lost");
    assert_eq!((status.code(), reason(&status).as_str()), (Code::Unavailable, "REPLICA_LOST"));
    assert!(before.elapsed() < LEASE / 4, "{:?}", before.elapsed());
    sandbox.assert_idle().await;

    let mut again = replica.attached().await;
    sandbox.until_status("a", "ready").await;
    let (submit, mut stream) = generate(&sandbox, &mut again, prompt()).await;
    again.step(vec![finished(token(&submit, 0), Finish::Stop)]);
    assert!(stream.message().await.expect("no error").is_some());
}

#[tokio::test(start_paused = true)]
async fn a_killed_leader_never_hangs_a_client() {
    let sandbox = Sandbox::start(impatient()).await;
    let (mut replica, mut attached) = sandbox.add("a").await;
    let (_submit, mut stream) = generate(&sandbox, &mut attached, prompt()).await;
    let before = Instant::now();
    replica.kill.take();
    drop(attached);
    let status = stream.message().await.expect_err("killed");
    assert_eq!(status.code(), Code::Unavailable);
    assert!(before.elapsed() < LEASE, "{:?}", before.elapsed());
    let status = sandbox.inference.clone().generate(prompt()).await.expect_err("nobody is left");
    assert_eq!((status.code(), reason(&status).as_str()), (Code::Unavailable, "NO_REPLICA"));
}

#[tokio::test(start_paused = true)]
async fn silence_for_the_lease_counts_as_death_and_load_alone_as_life() {
    let sandbox = Sandbox::start(impatient()).await;
    let (_replica, mut attached) = sandbox.add("a").await;
    let (_submit, mut stream) = generate(&sandbox, &mut attached, prompt()).await;
    for _ in 0..10 {
        tokio::time::sleep(LEASE / 2).await;
        attached.step(vec![]);
    }
    let last = Instant::now();
    let status = stream.message().await.expect_err("silent");
    assert_eq!((status.code(), reason(&status).as_str()), (Code::Unavailable, "REPLICA_LOST"));
    let waited = last.elapsed();
    assert!(waited >= LEASE - Duration::from_millis(10) && waited <= LEASE + Duration::from_millis(50), "{waited:?}");
}

#[tokio::test(start_paused = true)]
async fn the_router_renews_from_what_it_has_read() {
    let sandbox = Sandbox::start(RouterConfig::default()).await;
    let (_replica, mut attached) = sandbox.add("a").await;
    let mut heard = Instant::now();
    let mut clocks = Vec::new();
    for clock in 1..=20 {
        let message = attached.from_router.message().await.expect("the stream lives").expect("a message");
        assert!(heard.elapsed() <= LEASE / 4, "{:?}", heard.elapsed());
        heard = Instant::now();
        if let Some(router_message::Body::Renew(renew)) = message.body {
            clocks.push(renew.clock);
        }
        attached.step_at(clock, vec![]);
    }
    assert!(clocks.len() >= 18 && clocks.is_sorted(), "{clocks:?}");
    assert!(clocks.last().is_some_and(|last| *last >= 17), "the newest batch is named: {clocks:?}");
}

#[tokio::test(start_paused = true)]
async fn an_engine_that_fails_is_unavailable() {
    let sandbox = Sandbox::start(impatient()).await;
    let (_replica, mut attached) = sandbox.add("a").await;
    let (submit, mut stream) = generate(&sandbox, &mut attached, prompt()).await;
    let mut event = finished(token(&submit, 0), Finish::Error);
    event.error = "rank 1 was lost".to_owned();
    attached.step(vec![event]);
    let status = stream.message().await.expect_err("failed");
    assert_eq!((status.code(), reason(&status).as_str()), (Code::Unavailable, "ENGINE_FAILED"));
    assert!(status.message().contains("rank 1 was lost"), "{}", status.message());
}

#[tokio::test(start_paused = true)]
async fn a_replica_that_leaves_the_registry_keeps_its_streams_and_gets_no_more() {
    let sandbox = Sandbox::start(RouterConfig::default()).await;
    let (_replica, mut attached) = sandbox.add("a").await;
    let (submit, mut stream) = generate(&sandbox, &mut attached, prompt()).await;
    sandbox.registry.remove("a");
    sandbox.until_status("a", "gone").await;
    let status = sandbox.inference.clone().generate(prompt()).await.expect_err("nothing new");
    assert_eq!(reason(&status), "NO_REPLICA");
    attached.step(vec![token(&submit, 0), finished(token(&submit, 1), Finish::Stop)]);
    assert_eq!(stream.message().await.expect("no error").map(|response| response.index), Some(0));
    assert_eq!(stream.message().await.expect("no error").map(|response| response.index), Some(1));
    assert!(stream.message().await.expect("no error").is_none());
    drop(attached);
    sandbox.until_status("a", "").await;
}

#[tokio::test(start_paused = true)]
async fn strangers_are_not_attached() {
    let own = welcome("a");
    let foreign = ModelInfo { digest: "zzz".to_owned(), ..own.model.clone().unwrap_or_default() };
    let strangers = [
        ("another version", Welcome { protocol_version: own.protocol_version + 1, ..own.clone() }),
        ("another replica", Welcome { replica: "b".to_owned(), ..own.clone() }),
        ("another incarnation", Welcome { incarnation: "2".to_owned(), ..own.clone() }),
        ("another model", Welcome { model: Some(foreign), ..own.clone() }),
        ("no model", Welcome { model: None, ..own }),
    ];
    for (what, welcome) in strangers {
        let sandbox = Sandbox::start(RouterConfig::default()).await;
        let address = format!("{}:1", welcome.replica);
        let mut replica = FakeReplica::start(&sandbox.network, welcome);
        let record =
            ReplicaRecord { incarnation: "1".to_owned(), digest: "abc".to_owned(), ..ReplicaRecord::new("a", address) };
        sandbox.registry.register(record).expect("registered");
        for _ in 0..3 {
            replica.greeted().await;
        }
        sandbox.until_status("a", "unreachable").await;
        let status = sandbox.inference.clone().generate(prompt()).await.expect_err(what);
        assert_eq!(reason(&status), "NO_REPLICA", "{what}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_new_incarnation_takes_over_from_the_old_one() {
    let sandbox = Sandbox::start(impatient()).await;
    let (_old, mut attached) = sandbox.add("a").await;
    let (_submit, mut stream) = generate(&sandbox, &mut attached, prompt()).await;
    let mut new = FakeReplica::start(&sandbox.network, Welcome { incarnation: "2".to_owned(), ..welcome("a") });
    let record = ReplicaRecord { incarnation: "2".to_owned(), ..ReplicaRecord::new("a", "a:1") };
    sandbox.registry.register(record).expect("registered");
    let status = stream.message().await.expect_err("the old process is gone");
    assert_eq!(reason(&status), "REPLICA_LOST");
    let mut attached = new.attached().await;
    sandbox.until_status("a", "ready").await;
    let (submit, _stream) = generate(&sandbox, &mut attached, prompt()).await;
    assert_eq!(submit.prompt, [1, 2, 3]);
}
