//! The other end of a cluster: clients of a router over one connection, a leader's or router's metrics, and a wait for
//! what takes effect a little later.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use perigee_proto::v1::cluster_client::ClusterClient;
use perigee_proto::v1::inference_client::InferenceClient;
use perigee_proto::v1::{ListReplicasRequest, ReplicaInfo};
use perigee_tls::{Dialer, TlsError};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tonic::transport::Channel;
pub use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

use crate::error::{Result, TestkitError};

/// Time between two looks at a condition.
const POLL: Duration = Duration::from_millis(10);

/// Clients over one connection; clones share it.
#[derive(Debug, Clone)]
pub struct Clients {
    /// `perigee.v1.Inference`.
    pub inference: InferenceClient<Channel>,
    /// `perigee.v1.Cluster`.
    pub cluster: ClusterClient<Channel>,
    /// grpc.health.v1.
    pub health: HealthClient<Channel>,
}

impl Clients {
    /// Connects to a router.
    ///
    /// # Errors
    /// It cannot be reached.
    pub async fn connect(address: SocketAddr) -> Result<Self> {
        Self::connect_by(&Dialer::plain(), address).await
    }

    /// Connects with TLS, if the dialer has it.
    ///
    /// # Errors
    /// It cannot be reached, or does not let this client in.
    pub async fn connect_by(dialer: &Dialer, address: SocketAddr) -> Result<Self> {
        let address = address.to_string();
        let unreachable =
            |source: TlsError| TestkitError::Unreachable { address: address.clone(), source: Box::new(source) };
        let endpoint = dialer.endpoint(&address).map_err(unreachable)?;
        let channel = dialer.connect(&address, endpoint).await.map_err(unreachable)?;
        Ok(Self {
            // Log-probabilities of a long prompt make large messages.
            inference: InferenceClient::new(channel.clone()).max_decoding_message_size(64 << 20),
            cluster: ClusterClient::new(channel.clone()),
            health: HealthClient::new(channel),
        })
    }

    /// All replicas as the router sees them, by name.
    ///
    /// # Errors
    /// The call failed.
    pub async fn replicas(&self) -> Result<BTreeMap<String, ReplicaInfo>> {
        let answer = self.cluster.clone().list_replicas(ListReplicasRequest {}).await;
        let answer = answer.map_err(|status| TestkitError::Call { call: "ListReplicas", status: Box::new(status) })?;
        Ok(answer.into_inner().replicas.into_iter().map(|replica| (replica.replica.clone(), replica)).collect())
    }

    /// Waits until nothing runs on any replica, and every slot and page is free.
    ///
    /// # Errors
    /// Something is still held after `limit`, and what.
    pub async fn all_free(&self, limit: Duration) -> Result<Duration> {
        let mut last = BTreeMap::new();
        let waited = eventually("every slot and page free", limit, async || {
            last = self.replicas().await?;
            Ok(last.values().all(is_free).then_some(()))
        });
        match waited.await {
            Ok(((), took)) => Ok(took),
            Err(error) => {
                let loads = last.values().filter(|replica| !is_free(replica)).map(load).collect::<Vec<_>>();
                Err(TestkitError::Process { what: error.to_string(), message: loads.join("; ") })
            }
        }
    }
}

fn is_free(replica: &ReplicaInfo) -> bool {
    let idle = replica.running == 0 && replica.waiting == 0;
    idle && replica.slots_free == replica.slots_total && replica.pages_free == replica.pages_total
}

fn load(replica: &ReplicaInfo) -> String {
    format!(
        "{}: {} running, {} waiting, {} of {} slots and {} of {} pages free",
        replica.replica,
        replica.running,
        replica.waiting,
        replica.slots_free,
        replica.slots_total,
        replica.pages_free,
        replica.pages_total
    )
}

/// Looks until there is something to see, and tells how long that took.
///
/// # Errors
/// There was nothing within the time allowed, or a look failed.
pub async fn eventually<T>(
    what: &str,
    limit: Duration,
    mut look: impl AsyncFnMut() -> Result<Option<T>>,
) -> Result<(T, Duration)> {
    let began = Instant::now();
    loop {
        if let Some(found) = look().await? {
            return Ok((found, began.elapsed()));
        }
        if began.elapsed() > limit {
            return Err(TestkitError::Deadline { what: what.into(), seconds: limit.as_secs() });
        }
        tokio::time::sleep(POLL).await;
    }
}

/// What a process answers on its HTTP port: the status code and the text.
///
/// # Errors
/// The port does not answer as HTTP does.
pub async fn http_get(address: SocketAddr, path: &str) -> Result<(u16, String)> {
    let unreachable = |source: Box<dyn std::error::Error + Send + Sync>| TestkitError::Unreachable {
        address: format!("http://{address}{path}"),
        source,
    };
    let mut stream = TcpStream::connect(address).await.map_err(|error| unreachable(error.into()))?;
    // Version 1.0 ends the answer with the connection.
    let request = format!("GET {path} HTTP/1.0\r\n\r\n");
    stream.write_all(request.as_bytes()).await.map_err(|error| unreachable(error.into()))?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.map_err(|error| unreachable(error.into()))?;
    let code = answer.split(' ').nth(1).and_then(|code| code.parse().ok());
    let text = answer.split_once("\r\n\r\n").map(|(_, text)| text.to_owned());
    code.zip(text).ok_or_else(|| unreachable(format!("not HTTP: {answer:?}").into()))
}

/// A sample of /metrics, named as there: with its labels where it has some.
///
/// # Errors
/// The port does not answer, or has no such sample.
pub async fn metric(address: SocketAddr, name: &str) -> Result<f64> {
    let (_, text) = http_get(address, "/metrics").await?;
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok());
    value.ok_or_else(|| TestkitError::Unreachable {
        address: format!("http://{address}/metrics"),
        source: format!("no sample {name} in {text}").into(),
    })
}
