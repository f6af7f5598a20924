//! What goes to other replicas beside the steps, a task for each, and the target's side of a handoff. Here are handoffs:
//! chunks leave for the target, its answer comes back; `pages` and `leases` have what homes are asked and told. What is in the chunks is perigee-migration's business, and whether a session
//! moves at all the engine's.

use std::future::Future;
use std::time::Duration;

use perigee_engine::EngineHandle;
use perigee_engine::moves::{Fetching, HandoffConnector, HandoffRefused, HomeNote, Incoming, Outgoing, Target};
use perigee_engine::remote::RemoteHome;
use perigee_proto::internal::{HandoffAnswer, HandoffChunk, HandoffResult, ReplicaRun, handoff_answer};
use perigee_proto::status::{ErrorKind, WireError};
use perigee_trace::{TRACEPARENT, TraceContext, Traced};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::{AsciiMetadataValue, MetadataMap};
use tonic::{Code, Request, Status, Streaming};
use tracing::field::Empty;

use crate::identity::ReplicaIdentity;
use crate::peers::Peers;
use crate::{leases, move_report, pages};

/// Chunks between the encoder and the connection: enough to keep it busy, little enough that no session is in memory twice.
const CHUNKS_IN_FLIGHT: usize = 4;
/// Answers to one handoff that may wait for its source: there are two.
const ANSWERS: usize = 2;
/// While the connection takes nothing, a handoff that is called off is noticed that soon.
const CANCEL_CHECK: Duration = Duration::from_millis(20);
/// A source that sends nothing for that long is gone. The engine gives the session up before; this ends the call.
const CHUNK_PATIENCE: Duration = Duration::from_secs(30);
/// For which run of which replica a handoff is. An address alone may belong to another one by now.
const TARGET_REPLICA: &str = "perigee-target";
const TARGET_INCARNATION: &str = "perigee-target-incarnation";

/// Answers to one handoff.
pub(crate) type AnswerStream = ReceiverStream<Result<HandoffAnswer, Status>>;

/// Carries handoffs to other replicas over gRPC.
#[derive(Debug, Clone)]
pub struct GrpcConnector {
    runtime: Handle,
    peers: Peers,
    /// This run of this replica.
    run: ReplicaRun,
}

impl GrpcConnector {
    /// Tasks run on `runtime`, for run `incarnation` of replica `replica`.
    pub fn new(runtime: Handle, peers: Peers, replica: &str, incarnation: &str) -> Self {
        let run = ReplicaRun { replica: replica.to_owned(), incarnation: incarnation.to_owned() };
        Self { runtime, peers, run }
    }
}

impl HandoffConnector for GrpcConnector {
    fn open(&self, target: Target, mut outgoing: Outgoing) {
        let peers = self.peers.clone();
        self.runtime.spawn(async move {
            match carry(&peers, &target, &mut outgoing).await {
                Some(answer) => outgoing.answer(answer),
                // Nobody waits for an answer to what was called off.
                None => drop(outgoing),
            }
        });
    }

    fn fetch(&self, home: &RemoteHome, fetching: Fetching) {
        let (peers, home, own) = (self.peers.clone(), home.clone(), self.run.clone());
        self.runtime.spawn(async move { pages::fetch(&peers, own, &home, fetching).await });
    }

    fn tell(&self, home: &RemoteHome, note: HomeNote) {
        let (peers, home, own) = (self.peers.clone(), home.clone(), self.run.clone());
        self.runtime.spawn(async move { leases::tell(&peers, own, &home, note).await });
    }
}

