//! How this replica reaches other replicas' internal ports, for handoffs and for attention queries alike, and what it
//! measured of the ways there. What is said over a connection is not its business.

use std::sync::Arc;
use std::time::Duration;

use perigee_proto::internal::replica_client::ReplicaClient;
use perigee_registry::BoxFuture;
use perigee_tls::{Dialer, Tls, TlsError};
use tonic::transport::Channel;

use crate::links::Links;

/// How long a connection may take to open.
const CONNECT_PATIENCE: Duration = Duration::from_secs(1);
/// A peer that does not answer a ping for that long is lost, however alive its machine is.
const PING_INTERVAL: Duration = Duration::from_secs(2);
/// Bytes that may be on their way in one call, either way: a layer's queries of a whole batch, some chunks of a handoff, or prompts.
pub(crate) const WINDOW_BYTES: u32 = 4 << 20;
/// Largest message from a peer: the answers to a whole batch's queries of one layer.
const MAX_MESSAGE_BYTES: usize = 64 << 20;

/// Another way to an address than TCP, for simulations.
pub trait Reach: Send + Sync {
    /// Opens a connection to host:port, or says why that failed.
    fn reach<'a>(&'a self, address: &'a str) -> BoxFuture<'a, Result<Channel, String>>;
}

/// Opens connections to other replicas. Clones measure together.
#[derive(Clone, Default)]
pub struct Peers {
    dialer: Dialer,
    instead: Option<Arc<dyn Reach>>,
    links: Links,
}

impl Peers {
    /// With TLS where there is some.
    pub fn new(tls: Option<Arc<Tls>>) -> Self {
        Self { dialer: Dialer::new(tls), ..Self::default() }
    }

    /// Over another network.
    pub fn over(network: Arc<dyn Reach>) -> Self {
        Self { instead: Some(network), ..Self::default() }
    }

    /// What was measured of the ways to other replicas.
    pub fn links(&self) -> &Links {
        &self.links
    }

    /// A client of the Replica service at host:port, connected.
    ///
    /// # Errors
    /// The address, or what the system said when it was tried.
    pub(crate) async fn connect(&self, address: &str) -> Result<ReplicaClient<Channel>, String> {
        let channel = match &self.instead {
            Some(network) => network.reach(address).await?,
            None => self.channel(address).await.map_err(|error| error.to_string())?,
        };
        Ok(ReplicaClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES))
    }

    async fn channel(&self, address: &str) -> Result<Channel, TlsError> {
        let endpoint = self
            .dialer
            .endpoint(address)?
            .connect_timeout(CONNECT_PATIENCE)
            .http2_keep_alive_interval(PING_INTERVAL)
            .keep_alive_timeout(PING_INTERVAL)
            .keep_alive_while_idle(true)
            .initial_stream_window_size(WINDOW_BYTES)
            .initial_connection_window_size(WINDOW_BYTES);
        self.dialer.connect(address, endpoint).await
    }
}

impl std::fmt::Debug for Peers {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Peers")
            .field("dialer", &self.dialer)
            .field("links", &self.links)
            .finish_non_exhaustive()
    }
}
