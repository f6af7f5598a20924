//! An in-memory network: an address leads to whoever listens there. With sockets a paused clock would run ahead of what is on
//! its way.

use std::collections::HashMap;
use std::sync::Arc;

use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use perigee_registry::BoxFuture;
use perigee_router::Connect;
use perigee_worker::peers::Reach;
use tokio::io::DuplexStream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::transport::{Channel, Endpoint, Uri};

/// Bytes that may be on their way in one direction of a connection.
const WINDOW: usize = 1 << 20;

/// Where everybody listens.
#[derive(Clone, Default)]
pub(crate) struct Network {
    listeners: Arc<Mutex<HashMap<String, mpsc::UnboundedSender<DuplexStream>>>>,
}

impl Network {
    /// The connections that come to an address.
    pub(crate) fn listen(&self, address: &str) -> impl Stream<Item = std::io::Result<DuplexStream>> + use<> {
        let (sender, incoming) = mpsc::unbounded_channel();
        self.listeners.lock().insert(address.to_owned(), sender);
        UnboundedReceiverStream::new(incoming).map(Ok)
    }

    fn dial(&self, address: &str) -> Result<DuplexStream, String> {
        let (ours, theirs) = tokio::io::duplex(WINDOW);
        let listeners = self.listeners.lock();
        let listener = listeners.get(address).ok_or_else(|| format!("{address}: nobody listens"))?;
        listener.send(theirs).map_err(|_| format!("{address}: closed"))?;
        Ok(ours)
    }

    /// A connection to an address.
    pub(crate) async fn channel(&self, address: &str) -> Result<Channel, String> {
        let (network, address) = (self.clone(), address.to_owned());
        let connector = tower::service_fn(move |_: Uri| {
            let io = network.dial(&address).map(TokioIo::new).map_err(std::io::Error::other);
            async move { io }
        });
        let endpoint = Endpoint::from_static("http://memory");
        endpoint.connect_with_connector(connector).await.map_err(|error| error.to_string())
    }
}

impl Connect for Network {
    fn connect<'a>(&'a self, address: &'a str) -> BoxFuture<'a, Result<Channel, String>> {
        Box::pin(self.channel(address))
    }
}

impl Reach for Network {
    fn reach<'a>(&'a self, address: &'a str) -> BoxFuture<'a, Result<Channel, String>> {
        Box::pin(self.channel(address))
    }
}