/// Sends what the engine hands out and returns the target's answer, or why there is none. None: the handoff was called off,
/// and so was the call.
async fn carry(peers: &Peers, target: &Target, outgoing: &mut Outgoing) -> Option<Result<Vec<u64>, String>> {
    // The call ends with the body's None only. If this task gives up before, the body waits until the call is reset, so that
    // the target can take half a handoff for a whole one under no circumstances.
    let (chunks, body) = mpsc::channel::<Option<HandoffChunk>>(CHUNKS_IN_FLIGHT);
    let mut on_room = outgoing.on_room();
    let trace = outgoing.trace().map(ToString::to_string).and_then(|trace| trace.parse().ok());
    let body = ReceiverStream::new(body).chain(tokio_stream::pending()).map_while(|chunk| chunk);
    let call = async {
        let mut client = peers.connect(&target.endpoint).await?;
        let mut request = Request::new(body);
        address(request.metadata_mut(), target)?;
        if let Some(trace) = trace {
            request.metadata_mut().insert(TRACEPARENT, trace);
        }
        let refused = |status: Status| refusal(target, &status);
        let mut answers = client.handoff(request).await.map_err(refused)?.into_inner();
        while let Some(answer) = answers.message().await.map_err(refused)? {
            match answer.body {
                Some(handoff_answer::Body::Room(room)) => {
                    if let Some(on_room) = on_room.take() {
                        // A handoff that is called off needs no room.
                        let _ = on_room.send(move_report::room(&room));
                    }
                }
                Some(handoff_answer::Body::Result(result)) => return Ok(result),
                None => {}
            }
        }
        Err(format!("{} ended the handoff without an answer", target.replica))
    };
    let session = outgoing.session().0.clone();
    let answer = {
        tokio::pin!(call);
        let early = tokio::select! {
            answer = &mut call => Err(answer),
            sent = send(outgoing, &chunks) => Ok(sent?),
        };
        match early {
            Err(answer) => answer,
            Ok(Sent { bytes, time }) => {
                let waits = Instant::now();
                let answer = call.await;
                if answer.is_ok() {
                    peers.links().carried(&target.replica, bytes, time + waits.elapsed());
                }
                answer
            }
        }
    };
    Some(answer.and_then(|result| match result.session == session {
        true => Ok(result.digests),
        false => Err(format!("{} answered for session {}", target.replica, result.session)),
    }))
}

/// What a handoff came to on its way out.
#[derive(Default)]
struct Sent {
    bytes: u64,
    /// How long the connection took; not how long the engine took to hand it in.
    time: Duration,
}

/// Everything that is to be sent, then the mark of a good end. None if it was called off.
async fn send(outgoing: &mut Outgoing, chunks: &mpsc::Sender<Option<HandoffChunk>>) -> Option<Sent> {
    let mut sent = Sent::default();
    let mut demand = Some(move_report::demand(outgoing.demand()));
    while let Some(data) = outgoing.next_chunk().await {
        let (began, demand) = (Instant::now(), demand.take());
        sent.bytes += data.len() as u64;
        room(outgoing, chunks).await?.send(Some(HandoffChunk { data, demand }));
        sent.time += began.elapsed();
    }
    if outgoing.is_cancelled() {
        return None;
    }
    room(outgoing, chunks).await?.send(None);
    Some(sent)
}

/// Waits until the connection takes another chunk.
async fn room<'a>(
    outgoing: &Outgoing,
    chunks: &'a mpsc::Sender<Option<HandoffChunk>>,
) -> Option<mpsc::Permit<'a, Option<HandoffChunk>>> {
    loop {
        match tokio::time::timeout(CANCEL_CHECK, chunks.reserve()).await {
            Ok(Ok(permit)) => return Some(permit),
            // The call has ended; its answer says why.
            Ok(Err(_)) => std::future::pending().await,
            Err(_) if outgoing.is_cancelled() => return None,
            Err(_) => {}
        }
    }
}

/// Says for whom a handoff is.
fn address(metadata: &mut MetadataMap, target: &Target) -> Result<(), String> {
    for (key, value) in [(TARGET_REPLICA, &target.replica), (TARGET_INCARNATION, &target.incarnation)] {
        let value = AsciiMetadataValue::try_from(escaped(value)).map_err(|error| format!("{value:?}: {error}"))?;
        metadata.insert(key, value);
    }
    Ok(())
}

/// Names may have any character; headers may not.
fn escaped(name: &str) -> String {
    name.escape_default().to_string()
}

fn refusal(target: &Target, status: &Status) -> String {
    let who = &target.replica;
    match status.code() {
        Code::Unavailable | Code::Cancelled | Code::Unknown => format!("{who} was lost: {}", status.message()),
        code => format!("{who} refused the session ({code:?}): {}", status.message()),
    }
}

