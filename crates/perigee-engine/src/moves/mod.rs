//! A session's change of replicas, as the engine does it: the rules are `perigee_migration`'s, the bytes cross in tasks of
//! whoever serves the engine; here a session is frozen between two steps, taken off the device, put onto another one, and
//! kept in the books. What a home answers is `homes`' affair, what a step asks is `remote`'s.

mod fetching;
mod follow;
mod incoming;
mod keeping;
mod orphans;
mod outgoing;
mod pairs;
mod party;
mod record;
mod remote_rows;
mod seat;
mod source;
mod target;
mod ways;

use std::sync::Arc;
use std::time::Duration;

use perigee_migration::epochs::{Failure, Report};
use perigee_migration::handoff::Totals;
use perigee_migration::{AttendShape, DigestMismatch, HandoffError, Mode, Place};
use tokio::sync::oneshot;

pub use self::fetching::{FetchError, Fetching};
pub(crate) use self::follow::Follows;
pub(crate) use self::incoming::{Arriving, Reply};
pub use self::incoming::{Incoming, Prepared};
pub(crate) use self::keeping::Homes;
pub use self::keeping::{HomeAnswer, HomeNote};
pub(crate) use self::orphans::KeptEvents;
pub use self::orphans::TakeOver;
pub use self::outgoing::Outgoing;
pub(crate) use self::outgoing::SourcePart;
pub(crate) use self::pairs::PairBook;
pub use self::record::{RECORD_VERSION, RecordError};
pub(crate) use self::seat::Seats;
pub use self::ways::{PairAnswer, PairOffer, Room, Way};
use crate::homes::HomeDirectory;
use crate::remote::RemoteHome;
use crate::request::SessionId;

/// Settings of moves. Without them an engine neither hands sessions over nor takes any.
#[derive(Clone)]
pub struct MoveConfig {
    /// This replica, as segment tables name it.
    pub place: Place,
    /// Where it answers attention queries: host and port of its Replica service.
    pub endpoint: String,
    /// Digest of its model.
    pub model: String,
    /// What it answers queries over. Shared with whoever answers.
    pub homes: HomeDirectory,
    /// Whether it can answer at all. One that cannot hands sessions over with their pages.
    pub can_answer: bool,
    /// Opens handoffs to other replicas.
    pub connector: Arc<dyn HandoffConnector>,
    /// How long a replica waits for a router that is not there, before it parks a session that is being moved.
    pub silence: Duration,
    /// How long a parked session, and a home entry that nobody asks for, are kept.
    pub grace: Duration,
    /// How long a step waits for answers of homes.
    pub patience: Duration,
    /// After how many steps without an answer in a row a session's latents are computed again.
    pub misses: u32,
    /// What attention questions look like: what asking costs.
    pub shape: AttendShape,
    /// Which latents follow their sessions here.
    pub follow: FollowPolicy,
    /// By which ways states of sessions may go, best first. The stream is the last resort in any case.
    pub ways: Vec<Way>,
}

/// Which latents follow a session that arrived without them. Those that a home calls back follow in any case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FollowPolicy {
    /// Those that cost less to bring than to ask about, where there is room.
    #[default]
    ByCost,
    /// None.
    Never,
}

/// An answer to pages that came.
pub(crate) type FetchReply = oneshot::Sender<Result<(), FetchError>>;

/// Carries handoffs to other replicas.
pub trait HandoffConnector: Send + Sync {
    /// Begins to carry `outgoing` to `target`. Must return at once; the work is a task's.
    fn open(&self, target: Target, outgoing: Outgoing);

    /// Begins to bring latents from a home. Must return at once. As provided nothing is brought.
    fn fetch(&self, _home: &RemoteHome, fetching: Fetching) {
        fetching.fail("nobody brings pages here".into());
    }

    /// Tells a home what this replica needs of it. Must return at once. As provided homes hear nothing.
    fn tell(&self, _home: &RemoteHome, _note: HomeNote) {}
}

/// Where a session goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Name of the replica.
    pub replica: String,
    /// Which run of it.
    pub incarnation: String,
    /// Host and port of its Replica service.
    pub endpoint: String,
}

/// What a session needs of its target, as far as its source knows before it stands still.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Demand {
    /// Pages to be taken for it when it arrives.
    pub pages: u64,
    /// Most positions that it may ever compute.
    pub positions: u64,
    /// Positions whose latents stay on other replicas.
    pub remote: u64,
    /// How a target on the same machine reaches the source's slots, by rank; empty where it cannot.
    pub slots: Vec<Vec<u8>>,
    /// The pair that the source has with this target, or would have.
    pub pair: Option<PairOffer>,
}

/// A router's order to hand a session over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prepare {
    /// The session.
    pub session: SessionId,
    /// Its epoch here.
    pub epoch: u64,
    /// The epoch that it will have there.
    pub next: u64,
    /// Where it goes.
    pub target: Target,
    /// What goes with it.
    pub mode: Mode,
}

/// What a replica says of a move, in order with the tokens of its sessions.
#[derive(Debug, Clone, PartialEq)]
pub struct Reported {
    /// Number of events of the same batch that were said before it.
    pub before: usize,
    /// The session.
    pub session: SessionId,
    /// How far the move is.
    pub report: Report,
    /// What failed and what to do, where it failed.
    pub message: String,
    /// What the move came to, with the report that the target is ready.
    pub facts: Option<MoveFacts>,
}

/// What a move came to at its source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MoveFacts {
    /// Bytes by kind.
    pub bytes: Totals,
    /// From the freeze until the target had verified everything.
    pub frozen: Duration,
    /// Of that, taking state and pages off the device.
    pub export: Duration,
    /// Whole where a split move was asked for and is not possible.
    pub mode: Mode,
    /// By which way its state went.
    pub way: Way,
}

/// Why a handoff was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HandoffRefused {
    /// The session, its epoch or the room for it.
    #[error(transparent)]
    Failure(#[from] Failure),
    /// What arrived is not a handoff that this replica can take.
    #[error(transparent)]
    Handoff(#[from] HandoffError),
    /// What arrived is not what is in slot and pages.
    #[error(transparent)]
    Digest(#[from] DigestMismatch),
    /// The session's record cannot be read here.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The session's grammar cannot be made here.
    #[error("the session's grammar: {0}; replay the session")]
    Grammar(String),
    /// Positions whose latents an earlier run of this replica held: nobody has them any more.
    #[error("latents of {positions} positions were lost with an earlier run of this replica; replay the session")]
    Lost {
        /// How many.
        positions: u64,
    },
    /// The ranks could not write it.
    #[error("the ranks did not take it: {0}")]
    Ranks(String),
    /// This replica does not take part in moves.
    #[error("this replica does not take sessions over")]
    NotOffered,
    /// The engine ended.
    #[error("the replica stopped")]
    Stopped,
}
