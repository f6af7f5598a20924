//! Latents that follow their session over the wire: the home's side of FetchPages, which reads pages beside the steps, and
//! the owner's, a task for each segment. What is fetched, and where it goes, is the engine's business.

use std::sync::Arc;
use std::time::Duration;

use perigee_engine::moves::Fetching;
use perigee_engine::remote::RemoteHome;
use perigee_migration::{AnswerStatus, Digest, Geometry, PAGE_POSITIONS, PageSlice};
use perigee_proto::internal::{FetchPagesRequest, LatentPage, PageChunk, ReplicaRun};
use perigee_proto::status::{ErrorKind, WireError};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::Instant;
use tonic::Status;

use crate::attend::HomeParts;
use crate::leases::owner;
use crate::peers::Peers;

/// Bytes of a chunk, about: what an owner writes between two of its steps.
const CHUNK_BYTES: usize = 1 << 20;
/// Chunks that wait for the connection.
const CHUNKS_IN_FLIGHT: usize = 2;
/// Segments that a home gives out at once.
const AT_ONCE: usize = 4;
/// A home that sends nothing for that long has none to give for now.
const CHUNK_PATIENCE: Duration = Duration::from_secs(5);

/// What a home gives out for one call.
pub(crate) type Chunks = mpsc::Receiver<Result<PageChunk, Status>>;

/// The home's side.
#[derive(Clone)]
pub(crate) struct PageGiver {
    parts: HomeParts,
    geometry: Geometry,
    seats: Arc<Semaphore>,
}

impl PageGiver {
    pub(crate) fn new(parts: HomeParts, geometry: Geometry) -> Self {
        Self { parts, geometry, seats: Arc::new(Semaphore::new(AT_ONCE)) }
    }

    /// Gives out what was asked for, page by page, no faster than it is taken.
    ///
    /// # Errors
    /// The question is none.
    pub(crate) fn give(&self, request: FetchPagesRequest) -> Result<Chunks, Status> {
        let (first, tokens) = (request.first, request.tokens);
        let is_whole = |number: u64| number.is_multiple_of(PAGE_POSITIONS);
        let end = first.checked_add(tokens).filter(|_| is_whole(first) && is_whole(tokens));
        let Some(end) = end.filter(|end| *end > first) else {
            let message = format!("first, tokens: {tokens} positions from {first} are no whole pages");
            return Err(WireError::invalid("tokens", message).into());
        };
        let owner = request.owner.map(owner).unwrap_or_default();
        if let Err(status) = self.parts.homes.renew(&request.session, request.epoch, &owner) {
            return Err(refused(&request.session, status));
        }
        let (out, chunks) = mpsc::channel(CHUNKS_IN_FLIGHT);
        let giver = self.clone();
        tokio::spawn(async move {
            // Closed by nobody.
            let Ok(_seat) = giver.seats.clone().acquire_owned().await else { return };
            let (session, epoch) = (request.session, request.epoch);
            let mut next = first;
            while next < end {
                // Taken before the pages are read, so that no more is in memory than the connection has room for.
                let Ok(room) = out.reserve().await else { return };
                let (reader, name, from) = (giver.clone(), session.clone(), next);
                let read = tokio::task::spawn_blocking(move || reader.chunk((&name, epoch), from, end)).await;
                let chunk = read.unwrap_or(Err(AnswerStatus::Busy));
                next += chunk.as_ref().map_or(end, |chunk| pages_of(chunk, &giver.geometry) * PAGE_POSITIONS);
                let is_over = chunk.is_err();
                room.send(chunk.map_err(|status| refused(&session, status)));
                if is_over {
                    return;
                }
            }
        });
        Ok(chunks)
    }

    /// The next pages from `first` on, as many as a chunk has.
    fn chunk(&self, session: (&str, u64), first: u64, end: u64) -> Result<PageChunk, AnswerStatus> {
        let (homes, reader) = (&self.parts.homes, &*self.parts.reader);
        let page_bytes = self.geometry.position_bytes() * PAGE_POSITIONS * u64::from(self.geometry.mla_layers);
        let count = (CHUNK_BYTES as u64 / page_bytes.max(1)).max(1);
        let end = end.min(first + count * PAGE_POSITIONS);
        let mut pages = Vec::new();
        for first in (first..end).step_by(PAGE_POSITIONS as usize) {
            let layers = homes.page(reader, self.geometry.mla_layers, session, first)?;
            pages.extend((0..).zip(layers).map(|(layer, data)| {
                let digest = Digest::of_positions(&self.geometry, first, &data).0;
                LatentPage { layer, first, data, digest }
            }));
        }
        Ok(PageChunk { pages })
    }
}

fn pages_of(chunk: &PageChunk, geometry: &Geometry) -> u64 {
    chunk.pages.len() as u64 / u64::from(geometry.mla_layers.max(1))
}

fn refused(session: &str, status: AnswerStatus) -> Status {
    let (kind, what) = match status {
        AnswerStatus::Stale => (ErrorKind::Aborted, "belongs to a later owner"),
        AnswerStatus::Busy => (ErrorKind::Unavailable, "has pages that are not given out now"),
        AnswerStatus::Unknown | AnswerStatus::Missing | AnswerStatus::Answered => {
            (ErrorKind::FailedPrecondition, "has no such pages here")
        }
    };
    WireError::new(kind, format!("session {session} {what}")).into()
}

/// The owner's side of one segment, until all of it is there or it does not come.
pub(crate) async fn fetch(peers: &Peers, owner: ReplicaRun, home: &RemoteHome, mut fetching: Fetching) {
    if let Err(why) = bring(peers, owner, home, &mut fetching).await {
        fetching.fail(why);
    }
}

async fn bring(peers: &Peers, owner: ReplicaRun, home: &RemoteHome, fetching: &mut Fetching) -> Result<(), String> {
    let mut client = peers.connect(&home.endpoint).await?;
    let (began, mut bytes) = (Instant::now(), 0);
    let positions = fetching.positions();
    let request = FetchPagesRequest {
        home: Some(ReplicaRun { replica: home.replica.clone(), incarnation: home.incarnation.clone() }),
        owner: Some(owner),
        session: fetching.session().to_owned(),
        epoch: fetching.epoch(),
        first: positions.start,
        tokens: positions.end - positions.start,
    };
    let told = |status: Status| format!("{:?}: {}", status.code(), status.message());
    let silent = |_| format!("nothing came for {CHUNK_PATIENCE:?}");
    let opened = tokio::time::timeout(CHUNK_PATIENCE, client.fetch_pages(request)).await.map_err(silent)?;
    let mut chunks = opened.map_err(told)?.into_inner();
    while !fetching.is_complete() {
        let chunk = tokio::time::timeout(CHUNK_PATIENCE, chunks.message()).await.map_err(silent)?.map_err(told)?;
        let chunk = chunk.ok_or("the home ended the stream early")?;
        bytes += chunk.pages.iter().map(|page| page.data.len() as u64).sum::<u64>();
        let slices = chunk.pages.into_iter().map(|page| PageSlice {
            layer: page.layer,
            first: page.first,
            positions: PAGE_POSITIONS as u32,
            digest: Digest(page.digest),
            bytes: page.data,
        });
        fetching.push(slices.collect()).await.map_err(|error| error.to_string())?;
    }
    peers.links().carried(&home.replica, bytes, began.elapsed());
    Ok(())
}
