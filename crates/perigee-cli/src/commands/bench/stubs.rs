//! The stub replicas of `bench router`: started in this process, listed for the router, reached by the client.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use perigee_load::stub::{Clock, Pacer, Steps, StubReplica};
use perigee_proto::v1::ListReplicasRequest;
use perigee_tls::{Dialer, Tls};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tonic::transport::Channel;

use crate::client::ClientArgs;

/// How long a router may take to attach to all replicas.
const ATTACHING: Duration = Duration::from_secs(60);

/// How stubs behave.
#[derive(Debug, Clone, Copy)]
pub(super) struct Modelled {
    pub(super) steps: Steps,
    pub(super) slots: u32,
}

/// Stub replicas; they end when dropped.
pub(super) struct Stubs {
    addresses: Vec<String>,
    _serving: JoinSet<()>,
}

impl Stubs {
    /// Starts so many, on free ports of this machine.
    pub(super) async fn start(
        modelled: Modelled,
        count: usize,
        clock: Clock,
        tls: Option<Arc<Tls>>,
    ) -> anyhow::Result<Self> {
        let (mut addresses, mut serving) = (Vec::new(), JoinSet::new());
        let Modelled { steps, slots } = modelled;
        let pacer = Pacer::start().context("starting the thread that paces stub replicas")?;
        for number in 0..count {
            let listener = TcpListener::bind("127.0.0.1:0").await.context("listening for a stub replica")?;
            addresses.push(listener.local_addr()?.to_string());
            // Replicas do not step at the same moments.
            let phase = steps.base.mul_f64(number as f64 / count as f64);
            let (name, seed, pacer) = (name(number), number as u64, pacer.clone());
            let stub = StubReplica { name, slots, steps, phase, seed, clock, pacer };
            let tls = tls.clone();
            serving.spawn(async move {
                if let Err(error) = stub.serve(listener, tls).await {
                    tracing::warn!(%error, "a stub replica ended");
                }
            });
        }
        Ok(Self { addresses, _serving: serving })
    }

    /// The registry file that names them.
    pub(super) fn registry(&self) -> String {
        let record =
            |(number, address): (usize, &String)| serde_json::json!({"replica": name(number), "internal": address});
        let records: Vec<_> = self.addresses.iter().enumerate().map(record).collect();
        serde_json::json!({ "replicas": records }).to_string()
    }

    /// A connection to each.
    pub(super) async fn channels(&self, dialer: &Dialer) -> anyhow::Result<Vec<Channel>> {
        let mut channels = Vec::new();
        for address in &self.addresses {
            channels.push(dialer.connect(address, dialer.endpoint(address)?).await?);
        }
        Ok(channels)
    }

    /// Waits until the router that `client` reaches has a stream to each.
    pub(super) async fn wait_until_attached(&self, client: &ClientArgs) -> anyhow::Result<()> {
        let mut cluster = client.cluster().await?;
        let attached = async {
            loop {
                let listed = cluster.list_replicas(ListReplicasRequest {}).await?.into_inner().replicas;
                if listed.iter().filter(|replica| replica.status == "ready").count() == self.addresses.len() {
                    return Ok::<(), tonic::Status>(());
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        match tokio::time::timeout(ATTACHING, attached).await {
            Ok(result) => Ok(result?),
            Err(_) => {
                bail!("the router did not attach to all {} stub replicas within {ATTACHING:?}", self.addresses.len())
            }
        }
    }
}

fn name(number: usize) -> String {
    format!("stub-{number}")
}

/// A time above 0.
pub(super) fn milliseconds(time: f64) -> Option<Duration> {
    Duration::try_from_secs_f64(time / 1e3).ok().filter(|time| !time.is_zero())
}
