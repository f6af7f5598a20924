//! Two full replicas, each the home of a session that runs on the other, and each in need of pages: neither waits for the
//! other, and every session comes to its end with its own tokens.

use perigee_proto::v1::{GenerateRequest, MigrateMode, MigrateRequest, MigrateResponse, ReplicaInfo};
use perigee_testkit::Numbers;
use perigee_testkit::reference::Undisturbed;
use perigee_testkit::sandbox::{Clients, FleetSpec, eventually};
use tokio::task::JoinHandle;

use crate::client::{Answer, run};
use crate::deaths::{Open, judge};
use crate::plan::{Schedule, prompt};
use crate::{PATIENCE, greedy};

/// Latent pages of a replica, enough for what its sessions come to while they are brought to their places.
const PAGES: u32 = 64;
const PROMPT: usize = 600;
const TOKENS: u32 = 2000;
/// Sessions that each replica has at least: one that moves to the other, and one that stays.
const EACH: usize = 2;
/// Sessions that come when they are there, and each need more than what is left for their prompt.
const LONG_PROMPT: usize = 3000;
const FEW: u32 = 60;
/// So many that the router sends some to either.
const FILLERS: usize = 4;
const SEED: u64 = 950;

/// Moves a session.
async fn migrate(clients: &Clients, stream: &mut Open, to: &str, mode: MigrateMode) -> MigrateResponse {
    let order = MigrateRequest { session_id: stream.session.clone(), to: to.to_owned(), mode: mode.into() };
    let moved = clients.cluster.clone().migrate(order).await.expect("there is room").into_inner();
    stream.on = to.to_owned();
    moved
}

/// Sessions, as many on each replica: the first of each then runs on the other one, without its pages.
async fn cross(clients: &Clients, names: &[String]) -> Vec<Open> {
    let mut numbers = Numbers::new(SEED);
    let mut open: Vec<Open> = Vec::new();
    for number in 0..EACH * names.len() {
        let request = greedy(prompt(&mut numbers, 512, PROMPT), TOKENS);
        let request = GenerateRequest { request_id: format!("full-{number}"), ..request };
        let mut stream = Open::start(clients, request).await;
        let wanted = &names[number % names.len()];
        if stream.on != *wanted {
            migrate(clients, &mut stream, wanted, MigrateMode::Whole).await;
        }
        open.push(stream);
    }
    for (stream, to) in open.iter_mut().zip(names.iter().rev()) {
        let moved = migrate(clients, stream, to, MigrateMode::Split).await;
        assert_eq!((moved.mode(), moved.page_bytes), (MigrateMode::Split, 0), "{moved:?}");
    }
    open
}

/// Asks for more sessions on each replica, of which each needs more pages than there are left.
async fn fill(clients: &Clients) -> Vec<(GenerateRequest, JoinHandle<Answer>)> {
    let mut numbers = Numbers::new(SEED + 1);
    let fillers = (0..FILLERS).map(|number| {
        let request = greedy(prompt(&mut numbers, 512, LONG_PROMPT), FEW);
        let request = GenerateRequest { request_id: format!("filler-{number}"), ..request };
        let (clients, schedule) = (clients.clone(), Schedule { request: request.clone(), moves: Vec::new() });
        (request, tokio::spawn(async move { run(&clients, &schedule, &[]).await }))
    });
    fillers.collect()
}

/// Waits until both replicas need pages while they keep some for the other one.
async fn both_are_short(clients: &Clients) {
    let look = async || {
        let seen = clients.replicas().await?;
        let is_short = |one: &ReplicaInfo| one.homes > 0 && (one.waiting > 0 || one.pages_free == 0);
        let free = seen.values().map(|one| one.pages_free).collect::<Vec<_>>();
        Ok(seen.values().all(is_short).then_some(free))
    };
    let (free, _) = eventually("both replicas short of pages", PATIENCE, look).await.unwrap();
    println!("{free:?} of {PAGES} pages are free, and what waits needs {}", LONG_PROMPT.div_ceil(64));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_full_replicas_that_hold_pages_for_each_other_both_go_on() {
    let fleet = FleetSpec::new(env!("CARGO_BIN_EXE_perigee"), &[1, 1])
        .worker(format!("--latent-pages={PAGES}"))
        // While there is room, they would follow their session before anybody needs them.
        .worker("--pages-follow=never")
        .start()
        .await
        .unwrap();
    let clients = fleet.connect().await.unwrap();
    let names: Vec<String> = fleet.replicas.iter().map(|replica| replica.name.clone()).collect();
    let open = cross(&clients, &names).await;
    let fillers = fill(&clients).await;
    both_are_short(&clients).await;
    let of_sessions = open.into_iter().map(|stream| (stream.request, stream.answer));
    let mut undisturbed = Undisturbed::open("random:tiny", LONG_PROMPT + FEW as usize).unwrap();
    let (mut excused, mut count) = (0, 0);
    for (request, answer) in of_sessions.chain(fillers) {
        let answer = tokio::time::timeout(PATIENCE, answer).await.expect("nobody waits for the other").unwrap();
        excused += usize::from(judge(&mut undisturbed, &request, &answer, &[]));
        count += 1;
    }
    println!("{excused} of {count} sessions were excused");
    assert!(excused <= 1, "{excused} of {count} sessions were excused");
    clients.all_free(PATIENCE).await.unwrap();
}
