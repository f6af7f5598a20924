//! Workers that die or stop in the middle of streams. Every stream that ran there goes on elsewhere within two seconds
//! (three where a lease has to run out), with the tokens that it would have had; streams elsewhere go on as if nothing had
//! happened. Where nobody is left to go on, streams end with UNAVAILABLE.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use perigee_proto::v1::GenerateRequest;
use perigee_testkit::processes::{runs, signal, wait_for};
use perigee_testkit::sandbox::{Clients, Sandbox, eventually};
use perigee_testkit::{Numbers, TestkitError};
use tokio::task::JoinHandle;
use tonic::Code;
use tonic_types::StatusExt;

use crate::answer::{Answer, End, ask, read_through_deaths};
use crate::judge::Judge;
use crate::work::prompt;
use crate::{PATIENCE, greedy, up};

/// By when a client's stream goes on, or ends, after a process was killed.
const KILLED: Duration = Duration::from_secs(2);
/// By when it does after one fell silent: the lease is 2 s.
const SILENT: Duration = Duration::from_secs(3);
/// Streams of a scene on each replica at least, and how far each is before something happens.
const STREAMS: usize = 4;
const UNDERWAY: usize = 5;
/// How much further the others must come afterwards.
const FURTHER: usize = 40;
/// More than any scene lets them generate.
const ENDLESS: u32 = 30_000;

/// One stream that goes on until it is told that it is enough.
struct Open {
    request: GenerateRequest,
    tokens: Arc<AtomicUsize>,
    /// Who sent the last token.
    replica: Arc<Mutex<String>>,
    enough: Arc<AtomicBool>,
    answer: JoinHandle<Answer>,
}

impl Open {
    fn start(clients: &Clients, request: GenerateRequest) -> Self {
        let (tokens, replica, enough) = <(Arc<AtomicUsize>, Arc<Mutex<String>>, Arc<AtomicBool>)>::default();
        let (clients, asked) = (clients.clone(), request.clone());
        let (seen, who, stop) = (tokens.clone(), replica.clone(), enough.clone());
        let answer = tokio::spawn(async move {
            read_through_deaths(&clients, &asked, |response| {
                who.lock().unwrap().clone_from(&response.replica);
                seen.fetch_add(1, Ordering::Relaxed);
                if stop.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            })
            .await
        });
        Self { request, tokens, replica, enough, answer }
    }

    fn is_on(&self, replica: &str) -> bool {
        *self.replica.lock().unwrap() == replica
    }

    async fn reaches(&self, count: usize) {
        let look = async || {
            assert!(!self.answer.is_finished(), "a stream on {:?} ended early", self.replica);
            Ok((self.tokens.load(Ordering::Relaxed) >= count).then_some(()))
        };
        eventually(&format!("{count} tokens"), PATIENCE, look).await.unwrap();
    }
}

/// Streams, each with its first token, as many as it takes until both replicas have some: where one goes depends on how
/// fast the replicas are just then.
async fn on_both(clients: &Clients, seed: u64) -> Vec<Open> {
    const ENOUGH: usize = 60;
    let mut numbers = Numbers::new(seed);
    let mut open: Vec<Open> = Vec::new();
    let count = |open: &[Open], replica| open.iter().filter(|stream| stream.is_on(replica)).count();
    while count(&open, VICTIM) < STREAMS || count(&open, OTHER) < STREAMS {
        let number = open.len();
        assert!(number < ENOUGH, "{} of {number} streams are on {VICTIM}", count(&open, VICTIM));
        let request = GenerateRequest {
            request_id: format!("stream-{number}"),
            ..greedy(prompt(&mut numbers, 20 + number), ENDLESS)
        };
        let stream = Open::start(clients, request);
        stream.reaches(1).await;
        open.push(stream);
    }
    open
}

/// A cluster of two replicas with streams on both.
struct Scene {
    sandbox: Sandbox,
    clients: Clients,
    on_victim: Vec<Open>,
    elsewhere: Vec<Open>,
}

const VICTIM: &str = "replica-0";
const OTHER: &str = "replica-1";

impl Scene {
    async fn start() -> Self {
        let sandbox = up(2, 2).start().unwrap();
        let clients = sandbox.connect().await.unwrap();
        let open = on_both(&clients, 40).await;
        for stream in &open {
            stream.reaches(UNDERWAY).await;
        }
        let (on_victim, elsewhere) = open.into_iter().partition(|stream| stream.is_on(VICTIM));
        Self { sandbox, clients, on_victim, elsewhere }
    }

