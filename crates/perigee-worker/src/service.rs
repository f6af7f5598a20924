//! `perigee.internal.v1.Replica` on a leader: one task for each attached router, between its stream and the engine's
//! handle. Where the stream ends or the router is silent for its lease, its sessions are aborted; what they are, and how
//! they are stepped, is the engine's affair.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use perigee_engine::request::{RouterId, SessionId};
use perigee_engine::{EngineHandle, EngineHealth};
use perigee_proto::internal::replica_server::Replica;
use perigee_proto::internal::{
    AttendAnswer, AttendQuery, EventBatch, Flushed, HandoffChunk, HandoffResult, Hello, MovePhase, MoveReport,
    ReplicaMessage, RouterMessage, Sessions, Submit, replica_message, router_message,
};
use perigee_proto::status::{ErrorKind, WireError};
use perigee_proto::{PROTOCOL_VERSION, ids};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::convert;
use crate::identity::ReplicaIdentity;

/// How long a router may take to say hello.
const HELLO_PATIENCE: Duration = Duration::from_secs(5);
/// Load goes out at least this often; routers are promised twice a second.
const LOAD_INTERVAL: Duration = Duration::from_millis(400);
/// Messages that may wait for a router to read them, some seconds of steps; one that is slower is cut off.
const OUTBOX_MESSAGES: usize = 1024;
/// Leases that routers may ask for.
const SHORTEST_LEASE_MS: u32 = 100;
const LONGEST_LEASE_MS: u32 = 3_600_000;

/// The service of one leader.
#[derive(Debug, Clone)]
pub(crate) struct ReplicaService {
    engine: EngineHandle,
    identity: Arc<ReplicaIdentity>,
    next_stream: Arc<AtomicU64>,
}

impl ReplicaService {
    pub(crate) fn new(engine: EngineHandle, identity: Arc<ReplicaIdentity>) -> Self {
        Self { engine, identity, next_stream: Arc::default() }
    }
}

#[tonic::async_trait]
impl Replica for ReplicaService {
    type AttachStream = ReceiverStream<Result<ReplicaMessage, Status>>;
    type AttendStream = ReceiverStream<Result<AttendAnswer, Status>>;

    async fn attach(&self, request: Request<Streaming<RouterMessage>>) -> Result<Response<Self::AttachStream>, Status> {
        let mut messages = request.into_inner();
        let hello = read_hello(&mut messages).await?;
        let (outbox, out) = mpsc::channel(OUTBOX_MESSAGES);
        let lease_ms = hello.lease_ms.clamp(SHORTEST_LEASE_MS, LONGEST_LEASE_MS);
        let stream = RouterStream {
            engine: self.engine.clone(),
            // Not the router's own id: a second stream of the same router must not end with the first.
            id: RouterId(self.next_stream.fetch_add(1, Ordering::Relaxed)),
            outbox,
            lease: Duration::from_millis(lease_ms.into()),
        };
        let router = ids::RouterId(hello.router_id);
        let welcome = replica_message::Body::Welcome(self.identity.welcome());
        tokio::spawn(async move {
            tracing::info!(%router, "router attached");
            let why = stream.run(messages, welcome).await;
            tracing::info!(%router, why, "router detached");
        });
        Ok(Response::new(ReceiverStream::new(out)))
    }

    async fn handoff(&self, _: Request<Streaming<HandoffChunk>>) -> Result<Response<HandoffResult>, Status> {
        Err(unimplemented("Handoff").into())
    }

    async fn attend(&self, _: Request<Streaming<AttendQuery>>) -> Result<Response<Self::AttendStream>, Status> {
        Err(unimplemented("Attend").into())
    }
}

fn unimplemented(what: &str) -> WireError {
    WireError::new(ErrorKind::Unimplemented, format!("{what} is not offered by this version"))
}

async fn read_hello(messages: &mut Streaming<RouterMessage>) -> Result<Hello, Status> {
    let refuse = |message: String| WireError::new(ErrorKind::FailedPrecondition, message);
    let first = tokio::time::timeout(HELLO_PATIENCE, messages.message())
        .await
        .map_err(|_| refuse(format!("no hello within {HELLO_PATIENCE:?}")))??;
    let Some(router_message::Body::Hello(hello)) = first.and_then(|message| message.body) else {
        return Err(refuse("the first message must be hello".to_owned()).into());
    };
    if hello.protocol_version != PROTOCOL_VERSION {
        let theirs = hello.protocol_version;
        let message = format!("the router speaks version {theirs} of the protocol, this replica {PROTOCOL_VERSION}");
        return Err(refuse(message).into());
    }
    Ok(hello)
}

/// One router's stream.
struct RouterStream {
    engine: EngineHandle,
    id: RouterId,
    outbox: mpsc::Sender<Result<ReplicaMessage, Status>>,
    lease: Duration,
}

