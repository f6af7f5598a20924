//! Random schedules of kills: sessions decode, some of them with latents on another replica or on their way from there, and
//! then their owner, their home, both at once, every replica or the router ends by SIGKILL, at a random moment, and comes
//! back later. Every stream equals its undisturbed run, or ends with its deadline where no replica came back before; and on
//! whoever survives nothing stays held.
//!
//! PERIGEE_KILL_SCHEDULES asks for another number of them, PERIGEE_KILL_SEED for others; a failure names the seed of its
//! schedule, which PERIGEE_KILL_SEED with one schedule repeats. The long run, outside the suite:
//! `PERIGEE_KILL_SCHEDULES=200 cargo test -p perigee --test moves random_kills -- --nocapture`.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use perigee_proto::v1::{GenerateRequest, MigrateMode, MigrateRequest};
use perigee_testkit::Numbers;
use perigee_testkit::reference::Undisturbed;
use perigee_testkit::sandbox::{Clients, Fleet, FleetSpec};
use tonic::Code;

use crate::PATIENCE;
use crate::client::Answer;
use crate::deaths::{BROKEN, Open, judge, request};
use crate::schedules::setting;

const SEED: u64 = 9000;
/// Schedules in the suite.
const SCHEDULES: usize = 20;
/// Sessions of a schedule; the first two move.
const SESSIONS: usize = 3;
const MOVING: usize = 2;
/// Prompts: those of sessions that move are long enough to leave pages behind.
const LONG: (usize, usize) = (600, 1500);
const SHORT: (usize, usize) = (20, 400);
/// Tokens that a session has before it moves.
const UNDERWAY: (usize, usize) = (2, 60);
/// Longest time from the last move to a death, and from there to the return.
const SPREAD: Duration = Duration::from_millis(150);
const AWAY: Duration = Duration::from_millis(500);
/// Where all replicas die, the last session is wanted for so long, the first one much longer and the other without an end.
const SOON: Duration = Duration::from_secs(4);
const LATE: Duration = Duration::from_secs(600);
/// The grace time is a second here; what a dead router left behind is free after that, its lease and the silence.
const FREED: Duration = Duration::from_secs(20);

/// Who dies, as seen from the first session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Victim {
    Owner,
    Home,
    Both,
    /// All replicas, and none comes back before the last session's deadline.
    All,
    Router,
}

struct Scene {
    fleet: Fleet,
    clients: Clients,
    undisturbed: Undisturbed,
    /// Schedules by victim and by whether the first session had left pages behind.
    seen: BTreeMap<(Victim, bool), usize>,
    compared: usize,
    excused: usize,
    /// Streams that ended with their deadline.
    late: usize,
}

/// How a stream may end that no replica takes over before its deadline.
const LATE_CODES: &[Code] = &[Code::DeadlineExceeded];

async fn ended(stream: Open) -> (GenerateRequest, Answer) {
    let answer = tokio::time::timeout(PATIENCE, stream.answer).await.expect("no stream hangs").unwrap();
    (stream.request, answer)
}

/// A random part of a time.
fn part(numbers: &mut Numbers, of: Duration) -> Duration {
    of.mul_f64(numbers.between(0, 1000) as f64 / 1000.0)
}

