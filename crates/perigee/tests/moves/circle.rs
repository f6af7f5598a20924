//! No circle: replicas that each run sessions whose older latents the next one holds, all decoding, and then one of them
//! stops. The others' own sessions go on and lose at most one answer deadline; once it goes on, every session does, with the
//! tokens that it has undisturbed.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use perigee_proto::v1::{GenerateRequest, MigrateMode, MigrateRequest};
use perigee_testkit::Numbers;
use perigee_testkit::reference::{Undisturbed, Verdict};
use perigee_testkit::sandbox::{Clients, Fleet, FleetSpec, eventually, metric};
use tokio::task::JoinHandle;

use crate::client::{Answer, Watch, read};
use crate::judge::{engine_request, observed};
use crate::plan::prompt;
use crate::{PATIENCE, greedy};

/// How long a step waits for answers here: long enough to tell one wait from two.
const DEADLINE: Duration = Duration::from_millis(800);
/// Sessions that every replica begins at least; the first of them moves on.
const EACH: usize = 2;
/// How far sessions come before something happens, and how much further the others must come meanwhile and afterwards.
const UNDERWAY: usize = 20;
const FURTHER: usize = 60;
/// More than any session comes to.
const ENDLESS: u32 = 30_000;
/// Positions of a prompt: some pages.
const PROMPT: usize = 200;

/// One stream that goes on until it is told that it is enough.
struct Open {
    request: GenerateRequest,
    tokens: Arc<AtomicUsize>,
    enough: Arc<AtomicBool>,
    session: String,
    /// The replica that it began on, and the one that it was moved to.
    on: String,
    to: Option<String>,
    answer: JoinHandle<Answer>,
}

impl Open {
    async fn start(clients: &Clients, request: GenerateRequest) -> Self {
        let (tokens, enough) = <(Arc<AtomicUsize>, Arc<AtomicBool>)>::default();
        let (first, began) = tokio::sync::oneshot::channel();
        let watch = Watch::new(tokens.clone(), enough.clone(), first);
        let (clients, asked) = (clients.clone(), request.clone());
        let answer = tokio::spawn(async move { read(&clients, &asked, watch).await });
        let (session, on) = began.await.expect("a first token");
        Self { request, tokens, enough, session, on, to: None, answer }
    }

    fn count(&self) -> usize {
        self.tokens.load(Ordering::Relaxed)
    }

    async fn reaches(&self, count: usize) {
        let look = async || {
            assert!(!self.answer.is_finished(), "a stream on {} ended early", self.on);
            Ok((self.count() >= count).then_some(()))
        };
        eventually(&format!("{count} tokens on {}", self.on), PATIENCE, look).await.unwrap();
    }
}

/// Starts sessions until every replica has some, then moves the first of each to the replica before it.
async fn cross(fleet: &Fleet, clients: &Clients, seed: u64) -> Vec<Open> {
    const ENOUGH: usize = 60;
    let mut numbers = Numbers::new(seed);
    let names: Vec<String> = fleet.replicas.iter().map(|replica| replica.name.clone()).collect();
    let mut open: Vec<Open> = Vec::new();
    let count = |open: &[Open], name: &str| open.iter().filter(|stream| stream.on == name).count();
    while names.iter().any(|name| count(&open, name) < EACH) {
        assert!(open.len() < ENOUGH, "the router uses one replica only");
        open.push(Open::start(clients, greedy(prompt(&mut numbers, 512, PROMPT), ENDLESS)).await);
    }
    for (number, name) in names.iter().enumerate() {
        let to = &names[(number + names.len() - 1) % names.len()];
        let stream = open.iter_mut().find(|stream| stream.on == *name).expect("one on each");
        let session_id = stream.session.clone();
        let request = MigrateRequest { session_id, to: to.clone(), mode: MigrateMode::Split.into() };
        let moved = clients.cluster.clone().migrate(request).await.unwrap().into_inner();
        assert_eq!((moved.mode(), moved.page_bytes), (MigrateMode::Split, 0), "{moved:?}");
        stream.to = Some(to.clone());
    }
    for stream in &open {
        stream.reaches(stream.count() + UNDERWAY).await;
    }
    open
}

async fn waited(fleet: &Fleet, replica: usize) -> f64 {
    metric(fleet.replicas[replica].http, "perigee_remote_attention_seconds_sum").await.unwrap()
}

async fn one_of_a_ring_stops(degrees: &[usize], lease: Duration, seed: u64) {
    let fleet = FleetSpec::new(env!("CARGO_BIN_EXE_perigee"), degrees)
        .worker(format!("--attend-deadline-ms={}", DEADLINE.as_millis()))
        // They would not stay where they are asked for.
        .worker("--pages-follow=never")
        .router(format!("--lease-ms={}", lease.as_millis()))
        .start()
        .await
        .unwrap();
    let clients = fleet.connect().await.unwrap();
    let open = cross(&fleet, &clients, seed).await;

    // Whoever runs a session with latents on the stopped one is the replica before it.
    let (stopped, asker) = (degrees.len() - 1, degrees.len() - 2);
    let name = &fleet.replicas[stopped].name;
    let before = waited(&fleet, asker).await;
    fleet.signal(stopped, "STOP").unwrap();
    let elsewhere = open.iter().filter(|stream| stream.on != *name && stream.to.is_none());
    let elsewhere: Vec<(&Open, usize)> = elsewhere.map(|stream| (stream, stream.count())).collect();
    assert!(elsewhere.len() >= degrees.len() - 1, "sessions that have nothing to do with {name}");
    for (stream, had) in &elsewhere {
        stream.reaches(had + FURTHER).await;
    }
    // A step that waited again for the one that is silent would have cost a second deadline.
    let lost = waited(&fleet, asker).await - before;
    println!("the replica before {name} waited {lost:.3} s for answers, with a deadline of {DEADLINE:?}");
    assert!(lost < 1.8 * DEADLINE.as_secs_f64(), "{lost} s of waiting with a deadline of {DEADLINE:?}");
    fleet.signal(stopped, "CONT").unwrap();

    for stream in &open {
        stream.reaches(stream.count() + FURTHER).await;
        stream.enough.store(true, Ordering::Relaxed);
    }
    let mut undisturbed = Undisturbed::open("random:tiny", PROMPT + ENDLESS as usize).unwrap();
    let mut excused = 0;
    for stream in open {
        let answer = stream.answer.await.unwrap();
        assert_eq!((answer.failed.map(|status| status.to_string()), answer.broken), (None, Vec::new()));
        let mut seen = observed(&stream.request, &answer.choices[0]);
        seen.disturbed = PROMPT;
        match undisturbed.judge(&engine_request(&stream.request), 0, &seen).unwrap() {
            Verdict::Same => {}
            Verdict::Excused(excuses) => {
                println!("excused: {excuses:?}");
                excused += 1;
            }
            Verdict::Different(what) => panic!("{} to {:?}: {what}", stream.on, stream.to),
        }
    }
    assert!(excused <= 1, "{excused} sessions needed an excuse");
    clients.all_free(PATIENCE).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_replicas_that_answer_each_other_do_not_wait_in_a_circle() {
    one_of_a_ring_stops(&[1, 1], Duration::from_secs(2), 900).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ring_of_three_does_not_wait_in_a_circle() {
    // With a lease that outlives the stop nothing is replayed: the stopped one goes on with what it had.
    one_of_a_ring_stops(&[1, 2, 1], Duration::from_secs(30), 901).await;
}
