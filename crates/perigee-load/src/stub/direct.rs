//! A target that attaches to stub replicas itself, as a router would: what tokens take without a router between, so that
//! what a router adds can be told from what stubs, connections and the client take.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;
use perigee_proto::PROTOCOL_VERSION;
use perigee_proto::internal::replica_client::ReplicaClient;
use perigee_proto::internal::{
    Finish, Hello, ReplicaMessage, RouterMessage, SessionEvent, Submit, replica_message, router_message::Body,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::Streaming;
use tonic::transport::Channel;

use super::VOCABULARY;
use crate::LoadError;
use crate::target::{Ask, BoxFuture, Counts, Failure, Hear, Heard, Target};

/// Stub replicas, each over a stream of its own.
pub struct DirectTarget {
    streams: Vec<Stream>,
    next: AtomicUsize,
}

/// The stream to one stub. Dropping it ends the stream.
struct Stream {
    requests: mpsc::UnboundedSender<RouterMessage>,
    sessions: Arc<Sessions>,
}

/// Who waits for the events of which session.
type Sessions = Mutex<HashMap<String, mpsc::UnboundedSender<SessionEvent>>>;

impl DirectTarget {
    /// Attaches to every stub. Requests go to them in turn.
    ///
    /// # Errors
    /// [`LoadError::Target`] where one does not answer.
    pub async fn attach(channels: Vec<Channel>) -> Result<Self, LoadError> {
        let mut streams = Vec::new();
        for channel in channels {
            let (requests, outbox) = mpsc::unbounded_channel();
            let hello = Hello { protocol_version: PROTOCOL_VERSION, router_id: 1, lease_ms: 1000 };
            let _ = requests.send(RouterMessage { body: Some(Body::Hello(hello)) });
            let attached = ReplicaClient::new(channel).attach(UnboundedReceiverStream::new(outbox)).await;
            let messages = attached.map_err(|status| LoadError::Target(format!("Attach: {}", status.message())))?;
            let sessions = Arc::<Sessions>::default();
            tokio::spawn(distribute(messages.into_inner(), sessions.clone()));
            streams.push(Stream { requests, sessions });
        }
        if streams.is_empty() {
            return Err(LoadError::Target("there is no stub replica to attach to".to_owned()));
        }
        Ok(Self { streams, next: AtomicUsize::new(0) })
    }

    async fn generate(&self, ask: Ask<'_>, hear: Hear<'_>) -> Result<Counts, Failure> {
        let stream = &self.streams[self.next.fetch_add(1, Ordering::Relaxed) % self.streams.len()];
        let (sender, mut events) = mpsc::unbounded_channel();
        stream.sessions.lock().insert(ask.name.to_owned(), sender);
        let submit = Submit {
            sessions: vec![ask.name.to_owned()],
            epoch: 1,
            prompt: ask.dialogue.token_ids(VOCABULARY),
            max_tokens: ask.max_tokens,
            ..Submit::default()
        };
        // Where the stream is lost, no event comes.
        let _ = stream.requests.send(RouterMessage { body: Some(Body::Submit(submit)) });
        while let Some(event) = events.recv().await {
            let heard = Heard {
                tokens: u32::from(event.token.is_some()),
                ids: event.token.as_slice(),
                text: &event.text,
                ..Heard::default()
            };
            if hear(heard) == ControlFlow::Break(()) {
                break;
            }
            if event.finish() != Finish::Unspecified {
                return Ok(Counts { output: event.usage.map(|usage| usage.completion), ..Counts::default() });
            }
        }
        Err(Failure::cut_off())
    }
}

/// Gives events to whom they belong until the stream ends.
async fn distribute(mut messages: Streaming<ReplicaMessage>, sessions: Arc<Sessions>) {
    while let Ok(Some(message)) = messages.message().await {
        let Some(replica_message::Body::Batch(batch)) = message.body else { continue };
        let mut sessions = sessions.lock();
        for event in batch.events {
            let sender = match event.finish() {
                Finish::Unspecified => sessions.get(&event.session).cloned(),
                _ => sessions.remove(&event.session),
            };
            if let Some(sender) = sender {
                // Who asked may have given up.
                let _ = sender.send(event);
            }
        }
    }
    sessions.lock().clear();
}

impl Target for DirectTarget {
    fn ask<'a>(&'a self, ask: Ask<'a>, hear: Hear<'a>) -> BoxFuture<'a, Result<Counts, Failure>> {
        Box::pin(self.generate(ask, hear))
    }

    fn describe(&self) -> String {
        "stub replicas".to_owned()
    }
}
