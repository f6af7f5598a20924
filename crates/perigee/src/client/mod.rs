//! Commands that ask a running cluster: one file each, with its arguments and what it prints. They know the public protos
//! and nothing of what is behind a router.

pub(crate) mod drain;
pub(crate) mod generate;
pub(crate) mod migrate;
pub(crate) mod replicas;
pub(crate) mod sessions;
mod table;

use anyhow::{Context, anyhow};
use perigee_proto::v1::cluster_client::ClusterClient;
use perigee_proto::v1::inference_client::InferenceClient;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

use crate::DEFAULT_PORT;

/// Largest response: log-probabilities of a prompt.
const MAX_RESPONSE_BYTES: usize = 64 << 20;

/// What every client command takes.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct ClientArgs {
    /// Router's gRPC address, host:port.
    #[arg(long, default_value_t = format!("127.0.0.1:{DEFAULT_PORT}"))]
    pub(crate) router: String,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

impl ClientArgs {
    async fn channel(&self) -> anyhow::Result<Channel> {
        let address = &self.router;
        let endpoint = Endpoint::from_shared(format!("http://{address}"))
            .with_context(|| format!("--router {address}: expected host:port"))?;
        let connected = endpoint.tcp_nodelay(true).connect().await;
        connected.with_context(|| format!("reaching the router at {address}; is `perigee up` running?"))
    }

    pub(crate) async fn inference(&self) -> anyhow::Result<InferenceClient<Channel>> {
        Ok(InferenceClient::new(self.channel().await?).max_decoding_message_size(MAX_RESPONSE_BYTES))
    }

    pub(crate) async fn cluster(&self) -> anyhow::Result<ClusterClient<Channel>> {
        Ok(ClusterClient::new(self.channel().await?).max_decoding_message_size(MAX_RESPONSE_BYTES))
    }
}

/// Runs a client command to its end.
pub(crate) fn block_on(command: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("starting")?;
    runtime.block_on(command)
}

/// A refusal as a person reads it; the details are for programs.
pub(crate) fn refused(status: Status) -> anyhow::Error {
    anyhow!("{:?}: {}", status.code(), status.message())
}

/// Prints a value as one line of JSON.
pub(crate) fn print_json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    println!("{}", serde_json::to_string(value)?);
    Ok(())
}