impl Scene {
    async fn schedule(&mut self, seed: u64) {
        let mut numbers = Numbers::new(seed);
        let names: Vec<String> = self.fleet.replicas.iter().map(|replica| replica.name.clone()).collect();
        let victims = [Victim::Owner, Victim::Home, Victim::Both, Victim::All, Victim::Router];
        let victim = numbers.pick(&victims);
        let mut open = Vec::new();
        for session in 0..SESSIONS {
            let (least, most) = if session < MOVING { LONG } else { SHORT };
            let length = numbers.between(least, most);
            let request = request(&mut numbers, format!("kill-{seed}-{session}"), length);
            let deadline = [Some(LATE), None, Some(SOON)][session].filter(|_| victim == Victim::All);
            open.push(Open::start_within(&self.clients, request, deadline).await);
        }
        let mut places = (0, 0);
        let mut is_split = false;
        for (number, stream) in open.iter().take(MOVING).enumerate() {
            stream.reaches(numbers.between(UNDERWAY.0, UNDERWAY.1)).await;
            let home = names.iter().position(|name| *name == stream.on).expect("a replica of the fleet");
            let owner = (home + numbers.between(1, names.len() - 1)) % names.len();
            let (session_id, to) = (stream.session.clone(), names[owner].clone());
            let order = MigrateRequest { session_id, to, mode: MigrateMode::Split.into() };
            // It may be over before it moves; then its owner is where it began.
            let moved = self.clients.cluster.clone().migrate(order).await;
            if number == 0 {
                is_split = moved.is_ok();
                places = (if is_split { owner } else { home }, home);
            }
        }
        let (after, away) = (part(&mut numbers, SPREAD), part(&mut numbers, AWAY));
        let (owner, home) = places;
        println!("seed {seed}: {victim:?} dies {after:?} after the moves, owner {owner}, home {home}, for {away:?}");
        *self.seen.entry((victim, is_split)).or_default() += 1;
        // Not to be right, but to be wrong at every time.
        tokio::time::sleep(after).await;
        let mut dead: Vec<usize> = match victim {
            Victim::Owner => vec![owner],
            Victim::Home => vec![home],
            Victim::Both => vec![owner, home],
            Victim::All => (0..names.len()).collect(),
            Victim::Router => Vec::new(),
        };
        dead.dedup();
        dead.iter().for_each(|&replica| self.fleet.kill(replica));
        let mut answers = Vec::new();
        if victim == Victim::All {
            let last = open.pop().expect("the one with a deadline");
            let is_open = !last.answer.is_finished();
            let (request, answer) = ended(last).await;
            self.late += usize::from(is_open && answer.failed.is_some());
            answers.push((request, answer, LATE_CODES));
        }
        if victim == Victim::Router {
            self.fleet.router.kill();
        }
        tokio::time::sleep(away).await;
        for replica in dead {
            self.fleet.restart(replica).unwrap();
        }
        if victim == Victim::Router {
            self.fleet.restart_router().unwrap();
            self.clients = self.fleet.connect().await.unwrap();
        }
        let may_end_with = if victim == Victim::Router { BROKEN } else { &[] };
        for stream in open {
            let (request, answer) = ended(stream).await;
            answers.push((request, answer, may_end_with));
        }
        for (request, answer, may_end_with) in &answers {
            self.compared += 1;
            self.excused += usize::from(judge(&mut self.undisturbed, request, answer, may_end_with));
        }
        self.fleet.ready(&self.clients).await.unwrap();
        self.clients.all_free(FREED).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_kills_change_no_stream_and_leak_nothing() {
    let began = Instant::now();
    let first = setting("PERIGEE_KILL_SEED").unwrap_or(SEED);
    let count = setting("PERIGEE_KILL_SCHEDULES").map_or(SCHEDULES, |count| count as usize);
    println!("PERIGEE_KILL_SEED={first} PERIGEE_KILL_SCHEDULES={count}");
    let fleet = FleetSpec::new(env!("CARGO_BIN_EXE_perigee"), &[1, 2, 1])
        .worker("--move-grace=1")
        .worker("--handoff=pair")
        .worker("--move-silence-ms=500")
        .router("--lease-ms=1000")
        .start()
        .await
        .unwrap();
    let clients = fleet.connect().await.unwrap();
    let undisturbed = Undisturbed::open("random:tiny", 4096).unwrap();
    let mut scene = Scene { fleet, clients, undisturbed, seen: BTreeMap::new(), compared: 0, excused: 0, late: 0 };
    for seed in first..first + count as u64 {
        scene.schedule(seed).await;
    }
    let Scene { seen, compared, excused, late, .. } = scene;
    println!("{seen:#?}, {excused} of {compared} runs were excused, {late} came to their deadline");
    println!("{count} schedules in {:?}", began.elapsed());
    assert_eq!(compared, count * SESSIONS);
    assert!(excused * 20 <= compared.max(20), "{excused} of {compared} runs were excused");
    if count >= SCHEDULES {
        let split: usize = seen.iter().filter(|((_, is_split), _)| *is_split).map(|(_, count)| count).sum();
        assert!(split * 2 > count, "only {split} of {count} first sessions had moved: {seen:?}");
        assert!(late > 0, "no stream came to its deadline");
    }
}
