//! How this replica reaches other replicas' internal ports, for handoffs and for attention queries alike. What is said
//! over the connection is not its business.

use std::time::Duration;

use perigee_proto::internal::replica_client::ReplicaClient;
use tonic::transport::{Channel, Endpoint};

/// How long a connection may take to open.
const CONNECT_PATIENCE: Duration = Duration::from_secs(1);
/// A peer that does not answer a ping for that long is lost, however alive its machine is.
const PING_INTERVAL: Duration = Duration::from_secs(2);
/// Bytes that may be on their way in one call: a layer's queries of a whole batch, or some chunks of a handoff.
const WINDOW_BYTES: u32 = 4 << 20;
/// Largest message from a peer: the answers to a whole batch's queries of one layer.
const MAX_MESSAGE_BYTES: usize = 64 << 20;

/// Opens connections to other replicas.
#[derive(Debug, Clone, Default)]
pub struct Peers {}

impl Peers {
    /// A client of the Replica service at host:port, connected.
    ///
    /// # Errors
    /// The address, or what the system said when it was tried.
    pub(crate) async fn connect(&self, address: &str) -> Result<ReplicaClient<Channel>, String> {
        let failed = |error: tonic::transport::Error| format!("{address}: {}", with_sources(&error));
        let channel = self.endpoint(address).map_err(failed)?.connect().await.map_err(failed)?;
        Ok(ReplicaClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES))
    }

    fn endpoint(&self, address: &str) -> Result<Endpoint, tonic::transport::Error> {
        let endpoint = Endpoint::from_shared(format!("http://{address}"))?
            .tcp_nodelay(true)
            .connect_timeout(CONNECT_PATIENCE)
            .http2_keep_alive_interval(PING_INTERVAL)
            .keep_alive_timeout(PING_INTERVAL)
            .keep_alive_while_idle(true)
            .initial_stream_window_size(WINDOW_BYTES)
            .initial_connection_window_size(WINDOW_BYTES);
        Ok(endpoint)
    }
}

/// An error with its reasons: the library's own text is only "transport error".
fn with_sources(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        text = format!("{text}: {inner}");
        source = inner.source();
    }
    text
}