/// The target's side of one call. Answers leave by the stream; one that is dropped ends the handoff, and nothing of it stays.
pub(crate) fn receive(
    engine: &EngineHandle,
    identity: &ReplicaIdentity,
    request: Request<Streaming<HandoffChunk>>,
) -> Result<AnswerStream, Status> {
    check_address(identity, request.metadata())?;
    let traced = receiving(request.metadata());
    let mut chunks = request.into_inner();
    let mut incoming = engine.incoming();
    let (answers, out) = mpsc::channel(ANSWERS);
    tokio::spawn(async move {
        let answer = tokio::select! {
            answer = take(&mut chunks, &mut incoming, &answers) => answer,
            // The source gave up.
            () = answers.closed() => return,
        };
        let answer = match answer {
            Ok(()) => finish(incoming, &traced).await,
            Err(refused) => Err(refused),
        };
        if let Err(status) = &answer {
            traced.fail(status.message());
            tracing::warn!(parent: traced.span(), code = ?status.code(), message = status.message(), "a handoff was refused");
        }
        // A source that is gone hears of it by its own router.
        let _ = answers.send(answer).await;
    });
    Ok(ReceiverStream::new(out))
}

/// Takes all that is sent, and says as soon as there is room for it.
async fn take(
    chunks: &mut Streaming<HandoffChunk>,
    incoming: &mut Incoming,
    answers: &mpsc::Sender<Result<HandoffAnswer, Status>>,
) -> Result<(), Status> {
    let mut has_told = false;
    while let Some(chunk) = within(chunks.message()).await? {
        if let Some(demand) = chunk.demand {
            incoming.demands(move_report::demanded(demand));
        }
        incoming.push(&chunk.data).await.map_err(refused)?;
        if !has_told && incoming.has_room() {
            has_told = true;
            let body = Some(handoff_answer::Body::Room(move_report::told_room(incoming.room())));
            // Where nobody listens any more, the call ends.
            let _ = answers.send(Ok(HandoffAnswer { body })).await;
        }
    }
    Ok(())
}

async fn finish(incoming: Incoming, traced: &Traced) -> Result<HandoffAnswer, Status> {
    let prepared = incoming.finish().await.map_err(refused)?;
    tracing::debug!(parent: traced.span(), session = prepared.session, epoch = prepared.epoch, "a session is held, prepared");
    let result = HandoffResult { session: prepared.session, epoch: prepared.epoch, digests: prepared.digests };
    Ok(HandoffAnswer { body: Some(handoff_answer::Body::Result(result)) })
}

fn refused(error: HandoffRefused) -> Status {
    move_report::refused(&error).into()
}

/// The span of a handoff's arrival, which goes on from its source's.
fn receiving(metadata: &MetadataMap) -> Traced {
    let text = metadata.get(TRACEPARENT).and_then(|value| value.to_str().ok());
    let parent: Option<TraceContext> = text.and_then(|text| text.parse().ok());
    let span = tracing::error_span!(
        parent: None,
        "receive",
        otel.kind = "server",
        otel.status_code = Empty,
        otel.status_description = Empty,
        trace_id = Empty,
    );
    Traced::open(span, parent.as_ref())
}

async fn within<T>(next: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    let silent = |_| {
        let message = format!("nothing of the handoff came for {CHUNK_PATIENCE:?}");
        Status::from(WireError::new(ErrorKind::DeadlineExceeded, message))
    };
    tokio::time::timeout(CHUNK_PATIENCE, next).await.map_err(silent)?
}

/// Refuses what is meant for another replica, or for an earlier run of this one.
fn check_address(identity: &ReplicaIdentity, metadata: &MetadataMap) -> Result<(), Status> {
    for (key, mine) in [(TARGET_REPLICA, &identity.replica), (TARGET_INCARNATION, &identity.incarnation)] {
        let meant = metadata.get(key).and_then(|value| value.to_str().ok());
        if meant != Some(escaped(mine).as_str()) {
            let meant = meant.unwrap_or("nobody");
            let message = format!(
                "the handoff is for {meant}, this is replica {} in run {}",
                identity.replica, identity.incarnation
            );
            let error =
                WireError { reason: Some("OTHER_REPLICA"), ..WireError::new(ErrorKind::FailedPrecondition, message) };
            return Err(error.into());
        }
    }
    Ok(())
}
