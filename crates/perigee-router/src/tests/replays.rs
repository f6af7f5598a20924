//! Sessions whose owner is lost: they go on elsewhere after the tokens that their clients have, or wait for a replica, or
//! fail in the end and say why.

use std::time::Duration;

use perigee_proto::internal::{Finish, Refused, RefusedReason, SessionEvent, Submit, replica_message, router_message};
use perigee_proto::v1;
use tokio::time::Instant;
use tonic::Code;

use super::actor::TICK;
use super::fake::{Attached, Sandbox, finished, token};
use super::scene::{Scene, told};
use super::streams::{generate, prompt};
use crate::{MoveTimes, RouterConfig};

#[tokio::test(start_paused = true)]
async fn a_killed_owner_s_sessions_go_on_elsewhere() {
    let mut scene = Scene::start(RouterConfig::default()).await;
    let mut client = scene.client(1).await;
    client.reaches(7).await;
    let owner = scene.owner(client.session()).expect("somebody steps it");
    scene.kill(&owner);
    let read = client.read().await;
    read.is_complete(1);
    let owners = read.owners(0);
    assert_eq!((owners[0], owners[1].1, owners.len()), ((owner.as_str(), 1), 2, 2), "{owners:?}");
    assert_eq!((scene.count("replay", "done"), scene.count("replay", "failed")), (1, 0));
    scene.all_is_free(true).await;
}

#[tokio::test(start_paused = true)]
async fn choices_replay_alone_once_they_have_tokens_and_together_before() {
    let sandbox = Sandbox::start(RouterConfig::default()).await;
    let (mut a, mut on_a) = sandbox.add("a").await;
    let sampling = Some(v1::SamplingParams { n: Some(4), seed: Some(5), ..Default::default() });
    let request = v1::GenerateRequest { sampling, ..prompt() };
    let (submit, mut stream) = generate(&sandbox, &mut on_a, request).await;
    let of_choice = |submit: &Submit, number: usize, index: u64| SessionEvent {
        session: submit.sessions[number].clone(),
        ..token(submit, index)
    };
    // Choice 0 has two tokens, 1 has ended, 2 and 3 have none.
    on_a.step(vec![of_choice(&submit, 0, 0), finished(of_choice(&submit, 1, 0), Finish::Stop)]);
    on_a.step(vec![of_choice(&submit, 0, 1)]);
    for _ in 0..3 {
        stream.message().await.expect("no error").expect("a response");
    }
    let (_b, mut on_b) = sandbox.add("b").await;
    a.kill.take();
    drop(on_a);
    let mut replayed = [on_b.next_submit().await, on_b.next_submit().await];
    replayed.sort_by_key(|submit| submit.first_choice);
    let [alone, together] = replayed;
    assert_eq!((alone.sessions.as_slice(), alone.first_choice, alone.epoch), (&submit.sessions[..1], 0, 2));
    assert_eq!((alone.delivered.as_slice(), alone.prompt.as_slice()), ([100, 101].as_slice(), [1, 2, 3].as_slice()));
    assert_eq!((together.sessions.as_slice(), together.first_choice, together.epoch), (&submit.sessions[2..], 2, 2));
    assert_eq!((together.delivered.len(), together.sampling == submit.sampling), (0, true));
    on_b.step(vec![
        finished(of_choice(&alone, 0, 2), Finish::Stop),
        finished(of_choice(&together, 0, 0), Finish::Stop),
        finished(of_choice(&together, 1, 0), Finish::Stop),
    ]);
    let mut seen = Vec::new();
    while let Some(response) = stream.message().await.expect("no error") {
        seen.push((response.choice, response.index, response.replica, response.epoch));
    }
    let b = "b".to_owned();
    assert_eq!(seen, [(0, 2, b.clone(), 2), (2, 0, b.clone(), 2), (3, 0, b, 2)]);
    sandbox.assert_idle().await;
}

#[tokio::test(start_paused = true)]
async fn without_a_replica_a_session_waits_for_one() {
    let mut scene = Scene::start(RouterConfig::default()).await;
    let mut client = scene.client(1).await;
    client.reaches(5).await;
    for name in ["a", "b", "c"] {
        scene.kill(name);
    }
    tokio::time::sleep(Duration::from_secs(20)).await;
    let came = Instant::now();
    scene.add("d").await;
    client.reaches(6).await;
    assert!(came.elapsed() < Duration::from_secs(1), "it is noticed at once: {:?}", came.elapsed());
    client.read().await.is_complete(1);
    scene.all_is_free(true).await;
}

