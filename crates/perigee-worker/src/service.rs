//! `perigee.internal.v1.Replica` on a leader: one task for each attached router, between its stream and the engine's
//! handle. Where the stream ends or the router's lease runs out, its sessions are aborted; what they are, and how
//! they are stepped, is the engine's affair.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use perigee_engine::request::{RefusedRequest, RouterId, SessionId};
use perigee_engine::{EngineHandle, EngineHealth};
use perigee_proto::internal::replica_server::Replica;
use perigee_proto::internal::{
    AttendAnswer, AttendQuery, EventBatch, FetchPagesRequest, Flushed, HandoffChunk, HandoffResult, Hello,
    KeepHomesAnswer, KeepHomesRequest, Links as LinksMessage, PageChunk, Prepare, ReplicaMessage, RouterMessage,
    Sessions, Submit, replica_message, router_message,
};
use perigee_proto::status::{ErrorKind, WireError};
use perigee_proto::{PROTOCOL_VERSION, ids};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::attend::{HomeServices, answer_channel};
use crate::compile::{Compiling, Ready, Turns};
use crate::identity::ReplicaIdentity;
use crate::lease::Lease;
use crate::links::Links;
use crate::metrics::WorkerMetrics;
use crate::{convert, handoff, leases, move_report};

/// How long a router may take to say hello.
const HELLO_PATIENCE: Duration = Duration::from_secs(5);
/// Load goes out at least this often; routers are promised twice a second.
const LOAD_INTERVAL: Duration = Duration::from_millis(400);
/// What is measured of ways to other replicas goes out at most this often.
const LINKS_INTERVAL: Duration = Duration::from_secs(1);
/// Messages that may wait for a router to read them, some seconds of steps; one that is slower is cut off.
const OUTBOX_MESSAGES: usize = 1024;
/// Leases that routers may ask for.
const SHORTEST_LEASE_MS: u32 = 100;
const LONGEST_LEASE_MS: u32 = 3_600_000;

/// The service of one leader.
#[derive(Clone)]
pub(crate) struct ReplicaService {
    engine: EngineHandle,
    identity: Arc<ReplicaIdentity>,
    /// None where this replica keeps nothing for others.
    homes: Option<HomeServices>,
    measures: Measures,
    /// Where the order to drain is passed on.
    drain: watch::Sender<bool>,
    next_stream: Arc<AtomicU64>,
    /// For making grammars.
    turns: Turns,
}

/// What routers are told of beside the engine's own load.
#[derive(Clone)]
pub(crate) struct Measures {
    /// Knows how long steps take.
    pub(crate) metrics: WorkerMetrics,
    /// Ways to other replicas.
    pub(crate) links: Links,
}

impl ReplicaService {
    pub(crate) fn new(
        engine: EngineHandle,
        identity: Arc<ReplicaIdentity>,
        homes: Option<HomeServices>,
        measures: Measures,
        drain: watch::Sender<bool>,
    ) -> Self {
        Self { engine, identity, homes, measures, drain, next_stream: Arc::default(), turns: Turns::default() }
    }
}

#[tonic::async_trait]
impl Replica for ReplicaService {
    type AttachStream = ReceiverStream<Result<ReplicaMessage, Status>>;
    type AttendStream = ReceiverStream<Result<AttendAnswer, Status>>;
    type FetchPagesStream = ReceiverStream<Result<PageChunk, Status>>;

