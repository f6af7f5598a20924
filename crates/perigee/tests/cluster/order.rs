//! Processes start in any order; replicas of another model, and ranks that do not agree, serve nobody.

use perigee_testkit::sandbox::free_port;

use crate::parts::{Cluster, Replica};
use crate::streams::ask;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn processes_start_in_any_order_and_only_one_model_is_served() {
    let Some(mut cluster) = Cluster::start() else { return };
    // Its address is known; it comes last.
    cluster.etcd.kill();
    let meeting = free_port().unwrap();
    let follower = cluster.rank("a", 1, 2, meeting, &[]);
    let one = cluster.router().await;
    let leader = cluster.rank("a", 0, 2, meeting, &[]);
    let mut a = Replica { ranks: vec![leader, follower] };
    let mut b = cluster.replica("b", 1, &[]);
    let two = cluster.router().await;
    cluster.etcd.restart();
    for router in [&one, &two] {
        router.until_ready(&["a", "b"]).await;
    }

    let mut other = cluster.replica("other", 1, &["--model=random:tiny@8"]);
    for router in [&one, &two] {
        router.until("the other model refused", |seen| seen.get("other").is_some_and(|s| s == "refused")).await;
        let expected = ask(&router.clients).await.0;
        for _ in 0..8 {
            let (tokens, replica) = ask(&router.clients).await;
            assert_eq!(tokens, expected, "replicas are alike");
            assert_ne!(replica, "other");
        }
    }

    // Ranks of two models become nothing, together.
    let meeting = free_port().unwrap();
    let ranks = vec![
        cluster.rank("mixed", 0, 2, meeting, &[]),
        cluster.rank("mixed", 1, 2, meeting, &["--model=random:tiny@8"]),
    ];
    let mut mixed = Replica { ranks };
    mixed.ended(1);
    assert!(mixed.ranks.iter().any(|rank| rank.errors().contains("rank 1 has")), "{}", mixed.ranks[0].errors());

    // A replica whose second rank does not come is seen forming, and ends.
    let mut alone = cluster.rank("alone", 0, 2, free_port().unwrap(), &["--join-timeout=5"]);
    one.until("a forming replica", |seen| seen.get("alone").is_some_and(|status| status == "forming")).await;
    assert_eq!(alone.wait(crate::PATIENCE).unwrap().code(), Some(1), "{}", alone.errors());
    for replica in [&mut a, &mut b, &mut other] {
        replica.end();
        replica.ended(0);
    }
    for router in [&one, &two] {
        router.until("nobody", |seen| seen.is_empty()).await;
    }
}