#[tokio::test(start_paused = true)]
async fn a_request_with_a_deadline_waits_for_a_replica_until_then() {
    let moves = MoveTimes { replay: Duration::from_secs(1), ..MoveTimes::default() };
    let sandbox = Sandbox::start(RouterConfig { moves, ..RouterConfig::default() }).await;
    for returns in [true, false] {
        let (mut replica, mut attached) = sandbox.add("a").await;
        let mut request = tonic::Request::new(prompt());
        request.set_timeout(Duration::from_secs(60));
        let mut client = sandbox.inference.clone();
        let (stream, submit) = tokio::join!(client.generate(request), attached.next_submit());
        let mut stream = stream.expect("accepted").into_inner();
        attached.step(vec![token(&submit, 0)]);
        assert!(stream.message().await.expect("no error").is_some());
        replica.kill.take();
        drop(attached);
        // Far longer than a request without a deadline waits.
        let lost = Instant::now();
        tokio::time::sleep(Duration::from_secs(30)).await;
        if returns {
            let (mut replica, mut attached) = sandbox.add("b").await;
            let again = attached.next_submit().await;
            assert_eq!((again.delivered.as_slice(), again.epoch), ([100].as_slice(), 2));
            attached.step(vec![finished(token(&again, 1), Finish::Length)]);
            assert_eq!(stream.message().await.expect("no error").map(|response| response.index), Some(1));
            assert!(stream.message().await.expect("no error").is_none());
            replica.kill.take();
        } else {
            let status = stream.message().await.expect_err("nobody came");
            assert_eq!(status.code(), Code::DeadlineExceeded);
            assert!(lost.elapsed() >= Duration::from_secs(58), "{:?}", lost.elapsed());
        }
    }
    sandbox.assert_idle().await;
}

#[tokio::test(start_paused = true)]
async fn patience_ends() {
    let moves = MoveTimes { replay: Duration::from_secs(7), ..MoveTimes::default() };
    let mut scene = Scene::start(RouterConfig { moves, ..RouterConfig::default() }).await;
    let mut client = scene.client(1).await;
    client.reaches(5).await;
    for name in ["a", "b", "c"] {
        scene.kill(name);
    }
    let lost = Instant::now();
    let read = client.read().await;
    let waited = lost.elapsed();
    assert!(waited >= moves.replay && waited < moves.replay + Duration::from_secs(1), "{waited:?}");
    let (code, reason, facts) = told(&read.status.expect("nobody came"));
    assert_eq!((code, reason.as_str()), (Code::Unavailable, "REPLICA_LOST"));
    assert!(facts.contains_key("replica"));
    assert_eq!(scene.count("replay", "failed"), 1);
    scene.sandbox.assert_idle().await;
}

#[tokio::test(start_paused = true)]
async fn the_client_s_deadline_and_a_closing_router_end_the_wait() {
    let sandbox = Sandbox::start(RouterConfig::default()).await;
    let (mut replica, mut attached) = sandbox.add("a").await;
    let mut request = tonic::Request::new(prompt());
    request.set_timeout(Duration::from_secs(3));
    let mut client = sandbox.inference.clone();
    let (stream, _) = tokio::join!(client.generate(request), attached.next_submit());
    let mut in_time = stream.expect("accepted").into_inner();
    let (submit, mut endless) = generate(&sandbox, &mut attached, prompt()).await;
    attached.step(vec![token(&submit, 0)]);
    assert!(endless.message().await.expect("no error").is_some());
    replica.kill.take();
    drop(attached);
    let status = in_time.message().await.expect_err("too late");
    assert_eq!(status.code(), Code::DeadlineExceeded);

    let before = Instant::now();
    sandbox.router.inference.relay.stop_waiting();
    let status = endless.message().await.expect_err("the router ends");
    assert_eq!((status.code(), before.elapsed() < TICK), (Code::Unavailable, true));
    sandbox.assert_idle().await;
}

#[tokio::test(start_paused = true)]
async fn a_broken_stream_s_replica_may_take_its_sessions_back() {
    let mut scene = Scene::start(RouterConfig::default()).await;
    let mut client = scene.client(1).await;
    client.reaches(5).await;
    let owner = scene.owner(client.session()).expect("somebody steps it");
    for name in ["a", "b", "c"] {
        if name != owner {
            scene.kill(name);
        }
    }
    scene.actors.get_mut(&owner).expect("an actor").reattach().await;
    let read = client.read().await;
    read.is_complete(1);
    assert_eq!(read.owners(0), [(owner.as_str(), 1), (owner.as_str(), 2)]);
    scene.all_is_free(true).await;
}

fn refuse(attached: &Attached, submit: &Submit, reason: RefusedReason) {
    attached.send(replica_message::Body::Refused(Refused {
        sessions: submit.sessions.clone(),
        reason: reason.into(),
        field: "max_tokens".to_owned(),
        message: "no".to_owned(),
    }));
}

