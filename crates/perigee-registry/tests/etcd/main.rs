//! The etcd registry against real etcd processes: publications, watches, leases, restarts and losses of etcd. Whether a
//! replica that is listed lives is not asked here.

mod access;
mod outages;
mod seen;
mod server;

use std::process::{Command, Stdio};
use std::time::Duration;

use etcd_client::PutOptions;
use perigee_registry::{Change, EtcdConfig, EtcdRegistry, Registry, RegistryError, ReplicaRecord, ReplicaStatus};

use crate::seen::Seen;
use crate::server::{DEADLINE, Etcd, client, config, lease_other_than, renewals, soon};

/// Tells the process of [`publisher_process`] where etcd is.
const ENDPOINT: &str = "PERIGEE_TEST_ETCD";

fn record(name: &str, incarnation: &str) -> ReplicaRecord {
    ReplicaRecord { incarnation: incarnation.to_owned(), ..ReplicaRecord::new(name, "127.0.0.1:1") }
}

fn registry(config: EtcdConfig) -> EtcdRegistry {
    EtcdRegistry::connect(config).expect("good settings")
}

fn key(name: &str) -> String {
    format!("/perigee/replicas/{name}")
}

#[tokio::test]
async fn records_are_published_updated_and_withdrawn() {
    let Some(etcd) = Etcd::start() else { return };
    let registry = registry(config(&etcd));
    let mut seen = Seen::new(registry.watch());
    let forming = ReplicaRecord { status: ReplicaStatus::Forming, internal: String::new(), ..record("a", "1") };
    let publication = registry.publish(forming.clone()).await.expect("published");
    seen.until_names(&["a"]).await;
    publication.update(record("a", "1")).await.expect("updated");
    seen.until("a ready replica", |records| records["a"].status == ReplicaStatus::Ready).await;
    assert!(matches!(publication.update(record("a", "2")).await, Err(RegistryError::NotPublished { .. })));
    assert!(matches!(publication.update(record("b", "1")).await, Err(RegistryError::NotPublished { .. })));

    let mut late = Seen::new(registry.watch());
    late.until_names(&["a"]).await;
    assert_eq!(late.records["a"], record("a", "1"));

    // The process may end right after the drop: the record must be gone by then.
    drop(publication);
    let left = client(&etcd).await.get(key("a"), None).await.expect("an answer");
    assert_eq!(left.count(), 0);
    seen.until_names(&[]).await;
    late.until_names(&[]).await;
    let removed = Change::Removed { replica: "a".to_owned(), incarnation: "1".to_owned() };
    assert_eq!(seen.changes, [Change::Added(forming), Change::Updated(record("a", "1")), removed]);
}

#[tokio::test]
async fn a_watch_outlives_its_registry_and_prefixes_are_apart() {
    let Some(etcd) = Etcd::start() else { return };
    let blue = EtcdConfig { prefix: "team/blue".to_owned(), ..config(&etcd) };
    let mut seen = Seen::new(registry(config(&etcd)).watch());
    let _other = registry(blue).publish(record("a", "other")).await.expect("published");
    let _publication = registry(config(&etcd)).publish(record("a", "1")).await.expect("published");
    seen.until_names(&["a"]).await;
    assert_eq!(seen.records["a"].incarnation, "1");
}

/// Not a test: another process for [`a_killed_replica_leaves_while_a_busy_one_stays`] to kill.
#[tokio::test]
#[ignore = "a publisher that another test starts and kills"]
async fn publisher_process() {
    let endpoint = std::env::var(ENDPOINT).expect("only for the test that kills it");
    // A lease that is over soon once nobody renews it, but not while this process may be late.
    let config = EtcdConfig { lease_ttl: Duration::from_secs(6), ..EtcdConfig::new(vec![endpoint]) };
    let _publication = registry(config).publish(record("killed", "1")).await.expect("published");
    // To the end of its standard input, so that it does not outlive the test that started it.
    tokio::task::spawn_blocking(|| std::io::read_to_string(std::io::stdin())).await.expect("read").expect("read");
}

#[tokio::test]
async fn a_killed_replica_leaves_while_a_busy_one_stays() {
    let Some(etcd) = Etcd::start() else { return };
    let registry = registry(soon(&etcd));
    let _busy = registry.publish(record("busy", "1")).await.expect("published");
    let mut killed = Command::new(std::env::current_exe().expect("this program"))
        .args(["publisher_process", "--exact", "--ignored"])
        .env(ENDPOINT, etcd.endpoint())
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("a process");
    let mut seen = Seen::new(registry.watch());
    seen.until_names(&["busy", "killed"]).await;
    let (endpoint, busy) = (etcd.endpoint(), lease_other_than(&etcd, "busy", 0).await);
    let watch = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        killed.kill().expect("it runs");
        killed.wait().expect("it was killed");
        runtime.block_on(async {
            seen.until_names(&["busy"]).await;
            let mut client = etcd_client::Client::connect([endpoint], None).await.expect("a client");
            renewals(&mut client, busy, 2).await;
        });
        seen
    });
    // This thread ran the publishing, and is as busy as can be from before the first renewal to the last.
    let seen = watch.join().expect("the killed one left, the busy one stayed");
    assert_eq!(seen.removals(), 1);
    let leases = client(&etcd).await.leases().await.expect("an answer");
    assert_eq!(leases.leases().len(), 1, "the busy one's");
}