    async fn attach(&self, request: Request<Streaming<RouterMessage>>) -> Result<Response<Self::AttachStream>, Status> {
        let mut messages = request.into_inner();
        let hello = read_hello(&mut messages).await?;
        let (outbox, out) = mpsc::channel(OUTBOX_MESSAGES);
        let lease_ms = hello.lease_ms.clamp(SHORTEST_LEASE_MS, LONGEST_LEASE_MS);
        let stream = RouterStream {
            engine: self.engine.clone(),
            measures: self.measures.clone(),
            links_told: (0, Instant::now()),
            drain: self.drain.clone(),
            // Not the router's own id: a second stream of the same router must not end with the first.
            id: RouterId(self.next_stream.fetch_add(1, Ordering::Relaxed)),
            outbox,
            compiling: Compiling::new(self.turns.clone()),
            lease: Lease::new(Duration::from_millis(lease_ms.into()), Instant::now()),
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

    async fn handoff(&self, request: Request<Streaming<HandoffChunk>>) -> Result<Response<HandoffResult>, Status> {
        handoff::receive(&self.engine, &self.identity, request).await.map(Response::new)
    }

    async fn attend(&self, request: Request<Streaming<AttendQuery>>) -> Result<Response<Self::AttendStream>, Status> {
        let pool = self.homes.as_ref().map(|homes| homes.attend.clone()).ok_or_else(no_homes)?;
        let (answers, out) = answer_channel();
        let mut health = self.engine.health();
        tokio::spawn(async move {
            let has_ended =
                |health: &EngineHealth| matches!(health, EngineHealth::Stopped | EngineHealth::Failed { .. });
            let ended = async {
                // An error means that the engine's thread is gone.
                let _ = health.wait_for(has_ended).await;
            };
            pool.serve(request.into_inner(), answers, ended).await;
        });
        Ok(Response::new(ReceiverStream::new(out)))
    }

    async fn fetch_pages(
        &self,
        request: Request<FetchPagesRequest>,
    ) -> Result<Response<Self::FetchPagesStream>, Status> {
        let request = request.into_inner();
        leases::check_run(&self.identity, request.home.as_ref())?;
        let giver = self.homes.as_ref().and_then(|homes| homes.giver.as_ref()).ok_or_else(no_homes)?;
        giver.give(request).map(|chunks| Response::new(ReceiverStream::new(chunks)))
    }

    async fn keep_homes(&self, request: Request<KeepHomesRequest>) -> Result<Response<KeepHomesAnswer>, Status> {
        let request = request.into_inner();
        leases::check_run(&self.identity, request.home.as_ref())?;
        let homes = self.homes.as_ref().ok_or_else(no_homes)?;
        Ok(Response::new(leases::keep(&self.engine, &homes.directory, request)))
    }
}

fn no_homes() -> Status {
    let message = "this replica's device keeps no latents for other replicas";
    WireError::new(ErrorKind::Unimplemented, message).into()
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
    measures: Measures,
    /// How many measurements of ways to other replicas the router knows, and when they may be told again.
    links_told: (u64, Instant),
    drain: watch::Sender<bool>,
    id: RouterId,
    outbox: mpsc::Sender<Result<ReplicaMessage, Status>>,
    compiling: Compiling,
    lease: Lease,
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
    async fn run(mut self, mut messages: Streaming<RouterMessage>, welcome: replica_message::Body) -> Ended {
        let mut events = self.engine.attach(self.id);
        self.engine.renew(self.id, self.lease.until().into_std());
        if let Err(ended) = self.send(welcome) {
            return ended;
        }
        let mut told = Instant::now();
        let tell_every = LOAD_INTERVAL.min(self.lease.tell_every());
        loop {
            let result = tokio::select! {
                // After a stall of this process, what has arrived counts before the clock.
                biased;
                message = messages.message() => match message {
                    Ok(Some(message)) => self.take(message),
                    Ok(None) | Err(_) => Err("the router closed the stream"),
                },
                batch = events.recv() => match batch {
                    Some(batch) => {
                        told = Instant::now();
                        convert::messages(batch, self.draining()).into_iter().try_for_each(|body| self.send(body))
                    }
                    None => Err("the engine ended, or its lease ran out"),
                },
                // The engine tells its load too, but not in the middle of a long step.
                () = tokio::time::sleep_until(told + tell_every) => {
                    told = Instant::now();
                    let load = Some(convert::load(self.engine.load(), self.draining()));
                    self.send(replica_message::Body::Batch(EventBatch { load, ..EventBatch::default() }))
                }
                ready = self.compiling.next() => self.take_compiled(ready),
                () = self.outbox.closed() => Err("the router closed the stream"),
                () = tokio::time::sleep_until(self.lease.until()) => Err("its lease ran out"),
            };
            if let Err(ended) = result.and_then(|()| self.tell_links()) {
                return ended;
            }
        }
    }

    fn draining(&self) -> bool {
        *self.engine.health().borrow() != EngineHealth::Serving
    }

    fn send(&self, mut body: replica_message::Body) -> Result<(), Ended> {
        if let replica_message::Body::Batch(batch) = &mut body {
            batch.clock = self.lease.clock(Instant::now());
            if let Some(load) = &mut batch.load {
                let pace = self.measures.metrics.pace();
                (load.decode_ms, load.prompt_token_ms) = (pace.decode_ms(), pace.prompt_token_ms());
            }
        }
        send(&self.outbox, body)
    }

    /// Tells what is new of the ways to other replicas, now and then.
    fn tell_links(&mut self) -> Result<(), Ended> {
        let (known, again) = self.links_told;
        let (links, now) = (&self.measures.links, Instant::now());
        let count = links.count();
        if count == known || now < again {
            return Ok(());
        }
        self.links_told = (count, now + LINKS_INTERVAL);
        self.send(replica_message::Body::Links(LinksMessage { links: links.told() }))
    }

    fn take(&mut self, message: RouterMessage) -> Result<(), Ended> {
        use router_message::Body;
        match message.body {
            None => Ok(()),
            Some(Body::Renew(renew)) => {
                self.lease.renew(renew.clock, Instant::now());
                self.engine.renew(self.id, self.lease.until().into_std());
                Ok(())
            }
            Some(Body::Hello(_)) => Err("the router said hello twice"),
            Some(Body::Submit(submit)) => self.submit(submit),
            Some(Body::Abort(abort)) => {
                for session in abort.sessions {
                    if !self.compiling.abort(&session, abort.epoch) {
                        self.engine.abort(SessionId(session), abort.epoch);
                    }
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
            Some(Body::Drain(_)) => {
                self.drain.send_replace(true);
                Ok(())
            }
            Some(Body::Prepare(prepare)) => self.prepare(prepare),
            Some(Body::Start(start)) => {
                self.engine.start(self.id, SessionId(start.session), start.epoch);
                Ok(())
            }
            Some(Body::Release(release)) => {
                self.engine.release(self.id, SessionId(release.session), release.epoch, release.owner_epoch);
                Ok(())
            }
            Some(Body::AbortMove(abort)) => {
                self.engine.abort_move(self.id, SessionId(abort.session), abort.next_epoch, abort.epoch);
                Ok(())
            }
        }
    }

    fn submit(&mut self, mut submit: Submit) -> Result<(), Ended> {
        let names = submit.sessions.clone();
        let grammar = submit.grammar.take().map(convert::grammar_source).transpose();
        let request = convert::request(submit, std::time::Instant::now());
        let submitted = match (request, grammar) {
            (Ok(request), Ok(None)) => self.engine.submit(self.id, request),
            (Ok(request), Ok(Some(source))) => self.compiling.begin(&self.engine, request, source),
            (Err(refused), _) | (_, Err(refused)) => Err(refused),
        };
        self.answer(names, submitted)
    }

    /// A request's grammar was made: it goes the way of others now.
    fn take_compiled(&self, ready: Ready) -> Result<(), Ended> {
        let submitted = ready.request.and_then(|request| self.engine.submit(self.id, request));
        self.answer(ready.sessions, submitted)?;
        for (session, epoch) in ready.aborts {
            self.engine.abort(session, epoch);
        }
        Ok(())
    }

    fn answer(&self, names: Vec<String>, submitted: Result<(), RefusedRequest>) -> Result<(), Ended> {
        match submitted {
            Ok(()) => Ok(()),
            Err(refused) => self.send(replica_message::Body::Refused(convert::refused(names, refused))),
        }
    }

    fn prepare(&self, prepare: Prepare) -> Result<(), Ended> {
        match move_report::order(prepare) {
            Ok(order) => {
                self.engine.prepare(self.id, order);
                Ok(())
            }
            Err(refused) => self.send(replica_message::Body::MoveReport(*refused)),
        }
    }
}

/// Never waits: a router that does not read must not hold up anything.
fn send(outbox: &mpsc::Sender<Result<ReplicaMessage, Status>>, body: replica_message::Body) -> Result<(), Ended> {
    let message = ReplicaMessage { body: Some(body) };
    outbox.try_send(Ok(message)).map_err(|_| "the router does not read its messages")
}