#[tokio::test(start_paused = true)]
async fn a_session_with_tokens_outlasts_refusals() {
    let sandbox = Sandbox::start(RouterConfig::default()).await;
    let (mut a, mut on_a) = sandbox.add("a").await;
    let (submit, mut stream) = generate(&sandbox, &mut on_a, prompt()).await;
    on_a.step(vec![token(&submit, 0)]);
    assert!(stream.message().await.expect("no error").is_some());
    let (_b, mut on_b) = sandbox.add("b").await;
    a.kill.take();
    drop(on_a);
    let mut epochs = Vec::new();
    for reason in [RefusedReason::Full, RefusedReason::Unavailable, RefusedReason::Invalid] {
        let again = on_b.next_submit().await;
        assert_eq!(again.delivered, [100]);
        epochs.push(again.epoch);
        refuse(&on_b, &again, reason);
    }
    let last = on_b.next_submit().await;
    epochs.push(last.epoch);
    assert_eq!(epochs, [2, 3, 4, 5], "no epoch is used twice");
    on_b.step(vec![finished(token(&last, 1), Finish::Stop)]);
    let response = stream.message().await.expect("no error").expect("a response");
    assert_eq!((response.index, response.epoch, response.replica.as_str()), (1, 5, "b"));
    assert!(stream.message().await.expect("no error").is_none());
    sandbox.assert_idle().await;
}

#[tokio::test(start_paused = true)]
async fn an_engine_that_fails_loses_its_session_to_another() {
    let sandbox = Sandbox::start(RouterConfig::default()).await;
    let (_a, mut on_a) = sandbox.add("a").await;
    let (submit, mut stream) = generate(&sandbox, &mut on_a, prompt()).await;
    let (_b, mut on_b) = sandbox.add("b").await;
    let failing = |submit: &Submit, index| SessionEvent {
        token: None,
        error: "rank 1 was lost".to_owned(),
        ..finished(token(submit, index), Finish::Error)
    };
    on_a.step(vec![token(&submit, 0), failing(&submit, 1)]);
    let second = on_b.next_submit().await;
    assert_eq!((second.delivered.as_slice(), second.epoch), ([100].as_slice(), 2));
    // The failed replica is told that the session is over there.
    let router_message::Body::Abort(abort) = on_a.next().await else { panic!("an abort is due") };
    assert_eq!((abort.sessions.as_slice(), abort.epoch), (submit.sessions.as_slice(), 1));
    // Its late tokens count no more.
    on_a.step(vec![token(&submit, 1)]);
    on_b.step(vec![finished(token(&second, 1), Finish::Stop)]);
    let mut seen = Vec::new();
    while let Some(response) = stream.message().await.expect("no error") {
        seen.push((response.index, response.replica));
    }
    assert_eq!(seen, [(0, "a".to_owned()), (1, "b".to_owned())]);
    sandbox.assert_idle().await;
}

#[tokio::test(start_paused = true)]
async fn a_session_that_fails_everywhere_is_given_up() {
    let sandbox = Sandbox::start(RouterConfig::default()).await;
    let (_a, mut on_a) = sandbox.add("a").await;
    let (mut submit, mut stream) = generate(&sandbox, &mut on_a, prompt()).await;
    for attempt in 1..=3 {
        let mut failure = finished(token(&submit, 0), Finish::Error);
        (failure.token, failure.error) = (None, "it does not fit".to_owned());
        on_a.step(vec![failure]);
        if attempt < 3 {
            submit = loop {
                match on_a.next().await {
                    router_message::Body::Submit(submit) => break submit,
                    router_message::Body::Abort(_) => {}
                    other => panic!("expected a request, got {other:?}"),
                }
            };
            assert_eq!(submit.epoch, attempt + 1);
        }
    }
    let status = stream.message().await.expect_err("failed");
    let (code, reason, facts) = told(&status);
    assert_eq!((code, reason.as_str(), facts["replica"].as_str()), (Code::Unavailable, "ENGINE_FAILED", "a"));
    assert!(status.message().contains("it does not fit"), "{status}");
    sandbox.assert_idle().await;
}

#[tokio::test(start_paused = true)]
async fn an_abort_is_not_forgotten_when_its_owner_dies() {
    let sandbox = Sandbox::start(RouterConfig::default()).await;
    let (mut a, mut on_a) = sandbox.add("a").await;
    let (submit, mut stream) = generate(&sandbox, &mut on_a, prompt()).await;
    on_a.step(vec![token(&submit, 0)]);
    let (_b, _on_b) = sandbox.add("b").await;
    let abort = v1::AbortRequest { request_id: Some("mine".to_owned()), session_id: None };
    sandbox.inference.clone().abort(abort).await.expect("it runs");
    assert_eq!(on_a.next_abort().await, submit.sessions);
    a.kill.take();
    drop(on_a);
    let response = stream.message().await.expect("no error").expect("a response");
    assert_eq!(response.index, 0);
    let end = stream.message().await.expect("no error").expect("an end");
    assert_eq!((end.index, end.token_id, end.finish_reason()), (1, None, v1::FinishReason::Aborted));
    assert_eq!(end.usage, Some(v1::Usage { prompt: 3, completion: 1, cached: 0 }));
    assert!(stream.message().await.expect("no error").is_none());
    sandbox.assert_idle().await;
}
