//! Processes that are killed while sessions move: the source, the target or the router, at a random moment of a move, which
//! is in every phase of it sooner or later. Whatever dies, a stream whose router lives goes on with the tokens that it has
//! undisturbed; whatever was held is free again once the grace time is over.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use perigee_proto::v1::{GenerateRequest, MigrateMode, MigrateRequest, SamplingParams};
use perigee_testkit::Numbers;
use perigee_testkit::reference::{Undisturbed, Verdict};
use perigee_testkit::sandbox::{Clients, Fleet, FleetSpec, eventually};
use tokio::task::JoinHandle;
use tonic::Code;

use crate::PATIENCE;
use crate::client::{Answer, Watch, read};
use crate::judge::{engine_request, observed};
use crate::plan::prompt;

/// Who dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Victim {
    Source,
    Target,
    Router,
}

/// Deaths of each.
const ROUNDS: usize = 10;
/// Tokens of a session, and how many it has when its move begins.
const TOKENS: u32 = 800;
const UNDERWAY: usize = 20;
/// Longest time between the order to move and a death: a few times what a move takes.
const SPREAD: Duration = Duration::from_millis(25);
/// Sessions of a round: those that move, and one that stays.
const SESSIONS: usize = 3;
/// The grace time is a second here; what a dead router left behind is free after that, its lease and the silence.
const FREED: Duration = Duration::from_secs(20);
const SEED: u64 = 7000;

/// A stream and what is known of it while it runs.
pub(super) struct Open {
    pub(super) request: GenerateRequest,
    tokens: Arc<AtomicUsize>,
    pub(super) session: String,
    pub(super) on: String,
    pub(super) answer: JoinHandle<Answer>,
}

impl Open {
    pub(super) async fn start(clients: &Clients, request: GenerateRequest) -> Self {
        let tokens = Arc::new(AtomicUsize::new(0));
        let (first, began) = tokio::sync::oneshot::channel();
        let watch = Watch::new(tokens.clone(), Arc::new(AtomicBool::new(false)), first);
        let (clients, asked) = (clients.clone(), request.clone());
        let answer = tokio::spawn(async move { read(&clients, &asked, watch).await });
        let (session, on) = began.await.expect("a first token");
        Self { request, tokens, session, on, answer }
    }

    pub(super) async fn reaches(&self, count: usize) {
        let look = async || Ok((self.tokens.load(Ordering::Relaxed) >= count).then_some(()));
        eventually(&format!("{count} tokens"), PATIENCE, look).await.unwrap();
    }
}

/// A random request with a prompt of `length` tokens, which goes on for `TOKENS`.
pub(super) fn request(numbers: &mut Numbers, name: String, length: usize) -> GenerateRequest {
    let sampling = SamplingParams {
        temperature: Some(if numbers.one_in(2) { 0.0 } else { 0.8 }),
        repetition_penalty: numbers.one_in(2).then_some(1.2),
        seed: Some(numbers.next_u64()),
        ignore_eos: true,
        ..SamplingParams::default()
    };
    GenerateRequest {
        request_id: name,
        token_ids: prompt(numbers, 512, length),
        max_tokens: Some(TOKENS),
        sampling: Some(sampling),
        ..GenerateRequest::default()
    }
}

/// What happened over all rounds.
#[derive(Debug, Default)]
struct Tally {
    /// How moves ended whose cluster lost somebody.
    moves: BTreeMap<(Victim, String), usize>,
    compared: usize,
    excused: usize,
}

struct Scene {
    fleet: Fleet,
    clients: Clients,
    undisturbed: Undisturbed,
    tally: Tally,
}

