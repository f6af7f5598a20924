//! How handoffs and attention questions cross a world: by calls, with nothing on the way but what a test puts there. It
//! decides nothing and reads no handoff.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use perigee_backend::LatentReader;
use perigee_engine::EngineHandle;
use perigee_engine::homes::{AnswerModel, HomeDirectory, Owner};
use perigee_engine::moves::{Fetching, HandoffConnector, HomeAnswer, HomeNote, Outgoing, Room, Target};
use perigee_engine::remote::{AttentionClient, RemoteHome};
use perigee_engine::request::SessionId;
use perigee_migration::{AnswerStatus, Geometry, PAGE_POSITIONS, PageSlice};
use tokio::runtime::Handle;

/// What a test does to handoffs on their way.
#[derive(Debug, Clone, Default)]
pub enum Tamper {
    /// Nothing.
    #[default]
    Nothing,
    /// One bit of the stream is flipped: byte modulo the length, bit.
    Flip {
        /// Which byte of what was sent so far and follows.
        byte: usize,
        /// Which bit of it.
        bit: u8,
    },
    /// The stream ends in order after so many bytes.
    Cut {
        /// How many.
        bytes: usize,
    },
    /// The connection breaks after so many bytes.
    Break {
        /// How many.
        bytes: usize,
    },
    /// Another stream comes instead.
    Replace(Vec<u8>),
}

/// What became of one handoff.
#[derive(Debug, Clone)]
pub struct Carried {
    /// Bytes as the source sent them.
    pub bytes: Vec<u8>,
    /// Why the target did not take it, if it did not.
    pub refused: Option<String>,
}

/// Carries handoffs, as tasks of the runtime that the world was started in. Clones are the same.
#[derive(Clone)]
pub struct Carriage {
    runtime: Handle,
    homes: Homes,
    inner: Arc<Mutex<Inner>>,
}

#[derive(Default)]
struct Inner {
    engines: HashMap<String, EngineHandle>,
    tamper: Tamper,
    carried: Vec<Carried>,
    /// Why segments did not come.
    unfetched: Vec<String>,
}

impl Carriage {
    pub(super) fn new(homes: Homes) -> Self {
        Self { runtime: Handle::current(), homes, inner: Arc::default() }
    }

    pub(super) fn add(&self, name: &str, engine: EngineHandle) {
        self.with(|inner| inner.engines.insert(name.to_owned(), engine));
    }

    pub(super) fn remove(&self, name: &str) {
        self.with(|inner| inner.engines.remove(name));
    }

    pub(super) fn forget(&self) {
        self.with(|inner| inner.engines.clear());
    }

    /// What is done to handoffs from now on.
    pub fn tamper(&self, tamper: Tamper) {
        self.with(|inner| inner.tamper = tamper);
    }

    /// The handoffs since the last call, in the order of their ends.
    pub fn carried(&self) -> Vec<Carried> {
        self.with(|inner| std::mem::take(&mut inner.carried))
    }

    /// Why segments did not follow their sessions, since the last call.
    pub fn unfetched(&self) -> Vec<String> {
        self.with(|inner| std::mem::take(&mut inner.unfetched))
    }

