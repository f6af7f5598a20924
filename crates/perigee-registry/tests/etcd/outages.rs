//! etcd goes away and comes back, loses its data, forgets leases or its history: the last known set stands, and
//! publications return by themselves.

use std::time::Duration;

use perigee_registry::{EtcdConfig, Registry, RegistryError, ReplicaRecord, ReplicaStatus};

use crate::seen::Seen;
use crate::server::{Etcd, client, config, lease_other_than, soon};
use crate::{key, record, registry};

#[tokio::test]
async fn a_restart_of_etcd_changes_nothing_and_new_replicas_join_after_it() {
    let Some(mut etcd) = Etcd::start() else { return };
    let registry = registry(config(&etcd));
    let mut seen = Seen::new(registry.watch());
    let first = registry.publish(record("a", "1")).await.expect("published");
    seen.until_names(&["a"]).await;

    etcd.kill();
    let draining = ReplicaRecord { status: ReplicaStatus::Draining, ..record("a", "1") };
    let update = first.update(draining.clone()).await;
    assert!(matches!(update, Err(RegistryError::Unreachable { .. })), "found {update:?}");
    let joining = tokio::spawn({
        let registry = crate::registry(config(&etcd));
        async move { registry.publish(record("b", "1")).await }
    });
    etcd.restart();
    let _second = joining.await.expect("no panic").expect("published once etcd was back");
    seen.until("both, the first with its late update", |records| {
        records.len() == 2 && records["a"].status == ReplicaStatus::Draining
    })
    .await;
    assert_eq!(seen.removals(), 0);
    first.update(record("a", "1")).await.expect("updates work again");
}

#[tokio::test]
async fn an_etcd_that_lost_its_data_is_filled_again_and_nobody_sees_the_gap() {
    let Some(mut etcd) = Etcd::start() else { return };
    // The watch holds what vanished for a lease's time; ample here, so that slow machines cannot end it.
    let registry = registry(EtcdConfig { lease_ttl: Duration::from_secs(600), ..config(&etcd) });
    let publishers = crate::registry(soon(&etcd));
    let mut seen = Seen::new(registry.watch());
    let _first = publishers.publish(record("a", "1")).await.expect("published");
    let _second = publishers.publish(record("b", "1")).await.expect("published");
    // Nobody writes this one again.
    let value = serde_json::to_vec(&record("lost", "1")).expect("JSON");
    client(&etcd).await.put(key("lost"), value, None).await.expect("written");
    seen.until_names(&["a", "b", "lost"]).await;

    etcd.kill();
    etcd.lose_data();
    etcd.restart();
    for name in ["a", "b"] {
        lease_other_than(&etcd, name, 0).await;
    }
    let _third = publishers.publish(record("c", "1")).await.expect("published");
    seen.until_names(&["a", "b", "c", "lost"]).await;
    assert_eq!(seen.removals(), 0);
}

#[tokio::test]
async fn what_left_while_etcd_was_away_is_let_go_of_in_the_end() {
    let Some(mut etcd) = Etcd::start() else { return };
    let registry = registry(soon(&etcd));
    let mut seen = Seen::new(registry.watch());
    let first = registry.publish(record("a", "1")).await.expect("published");
    let _second = registry.publish(record("b", "1")).await.expect("published");
    seen.until_names(&["a", "b"]).await;
    etcd.kill();
    drop(first);
    etcd.lose_data();
    etcd.restart();
    seen.until_names(&["b"]).await;
    assert_eq!(seen.removals(), 1);
}

#[tokio::test]
async fn a_lost_lease_is_replaced() {
    let Some(etcd) = Etcd::start() else { return };
    let registry = registry(soon(&etcd));
    let mut seen = Seen::new(registry.watch());
    let _publication = registry.publish(record("a", "1")).await.expect("published");
    let former = lease_other_than(&etcd, "a", 0).await;
    client(&etcd).await.lease_revoke(former).await.expect("revoked");
    let next = lease_other_than(&etcd, "a", former).await;
    seen.until("its return", |records| records.contains_key("a") && records["a"].incarnation == "1").await;

    // A key that an operator removed returns as well, under the same lease.
    client(&etcd).await.delete(key("a"), None).await.expect("removed");
    seen.until_names(&[]).await;
    seen.until_names(&["a"]).await;
    assert_eq!(lease_other_than(&etcd, "a", 0).await, next);
}

#[tokio::test]
async fn compaction_loses_no_last_word() {
    let Some(etcd) = Etcd::start() else { return };
    let registry = registry(config(&etcd));
    let mut seen = Seen::new(registry.watch());
    let publication = registry.publish(record("a", "1")).await.expect("published");
    let mut client = client(&etcd).await;
    for step in 1..=50 {
        let next = ReplicaRecord { tp: step, ..record("a", "1") };
        publication.update(next).await.expect("updated");
        let revision = client.get("any", None).await.expect("an answer").header().expect("a header").revision();
        client.compact(revision, None).await.expect("compacted");
    }
    seen.until("the last update", |records| records.get("a").is_some_and(|record| record.tp == 50)).await;
    assert_eq!(seen.removals(), 0);
}

#[tokio::test]
async fn another_member_answers_where_one_is_away() {
    let Some(etcd) = Etcd::start() else { return };
    let nobody = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
    let closed = nobody.local_addr().expect("its address").to_string();
    drop(nobody);
    let config = EtcdConfig { endpoints: vec![closed.clone(), etcd.endpoint(), closed], ..config(&etcd) };
    let registry = registry(config);
    let mut seen = Seen::new(registry.watch());
    let _publication = registry.publish(record("a", "1")).await.expect("published");
    seen.until_names(&["a"]).await;
}
