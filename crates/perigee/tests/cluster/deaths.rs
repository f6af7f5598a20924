//! Processes of a cluster die, stand still, or are told to end, while streams run through two routers. Streams of what is
//! lost go on elsewhere or say that they are lost; all others do not notice.

use perigee_testkit::processes::signal;
use perigee_testkit::sandbox::eventually;

use crate::PATIENCE;
use crate::parts::{Cluster, Router};
use crate::streams::{Open, all_go_on, ask, go_on_or_are_lost};

/// Room for every stream to its end on one replica, so that none of them waits for another's.
const PAGES: &str = "--latent-pages=2560";

fn open(routers: &[&Router], count: usize) -> Vec<Open> {
    (0..count).map(|number| Open::start(&routers[number % routers.len()].clients, number as u32)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_a_leader_and_a_router_are_killed() {
    let Some(mut cluster) = Cluster::start() else { return };
    let mut a = cluster.replica("a", 2, &[PAGES]);
    let _b = cluster.replica("b", 1, &[PAGES]);
    let (mut one, two) = (cluster.router().await, cluster.router().await);
    for router in [&one, &two] {
        router.until_ready(&["a", "b"]).await;
    }
    let mut streams = open(&[&one, &two], 6);
    all_go_on(&streams, 5).await;

    // A follower: the replica leaves as a whole, and at once.
    a.ranks[1].kill();
    assert_eq!(a.ranks[0].wait(PATIENCE).unwrap().code(), Some(1), "{}", a.ranks[0].errors());
    assert!(a.ranks[0].errors().contains("rank 1"), "{}", a.ranks[0].errors());
    for router in [&one, &two] {
        router.until_ready(&["b"]).await;
    }
    go_on_or_are_lost(&mut streams, 10).await;

    // A leader: its record stays to the end of its lease, and its successor waits for the name.
    let mut a = cluster.replica("a", 2, &[PAGES]);
    one.until_ready(&["a", "b"]).await;
    streams.extend(open(&[&one, &two], 4));
    go_on_or_are_lost(&mut streams, 5).await;
    a.ranks[0].kill();
    assert_eq!(a.ranks[1].wait(PATIENCE).unwrap().code(), Some(1), "{}", a.ranks[1].errors());
    assert!(a.ranks[1].errors().contains("rank 0"), "{}", a.ranks[1].errors());
    go_on_or_are_lost(&mut streams, 10).await;
    let _a = cluster.replica("a", 2, &[PAGES]);
    for router in [&one, &two] {
        router.until_ready(&["a", "b"]).await;
    }
    go_on_or_are_lost(&mut streams, 10).await;
    drop(streams);

    // A router: its sessions end, and the other's do not.
    let (of_one, of_two) = (open(&[&one], 3), open(&[&two], 2));
    all_go_on(&of_one, 5).await;
    all_go_on(&of_two, 5).await;
    one.process.kill();
    for stream in of_one {
        stream.was_cut().await;
    }
    let two_run = async || {
        let running: u32 = two.clients.replicas().await?.values().map(|replica| replica.running).sum();
        Ok((running == 2).then_some(()))
    };
    eventually("the end of the sessions of the killed router", PATIENCE, two_run).await.unwrap();
    all_go_on(&of_two, 20).await;
    let again = cluster.router().await;
    again.until_ready(&["a", "b"]).await;
    ask(&again.clients).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_stands_still_loses_its_sessions_and_its_place_and_gets_the_place_back() {
    let Some(mut cluster) = Cluster::start() else { return };
    let (a, _b) = (cluster.replica("a", 1, &[PAGES]), cluster.replica("b", 1, &[PAGES]));
    let router = cluster.router().await;
    router.until_ready(&["a", "b"]).await;
    let mut streams = open(&[&router], 6);
    all_go_on(&streams, 5).await;
    signal("STOP", a.ranks[0].pid()).unwrap();
    router.until("a replica out of reach", |seen| seen.get("a").is_none_or(|status| status == "unreachable")).await;
    go_on_or_are_lost(&mut streams, 10).await;
    // Longer than its lease in etcd, so that it has to publish itself anew.
    router.until("a replica that left", |seen| !seen.contains_key("a")).await;
    signal("CONT", a.ranks[0].pid()).unwrap();
    router.until_ready(&["a", "b"]).await;
    // What ran there for streams that are lost or elsewhere is over.
    let nothing_runs = async || {
        let running = router.clients.replicas().await?.remove("a").map(|replica| replica.running);
        Ok((running == Some(0)).then_some(()))
    };
    eventually("the end of what ran there", PATIENCE, nothing_runs).await.unwrap();
    all_go_on(&streams, 10).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_is_told_to_end_leaves_within_its_grace() {
    let Some(mut cluster) = Cluster::start() else { return };
    let mut a = cluster.replica("a", 1, &["--grace=1"]);
    let router = cluster.router().await;
    router.until_ready(&["a"]).await;
    let endless = Open::start(&router.clients, 3);
    assert!(endless.goes_on(5).await);
    a.end();
    // Until the grace is over it is seen draining, or it has left already.
    router.until("draining", |seen| seen.get("a").is_none_or(|status| status == "draining")).await;
    a.ended(0);
    endless.was_lost().await;
    router.until("nobody", |seen| seen.is_empty()).await;
}
