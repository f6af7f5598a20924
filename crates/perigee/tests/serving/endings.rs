//! Ends that the client brings about: it goes away, its deadline passes, it calls Abort. Slots and pages are free within a
//! second, whether the request ran or still waited.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use perigee_proto::v1::{
    AbortRequest, FinishReason, GenerateRequest, ListSessionsRequest, SamplingParams, SessionInfo,
};
use perigee_testkit::Sandbox;
use perigee_testkit::sandbox::{Clients, eventually};
use tonic::{Code, Request, Streaming};
use tonic_types::StatusExt;

use crate::answer::{Answer, End, ask, read, read_stream};
use crate::{PATIENCE, greedy, up};

/// By when what an ended request held is free.
const FREED: Duration = Duration::from_secs(1);
const SLOTS: u32 = 4;
const ENDLESS: u32 = 30_000;

async fn cluster() -> (Sandbox, Clients) {
    let sandbox = up(1, 2).option(format!("--state-slots={SLOTS}")).option("--latent-pages=1024").start().unwrap();
    let clients = sandbox.connect().await.unwrap();
    (sandbox, clients)
}

/// An endless request with this many choices.
fn endless(name: &str, choices: u32) -> GenerateRequest {
    let request = greedy(vec![5, 6, 7, 8], ENDLESS);
    let request_id = name.to_owned();
    let sampling = SamplingParams { n: Some(choices), temperature: None, ..request.sampling.unwrap_or_default() };
    GenerateRequest { request_id, sampling: Some(sampling), ..request }
}

/// Waits until the router was told that so many sessions run and wait.
async fn load_becomes(clients: &Clients, running: u32, waiting: u32, limit: Duration) -> Duration {
    let look = async || {
        let replicas = clients.replicas().await?;
        let load = replicas.values().next().map(|replica| (replica.running, replica.waiting));
        Ok((load == Some((running, waiting))).then_some(()))
    };
    eventually(&format!("{running} running and {waiting} waiting"), limit, look).await.unwrap().1
}

async fn sessions(clients: &Clients) -> Vec<SessionInfo> {
    let mut cluster = clients.cluster.clone();
    let answer = cluster.list_sessions(ListSessionsRequest::default()).await.unwrap();
    answer.into_inner().sessions
}

