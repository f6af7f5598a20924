//! The stream to one replica's leader: connects, says who attaches, takes in what the leader sends, keeps the lease, and
//! notices silence. It comes back with growing pauses; what the messages mean for requests is the relay's business.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use perigee_proto::PROTOCOL_VERSION;
use perigee_proto::ids::RouterId;
use perigee_proto::internal::{Hello, Renew, RouterMessage, Welcome, replica_message, router_message};
use perigee_registry::{BoxFuture, ReplicaRecord};
use perigee_tls::{Dialer, with_causes};
use prost::DecodeError;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::Instant;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::Channel;
use tonic::{Request, Status, Streaming};

use crate::attachment::{Attachment, Identity};
use crate::batch::{AttachCodec, Batch, Contents, Inbound};
use crate::relay::Relay;
use crate::replicas::Replicas;

/// Largest message from a leader: log-probabilities of the longest prompt.
const MAX_MESSAGE_BYTES: usize = 64 << 20;
/// Pauses between attempts to connect.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// Bytes from which on a batch is a large one, of some 16 events.
const LARGE_BATCH: usize = 768;

/// The call by which a router attaches.
const ATTACH: &str = "/perigee.internal.v1.Replica/Attach";

/// How to reach an address: TCP in production, something else under a simulated network.
pub trait Connect: Send + Sync {
    /// Opens a connection to host:port, or says why that failed.
    fn connect<'a>(&'a self, address: &'a str) -> BoxFuture<'a, Result<Channel, String>>;
}

/// Connects over TCP, with TLS where the dialer has it.
#[derive(Debug, Clone, Default)]
pub struct TcpConnector(pub Dialer);

impl Connect for TcpConnector {
    fn connect<'a>(&'a self, address: &'a str) -> BoxFuture<'a, Result<Channel, String>> {
        Box::pin(async move {
            let endpoint = self.0.endpoint(address).map_err(|error| error.to_string())?;
            let endpoint = endpoint.initial_stream_window_size(1 << 20);
            self.0.connect(address, endpoint).await.map_err(|error| error.to_string())
        })
    }
}

/// What all clients of a router share.
pub(crate) struct ClientContext {
    pub(crate) connector: Arc<dyn Connect>,
    pub(crate) replicas: Arc<Replicas>,
    pub(crate) relay: Arc<Relay>,
    pub(crate) router: RouterId,
    pub(crate) lease: Duration,
    pub(crate) next_attachment: AtomicU64,
    /// Who takes in a large batch; one for each thread.
    pub(crate) turns: Semaphore,
}

