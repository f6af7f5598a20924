//! A cluster whose processes are started one by one, as by an operator: a router, and the ranks of two replicas that find
//! each other by addresses. One replica is drained while a stream runs on it, the other loses a rank.

use std::ops::ControlFlow;
use std::time::Duration;

use perigee_testkit::processes::signal;
use perigee_testkit::sandbox::{Clients, Parts, PartsSpec, eventually};
use tonic::Code;

use crate::answer::{ask, read_through_deaths};
use crate::{PATIENCE, greedy};

/// How long processes may take to end once they have nothing to do.
const END: Duration = Duration::from_secs(5);
/// Tokens of a stream that is still running when its replica is told to drain.
const LONG: usize = 900;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ranks_and_a_router_started_one_by_one_are_a_cluster() {
    let spec =
        PartsSpec { program: env!("CARGO_BIN_EXE_perigee").into(), model: "random:tiny".into(), replicas: 2, tp: 2 };
    let mut parts = Parts::start(&spec).unwrap();
    let clients = Clients::connect(parts.grpc).await.unwrap();
    let both = async || {
        let replicas = clients.replicas().await?;
        Ok((replicas.len() == 2 && replicas.values().all(|replica| replica.status == "ready")).then_some(replicas))
    };
    let (replicas, _) = eventually("both replicas", PATIENCE, both).await.unwrap();
    for (replica, ranks) in replicas.values().zip(&parts.ranks) {
        assert_eq!(replica.pids, ranks.iter().map(|rank| rank.pid()).collect::<Vec<_>>());
        assert_eq!((replica.tp, replica.slots_total, replica.slots_free), (2, 64, 64));
    }

    // SIGTERM to a leader: its stream goes on at the other, as new requests do, and the ranks end well.
    let long = greedy(vec![5, 6, 7], LONG as u32);
    let (first, started) = tokio::sync::oneshot::channel();
    let running = {
        let (clients, long, mut first) = (clients.clone(), long.clone(), Some(first));
        tokio::spawn(async move {
            let mut last = String::new();
            let answer = read_through_deaths(&clients, &long, |response| {
                last.clone_from(&response.replica);
                if let Some(first) = first.take() {
                    first.send(response.replica.clone()).unwrap();
                }
                ControlFlow::Continue(())
            });
            (answer.await, last)
        })
    };
    let serves = started.await.unwrap();
    let ending = usize::from(serves == "replica-1");
    signal("TERM", parts.ranks[ending][0].pid()).unwrap();
    let draining = async || Ok(clients.replicas().await?.remove(&serves).filter(|replica| replica.status != "ready"));
    eventually("no new requests there", PATIENCE, draining).await.unwrap();
    let elsewhere = ask(&clients, &greedy(vec![5, 6, 7], 20)).await.finished();
    assert_ne!(elsewhere.replica, serves);
    let (answer, last) = tokio::time::timeout(PATIENCE, running).await.expect("it ends").unwrap();
    let answer = answer.finished();
    assert_eq!((answer.tokens(), &last), (LONG, &elsewhere.replica));
    assert_eq!(answer.choices[0].tokens[..20], elsewhere.choices[0].tokens, "replicas are alike");
    for rank in &mut parts.ranks[ending] {
        assert_eq!(rank.wait(END).unwrap().code(), Some(0), "{}", rank.errors());
    }

    // A follower of the other is killed: its leader ends too and says whom it lost; the router has nobody left.
    let [leader, follower] = &mut parts.ranks[1 - ending][..] else { panic!("two ranks") };
    follower.kill();
    assert_eq!(leader.wait(END).unwrap().code(), Some(1), "{}", leader.errors());
    assert!(leader.errors().contains("rank 1"), "{}", leader.errors());
    let nobody = async || {
        let refused = ask(&clients, &greedy(vec![5], 1)).await;
        Ok(matches!(refused.end, crate::answer::End::Failed(_)).then_some(refused))
    };
    let (refused, _) = eventually("nobody to serve", PATIENCE, nobody).await.unwrap();
    assert_eq!(refused.status().code(), Code::Unavailable, "{}", refused.status());
    signal("TERM", parts.router.pid()).unwrap();
    drop(clients);
    assert_eq!(parts.router.wait(END).unwrap().code(), Some(0), "{}", parts.router.errors());
}
