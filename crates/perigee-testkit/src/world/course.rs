//! What a router of a world is told to do and to get wrong, and what came of it. Plain data.

use perigee_engine::moves::MoveFacts;
use perigee_migration::Mode;
use perigee_migration::epochs::Side;

use crate::reference::Observed;

/// A move that is due.
#[derive(Debug, Clone, Copy)]
pub struct Order {
    /// After that many tokens.
    pub after: usize,
    /// To which member; the next one where the session is there already.
    pub to: usize,
    /// What goes along.
    pub mode: Mode,
}

/// A message between router and replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Message {
    /// To the source.
    Prepare,
    /// To the target.
    Start,
    /// To the source.
    Release,
    /// To both.
    AbortMove,
    /// From the source.
    Ready,
    /// From the target.
    Started,
    /// From the source.
    Released,
    /// From both.
    Aborted,
}

/// A moment of a move.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// The source was just asked to hand the session over.
    Preparing,
    /// The target holds it, and nothing is decided.
    Ready,
    /// The router has decided, and start and release are on their way.
    Committed,
    /// Both sides have answered.
    Moved,
}

/// What goes wrong on purpose.
#[derive(Debug, Clone, Copy, Default)]
pub struct Trouble {
    /// The first message of this kind never arrives.
    pub lost: Option<Message>,
    /// Every message of this kind arrives twice.
    pub doubled: Option<Message>,
    /// The router takes every move back once its target is ready.
    pub cancels: bool,
    /// After that many tokens the owner counts as lost, though it runs on, and the session is replayed elsewhere.
    pub presumed_lost: Option<usize>,
    /// Tokens of every epoch are accepted.
    pub accepts_all_epochs: bool,
    /// Who of a move's two sides dies, and when. The router learns of it at once.
    pub dies: Option<(Moment, Side)>,
    /// The router is gone once the target is ready: it neither commits nor takes back.
    pub dies_when_ready: bool,
}

/// What became of a session.
#[derive(Debug, Clone, Default)]
pub struct Course {
    /// What a client would have received.
    pub observed: Observed,
    /// What became of every move that was begun, with what it came to or why it failed.
    pub moves: Vec<(Order, std::result::Result<MoveFacts, String>)>,
    /// The epoch of every token.
    pub epochs: Vec<u64>,
    /// Rules that were broken.
    pub broken: Vec<String>,
    /// Tokens that were dropped because their sender did not own the session.
    pub strays: usize,
}