impl Drop for RouterStream {
    fn drop(&mut self) {
        self.engine.detach(self.id);
    }
}

/// Why a stream ends.
type Ended = &'static str;

impl RouterStream {
    /// Carries messages until the stream ends, and says why it did.
    async fn run(self, mut messages: Streaming<RouterMessage>, welcome: replica_message::Body) -> Ended {
        let mut events = self.engine.attach(self.id);
        if let Err(ended) = self.send(welcome) {
            return ended;
        }
        let mut heard = Instant::now();
        let mut told = Instant::now();
        loop {
            let result = tokio::select! {
                // After a stall of this process, what has arrived counts before the clock.
                biased;
                message = messages.message() => match message {
                    Ok(Some(message)) => {
                        heard = Instant::now();
                        self.take(message)
                    }
                    Ok(None) | Err(_) => Err("the router closed the stream"),
                },
                batch = events.recv() => match batch {
                    Some(batch) => {
                        told = Instant::now();
                        self.send(replica_message::Body::Batch(convert::batch(batch, self.draining())))
                    }
                    None => Err("the engine ended"),
                },
                // The engine tells its load too, but not in the middle of a long step.
                () = tokio::time::sleep_until(told + LOAD_INTERVAL) => {
                    told = Instant::now();
                    let load = Some(convert::load(self.engine.load(), self.draining()));
                    self.send(replica_message::Body::Batch(EventBatch { events: Vec::new(), load }))
                }
                () = self.outbox.closed() => Err("the router closed the stream"),
                () = tokio::time::sleep_until(heard + self.lease) => Err("the router was silent for its lease"),
            };
            if let Err(ended) = result {
                return ended;
            }
        }
    }

    fn draining(&self) -> bool {
        *self.engine.health().borrow() != EngineHealth::Serving
    }

    fn send(&self, body: replica_message::Body) -> Result<(), Ended> {
        send(&self.outbox, body)
    }

    fn take(&self, message: RouterMessage) -> Result<(), Ended> {
        use router_message::Body;
        match message.body {
            Some(Body::Renew(_)) | None => Ok(()),
            Some(Body::Hello(_)) => Err("the router said hello twice"),
            Some(Body::Submit(submit)) => self.submit(submit),
            Some(Body::Abort(abort)) => {
                for session in abort.sessions {
                    self.engine.abort(SessionId(session));
                }
                Ok(())
            }
            Some(Body::ListSessions(question)) => {
                let (engine, outbox) = (self.engine.clone(), self.outbox.clone());
                // The answer waits for a step; messages and events must not wait with it.
                tokio::spawn(async move {
                    let sessions = engine.sessions().await.into_iter().map(convert::session).collect();
                    let answer = Sessions { call: question.call, sessions };
                    // A router that is gone needs no answer.
                    let _ = send(&outbox, replica_message::Body::Sessions(answer));
                });
                Ok(())
            }
            Some(Body::Flush(question)) => {
                let (engine, outbox) = (self.engine.clone(), self.outbox.clone());
                tokio::spawn(async move {
                    engine.flush_cache().await;
                    let _ = send(&outbox, replica_message::Body::Flushed(Flushed { call: question.call }));
                });
                Ok(())
            }
            Some(Body::Prepare(prepare)) => self.refuse_move(prepare.session, prepare.epoch),
            Some(Body::Start(start)) => self.refuse_move(start.session, start.epoch),
            Some(Body::Release(release)) => self.refuse_move(release.session, release.epoch),
            Some(Body::AbortMove(abort)) => self.refuse_move(abort.session, abort.epoch),
        }
    }

    fn submit(&self, submit: Submit) -> Result<(), Ended> {
        let names = submit.sessions.clone();
        let submitted = convert::request(submit, std::time::Instant::now())
            .and_then(|request| self.engine.submit(self.id, request));
        match submitted {
            Ok(()) => Ok(()),
            Err(refused) => self.send(replica_message::Body::Refused(convert::refused(names, refused))),
        }
    }

    fn refuse_move(&self, session: String, epoch: u64) -> Result<(), Ended> {
        let error = unimplemented("moving a session");
        self.send(replica_message::Body::MoveReport(MoveReport {
            session,
            epoch,
            phase: MovePhase::Failed.into(),
            code: error.kind.grpc_code() as i32,
            message: error.message,
            ..MoveReport::default()
        }))
    }
}

/// Never waits: a router that does not read must not hold up anything.
fn send(outbox: &mpsc::Sender<Result<ReplicaMessage, Status>>, body: replica_message::Body) -> Result<(), Ended> {
    let message = ReplicaMessage { body: Some(body) };
    outbox.try_send(Ok(message)).map_err(|_| "the router does not read its messages")
}
