//! The leader's side of the stream: hello, events, refusals, leases, questions, and what is not offered.

use std::time::Duration;

use perigee_engine::testing::{Faults, ModelSizes};
use perigee_proto::internal::{
    Abort, Finish, Flush, ListSessions, MoveFailure, MoveMode, MovePhase, Prepare, RefusedReason, Renew,
    replica_message, router_message,
};
use perigee_proto::v1::inference_client::InferenceClient;
use perigee_proto::{internal, v1};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::Code;
use tonic::transport::Channel;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use super::sandbox::{HandMade, Leader, LeaderOptions, PATIENCE, hello, submit};

const LONG: Duration = Duration::from_secs(60);

/// A leader whose sessions do not end by themselves soon.
async fn slow_leader() -> Leader {
    Leader::start("a", LeaderOptions { step: Duration::from_millis(2), ..LeaderOptions::default() }).await
}

#[tokio::test]
async fn a_request_runs_and_its_events_come_in_order() {
    let leader = Leader::start("a", LeaderOptions::default()).await;
    let (mut router, welcome) = HandMade::attach(&leader, hello(LONG)).await.expect("attached");
    assert_eq!((welcome.replica.as_str(), welcome.tp), ("a", 1));
    assert_eq!(welcome.model.expect("a model").vocab_size, 300);
    router.send(router_message::Body::Submit(submit("s", vec![1, 2, 3], 20)));
    let events = router.events_to_end().await;
    let indices: Vec<u64> = events.iter().filter(|event| event.token.is_some()).map(|event| event.index).collect();
    assert_eq!(indices, (0..20).collect::<Vec<_>>());
    let last = events.last().expect("an end");
    assert_eq!((last.finish(), last.epoch), (Finish::Length, 1));
    assert_eq!(last.usage.as_deref(), Some(&internal::Counts { prompt: 3, completion: 20, cached: 0 }));
    leader.assert_free().await;
    leader.stop().await.expect("a good end");
}

#[tokio::test]
async fn another_version_or_no_hello_is_refused() {
    let leader = Leader::start("a", LeaderOptions::default()).await;
    let other = internal::Hello { protocol_version: 99, ..hello(LONG) };
    let refused = HandMade::attach(&leader, other).await.map(|_| ()).expect_err("another version");
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("99"), "{}", refused.message());
}

#[tokio::test]
async fn bad_requests_are_refused_and_name_the_field() {
    let options = LeaderOptions { queue_limit: Some(0), ..LeaderOptions::default() };
    let leader = Leader::start("a", options).await;
    let (mut router, _) = HandMade::attach(&leader, hello(LONG)).await.expect("attached");
    let mut hot = submit("s", vec![1], 5);
    hot.sampling.as_mut().expect("set").top_p = 2.0;
    let cases = [
        (submit("s", vec![1, 300], 5), RefusedReason::Invalid, "token_ids"),
        (hot, RefusedReason::Invalid, "sampling.top_p"),
        (internal::Submit { sampling: None, ..submit("s", vec![1], 5) }, RefusedReason::Invalid, "sampling"),
        (internal::Submit { text: true, ..submit("s", vec![1], 5) }, RefusedReason::Invalid, "text"),
        (submit("s", vec![1], 5), RefusedReason::Full, ""),
    ];
    for (submit, reason, field) in cases {
        router.send(router_message::Body::Submit(submit));
        let replica_message::Body::Refused(refused) = router.next_answer().await else {
            panic!("{field}: not refused")
        };
        assert_eq!((refused.reason(), refused.field.as_str()), (reason, field));
        assert_eq!(refused.sessions, ["s"]);
        assert!(!refused.message.is_empty());
    }
    leader.engine.drain();
    router.send(router_message::Body::Submit(submit("s", vec![1], 5)));
    let replica_message::Body::Refused(refused) = router.next_answer().await else { panic!("it drains") };
    assert_eq!(refused.reason(), RefusedReason::Unavailable);
}

#[tokio::test]
async fn an_abort_ends_the_session_and_frees_it() {
    let leader = slow_leader().await;
    let (mut router, _) = HandMade::attach(&leader, hello(LONG)).await.expect("attached");
    router.send(router_message::Body::Submit(submit("s", vec![1, 2], 5000)));
    router.first_events().await;
    router.send(router_message::Body::Abort(Abort { sessions: vec!["s".to_owned(), "nobody".to_owned()], epoch: 0 }));
    let last = router.events_to_end().await.pop().expect("an end");
    assert_eq!(last.finish(), Finish::Aborted);
    leader.assert_free().await;
}