#[tokio::test]
async fn a_client_that_goes_away_frees_what_it_held() {
    let (_sandbox, clients) = cluster().await;
    for choices in [1, SLOTS] {
        let enough = 3 * choices;
        let mut seen = 0;
        let request = endless("leaves", choices);
        let answer = read(&clients, &request, |_| {
            seen += 1;
            if seen >= enough { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        assert!(matches!(answer.await.end, End::Dropped));
        let took = clients.all_free(FREED).await.unwrap();
        println!("{choices} choices free after {took:?}");
    }
    // One that waits behind another goes away without a token.
    let runs = clients.inference.clone().generate(endless("runs", SLOTS)).await.unwrap().into_inner();
    load_becomes(&clients, SLOTS, 0, PATIENCE).await;
    let waits = clients.inference.clone().generate(endless("waits", 1)).await.unwrap().into_inner();
    load_becomes(&clients, SLOTS, 1, PATIENCE).await;
    let found = sessions(&clients).await;
    let of = |name: &str| found.iter().filter(|session| session.request_id == name).collect::<Vec<_>>();
    assert_eq!(of("runs").len() as u32, SLOTS);
    assert!(of("runs").iter().all(|session| session.status == "decode" && session.context >= 4), "{found:?}");
    assert_eq!(of("waits").iter().map(|session| session.status.as_str()).collect::<Vec<_>>(), ["waiting"]);
    drop(waits);
    load_becomes(&clients, SLOTS, 0, FREED).await;
    drop(runs);
    clients.all_free(FREED).await.unwrap();
    assert!(sessions(&clients).await.is_empty());
}

#[tokio::test]
async fn a_closed_connection_frees_what_its_streams_held() {
    let (sandbox, clients) = cluster().await;
    // A runtime of its own: it goes down with its connection and without a word to the streams.
    let client = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let stream = runtime.block_on(async {
            let other = sandbox.connect().await.unwrap();
            let mut stream = other.inference.clone().generate(endless("lost", 2)).await.unwrap().into_inner();
            assert!(stream.message().await.unwrap().is_some());
            stream
        });
        runtime.shutdown_background();
        std::mem::forget(stream);
        sandbox
    });
    let _sandbox = tokio::task::spawn_blocking(|| client.join().unwrap()).await.unwrap();
    clients.all_free(FREED).await.unwrap();
}

async fn with_deadline(clients: &Clients, request: &GenerateRequest, deadline: Duration) -> (Answer, Duration) {
    let mut call = Request::new(request.clone());
    call.set_timeout(deadline);
    let began = Instant::now();
    let stream: Streaming<_> = clients.inference.clone().generate(call).await.unwrap().into_inner();
    let answer = read_stream(stream, request, |_| ControlFlow::Continue(())).await;
    let took = answer.ended - began;
    (answer, took)
}

#[tokio::test]
async fn a_deadline_ends_requests_that_run_and_that_wait() {
    let (_sandbox, clients) = cluster().await;
    let deadline = Duration::from_millis(400);
    let check = |answer: &Answer, took: Duration| {
        assert_eq!(answer.status().code(), Code::DeadlineExceeded, "{}", answer.status());
        assert!(took < deadline + FREED, "{took:?}");
        // The router is a little earlier than the transport.
        assert!(took >= deadline - Duration::from_millis(100), "{took:?}");
    };
    let (answer, took) = with_deadline(&clients, &endless("runs", 2), deadline).await;
    check(&answer, took);
    assert!(answer.tokens() > 2, "it ran");
    clients.all_free(FREED).await.unwrap();

    let blocks = clients.inference.clone().generate(endless("blocks", SLOTS)).await.unwrap().into_inner();
    load_becomes(&clients, SLOTS, 0, PATIENCE).await;
    // The first to wait may be refused as hopeless, where the router guesses that its turn comes too late.
    let mut call = Request::new(endless("waits", 1));
    call.set_timeout(deadline);
    let began = Instant::now();
    match clients.inference.clone().generate(call).await {
        Ok(stream) => {
            let answer = read_stream(stream.into_inner(), &endless("waits", 1), |_| ControlFlow::Continue(())).await;
            check(&answer, answer.ended - began);
            assert_eq!(answer.tokens(), 0, "it waited");
        }
        Err(status) => {
            assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
            assert!(status.get_error_details().retry_info().is_some());
        }
    }
    load_becomes(&clients, SLOTS, 0, FREED).await;
    drop(blocks);
    clients.all_free(FREED).await.unwrap();
    // A deadline that is far away changes nothing.
    let (answer, _) = with_deadline(&clients, &greedy(vec![5, 6, 7], 20), PATIENCE).await;
    assert_eq!(answer.finished().tokens(), 20);
}

async fn abort(clients: &Clients, request: AbortRequest) -> Result<Vec<String>, tonic::Status> {
    let mut inference = clients.inference.clone();
    inference.abort(request).await.map(|answer| answer.into_inner().session_ids)
}

#[tokio::test]
async fn abort_ends_a_request_or_one_of_its_choices() {
    let (_sandbox, clients) = cluster().await;
    let request = endless("by-name", 3);
    let other = clients.clone();
    let reading = tokio::spawn(async move { ask(&other, &request).await });
    load_becomes(&clients, 3, 0, PATIENCE).await;
    let all: Vec<String> = sessions(&clients).await.into_iter().map(|session| session.session).collect();
    let by_session = |session: &str| AbortRequest { session_id: Some(session.to_owned()), ..AbortRequest::default() };
    let by_name = |name: &str| AbortRequest { request_id: Some(name.to_owned()), ..AbortRequest::default() };

    assert_eq!(abort(&clients, by_session(&all[1])).await.unwrap(), [all[1].clone()]);
    load_becomes(&clients, 2, 0, FREED).await;
    assert_eq!(abort(&clients, by_name("by-name")).await.unwrap().len(), 2);
    let answer = tokio::time::timeout(FREED, reading).await.expect("it ends").unwrap().finished();
    for choice in &answer.choices {
        assert_eq!(choice.finish, Some(FinishReason::Aborted));
        assert_eq!(choice.usage.map(|usage| usage.prompt), Some(4));
    }
    clients.all_free(FREED).await.unwrap();

    let code = async |request| abort(&clients, request).await.unwrap_err().code();
    assert_eq!(code(by_name("by-name")).await, Code::NotFound);
    assert_eq!(code(by_session(&all[0])).await, Code::NotFound);
    assert_eq!(code(by_session("no session's name")).await, Code::InvalidArgument);
    assert_eq!(code(AbortRequest::default()).await, Code::InvalidArgument);
    let both = AbortRequest { request_id: Some("a".into()), session_id: Some(all[0].clone()) };
    assert_eq!(code(both).await, Code::InvalidArgument);
}
