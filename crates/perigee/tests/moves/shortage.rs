//! Two full replicas, each the home of a session that runs on the other, and each in need of pages: neither waits for the
//! other, and every session comes to its end with its own tokens.

use std::collections::BTreeSet;

use perigee_proto::v1::{GenerateRequest, MigrateMode, MigrateRequest, MigrateResponse, ReplicaInfo};
use perigee_testkit::Numbers;
use perigee_testkit::reference::Undisturbed;
use perigee_testkit::sandbox::{Clients, FleetSpec, eventually};

use crate::deaths::{Open, judge};
use crate::plan::prompt;
use crate::{PATIENCE, greedy};

/// Latent pages of a replica. Each session alone comes to almost as many; where they begin there is room to move.
const PAGES: u32 = 40;
const PROMPT: usize = 600;
const TOKENS: u32 = 1800;
/// Sessions that each replica has at least: one that moves to the other, and one that stays.
const EACH: usize = 2;
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

/// Waits until each replica was full once, and both need pages while they keep some for the other one: no page is free, or
/// a session has stepped back for want of them.
async fn both_are_short(clients: &Clients) {
    let mut full: BTreeSet<String> = BTreeSet::new();
    let look = async || {
        let seen = clients.replicas().await?;
        full.extend(seen.values().filter(|one| one.pages_free == 0).map(|one| one.replica.clone()));
        let is_short = |one: &ReplicaInfo| one.homes > 0 && (one.pages_free == 0 || one.running < EACH as u32);
        Ok((full.len() == seen.len() && seen.values().all(is_short)).then_some(()))
    };
    eventually("both replicas short of pages", PATIENCE, look).await.unwrap();
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
    both_are_short(&clients).await;
    let mut undisturbed = Undisturbed::open("random:tiny", PROMPT + TOKENS as usize).unwrap();
    let (mut excused, count) = (0, open.len());
    for stream in open {
        let answer = tokio::time::timeout(PATIENCE, stream.answer).await.expect("nobody waits for the other").unwrap();
        excused += usize::from(judge(&mut undisturbed, &stream.request, &answer, &[]));
    }
    println!("{excused} of {count} sessions were excused");
    assert!(excused <= 1, "{excused} of {count} sessions were excused");
    clients.all_free(PATIENCE).await.unwrap();
}