#[tokio::test]
async fn a_stream_that_breaks_frees_its_sessions_and_no_others() {
    let leader = slow_leader().await;
    let (first, _) = HandMade::attach(&leader, hello(LONG)).await.expect("attached");
    let (mut second, _) = HandMade::attach(&leader, hello(LONG)).await.expect("the same router id again");
    first.send(router_message::Body::Submit(submit("first", vec![1], 5000)));
    second.send(router_message::Body::Submit(submit("second", vec![1], 300)));
    drop(first);
    let events = second.events_to_end().await;
    assert_eq!(events.last().map(internal::SessionEvent::finish), Some(Finish::Length));
    assert!(events.iter().all(|event| event.session == "second"), "events of another stream");
    leader.assert_free().await;
}

#[tokio::test]
async fn a_silent_router_loses_its_lease() {
    let leader = slow_leader().await;
    // Long enough for the other one to renew its own on a machine that is busy elsewhere.
    let lease = Duration::from_secs(2);
    let (mut silent, _) = HandMade::attach(&leader, hello(lease)).await.expect("attached");
    let (mut alive, _) = HandMade::attach(&leader, hello(lease)).await.expect("attached");
    silent.send(router_message::Body::Submit(submit("silent", vec![1], 8000)));
    alive.send(router_message::Body::Submit(submit("alive", vec![1], 8000)));
    // It says much, but not what would renew its lease.
    let words = silent.to_leader.clone();
    let renewals = tokio::spawn(async move {
        while let Some(clock) = alive.clock().await {
            alive.send(router_message::Body::Renew(Renew { clock }));
            // Closed once its stream is.
            let _ = words.send(internal::RouterMessage { body: Some(router_message::Body::Renew(Renew { clock: 0 })) });
        }
    });
    while silent.next().await.is_ok_and(|message| message.is_some()) {}
    let left = leader.engine.sessions().await;
    let left: Vec<&str> = left.iter().map(|session| session.session.0.as_str()).collect();
    assert_eq!(left, ["alive"], "the lease of the silent one ran out");
    renewals.abort();
    leader.assert_free().await;
}

#[tokio::test]
async fn load_comes_at_least_twice_a_second_even_during_a_long_step() {
    let options = LeaderOptions { step: Duration::from_millis(1500), ..LeaderOptions::default() };
    let leader = Leader::start("a", options).await;
    let (mut router, _) = HandMade::attach(&leader, hello(LONG)).await.expect("attached");
    router.send(router_message::Body::Submit(submit("s", vec![1], 1)));
    let mut last = tokio::time::Instant::now();
    let mut batches = 0;
    loop {
        let Some(replica_message::Body::Batch(batch)) = router.next().await.expect("no error") else { continue };
        assert!(last.elapsed() < Duration::from_millis(900), "silent for {:?}", last.elapsed());
        last = tokio::time::Instant::now();
        batches += 1;
        assert!(batch.load.is_some());
        if !batch.events.is_empty() {
            break;
        }
    }
    assert!(batches >= 4, "{batches} batches in a step of 1.5 s");
}

#[tokio::test]
async fn questions_are_answered_and_moves_are_not_offered() {
    let leader = slow_leader().await;
    let (mut router, _) = HandMade::attach(&leader, hello(LONG)).await.expect("attached");
    router.send(router_message::Body::Submit(submit("s", vec![1; 100], 5000)));
    router.send(router_message::Body::ListSessions(ListSessions { call: 5 }));
    let replica_message::Body::Sessions(sessions) = router.next_answer().await else { panic!("no sessions") };
    assert_eq!((sessions.call, sessions.sessions.len()), (5, 1));
    assert_eq!(sessions.sessions[0].session, "s");
    router.send(router_message::Body::Flush(Flush { call: 6 }));
    let replica_message::Body::Flushed(flushed) = router.next_answer().await else { panic!("not flushed") };
    assert_eq!(flushed.call, 6);
    let prepare = Prepare { session: "s".to_owned(), epoch: 1, next_epoch: 2, ..Prepare::default() };
    router.send(router_message::Body::Prepare(prepare.clone()));
    let replica_message::Body::MoveReport(report) = router.next_answer().await else { panic!("no report") };
    assert_eq!((report.phase(), report.code), (MovePhase::Failed, Code::InvalidArgument as i32));
    router.send(router_message::Body::Prepare(Prepare { mode: MoveMode::Whole.into(), ..prepare }));
    let replica_message::Body::MoveReport(report) = router.next_answer().await else { panic!("no report") };
    assert_eq!((report.phase(), report.failure()), (MovePhase::Failed, MoveFailure::NotHere), "{report:?}");
    assert!(report.message.contains("no part in moves"), "{report:?}");
}