    /// The streams of the victim go on elsewhere in time, the others as before.
    async fn all_go_on(&mut self, since: Instant, limit: Duration) {
        for stream in &self.on_victim {
            let look = async || {
                assert!(!stream.answer.is_finished(), "a stream of {VICTIM} ended");
                Ok(stream.is_on(OTHER).then_some(()))
            };
            eventually("a stream's first token from elsewhere", limit + PATIENCE, look).await.unwrap();
            let took = since.elapsed();
            println!("{took:?} until a stream went on after some {} tokens", stream.tokens.load(Ordering::Relaxed));
            assert!(took <= limit, "{took:?}");
        }
        for stream in self.on_victim.iter().chain(&self.elsewhere) {
            stream.reaches(stream.tokens.load(Ordering::Relaxed) + FURTHER).await;
            stream.enough.store(true, Ordering::Relaxed);
        }
        let fresh = greedy(vec![9, 8, 7], 4);
        assert_eq!(ask(&self.clients, &fresh).await.finished().replica, OTHER, "new requests go elsewhere");
    }

    /// All streams are what they are alone, asked again of the replica `on`, where only that one is left.
    async fn all_are_right(&mut self, on: Option<&str>) {
        let mut judge = Judge::new("random:tiny");
        for stream in self.on_victim.drain(..).chain(self.elsewhere.drain(..)) {
            let answer = stream.answer.await.unwrap();
            assert!(matches!(answer.end, End::Dropped), "{:?}", answer.end);
            let shorter = GenerateRequest { max_tokens: Some(answer.tokens() as u32), ..stream.request };
            let alone = ask(&self.clients, &shorter).await.finished();
            assert!(on.is_none_or(|on| alone.replica == on), "a new request went to {}", alone.replica);
            judge.compare(&shorter, &answer, &alone);
        }
        judge.verdict(2 * STREAMS);
    }
}

async fn a_rank_is_killed(rank: usize) {
    let mut scene = Scene::start().await;
    let pids = scene.sandbox.replica(VICTIM).pids.clone();
    let killed = Instant::now();
    signal("KILL", pids[rank]).unwrap();
    scene.all_go_on(killed, KILLED).await;
    scene.all_are_right(Some(OTHER)).await;

    let clients = &scene.clients;
    let gone = async || Ok((!clients.replicas().await?.contains_key(VICTIM)).then_some(()));
    let ((), took) = eventually("the victim's end in ListReplicas", PATIENCE, gone).await.unwrap();
    println!("no longer listed {took:?} after the streams were judged");
    let ended = || pids.iter().all(|&pid| !runs(pid)).then_some(());
    wait_for("the end of the victim's processes", KILLED, ended).unwrap();
    clients.all_free(KILLED).await.unwrap();
    assert!(scene.sandbox.up.errors().contains("replica-0 is gone: rank"), "{}", scene.sandbox.up.errors());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_is_killed() {
    a_rank_is_killed(1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_is_killed() {
    a_rank_is_killed(0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_stops_and_goes_on() {
    let mut scene = Scene::start().await;
    let leader = scene.sandbox.replica(VICTIM).pids[0];
    let stopped = Instant::now();
    signal("STOP", leader).unwrap();
    scene.all_go_on(stopped, SILENT).await;
    let status = async || -> Result<_, TestkitError> {
        Ok(scene.clients.replicas().await?.remove(VICTIM).map(|replica| replica.status))
    };
    assert_eq!(status().await.unwrap().as_deref(), Some("unreachable"));

    signal("CONT", leader).unwrap();
    let ready = async || Ok(status().await?.filter(|status| status == "ready"));
    eventually("the leader's return", PATIENCE, ready).await.unwrap();
    scene.all_are_right(None).await;
    // What it ran for streams that are gone has ended with them.
    scene.clients.all_free(PATIENCE).await.unwrap();
    on_both(&scene.clients, 41).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_replica_dies() {
    let mut sandbox = up(1, 2).start().unwrap();
    let clients = sandbox.connect().await.unwrap();
    let stream = Open::start(&clients, greedy(vec![7, 8, 9], ENDLESS));
    stream.reaches(UNDERWAY).await;
    let killed = Instant::now();
    signal("KILL", sandbox.replicas[0].pids[1]).unwrap();
    let answer = tokio::time::timeout(PATIENCE, stream.answer).await.expect("no stream hangs").unwrap();
    let status = answer.status();
    assert_eq!(status.code(), Code::Unavailable);
    let details = status.get_error_details();
    let info = details.error_info().expect("a reason for programs");
    assert!(["REPLICA_LOST", "ENGINE_FAILED", "REPLICA_REFUSED"].contains(&info.reason.as_str()), "{}", info.reason);
    assert!(answer.ended - killed <= KILLED, "{:?}", answer.ended - killed);
    drop(clients);
    let status = sandbox.up.wait(PATIENCE).unwrap();
    assert_eq!(status.code(), Some(1), "{}", sandbox.up.errors());
    assert!(sandbox.up.errors().contains("no replica is left"), "{}", sandbox.up.errors());
}