#[tokio::test]
async fn a_name_belongs_to_one_incarnation() {
    let Some(etcd) = Etcd::start() else { return };
    let impatient = registry(EtcdConfig { name_wait: Duration::ZERO, ..config(&etcd) });
    let patient = registry(EtcdConfig { name_wait: DEADLINE, ..config(&etcd) });
    let first = impatient.publish(record("a", "1")).await.expect("published");
    match impatient.publish(record("a", "2")).await.map(|_| ()) {
        Err(RegistryError::NameTaken { replica, incarnation }) => assert_eq!((&*replica, &*incarnation), ("a", "1")),
        other => panic!("expected a taken name, found {other:?}"),
    }
    first.update(record("a", "1")).await.expect("the attempt changed nothing");

    // A successor waits for its predecessor, here until that is withdrawn.
    let waiting = tokio::spawn(async move {
        let publication = patient.publish(record("a", "3")).await;
        (patient, publication)
    });
    let mut seen = Seen::new(impatient.watch());
    seen.until_names(&["a"]).await;
    drop(first);
    seen.until("the successor", |records| records.get("a").is_some_and(|record| record.incarnation == "3")).await;
    let (_patient, publication) = waiting.await.expect("no panic");
    publication.expect("published");
}

#[tokio::test]
async fn twenty_publishers_at_once() {
    let Some(etcd) = Etcd::start() else { return };
    let registry = std::sync::Arc::new(registry(EtcdConfig { name_wait: Duration::ZERO, ..config(&etcd) }));
    let mut seen = Seen::new(registry.watch());
    let all_at_once = |name: fn(usize) -> String| {
        let publish = |index: usize| {
            let registry = registry.clone();
            tokio::spawn(async move { registry.publish(record(&name(index), &index.to_string())).await })
        };
        (0..20).map(publish).collect::<Vec<_>>()
    };
    let mut publications = Vec::new();
    for task in all_at_once(|index| format!("replica-{index:02}")) {
        publications.push(task.await.expect("no panic").expect("published"));
    }
    seen.until("twenty replicas", |records| records.len() == 20).await;
    assert_eq!((seen.changes.len(), seen.removals()), (20, 0));

    let mut won = Vec::new();
    for task in all_at_once(|_| "one-name".to_owned()) {
        match task.await.expect("no panic") {
            Ok(publication) => won.push(publication),
            Err(RegistryError::NameTaken { replica, .. }) => assert_eq!(replica, "one-name"),
            Err(error) => panic!("{error}"),
        }
    }
    assert_eq!(won.len(), 1, "one of them has the name");
    seen.until("the twenty-first", |records| records.len() == 21).await;

    drop(won);
    drop(publications);
    seen.until_names(&[]).await;
}

#[tokio::test]
async fn malformed_records_are_skipped_and_their_names_can_be_used() {
    let Some(etcd) = Etcd::start() else { return };
    let mut client = client(&etcd).await;
    let misplaced = serde_json::to_vec(&record("b", "1")).expect("JSON");
    let values: [(&str, Vec<u8>); 5] = [
        ("empty", vec![]),
        ("text", b"not JSON".to_vec()),
        ("list", b"[1, 2]".to_vec()),
        ("huge", vec![b' '; 1 << 20]),
        ("misplaced", misplaced),
    ];
    for (name, value) in values {
        client.put(key(name), value, None).await.expect("written");
    }
    let registry = registry(soon(&etcd));
    let mut seen = Seen::new(registry.watch());
    let _good = registry.publish(record("good", "1")).await.expect("published");
    seen.until_names(&["good"]).await;
    let _text = registry.publish(record("text", "1")).await.expect("nobody has that name");
    seen.until_names(&["good", "text"]).await;

    // While a watch runs, too; the keeper then mends its own key.
    client.put(key("good"), "garbage", None).await.expect("written");
    seen.until_names(&["text"]).await;
    seen.until_names(&["good", "text"]).await;
}

#[tokio::test]
async fn a_listing_of_many_keys_comes_whole() {
    let Some(etcd) = Etcd::start() else { return };
    let mut client = client(&etcd).await;
    let lease = client.lease_grant(60, None).await.expect("a lease").id();
    let names: Vec<String> = (0..150).map(|index| format!("replica-{index:03}")).collect();
    for name in &names {
        let value = serde_json::to_vec(&record(name, "1")).expect("JSON");
        client.put(key(name), value, Some(PutOptions::new().with_lease(lease))).await.expect("written");
    }
    let mut seen = Seen::new(registry(config(&etcd)).watch());
    seen.until("all of them", |records| records.keys().eq(&names)).await;
    assert_eq!(seen.changes.len(), names.len());
    client.lease_revoke(lease).await.expect("revoked");
    seen.until_names(&[]).await;
}
