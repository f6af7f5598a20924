//! One choice of a request, which is one session: who owns it, in which epoch, what its client has of it, and which replicas
//! hold or held something of it. What is done about it, and where it is sent, is decided elsewhere.

use std::sync::Arc;

use perigee_migration::epochs::{Coordinator, CoordinatorState, Side};
use perigee_proto::status::WireError;
use tokio::time::Instant;

use crate::attachment::Attachment;
use crate::timers::Alarm;
use crate::transit::Transit;

/// The first epoch of a session.
const FIRST_EPOCH: u64 = 1;

/// One choice. Every token passes it, and it is in another processor's cache then: what a token needs lies together, in the
/// order of these lines, and what only moves and losses need elsewhere.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Choice {
    /// Whose tokens are accepted: the commit point of its moves.
    pub(crate) coordinator: Coordinator,
    /// What the client has of it, in order; the next token's index is its length. A replay goes on after these.
    pub(crate) tokens: Vec<u32>,
    /// How many tokens from the first its client has from another router: they are taken in and not sent on.
    pub(crate) withheld: u64,
    /// The move under way, or the last one until its cost is known.
    pub(crate) transit: Option<Box<Transit>>,
    /// The replay whose first token is still to come.
    pub(crate) replay: Option<Box<Replay>>,
    pub(crate) last_token: Option<Instant>,
    pub(crate) first_token: Option<Instant>,
    /// Engine failures since its last token.
    pub(crate) failures: u32,
    pub(crate) is_finished: bool,
    /// Whether its first response was read.
    pub(crate) is_answered: bool,
    /// Its client, or an operator, asked for its end.
    pub(crate) is_aborted: bool,
    /// Streams that it was sent to without success, so as not to ask the same ones again at once.
    pub(crate) tried: Vec<u64>,
    /// Its name in the cluster.
    pub(crate) session: String,
    /// Where it runs; none while it waits for a replica.
    pub(crate) owner: Option<Arc<Attachment>>,
    /// Every replica that has or had something of it, by its latest stream.
    pub(crate) holders: Vec<Arc<Attachment>>,
    /// Set while it has no owner and needs one.
    pub(crate) pending: Option<Box<Pending>>,
    /// When it is to be looked at again, if nothing happens before.
    pub(crate) alarm: Option<Alarm>,
    /// When its last move began, whoever wanted it and whatever became of it.
    pub(crate) last_move: Option<Instant>,
    /// Attempts to have it leave a replica that drains.
    pub(crate) leaving: Option<Leaving>,
    /// Streams and epochs of tokens that were not the owner's, whose senders were told so.
    strays: Vec<(u64, u64)>,
}

/// Why a session has no owner, and since when.
#[derive(Debug, Clone)]
pub(crate) struct Pending {
    pub(crate) since: Instant,
    /// What its client is told if no replica comes.
    pub(crate) cause: WireError,
    /// Whether it may wait for a replica; if not, it ends where none takes it at once.
    pub(crate) may_wait: bool,
}

/// How often a session was asked to leave a replica, and when it may be asked again.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Leaving {
    /// The stream to the replica.
    pub(crate) from: u64,
    pub(crate) tries: u32,
    pub(crate) again: Instant,
}

/// A session that is submitted anew.
#[derive(Debug, Clone)]
pub(crate) struct Replay {
    /// When its owner was lost.
    pub(crate) lost: Instant,
    /// Since when its client gets nothing.
    pub(crate) since: Instant,
    /// Its former owner, for the log.
    pub(crate) from: Arc<str>,
}

impl Choice {
    /// A choice that nobody runs yet; `cause` is what its client is told if nobody takes it.
    pub(crate) fn new(session: String, now: Instant, cause: WireError) -> Self {
        Self {
            session,
            owner: None,
            coordinator: Coordinator::new(FIRST_EPOCH),
            tokens: Vec::new(),
            withheld: 0,
            is_finished: false,
            first_token: None,
            last_token: None,
            is_answered: false,
            is_aborted: false,
            holders: Vec::new(),
            pending: Some(Box::new(Pending { since: now, cause, may_wait: false })),
            tried: Vec::new(),
            transit: None,
            replay: None,
            alarm: None,
            last_move: None,
            leaving: None,
            failures: 0,
            strays: Vec::new(),
        }
    }

    /// Index that its next token must have.
    pub(crate) fn due(&self) -> u64 {
        self.tokens.len() as u64
    }

    /// The move under way.
    pub(crate) fn moving(&mut self) -> Option<&mut Transit> {
        self.transit.as_deref_mut().filter(|transit| transit.outcome.is_none())
    }

    /// What a stream is to it: a side of the move under way, or its owner, which counts as the source.
    pub(crate) fn side_of(&self, attachment: &Attachment) -> Option<Side> {
        if let Some(transit) = self.transit.as_ref().filter(|transit| transit.outcome.is_none()) {
            return transit.side_of(attachment);
        }
        self.owner.as_ref().filter(|owner| owner.id == attachment.id).map(|_| Side::Source)
    }

    /// Whether a replica is to be found for it now: it has no owner, and no alarm that says when to try again.
    pub(crate) fn needs_owner(&self) -> bool {
        self.pending.is_some() && self.alarm.is_none()
    }

    /// The side whose tokens are accepted.
    pub(crate) fn owning_side(&self) -> Side {
        match self.coordinator.state() {
            CoordinatorState::Committed { .. } => Side::Target,
            _ => Side::Source,
        }
    }

    /// Notes that a replica has something of it from now on.
    pub(crate) fn is_held_by(&mut self, attachment: &Arc<Attachment>) {
        let is_same = |holder: &Arc<Attachment>| holder.identity.is_same_run(&attachment.identity);
        match self.holders.iter_mut().find(|holder| is_same(holder)) {
            Some(holder) => *holder = attachment.clone(),
            None => self.holders.push(attachment.clone()),
        }
    }

    /// Whether the sender of a stray token is to be told; once for each epoch on each stream.
    pub(crate) fn is_new_stray(&mut self, attachment: &Attachment, epoch: u64) -> bool {
        let stray = (attachment.id, epoch);
        let is_new = !self.strays.contains(&stray);
        if is_new {
            self.strays.push(stray);
        }
        is_new
    }
}