impl Scene {
    async fn round(&mut self, number: usize, victim: Victim, numbers: &mut Numbers) {
        let names: Vec<String> = self.fleet.replicas.iter().map(|replica| replica.name.clone()).collect();
        let mut open = Vec::new();
        for session in 0..SESSIONS {
            let name = format!("{victim:?}-{number}-{session}");
            let length = numbers.between(20, 500);
            open.push(Open::start(&self.clients, request(numbers, name, length)).await);
        }
        for stream in &open {
            stream.reaches(UNDERWAY).await;
        }
        let moving = &open[0];
        let source = names.iter().position(|name| *name == moving.on).expect("a replica of the fleet");
        let target = (source + numbers.between(1, names.len() - 1)) % names.len();
        let mode = numbers.pick(&[MigrateMode::Split, MigrateMode::Whole]);
        let order = MigrateRequest { session_id: moving.session.clone(), to: names[target].clone(), mode: mode.into() };
        let mut cluster = self.clients.cluster.clone();
        let asked = tokio::spawn(async move { cluster.migrate(order).await });
        // Not to be right, but to be wrong at every time.
        let after = SPREAD.mul_f64(numbers.between(0, 1000) as f64 / 1000.0);
        tokio::time::sleep(after).await;
        match victim {
            Victim::Source => self.fleet.kill(source),
            Victim::Target => self.fleet.kill(target),
            Victim::Router => self.fleet.router.kill(),
        }
        let moved = match tokio::time::timeout(PATIENCE, asked).await.expect("an answer").expect("a task") {
            Ok(answer) => format!("{:?}", answer.into_inner().mode()),
            Err(status) => format!("{:?}", status.code()),
        };
        println!("{victim:?} dies {after:?} after the order to move from {source} to {target} ({mode:?}): {moved}");
        *self.tally.moves.entry((victim, moved)).or_default() += 1;
        for stream in open {
            let answer = tokio::time::timeout(PATIENCE, stream.answer).await.expect("no stream hangs").unwrap();
            self.judge(victim, &stream.request, &answer);
        }
        self.recover(victim, (source, target)).await;
    }

    fn judge(&mut self, victim: Victim, request: &GenerateRequest, answer: &Answer) {
        self.tally.compared += 1;
        let is_excused = judge(&mut self.undisturbed, request, answer, victim == Victim::Router);
        self.tally.excused += usize::from(is_excused);
    }

    /// Everything that was held is free, and whoever died is there again.
    async fn recover(&mut self, victim: Victim, (source, target): (usize, usize)) {
        match victim {
            Victim::Source => self.fleet.restart(source).unwrap(),
            Victim::Target => self.fleet.restart(target).unwrap(),
            Victim::Router => {
                self.fleet.restart_router().unwrap();
                self.clients = self.fleet.connect().await.unwrap();
            }
        }
        self.fleet.ready(&self.clients).await.unwrap();
        self.clients.all_free(FREED).await.unwrap();
    }
}

/// Holds a stream against its undisturbed run; whether it needed an excuse. Only one whose router died may have broken off.
pub(super) fn judge(
    undisturbed: &mut Undisturbed,
    request: &GenerateRequest,
    answer: &Answer,
    has_lost_router: bool,
) -> bool {
    let name = &request.request_id;
    assert_eq!(answer.broken, Vec::<String>::new(), "{name}");
    if let Some(status) = &answer.failed {
        // What a client makes of a connection that breaks depends on where it breaks.
        let is_broken = matches!(status.code(), Code::Unavailable | Code::Unknown | Code::Cancelled);
        assert!(has_lost_router && is_broken, "{name}: {status}");
    }
    assert_eq!(answer.failed.is_none(), answer.choices[0].finish.is_some(), "{name}");
    let mut seen = observed(request, &answer.choices[0]);
    // A replay computes the prompt anew, in other chunks.
    seen.disturbed = 0;
    match undisturbed.judge(&engine_request(request), 0, &seen).unwrap() {
        Verdict::Same => false,
        Verdict::Excused(excuses) => {
            println!("{name} excused: {excuses:?}");
            true
        }
        Verdict::Different(what) => panic!("{name}: {what}; epochs {:?}", answer.choices[0].epochs),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_dies_in_a_move_sessions_go_on_and_nothing_stays_held() {
    let began = Instant::now();
    let fleet = FleetSpec::new(env!("CARGO_BIN_EXE_perigee"), &[1, 2, 1])
        .worker("--move-grace=1")
        .worker("--move-silence-ms=500")
        .router("--lease-ms=1000")
        .start()
        .await
        .unwrap();
    let clients = fleet.connect().await.unwrap();
    let undisturbed = Undisturbed::open("random:tiny", 2048).unwrap();
    let mut scene = Scene { fleet, clients, undisturbed, tally: Tally::default() };
    let mut numbers = Numbers::new(SEED);
    for number in 0..ROUNDS {
        for victim in [Victim::Source, Victim::Target, Victim::Router] {
            scene.round(number, victim, &mut numbers).await;
        }
    }
    let tally = scene.tally;
    println!("{tally:#?} in {:?}", began.elapsed());
    assert_eq!(tally.compared, ROUNDS * 3 * SESSIONS);
    assert!(tally.excused * 20 <= tally.compared, "{} of {} runs were excused", tally.excused, tally.compared);
}
