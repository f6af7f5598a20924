//! Pairs: ways of their own between two ranks of different replicas, by which a state slot goes from one to the other beside
//! all steps. Here is what every backend's pairs have in common: orders and states, a thread for each pair, time limits, and an
//! end that takes nothing else along. What carries the bytes is a backend's [`PairTransport`].
//!
//! A pair has a direction: the source invites, the target is told the invitation (by whoever arranges moves), and both meet in
//! the background. So two replicas that hand sessions to each other at once cannot wait in a circle. One parcel is on its way at
//! a time; the target receives it beside its slots, so that one that comes late, or half, spoils nothing. Any failure breaks the
//! pair, and this pair alone: the state goes another way then.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// Pairs of one rank at a time; further ones are refused, and sessions go another way.
pub const MOST_PAIRS: usize = 8;

/// Which end of a pair a rank is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum PairEnd {
    /// It invites, and sends.
    Source,
    /// It receives.
    Target,
}

/// What is to be done with a pair. Nothing but [`Self::Take`] waits, and that only for what has left its source already.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum PairOrder {
    /// Begin to meet the other end.
    Meet {
        /// Which end this is.
        end: PairEnd,
        /// How long a slot may take from then on, the other end's delay included, before the pair counts as broken.
        patience: Duration,
    },
    /// Nothing; how far is it?
    Look,
    /// Send a slot, which nobody changes before that is done.
    Send {
        /// The slot.
        slot: u32,
    },
    /// Receive what the other end sends.
    Expect,
    /// Write what was received to a slot.
    Take {
        /// The slot.
        slot: u32,
    },
    /// End the pair.
    Close,
}

/// How far a pair is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum PairState {
    /// The other end has not been met.
    Meeting,
    /// Nothing is on its way, or what was is done: a slot can be sent or expected.
    Ready,
    /// A slot is on its way.
    Busy,
    /// It is of no use any more, and why.
    Broken(String),
}

impl PairState {
    /// What the pairs of all ranks together are: as far as the last of them.
    pub fn join(self, other: Self) -> Self {
        match (self, other) {
            (Self::Broken(why), _) | (_, Self::Broken(why)) => Self::Broken(why),
            (Self::Meeting, _) | (_, Self::Meeting) => Self::Meeting,
            (Self::Busy, _) | (_, Self::Busy) => Self::Busy,
            (Self::Ready, Self::Ready) => Self::Ready,
        }
    }
}

/// Carries parcels between two processes.
pub trait PairTransport: Send + Sync + 'static {
    /// A slot on its way, or room for one.
    type Parcel: Send + 'static;
    /// One end of a pair that was met; it stays on the thread that met it.
    type Link: PairLink<Parcel = Self::Parcel>;

    /// What another process has to know to meet this one.
    ///
    /// # Errors
    /// Why nobody can.
    fn invite(&self) -> Result<Vec<u8>, String>;

    /// Meets the other end, which does the same. Returns soon after `watch` says that there is no more time.
    ///
    /// # Errors
    /// Why the other end was not met.
    fn meet(&self, invitation: &[u8], end: PairEnd, watch: &Watch) -> Result<Self::Link, String>;

    /// An invitation that is used no more, or never was. As provided nothing is kept of one.
    fn forget(&self, _invitation: &[u8]) {}
}

/// One end of a pair. Dropping it ends it for both.
pub trait PairLink {
    /// See [`PairTransport::Parcel`].
    type Parcel;

    /// Sends a parcel and returns once the other end has it, or soon after `watch` says that there is no more time.
    ///
    /// # Errors
    /// What broke. The link is not used again.
    fn send(&mut self, parcel: &mut Self::Parcel, watch: &Watch) -> Result<(), String>;

    /// Fills a parcel with what the other end sends.
    ///
    /// # Errors
    /// As [`Self::send`].
    fn receive(&mut self, parcel: &mut Self::Parcel, watch: &Watch) -> Result<(), String>;
}

