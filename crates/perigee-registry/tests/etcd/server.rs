//! The real etcd of a test, as a registry's settings and as a client that uses nothing of the registry.

use std::time::{Duration, Instant};

use etcd_client::Client;
use perigee_registry::EtcdConfig;
pub(crate) use perigee_testkit::etcd::Etcd;

use crate::key;

/// For whatever takes long only when something is wrong.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// A registry's settings with a lease that no machine is too slow to renew: a keeper is due three times in it.
pub(crate) fn config(etcd: &Etcd) -> EtcdConfig {
    EtcdConfig { lease_ttl: Duration::from_secs(60), ..EtcdConfig::new(vec![etcd.endpoint()]) }
}

/// The same where a test waits for a keeper's next look, or for a lease's time: what is due within 4 s may come 6 s late.
pub(crate) fn soon(etcd: &Etcd) -> EtcdConfig {
    EtcdConfig { lease_ttl: Duration::from_secs(10), ..config(etcd) }
}

/// The lease under which etcd has a replica's record, once it has one other than `former`.
pub(crate) async fn lease_other_than(etcd: &Etcd, name: &str, former: i64) -> i64 {
    let mut client = client(etcd).await;
    let began = Instant::now();
    while began.elapsed() < DEADLINE {
        let found = client.get(key(name), None).await.expect("an answer");
        if let Some(present) = found.kvs().first()
            && present.lease() != former
        {
            return present.lease();
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("replica {name} was not published again");
}

/// Waits until a lease was renewed so many times: what is left of it only grows then.
pub(crate) async fn renewals(client: &mut Client, lease: i64, count: usize) {
    let (mut found, mut left) = (0, i64::MAX);
    let began = Instant::now();
    while found < count {
        assert!(began.elapsed() < DEADLINE, "{found} renewals of {count}");
        let now = client.lease_time_to_live(lease, None).await.expect("an answer").ttl();
        assert!(now >= 0, "the lease is gone after {found} renewals");
        found += usize::from(now > left);
        left = now;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A client that uses nothing of the registry.
pub(crate) async fn client(etcd: &Etcd) -> Client {
    Client::connect([etcd.endpoint()], None).await.expect("a client")
}