#[tokio::test]
async fn a_failed_engine_ends_every_stream_and_the_leader() {
    let faults = Faults { fatal_step: Some(5), ..Faults::default() };
    let mut leader = Leader::start("a", LeaderOptions { faults, ..LeaderOptions::default() }).await;
    let (mut router, _) = HandMade::attach(&leader, hello(LONG)).await.expect("attached");
    router.send(router_message::Body::Submit(submit("s", vec![1], 100)));
    let last = router.events_to_end().await.pop().expect("an end");
    assert_eq!(last.finish(), Finish::Error);
    assert!(!last.error.is_empty());
    while router.next().await.is_ok_and(|message| message.is_some()) {}
    let error = leader.ended().await.expect_err("it cannot go on");
    assert!(error.to_string().contains("engine failed"), "{error}");
}

#[tokio::test]
async fn draining_lets_running_sessions_end() {
    let leader = slow_leader().await;
    let (mut router, _) = HandMade::attach(&leader, hello(LONG)).await.expect("attached");
    router.send(router_message::Body::Submit(submit("s", vec![1], 200)));
    router.first_events().await;
    let (events, ended) = tokio::join!(router.events_to_end(), leader.stop());
    assert_eq!(events.last().map(internal::SessionEvent::finish), Some(Finish::Length));
    ended.expect("a good end");
}

#[tokio::test]
async fn the_public_port_has_health_and_the_model() {
    let options = LeaderOptions { sizes: ModelSizes::default(), ..LeaderOptions::default() };
    let leader = Leader::start("a", options).await;
    let url = format!("http://{}", leader.public);
    let channel = Channel::from_shared(url).expect("a URL").connect().await.expect("connected");
    let mut client = InferenceClient::new(channel.clone());
    let info = client.get_model_info(v1::GetModelInfoRequest {}).await.expect("told").into_inner();
    assert_eq!((info.model.as_str(), info.digest.as_str(), info.vocab_size), ("modelled", "m", 300));
    let refused = client.generate(v1::GenerateRequest::default()).await.expect_err("a leader is no router");
    assert_eq!(refused.code(), Code::Unimplemented);

    let mut health = HealthClient::new(channel);
    let status = |service: &str| HealthCheckRequest { service: service.to_owned() };
    for service in ["", "perigee.v1.Inference"] {
        let answer = health.check(status(service)).await.expect("told").into_inner();
        assert_eq!(answer.status(), ServingStatus::Serving, "{service:?}");
    }
    leader.engine.drain();
    let until_not_serving = async {
        while health.check(status("")).await.expect("told").into_inner().status() == ServingStatus::Serving {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(PATIENCE, until_not_serving).await.expect("health follows the engine");
}

#[tokio::test]
async fn http_has_health_and_metrics() {
    let leader = Leader::start("a", LeaderOptions::default()).await;
    let (mut router, _) = HandMade::attach(&leader, hello(LONG)).await.expect("attached");
    router.send(router_message::Body::Submit(submit("s", vec![1, 2, 3], 5)));
    router.events_to_end().await;
    leader.assert_free().await;
    assert!(get(&leader, "/health").await.starts_with("HTTP/1.1 200"));
    let metrics = get(&leader, "/metrics").await;
    for line in [
        "perigee_tokens_total{kind=\"completion\"} 5",
        "perigee_tokens_total{kind=\"prompt\"} 3",
        "perigee_state_slots{kind=\"free\"} 64",
        "perigee_state_slots{kind=\"total\"} 64",
    ] {
        assert!(metrics.lines().any(|found| found == line), "{line} is missing in {metrics}");
    }
}

async fn get(leader: &Leader, path: &str) -> String {
    let mut stream = tokio::net::TcpStream::connect(leader.http).await.expect("connected");
    let request = format!("GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.expect("sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("an answer");
    answer
}