/// How long a pair waits for what, beside slots.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// For the other end to come.
    pub meeting: Duration,
    /// For work, before an idle pair ends.
    pub idle: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { meeting: Duration::from_secs(60), idle: Duration::from_secs(600) }
    }
}

/// The time that is left for a piece of work.
#[derive(Debug)]
pub struct Watch {
    is_off: Arc<AtomicBool>,
    began: Instant,
    patience: Duration,
}

impl Watch {
    /// Fails once the work is called off, or has taken too long.
    ///
    /// # Errors
    /// Which of the two.
    pub fn check(&self) -> Result<(), String> {
        if self.is_off.load(Ordering::Relaxed) {
            return Err("it was called off".into());
        }
        match self.began.elapsed() > self.patience {
            true => Err(format!("the other end is lost or silent for {:?}", self.patience)),
            false => Ok(()),
        }
    }
}

/// All pairs of a rank, by invitation.
pub struct Pairs<T: PairTransport> {
    transport: Arc<T>,
    patience: Patience,
    open: HashMap<Vec<u8>, Pair<T::Parcel>>,
}

/// The way to a pair's thread, and what it says.
struct Pair<P> {
    work: Sender<Work<P>>,
    is_off: Arc<AtomicBool>,
    shared: Arc<Shared<P>>,
    /// How long a parcel may take.
    parcels: Duration,
}

enum Work<P> {
    Send(P),
    Receive(P),
}

struct Shared<P> {
    progress: Mutex<Progress<P>>,
    changed: Condvar,
}

enum Progress<P> {
    Meeting,
    Ready,
    Busy,
    /// What came, and was not taken.
    Came(P),
    Broken(String),
}

impl<P> Shared<P> {
    fn lock(&self) -> MutexGuard<'_, Progress<P>> {
        // Whole whatever a panic elsewhere left behind: it is replaced as such.
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, progress: Progress<P>) {
        *self.lock() = progress;
        self.changed.notify_all();
    }
}

impl<P> Progress<P> {
    fn state(&self) -> PairState {
        match self {
            Self::Meeting => PairState::Meeting,
            Self::Ready | Self::Came(_) => PairState::Ready,
            Self::Busy => PairState::Busy,
            Self::Broken(why) => PairState::Broken(why.clone()),
        }
    }
}

fn unknown() -> PairState {
    PairState::Broken("there is no such pair".into())
}

impl<T: PairTransport> Pairs<T> {
    /// No pairs yet, over this transport.
    pub fn new(transport: T, patience: Patience) -> Self {
        Self { transport: Arc::new(transport), patience, open: HashMap::new() }
    }

    /// An invitation to a new pair, to be told to its target.
    ///
    /// # Errors
    /// Why there can be none.
    pub fn invite(&self) -> Result<Vec<u8>, String> {
        self.transport.invite()
    }

    /// Begins to meet the other end, in the background. A parcel may take as long as `parcels`.
    pub fn meet(&mut self, invitation: &[u8], end: PairEnd, parcels: Duration) -> PairState {
        if let Some(pair) = self.open.get(invitation) {
            return pair.shared.lock().state();
        }
        if self.open.len() >= MOST_PAIRS {
            // Those whose other end went away.
            self.open.retain(|_, pair| !matches!(*pair.shared.lock(), Progress::Broken(_)));
        }
        if self.open.len() >= MOST_PAIRS {
            return PairState::Broken(format!("there are {MOST_PAIRS} pairs already"));
        }
        let (work, orders) = channel();
        let shared = Arc::new(Shared { progress: Mutex::new(Progress::Meeting), changed: Condvar::new() });
        let is_off = Arc::new(AtomicBool::new(false));
        let pair = Pair { work, is_off: Arc::clone(&is_off), shared: Arc::clone(&shared), parcels };
        let (transport, patience, invited) = (Arc::clone(&self.transport), self.patience, invitation.to_vec());
        let run = move || {
            let why = serve(&*transport, &invited, end, (&patience, parcels, &is_off), (&orders, &shared));
            transport.forget(&invited);
            shared.set(Progress::Broken(why));
        };
        match std::thread::Builder::new().name("perigee-pair".into()).spawn(run) {
            Ok(_) => {
                self.open.insert(invitation.to_vec(), pair);
                PairState::Meeting
            }
            Err(error) => PairState::Broken(format!("starting a thread: {error}")),
        }
    }

