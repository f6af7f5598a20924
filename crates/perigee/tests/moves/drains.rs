//! A rolling drain: three replicas leave one by one, as operators have them leave, while a hundred streams are open all the
//! time. No stream fails, none loses or repeats a token, and nothing is held anywhere afterwards.

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use perigee_testkit::processes::signal;
use perigee_testkit::sandbox::{Fleet, FleetSpec, eventually};
use tokio::task::JoinSet;

use crate::PATIENCE;
use crate::known::Known;

const STREAMS: usize = 100;
/// Different requests among them.
const REQUESTS: usize = 20;

/// Streams that are open all the time.
struct Streams {
    known: Arc<Known>,
    enough: Arc<AtomicBool>,
    /// Answers so far.
    ended: Arc<AtomicUsize>,
    /// Epochs beyond the first of those answers: each is a move or a replay.
    moves: Arc<AtomicUsize>,
    readers: JoinSet<()>,
}

impl Streams {
    async fn open(fleet: &Fleet, count: usize) -> Self {
        let clients = fleet.connect().await.unwrap();
        let known = Arc::new(Known::ask(&clients, REQUESTS, (150, 400), 8000).await);
        let (enough, ended, moves) = (Arc::<AtomicBool>::default(), Arc::default(), Arc::default());
        let mut streams = Self { known, enough, ended, moves, readers: JoinSet::new() };
        for number in 0..count {
            let (known, enough) = (streams.known.clone(), streams.enough.clone());
            let (ended, moves) = (streams.ended.clone(), streams.moves.clone());
            let clients = clients.clone();
            streams.readers.spawn(async move {
                while !enough.load(Ordering::Relaxed) {
                    let answer = known.again(&clients, number).await;
                    known.judge(number, &answer);
                    ended.fetch_add(1, Ordering::Relaxed);
                    let further = answer.choices.iter().map(|choice| choice.epochs.len() - 1).sum();
                    moves.fetch_add(further, Ordering::Relaxed);
                }
            });
        }
        streams
    }

    /// Waits for the last answers; a failed one panics here.
    async fn close(mut self) -> (usize, usize) {
        self.enough.store(true, Ordering::Relaxed);
        while let Some(ended) = self.readers.join_next().await {
            ended.expect("a stream that nothing happens to");
        }
        let (ended, moves) = (self.ended.load(Ordering::Relaxed), self.moves.load(Ordering::Relaxed));
        self.known.few_excuses(ended);
        (ended, moves)
    }
}

/// Waits until a replica's sessions are many.
async fn is_busy(fleet: &Fleet, replica: usize, sessions: u32) {
    let (clients, name) = (fleet.connect().await.unwrap(), fleet.replicas[replica].name.clone());
    let look = async || {
        let seen = clients.replicas().await?;
        let there = seen.get(&name).map_or(0, |info| info.running + info.waiting);
        Ok((there >= sessions).then_some(()))
    };
    eventually("many sessions on a replica", PATIENCE, look).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_leave_one_by_one_under_a_hundred_streams() {
    let mut fleet = FleetSpec::new(env!("CARGO_BIN_EXE_perigee"), &[1, 2, 1]).start().await.unwrap();
    let streams = Streams::open(&fleet, STREAMS).await;
    for replica in 0..3 {
        is_busy(&fleet, replica, 20).await;
        let (name, router) = (fleet.replicas[replica].name.clone(), fleet.grpc.to_string());
        // By command, by signal to the leader, and by command again.
        if replica == 1 {
            signal("TERM", fleet.replicas[replica].ranks[0].pid()).unwrap();
        } else {
            let drain = move || {
                let mut command = Command::new(env!("CARGO_BIN_EXE_perigee"));
                command.args(["drain", &name, "--json", "--router", &router]).output()
            };
            let output = tokio::task::spawn_blocking(drain).await.unwrap().unwrap();
            let told = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            println!("{told}");
            let told: serde_json::Value = serde_json::from_str(&told).unwrap();
            let left = |name: &str| told[name].as_u64().expect("a count");
            assert!(left("moved") + left("ended") >= 20, "{told}");
        }
        for rank in &mut fleet.replicas[replica].ranks {
            let status = rank.wait(PATIENCE).unwrap();
            assert!(status.success(), "{status}: {}", rank.errors());
        }
        fleet.restart(replica).unwrap();
        fleet.ready(&fleet.connect().await.unwrap()).await.unwrap();
    }
    let (ended, moves) = streams.close().await;
    println!("{ended} streams, {moves} moves and replays");
    assert!(ended >= STREAMS && moves >= 40, "{ended} streams, {moves} moves");
    fleet.connect().await.unwrap().all_free(PATIENCE).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_replica_is_not_drained_by_command() {
    let fleet = FleetSpec::new(env!("CARGO_BIN_EXE_perigee"), &[1]).start().await.unwrap();
    let run = |replica: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_perigee"));
        command.args(["drain", replica, "--router", &fleet.grpc.to_string()]).output().unwrap()
    };
    for (replica, says) in [("replica-0", "no other replica"), ("nobody", "nobody")] {
        let output = run(replica);
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(1) && errors.contains(says), "{errors}");
    }
    assert!(fleet.connect().await.unwrap().replicas().await.unwrap()["replica-0"].status == "ready");
}
