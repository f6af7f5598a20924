//! Many replicas join at once, serve at once, and leave at once.

use tokio::task::JoinSet;

use crate::parts::{Cluster, Replica};
use crate::streams::ask;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twenty_replicas_join_at_once() {
    const COUNT: usize = 20;
    let Some(mut cluster) = Cluster::start() else { return };
    let routers = [cluster.router().await, cluster.router().await];
    let names: Vec<String> = (0..COUNT).map(|number| format!("replica-{number:02}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let mut replicas: Vec<Replica> = names.iter().map(|name| cluster.replica(name, 1, &[])).collect();
    for router in &routers {
        router.until_ready(&names).await;
    }
    let mut asking = JoinSet::new();
    for number in 0..2 * COUNT {
        let clients = routers[number % 2].clients.clone();
        asking.spawn(async move { ask(&clients).await.0 });
    }
    let answers = asking.join_all().await;
    assert!(answers.iter().all(|tokens| *tokens == answers[0]), "replicas are alike");

    replicas.iter().for_each(Replica::end);
    for replica in &mut replicas {
        replica.ended(0);
    }
    for router in &routers {
        router.until("nobody", |seen| seen.is_empty()).await;
    }
}