    /// How far a pair is.
    pub fn state(&self, invitation: &[u8]) -> PairState {
        self.open.get(invitation).map_or_else(unknown, |pair| pair.shared.lock().state())
    }

    /// Begins to send.
    pub fn send(&mut self, invitation: &[u8], parcel: T::Parcel) -> PairState {
        self.begin(invitation, Work::Send(parcel))
    }

    /// Begins to receive into `parcel`.
    pub fn expect(&mut self, invitation: &[u8], parcel: T::Parcel) -> PairState {
        self.begin(invitation, Work::Receive(parcel))
    }

    fn begin(&mut self, invitation: &[u8], work: Work<T::Parcel>) -> PairState {
        let Some(pair) = self.open.get(invitation) else { return unknown() };
        let mut progress = pair.shared.lock();
        match progress.state() {
            PairState::Ready => {}
            other => return other,
        }
        *progress = Progress::Busy;
        if pair.work.send(work).is_err() {
            *progress = Progress::Broken("its thread ended".into());
        }
        progress.state()
    }

    /// What was received. Waits a moment for the last of what its source has sent.
    ///
    /// # Errors
    /// Nothing was received.
    pub fn take(&mut self, invitation: &[u8]) -> Result<T::Parcel, String> {
        let pair = self.open.get(invitation).ok_or("there is no such pair")?;
        let is_busy = |progress: &mut Progress<T::Parcel>| matches!(progress, Progress::Busy);
        let waited = pair.shared.changed.wait_timeout_while(pair.shared.lock(), pair.parcels / 4, is_busy);
        let mut progress = waited.unwrap_or_else(PoisonError::into_inner).0;
        match std::mem::replace(&mut *progress, Progress::Ready) {
            Progress::Came(parcel) => Ok(parcel),
            other => {
                let state = other.state();
                *progress = other;
                Err(format!("nothing came by the pair, which is {state:?}"))
            }
        }
    }

    /// Ends a pair, in the background; what it was about to do does not happen.
    pub fn close(&mut self, invitation: &[u8]) {
        match self.open.remove(invitation) {
            Some(pair) => pair.is_off.store(true, Ordering::Relaxed),
            None => self.transport.forget(invitation),
        }
    }
}

impl<T: PairTransport> Drop for Pairs<T> {
    fn drop(&mut self) {
        self.open.values().for_each(|pair| pair.is_off.store(true, Ordering::Relaxed));
    }
}

impl<T: PairTransport> std::fmt::Debug for Pairs<T> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Pairs").field("open", &self.open.len()).finish_non_exhaustive()
    }
}

/// A pair's life, on its thread; why it is over.
fn serve<T: PairTransport>(
    transport: &T,
    invitation: &[u8],
    end: PairEnd,
    (patience, parcels, is_off): (&Patience, Duration, &Arc<AtomicBool>),
    (orders, shared): (&Receiver<Work<T::Parcel>>, &Shared<T::Parcel>),
) -> String {
    let watch = |patience| Watch { is_off: Arc::clone(is_off), began: Instant::now(), patience };
    let mut link = match transport.meet(invitation, end, &watch(patience.meeting)) {
        Ok(link) => link,
        Err(why) => return why,
    };
    shared.set(Progress::Ready);
    loop {
        // Whoever closes the pair drops the way here.
        let Ok(work) = orders.recv_timeout(patience.idle) else { return "nobody needed it".into() };
        let watch = watch(parcels);
        let done = match work {
            Work::Send(mut parcel) => link.send(&mut parcel, &watch).map(|()| Progress::Ready),
            Work::Receive(mut parcel) => link.receive(&mut parcel, &watch).map(|()| Progress::Came(parcel)),
        };
        match done {
            Ok(progress) => shared.set(progress),
            Err(why) => return why,
        }
    }
}

#[cfg(test)]
mod tests;
