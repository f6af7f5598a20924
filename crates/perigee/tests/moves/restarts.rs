//! Replicas that are killed and started again, over and over, under a steady stream of requests: none fails. Each kill must
//! hit a stream that runs, or it would prove nothing.
//!
//! PERIGEE_RESTARTS_REQUESTS asks for another number of requests and PERIGEE_RESTARTS_SECONDS for another time between kills.
//! The long run, outside the suite: `PERIGEE_RESTARTS_REQUESTS=800 PERIGEE_RESTARTS_SECONDS=5 cargo test -p perigee --test
//! moves no_request_fails -- --nocapture`.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use perigee_proto::v1::{ListSessionsRequest, SessionInfo};
use perigee_testkit::sandbox::{Clients, Fleet, FleetSpec, eventually};
use tokio::sync::oneshot;
use tokio::task::JoinSet;

use crate::PATIENCE;
use crate::client::{Answer, Choice};
use crate::known::Known;
use crate::schedules::setting;

/// Requests in the suite, as many of them as are sent in `LONGEST`, and seconds between kills there.
const REQUESTS: u64 = 60;
const LONGEST: Duration = Duration::from_secs(60);
const SECONDS: u64 = 2;
/// Different requests among them, of so many tokens.
const DIFFERENT: usize = 24;
const TOKENS: (usize, usize) = (300, 600);
/// Kills that the suite waits for, however many requests that takes.
const KILLS: usize = 3;
/// A session with at least so many tokens to go does not end while it is looked at.
const FAR_FROM_ITS_END: u64 = 150;
/// Requests at once when the capacity is measured.
const AT_ONCE: usize = 16;

/// Requests per second that a replica answers when it has as many as it can run together.
async fn capacity(clients: &Clients, known: &Arc<Known>, replicas: usize) -> f64 {
    let began = Instant::now();
    let mut asking = JoinSet::new();
    for number in 0..AT_ONCE * replicas {
        let (clients, known) = (clients.clone(), known.clone());
        asking.spawn(async move { known.judge(number, &known.again(&clients, number).await) });
    }
    let answered = asking.join_all().await.len();
    answered as f64 / replicas as f64 / began.elapsed().as_secs_f64()
}

/// Whether a session goes on for long.
fn stays(known: &Known, one: &SessionInfo) -> bool {
    let request = known.named(&one.request_id);
    let most = request.token_ids.len() as u64 + u64::from(request.max_tokens.unwrap_or_default());
    one.status == "decode" && one.context + FAR_FROM_ITS_END <= most
}

/// Kills one replica after the other, each time one that runs a stream, until it is told to stop; the sessions that ran on
/// each. Counts the kills as it goes.
async fn restart_one_after_the_other(
    (fleet, known): (&mut Fleet, &Known),
    every: Duration,
    mut stop: oneshot::Receiver<()>,
    kills: &AtomicUsize,
) -> Vec<BTreeSet<String>> {
    let clients = fleet.connect().await.unwrap();
    let mut hit = Vec::new();
    loop {
        tokio::select! {
            _ = &mut stop => break,
            () = tokio::time::sleep(every) => {}
        }
        let look = async || {
            if !stop.is_empty() {
                return Ok(Some(None));
            }
            // One in a long step answers too late: then again.
            let listed = clients.cluster.clone().list_sessions(ListSessionsRequest::default()).await;
            let there = listed.map(|answer| answer.into_inner().sessions).unwrap_or_default();
            let running: Vec<SessionInfo> = there.into_iter().filter(|one| stays(known, one)).collect();
            Ok((!running.is_empty()).then_some(Some(running)))
        };
        let Some(running) = eventually("running streams", PATIENCE, look).await.unwrap().0 else { break };
        let owner = &running[0].owner;
        let victim = fleet.replicas.iter().position(|replica| replica.name == *owner).expect("a replica of the fleet");
        fleet.kill(victim);
        kills.fetch_add(1, Ordering::Relaxed);
        hit.push(running.iter().filter(|one| one.owner == *owner).map(|one| one.session.clone()).collect());
        fleet.restart(victim).unwrap();
        fleet.ready(&clients).await.unwrap();
    }
    hit
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_fails_while_replicas_are_killed_and_started_again() {
    let every = Duration::from_secs(setting("PERIGEE_RESTARTS_SECONDS").unwrap_or(SECONDS));
    let mut fleet = FleetSpec::new(env!("CARGO_BIN_EXE_perigee"), &[1, 1]).start().await.unwrap();
    let clients = fleet.connect().await.unwrap();
    let known = Arc::new(Known::ask(&clients, DIFFERENT, TOKENS, 9000).await);
    let capacity = capacity(&clients, &known, 2).await;
    let between = Duration::from_secs_f64(2.0 / capacity);
    let in_time = (LONGEST.as_secs_f64() / between.as_secs_f64()) as u64;
    let requests = setting("PERIGEE_RESTARTS_REQUESTS").unwrap_or(REQUESTS.min(in_time));
    println!(
        "a replica answers {capacity:.1} requests/s; {requests} are sent, one every {between:?}, a replica killed every {every:?}"
    );

    let (stop, stopped) = oneshot::channel();
    let kills = AtomicUsize::new(0);
    let asking = async {
        let mut asked = JoinSet::new();
        let mut number = 0;
        // A fast machine answers them all before it has lost so many replicas.
        while number < requests as usize || kills.load(Ordering::Relaxed) < KILLS {
            let (clients, known) = (clients.clone(), known.clone());
            asked.spawn(async move { (number, known.again(&clients, number).await) });
            number += 1;
            tokio::time::sleep(between).await;
        }
        // On a slow machine an answer takes longer than the time between two kills: none would come to its end.
        stop.send(()).expect("it kills until it is told");
        let mut answers: Vec<Answer> = Vec::new();
        while let Some(ended) = asked.join_next().await {
            let (number, answer) = ended.expect("a client");
            known.judge(number, &answer);
            answers.push(answer);
        }
        answers
    };
    let (answers, hit) =
        tokio::join!(asking, restart_one_after_the_other((&mut fleet, &known), every, stopped, &kills));
    let choices = answers.iter().flat_map(|answer| &answer.choices);
    // A client may have had nothing of the first epoch yet.
    let is_replayed = |choice: &&Choice| choice.epochs.keys().any(|epoch| *epoch > 1);
    let replayed: BTreeSet<&String> = choices.filter(is_replayed).map(|choice| &choice.session).collect();
    let hits: Vec<usize> =
        hit.iter().map(|running| running.iter().filter(|one| replayed.contains(one)).count()).collect();
    println!("{} answers, 0 failed; streams hit by each of {} kills: {hits:?}", answers.len(), hits.len());
    assert!(answers.len() >= requests as usize, "{} answers", answers.len());
    assert!(hits.len() >= KILLS && hits.iter().all(|&streams| streams > 0), "{hits:?}");
    known.few_excuses(answers.len());
    clients.all_free(PATIENCE).await.unwrap();
}