    fn with<T>(&self, look: impl FnOnce(&mut Inner) -> T) -> T {
        look(&mut self.inner.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl HandoffConnector for Carriage {
    fn open(&self, target: Target, outgoing: Outgoing) {
        let (engine, tamper) = self.with(|inner| (inner.engines.get(&target.endpoint).cloned(), inner.tamper.clone()));
        let Some(engine) = engine else { return drop(outgoing) };
        let carriage = self.clone();
        self.runtime.spawn(async move { carry(&carriage, &engine, tamper, outgoing).await });
    }

    fn fetch(&self, home: &RemoteHome, fetching: Fetching) {
        let (carriage, endpoint) = (self.clone(), home.endpoint.clone());
        self.runtime.spawn(async move {
            if let Err(why) = fetch(&carriage.homes, &endpoint, fetching).await {
                carriage.with(|inner| inner.unfetched.push(why));
            }
        });
    }

    fn tell(&self, home: &RemoteHome, note: HomeNote) {
        let engine = self.with(|inner| inner.engines.get(&home.endpoint).cloned());
        let directory = homes(&self.homes).get(&home.endpoint).map(|home| home.directory.clone());
        let (Some(engine), Some(directory)) = (engine, directory) else { return };
        for (session, epoch) in &note.given_up {
            engine.home_given_up(SessionId(session.clone()), *epoch);
        }
        let is_missing = |(session, epoch): &&(String, u64)| {
            directory.renew(session, *epoch, &Owner::default()) == Err(AnswerStatus::Unknown)
        };
        let missing = note.renewed.iter().filter(is_missing).cloned().collect();
        note.answer(HomeAnswer { missing, call_back: directory.calls_back() });
    }
}

/// Brings a segment page by page, or says why not.
async fn fetch(known: &Homes, endpoint: &str, mut fetching: Fetching) -> Result<(), String> {
    for first in fetching.positions().step_by(PAGE_POSITIONS as usize) {
        let slices = {
            let homes = homes(known);
            let home = homes.get(endpoint).ok_or("the home is gone")?;
            let session = (fetching.session(), fetching.epoch());
            let layers = home.directory.page(&*home.reader, home.geometry.mla_layers, session, first);
            let layers = layers.map_err(|status| format!("{status:?}"))?;
            let slice = |(layer, bytes)| PageSlice::new(&home.geometry, layer, first, bytes);
            (0..).zip(layers).map(slice).collect::<Result<Vec<_>, _>>().map_err(|error| error.to_string())?
        };
        fetching.push(slices).await.map_err(|error| error.to_string())?;
    }
    Ok(())
}

fn homes(known: &Homes) -> MutexGuard<'_, HashMap<String, Home>> {
    known.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn carry(carriage: &Carriage, engine: &EngineHandle, tamper: Tamper, mut outgoing: Outgoing) {
    let mut incoming = engine.incoming();
    incoming.demands(outgoing.demand());
    let mut on_room = outgoing.on_room();
    let mut sent: Vec<u8> = Vec::new();
    let (mut refused, mut is_broken) = (None, false);
    while let Some(chunk) = outgoing.next_chunk().await {
        let start = sent.len();
        sent.extend(&chunk);
        // What comes instead of a handoff comes at its end.
        if let Some(on_room) = on_room.take_if(|_| matches!(tamper, Tamper::Replace(_))) {
            // The source may have given up.
            let _ = on_room.send(Room::default());
        }
        let Some(bytes) = tampered(&tamper, chunk, start, &mut is_broken) else { continue };
        if refused.is_none()
            && !bytes.is_empty()
            && let Err(error) = incoming.push(&bytes).await
        {
            refused = Some(error.to_string());
            break;
        }
        if incoming.has_room()
            && let Some(on_room) = on_room.take()
        {
            // The source may have given up.
            let _ = on_room.send(incoming.room());
        }
        if is_broken {
            break;
        }
    }
    if is_broken || (outgoing.is_cancelled() && refused.is_none()) {
        carriage.with(|inner| inner.carried.push(Carried { bytes: sent, refused: Some("broken off".into()) }));
        return;
    }
    let answer = match refused {
        Some(refused) => Err(refused),
        None => {
            let replaced = match &tamper {
                Tamper::Replace(bytes) => incoming.push(bytes).await,
                _ => Ok(()),
            };
            match replaced {
                Ok(()) => incoming.finish().await,
                Err(refused) => Err(refused),
            }
            .map(|prepared| prepared.digests)
            .map_err(|error| error.to_string())
        }
    };
    carriage.with(|inner| inner.carried.push(Carried { bytes: sent, refused: answer.clone().err() }));
    outgoing.answer(answer);
}

/// What arrives of a chunk that begins at byte `start` of the stream; none of what does not.
fn tampered(tamper: &Tamper, mut chunk: Vec<u8>, start: usize, is_broken: &mut bool) -> Option<Vec<u8>> {
    match *tamper {
        Tamper::Nothing => Some(chunk),
        Tamper::Flip { byte, bit } => {
            if let Some(byte) = byte.checked_sub(start).and_then(|index| chunk.get_mut(index)) {
                *byte ^= 1 << bit;
            }
            Some(chunk)
        }
        Tamper::Cut { bytes } | Tamper::Break { bytes } => {
            let left = bytes.saturating_sub(start);
            *is_broken = matches!(tamper, Tamper::Break { .. }) && chunk.len() >= left;
            chunk.truncate(left);
            Some(chunk)
        }
        Tamper::Replace(_) => None,
    }
}

/// A replica that answers questions.
pub(super) struct Home {
    pub(super) directory: HomeDirectory,
    pub(super) reader: Arc<dyn LatentReader>,
    pub(super) model: AnswerModel,
    pub(super) geometry: Geometry,
}

/// All of them, by address.
pub(super) type Homes = Arc<Mutex<HashMap<String, Home>>>;

/// Asks homes by calls: an answer is there as soon as the question is.
pub(super) struct Questions {
    homes: Homes,
    answers: Vec<Option<Vec<u8>>>,
}

impl Questions {
    pub(super) fn new(homes: Homes) -> Self {
        Self { homes, answers: Vec::new() }
    }
}

impl AttentionClient for Questions {
    fn ask(&mut self, home: &RemoteHome, message: Vec<u8>) {
        let found = {
            let homes = self.homes.lock().unwrap_or_else(PoisonError::into_inner);
            homes.get(&home.endpoint).map(|home| (home.directory.clone(), Arc::clone(&home.reader), home.model))
        };
        let answer = found.and_then(|(directory, reader, model)| directory.answer(&*reader, &model, &message).ok());
        self.answers.push(answer);
    }

    fn collect(&mut self, _until: Instant) -> Vec<Option<Vec<u8>>> {
        std::mem::take(&mut self.answers)
    }

    fn is_overdue(&self, _home: &RemoteHome) -> bool {
        false
    }
}
