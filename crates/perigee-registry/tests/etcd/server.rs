//! The real etcd of a test, as a registry's settings and as a client that uses nothing of the registry.

use std::time::Duration;

use etcd_client::Client;
use perigee_registry::EtcdConfig;
pub(crate) use perigee_testkit::etcd::Etcd;

/// For whatever takes long only when something is wrong.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// A registry's settings with the shortest lease that etcd grants (2 s).
pub(crate) fn config(etcd: &Etcd) -> EtcdConfig {
    EtcdConfig { lease_ttl: Duration::from_secs(2), ..EtcdConfig::new(vec![etcd.endpoint()]) }
}

/// A client that uses nothing of the registry.
pub(crate) async fn client(etcd: &Etcd) -> Client {
    Client::connect([etcd.endpoint()], None).await.expect("a client")
}