/// Keeps a stream to a replica until `leaving` says that the registry lost it and the stream has ended.
pub(crate) async fn keep_attached(context: Arc<ClientContext>, record: ReplicaRecord, leaving: watch::Receiver<bool>) {
    let mut pause = FIRST_PAUSE;
    let mut told = false;
    while !*leaving.borrow() {
        match attach(&context, &record).await {
            Ok(stream) => {
                pause = FIRST_PAUSE;
                told = false;
                tracing::info!(replica = record.replica, "replica attached");
                let why = stream.run(&context).await;
                tracing::warn!(replica = record.replica, why, "replica lost");
            }
            // The first failure says it all; the next ones are the same.
            Err(why) if !told => {
                told = true;
                tracing::warn!(replica = record.replica, why, "replica not reached, trying on");
            }
            Err(why) => tracing::debug!(replica = record.replica, why, "replica not reached"),
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// A stream whose leader said welcome. Dropping it, for whatever reason, ends what runs there.
struct LiveStream {
    attachment: Arc<Attachment>,
    messages: Streaming<Inbound>,
    guard: LossGuard,
}

struct LossGuard {
    attachment: Arc<Attachment>,
    replicas: Arc<Replicas>,
    relay: Arc<Relay>,
    why: &'static str,
}

impl Drop for LossGuard {
    fn drop(&mut self) {
        // Closed first: no request may join a stream whose requests are being ended.
        self.attachment.close();
        self.replicas.detach(&self.attachment.identity.replica, self.attachment.id);
        self.relay.lost(&self.attachment, self.why);
    }
}

/// Connects and exchanges hello and welcome, all within the lease.
async fn attach(context: &ClientContext, record: &ReplicaRecord) -> Result<LiveStream, String> {
    let (outbox, inbox) = mpsc::unbounded_channel();
    let exchange = async {
        let channel = context.connector.connect(&record.internal).await?;
        let mut client = Grpc::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES);
        let lease_ms = u32::try_from(context.lease.as_millis()).unwrap_or(u32::MAX);
        let hello = Hello { protocol_version: PROTOCOL_VERSION, router_id: context.router.0, lease_ms };
        let hello = RouterMessage { body: Some(router_message::Body::Hello(hello)) };
        outbox.send(hello).map_err(|_| "the stream closed".to_owned())?;
        client.ready().await.map_err(|error| with_causes(&error.to_string(), &error))?;
        let call = Request::new(UnboundedReceiverStream::new(inbox));
        let response = client.streaming(call, PathAndQuery::from_static(ATTACH), AttachCodec).await;
        let refused = |status: Status| with_causes(status.message(), &status);
        let mut messages = response.map_err(refused)?.into_inner();
        let first = match messages.message().await.map_err(refused)? {
            Some(Inbound::Other(message)) => message.body,
            _ => None,
        };
        match first {
            Some(replica_message::Body::Welcome(welcome)) => Ok((messages, welcome)),
            _ => Err("its first message is not a welcome".to_owned()),
        }
    };
    let silent = |_| format!("no welcome within {:?}", context.lease);
    let (messages, welcome) = tokio::time::timeout(context.lease, exchange).await.map_err(silent)??;
    let identity = identify(welcome, record)?;
    let id = context.next_attachment.fetch_add(1, Ordering::Relaxed);
    let attachment = Arc::new(Attachment::new(id, identity, outbox));
    let guard = LossGuard {
        attachment: attachment.clone(),
        replicas: context.replicas.clone(),
        relay: context.relay.clone(),
        why: "its stream broke",
    };
    Ok(LiveStream { attachment, messages, guard })
}

/// Who answered, if it is who was asked for.
fn identify(welcome: Welcome, record: &ReplicaRecord) -> Result<Identity, String> {
    if welcome.protocol_version != PROTOCOL_VERSION {
        let theirs = welcome.protocol_version;
        return Err(format!("it speaks version {theirs} of the protocol, this router {PROTOCOL_VERSION}"));
    }
    let other_incarnation = !record.incarnation.is_empty() && welcome.incarnation != record.incarnation;
    if welcome.replica != record.replica || other_incarnation {
        let (name, incarnation) = (&welcome.replica, &welcome.incarnation);
        return Err(format!("{} answers as replica {name} of incarnation {incarnation}", record.internal));
    }
    let model = welcome.model.ok_or("its welcome names no model")?;
    if !record.digest.is_empty() && model.digest != record.digest {
        return Err(format!("it serves model {}, its record says {}", model.digest, record.digest));
    }
    Ok(Identity {
        replica: welcome.replica.into(),
        incarnation: welcome.incarnation,
        model: Arc::new(model.into()),
        tp: welcome.tp,
        device: welcome.device,
        pids: welcome.pids,
        weight_bytes: welcome.weight_bytes,
        step_tokens: welcome.step_tokens,
        move_costs: welcome.move_costs,
    })
}

impl LiveStream {
    /// Reads until the stream breaks or is silent for the lease, and says which. The replica counts as attached from its
    /// first load on: before that, nobody knows whether it has room.
    async fn run(mut self, context: &ClientContext) -> &'static str {
        let mut heard = Instant::now();
        // What the leader's lease runs from, and when it was last told so.
        let mut clock = 0;
        let mut renewed = heard;
        let mut known = false;
        // One timer, set anew when it rings: most of a thousand messages a second find it as it is.
        let mut alarm = pin!(tokio::time::sleep_until(renewed + context.lease / 8));
        let why = loop {
            // Here, because a leader that always has something to say leaves the clock below no turn.
            if renewed.elapsed() >= context.lease / 8 {
                renewed = Instant::now();
                if self.attachment.send(router_message::Body::Renew(Renew { clock })).is_err() {
                    break "its stream broke";
                }
            }
            tokio::select! {
                // After a stall of this process, what has arrived counts before the clock.
                biased;
                message = self.messages.message() => match message {
                    Ok(Some(Inbound::Batch(batch))) => {
                        heard = Instant::now();
                        let Ok(taken) = self.take_batch(context, &batch, heard).await else { break "its stream broke" };
                        clock = taken.clock;
                        if taken.has_load && !known {
                            known = true;
                            context.replicas.attach(&self.attachment.identity.replica, self.attachment.clone());
                        }
                    }
                    Ok(Some(Inbound::Other(message))) => {
                        heard = Instant::now();
                        self.take(context, message.body, heard);
                    }
                    Ok(None) | Err(_) => break "its stream broke",
                },
                () = &mut alarm => {
                    let (now, silent) = (Instant::now(), heard + context.lease);
                    if now >= silent {
                        break "it was silent for its lease";
                    }
                    alarm.as_mut().reset(silent.min(now + context.lease / 8));
                }
            }
        };
        self.guard.why = why;
        why
    }

    /// Takes in a batch of events. A large one waits for its turn, which lasts until those that it woke have run: of batches
    /// that came together, the first leaves before the last is taken in, not all after that.
    async fn take_batch(&self, context: &ClientContext, batch: &Batch, now: Instant) -> Result<Taken, DecodeError> {
        let is_large = batch.len() >= LARGE_BATCH;
        // It is never closed.
        let _turn = if is_large { context.turns.acquire().await.ok() } else { None };
        let Contents { events, load, clock } = batch.read()?;
        context.relay.deliver(&self.attachment, events, now);
        if load.is_some_and(|load| self.attachment.set_load(load)) {
            context.replicas.reconsider();
        }
        if is_large {
            tokio::task::yield_now().await;
        }
        Ok(Taken { has_load: load.is_some(), clock })
    }

    /// Takes in any other message.
    fn take(&self, context: &ClientContext, body: Option<replica_message::Body>, now: Instant) {
        use replica_message::Body;
        match body {
            Some(Body::Refused(refused)) => context.relay.refused(&self.attachment, &refused),
            Some(Body::Sessions(sessions)) => self.attachment.answer_sessions(sessions.call, sessions.sessions),
            Some(Body::Flushed(flushed)) => self.attachment.answer_flush(flushed.call),
            Some(Body::MoveReport(report)) => context.relay.reported(&self.attachment, &report, now),
            Some(Body::Links(links)) => self.attachment.set_links(links.links),
            Some(Body::Batch(_) | Body::Welcome(_)) | None => {
                tracing::debug!(replica = &*self.attachment.identity.replica, "message that nothing waits for");
            }
        }
    }
}

/// What a batch said beside its events.
struct Taken {
    has_load: bool,
    clock: u64,
}
