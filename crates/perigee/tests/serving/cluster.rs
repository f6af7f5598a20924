//! Runs a workload against a cluster: requests arrive as others progress, some clients go away, and afterwards each
//! request runs once more, alone. Arrivals follow counts of received tokens, so the order of things is that of the
//! cluster's own progress and not of a clock.

use std::ops::ControlFlow;
use std::time::Duration;

use perigee_testkit::Numbers;
use perigee_testkit::sandbox::{Clients, Sandbox};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::answer::{Answer, End, ask, read};
use crate::judge::Judge;
use crate::work::Work;

/// How long slots and pages may take to come back once the last stream has ended.
const FREED: Duration = Duration::from_secs(2);
/// Connections that clients share.
const CONNECTIONS: usize = 4;

/// How requests arrive.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Arrivals {
    /// At once, in the beginning.
    pub(crate) first: usize,
    /// Most tokens that all clients together receive between one arrival and the next.
    pub(crate) spread: usize,
    /// Most streams at once.
    pub(crate) at_once: usize,
}

/// What a workload led to.
pub(crate) struct Outcome {
    /// In the order of the requests.
    pub(crate) answers: Vec<Answer>,
    /// Most streams that were open at once.
    pub(crate) peak: usize,
}

/// Runs all requests at once, so to speak.
pub(crate) async fn run(sandbox: &Sandbox, work: &[Work], arrivals: Arrivals, seed: u64) -> Outcome {
    let mut connections = Vec::new();
    for _ in 0..CONNECTIONS {
        connections.push(sandbox.connect().await.unwrap());
    }
    let mut numbers = Numbers::new(seed);
    let (progress, mut received) = mpsc::unbounded_channel();
    let mut open = JoinSet::new();
    let mut answers: Vec<Option<Answer>> = vec![None; work.len()];
    let (mut next, mut due, mut tokens, mut peak) = (0, 0, 0, 0);
    while next < work.len() || !open.is_empty() {
        let room = open.len() < arrivals.at_once;
        if next < work.len() && room && (next < arrivals.first || tokens >= due || open.is_empty()) {
            let (number, work) = (next, work[next].clone());
            let (clients, progress) = (connections[number % CONNECTIONS].clone(), progress.clone());
            open.spawn(async move { (number, one(&clients, &work, &progress).await) });
            next += 1;
            due = tokens + numbers.between(0, arrivals.spread);
            peak = peak.max(open.len());
            continue;
        }
        tokio::select! {
            Some(()) = received.recv() => tokens += 1,
            Some(ended) = open.join_next() => {
                let (number, answer) = ended.expect("no rule of streams was broken");
                answers[number] = Some(answer);
            }
        }
    }
    Outcome { answers: answers.into_iter().flatten().collect(), peak }
}

/// One client: it tells of every token, and goes away when it has enough.
async fn one(clients: &Clients, work: &Work, progress: &mpsc::UnboundedSender<()>) -> Answer {
    let mut seen = 0;
    read(clients, &work.request, |response| {
        if response.token_id.is_some() {
            seen += 1;
            // Nobody counts once all requests have arrived.
            let _ = progress.send(());
        }
        match work.leaves_after {
            Some(most) if seen >= most => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        }
    })
    .await
}

/// Everything is free again; then each request runs alone and gives the same.
pub(crate) async fn equals_solo_runs(sandbox: &Sandbox, work: &[Work], outcome: &Outcome, judge: &mut Judge) {
    let clients = sandbox.connect().await.unwrap();
    let took = clients.all_free(FREED).await.unwrap();
    println!("all slots and pages free {took:?} after the last stream");
    assert_eq!(outcome.answers.len(), work.len());
    for (work, answer) in work.iter().zip(&outcome.answers) {
        if let End::Failed(status) = &answer.end {
            panic!("{} ended with {status}", work.request.request_id);
        }
        assert!(work.leaves_after.is_some() || matches!(answer.end, End::Finished));
        let alone = ask(&clients, &work.request).await.finished();
        judge.compare(&work.request, answer, &alone);
    }
    clients.all_free(FREED).await.unwrap();
}
