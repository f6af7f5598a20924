//! Commands that ask a running cluster: one file each, with its arguments and what it prints. They know the public protos
//! and nothing of what is behind a router.

pub(crate) mod chat;
pub(crate) mod drain;
pub(crate) mod generate;
pub(crate) mod migrate;
pub(crate) mod replicas;
pub(crate) mod sessions;
mod table;

use std::net::IpAddr;

use anyhow::{Context, anyhow};
use perigee_proto::v1::cluster_client::ClusterClient;
use perigee_proto::v1::inference_client::InferenceClient;
use perigee_tls::{ClientTlsOptions, Dialer, with_causes};
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::DEFAULT_PORT;
use crate::commands::without_faults;

/// Largest response: log-probabilities of a prompt.
const MAX_RESPONSE_BYTES: usize = 64 << 20;

/// What every client command takes.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct ClientArgs {
    /// Router's gRPC address, host:port; https://HOST:PORT turns TLS on.
    #[arg(long, default_value_t = format!("127.0.0.1:{DEFAULT_PORT}"))]
    pub(crate) router: String,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
    /// TLS towards the router.
    #[command(flatten)]
    pub(crate) tls: ClientTlsOptions,
}

impl ClientArgs {
    /// A connection to the router.
    pub(crate) async fn channel(&self) -> anyhow::Result<Channel> {
        let (address, asks_for_tls) = match self.router.strip_prefix("https://") {
            Some(address) => (address, true),
            None => (self.router.strip_prefix("http://").unwrap_or(&self.router), false),
        };
        let with_tls = asks_for_tls || self.tls.is_on();
        if !with_tls && !self.tls.insecure && !is_this_machine(address) {
            without_faults(&[format!(
                "--router: {address} is not on this machine; give --tls-ca or https://, or --insecure to go without TLS"
            )])?;
        }
        let dialer = Dialer::new(if with_tls { Some(self.tls.load()?) } else { None });
        let endpoint = dialer.endpoint(address).context("--router")?;
        let connected = dialer.connect(address, endpoint).await;
        connected.with_context(|| format!("reaching the router at {address}; is `perigee up` running?"))
    }

    pub(crate) async fn inference(&self) -> anyhow::Result<InferenceClient<Channel>> {
        Ok(InferenceClient::new(self.channel().await?).max_decoding_message_size(MAX_RESPONSE_BYTES))
    }

    pub(crate) async fn cluster(&self) -> anyhow::Result<ClusterClient<Channel>> {
        Ok(ClusterClient::new(self.channel().await?).max_decoding_message_size(MAX_RESPONSE_BYTES))
    }
}

/// Whether an address host:port is a loopback one by its look; a name that is not `localhost` may be anywhere.
fn is_this_machine(address: &str) -> bool {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// Runs a client command to its end.
pub(crate) fn block_on(command: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("starting")?;
    runtime.block_on(command)
}

/// A refusal as a person reads it; the details are for programs.
pub(crate) fn refused(status: Status) -> anyhow::Error {
    let told = with_causes(status.message(), &status);
    // Routers never say so: what answers does not speak gRPC, or the connection broke beneath it.
    let is_no_answer = status.code() == Code::Unknown || told.contains("protocol error");
    let hint = if is_no_answer {
        "; is this the gRPC port of a router, and is TLS on there (--tls-ca) or off as here?"
    } else {
        ""
    };
    anyhow!("{:?}: {told}{hint}", status.code())
}

/// Prints a value as one line of JSON.
pub(crate) fn print_json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    println!("{}", serde_json::to_string(value)?);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_routers_answer_is_told_with_its_causes() {
        let alert = std::io::Error::other("received fatal alert: CertificateExpired");
        let broken = Status::from_error(Box::new(std::io::Error::other(alert)));
        let told = refused(broken).to_string();
        assert!(told.contains("CertificateExpired") && told.contains("gRPC port"), "{told}");
        let told = refused(Status::not_found("no such session")).to_string();
        assert_eq!(told, "NotFound: no such session");
    }

    #[test]
    fn loopback_is_known_by_its_look() {
        for (address, here) in [
            ("127.0.0.1:7411", true),
            ("127.9.9.9:1", true),
            ("localhost:7411", true),
            ("[::1]:7411", true),
            ("10.0.0.1:7411", false),
            ("0.0.0.0:7411", false),
            ("router:7411", false),
            ("[fe80::1]:7411", false),
        ] {
            assert_eq!(is_this_machine(address), here, "{address}");
        }
    }
}
