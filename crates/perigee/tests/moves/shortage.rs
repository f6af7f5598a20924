//! Two full replicas, each the home of a session that runs on the other, and each in need of pages: neither waits for the
//! other, and every session comes to its end with its own tokens.

use std::collections::BTreeMap;

use perigee_proto::v1::{GenerateRequest, MigrateMode, MigrateRequest};
use perigee_testkit::Numbers;
use perigee_testkit::reference::Undisturbed;
use perigee_testkit::sandbox::{Clients, Fleet, FleetSpec, eventually};

use crate::deaths::{Open, judge};
use crate::plan::prompt;
use crate::{PATIENCE, greedy};

/// Latent pages of a replica. Each session alone comes to almost as many.
const PAGES: u32 = 20;
const PROMPT: usize = 400;
const TOKENS: u32 = 800;
/// Sessions that each replica has at least: one that moves to the other, and one that stays.
const EACH: usize = 2;
const SEED: u64 = 950;

/// Starts sessions until each replica has enough of them.
async fn begin(clients: &Clients, names: &[String]) -> Vec<Open> {
    const ENOUGH: usize = 60;
    let mut numbers = Numbers::new(SEED);
    let mut open: Vec<Open> = Vec::new();
    while names.iter().any(|name| open.iter().filter(|stream| stream.on == *name).count() < EACH) {
        assert!(open.len() < ENOUGH, "the router uses one replica only");
        let request_id = format!("full-{}", open.len());
        let request = greedy(prompt(&mut numbers, 512, PROMPT), TOKENS);
        open.push(Open::start(clients, GenerateRequest { request_id, ..request }).await);
    }
    open
}

/// Moves the first session of each replica to the other one, without its pages.
async fn cross(clients: &Clients, names: &[String], open: &[Open]) {
    let moves = names.iter().zip(names.iter().rev()).map(|(from, to)| {
        let stream = open.iter().find(|stream| stream.on == *from).expect("one on each");
        let order = MigrateRequest {
            session_id: stream.session.clone(),
            to: to.clone(),
            mode: MigrateMode::Split.into(),
        };
        let mut cluster = clients.cluster.clone();
        tokio::spawn(async move { cluster.migrate(order).await })
    });
    for moved in moves.collect::<Vec<_>>() {
        let moved = moved.await.expect("a task").expect("a move").into_inner();
        assert_eq!((moved.mode(), moved.page_bytes), (MigrateMode::Split, 0), "{moved:?}");
    }
}

/// Waits until every page of each replica is in use while it keeps some for the other one.
async fn both_were_full(fleet: &Fleet, clients: &Clients) {
    let mut full: BTreeMap<String, bool> = BTreeMap::new();
    let look = async || {
        for (name, replica) in clients.replicas().await? {
            *full.entry(name).or_default() |= replica.pages_free == 0 && replica.homes > 0;
        }
        Ok((full.len() == fleet.replicas.len() && full.values().all(|was| *was)).then_some(()))
    };
    eventually("both replicas full", PATIENCE, look).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_full_replicas_that_hold_pages_for_each_other_both_go_on() {
    let fleet = FleetSpec::new(env!("CARGO_BIN_EXE_perigee"), &[1, 1])
        .worker(format!("--latent-pages={PAGES}"))
        .start()
        .await
        .unwrap();
    let clients = fleet.connect().await.unwrap();
    let names: Vec<String> = fleet.replicas.iter().map(|replica| replica.name.clone()).collect();
    let open = begin(&clients, &names).await;
    cross(&clients, &names, &open).await;
    both_were_full(&fleet, &clients).await;
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
