//! etcd goes away while streams run, comes back, and loses what it knew.

use crate::parts::Cluster;
use crate::streams::{Open, all_go_on, ask};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_do_not_notice_that_etcd_is_away_and_replicas_join_after_it() {
    let Some(mut cluster) = Cluster::start() else { return };
    let _replicas = [cluster.replica("a", 1, &[]), cluster.replica("b", 1, &[])];
    let routers = [cluster.router().await, cluster.router().await];
    for router in &routers {
        router.until_ready(&["a", "b"]).await;
    }
    let streams: Vec<Open> = (0..4).map(|number| Open::start(&routers[number % 2].clients, number as u32)).collect();
    all_go_on(&streams, 5).await;

    cluster.etcd.kill();
    all_go_on(&streams, 20).await;
    ask(&routers[0].clients).await;
    let mut late = cluster.replica("late", 1, &[]);
    all_go_on(&streams, 20).await;
    cluster.etcd.restart();
    for router in &routers {
        router.until_ready(&["a", "b", "late"]).await;
    }
    all_go_on(&streams, 20).await;

    cluster.etcd.kill();
    cluster.etcd.lose_data();
    cluster.etcd.restart();
    // It knows of all again only if those who live have written it again: a newcomer is seen beside them.
    let mut last = cluster.replica("later", 1, &[]);
    for router in &routers {
        router.until_ready(&["a", "b", "late", "later"]).await;
    }
    all_go_on(&streams, 20).await;
    for replica in [&mut late, &mut last] {
        replica.end();
        replica.ended(0);
    }
    for router in &routers {
        router.until_ready(&["a", "b"]).await;
    }
}
