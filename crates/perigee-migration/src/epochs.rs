//! Who may step a session, as state machines without clock or network: one for each side of a move, one for a replica
//! that may be either, one for the router that coordinates. An event goes in, actions come out; the driver carries them
//! out and starts the timer that a state names. The README has the protocol and its failures.
//!
//! What all of it rests on:
//! - Epochs of a session only rise, and the router that holds the client's stream makes them all. Another one to which the
//!   client has turned begins above all that the first can make.
//! - The router is the commit point: it accepts the tokens of one owner only, and a target runs only when that router,
//!   having accepted the target's epoch, says so.
//! - A source that was asked to hand over stops before it sends the record, and goes on only when the router names it an
//!   epoch above the target's. A source that hears nothing parks.
//! - A replica's events and reports share one ordered stream: a report that a session is ready comes after its tokens.
//!
//! Messages may be lost, doubled or late: each names epochs, and whoever gets one that does not fit says what it knows.

pub mod coordinator;
pub mod party;
pub mod source;
pub mod target;
#[cfg(test)]
mod tests;

pub use coordinator::{Coordinator, CoordinatorAction, CoordinatorEvent, CoordinatorState, Outcome, TokenVerdict};
pub use party::{Party, PartyEvent};
pub use source::{Source, SourceEvent, SourceState};
pub use target::{Target, TargetEvent, TargetState};

/// What a router tells a replica about a move.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Command {
    /// To the owner: hand the session over.
    Prepare {
        /// Its epoch there.
        epoch: u64,
        /// The epoch that it will have at the target.
        next: u64,
    },
    /// To the target: run the prepared session.
    Start {
        /// Its epoch there.
        epoch: u64,
    },
    /// To the former owner: the session runs elsewhere.
    Release {
        /// Its epoch there.
        epoch: u64,
        /// Its epoch at the new owner.
        owner_epoch: u64,
    },
    /// To both sides: the move is off.
    AbortMove {
        /// The epoch that the target would have had.
        next: u64,
        /// The epoch that the source goes on with, above `next`.
        epoch: u64,
    },
    /// To the owner of a session whose router is gone, from another router that the client has turned to: it goes on, or on
    /// again, under that one.
    TakeOver {
        /// The epoch that it goes on with, see [`first_after`].
        epoch: u64,
    },
}

/// Epochs of a session that one router can make. Which it has made is known to nobody else.
const EPOCHS_OF_A_ROUTER: u64 = 1 << 32;

/// The first epoch of a router that takes a session over, of which epoch `known` was heard: above every epoch that the
/// router before it has made or may yet make.
pub fn first_after(known: u64) -> u64 {
    (known / EPOCHS_OF_A_ROUTER).saturating_add(1).saturating_mul(EPOCHS_OF_A_ROUTER)
}

/// The last epoch that the router which made `epoch` can make.
pub fn last_beside(epoch: u64) -> u64 {
    epoch | (EPOCHS_OF_A_ROUTER - 1)
}

impl Command {
    /// The epoch by which a report answers the command.
    pub fn epoch(&self) -> u64 {
        match *self {
            Self::Prepare { epoch, .. }
            | Self::Start { epoch }
            | Self::Release { epoch, .. }
            | Self::AbortMove { epoch, .. }
            | Self::TakeOver { epoch } => epoch,
        }
    }
}

/// What a replica answers to a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Report {
    /// [`Command::epoch`] of the command.
    pub epoch: u64,
    /// What happened.
    pub phase: Phase,
}

/// How far a move is at a replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Phase {
    /// From the source: the target holds the session, verified and not running.
    Ready,
    /// From the target, or from an owner that was taken over: it runs.
    Started,
    /// From the source: it gave the session up.
    Released,
    /// From either: the source goes on, the target forgot.
    Aborted,
    /// The command was not carried out.
    Failed(Failure),
}

/// Why a command was not carried out, or a handoff not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Failure {
    /// The command is of the past.
    #[error("epoch {known} of the session is known here")]
    Stale {
        /// The highest epoch known.
        known: u64,
    },
    /// The session is being handed over already, or runs here.
    #[error("the session is here and in use")]
    Busy,
    /// There is no such session here.
    #[error("the session is not here")]
    NotHere,
    /// The session is parked here because its router fell silent.
    #[error("the session is parked")]
    Parked,
    /// There is no slot, or not enough pages.
    #[error("there is no room for the session")]
    Full,
    /// The handoff broke or the target refused it.
    #[error("the handoff failed")]
    Handoff,
    /// The session ended meanwhile.
    #[error("the session ended")]
    Ended,
}

/// Which side of a move.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Side {
    /// The owner, or the former one.
    Source,
    /// The owner to be.
    Target,
}

/// What a state waits for. A driver has one timer for each side, set anew by every event of that side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Timer {
    /// The other side or the router must be heard of: seconds. Then [`PartyEvent::Silence`].
    Silence,
    /// What is kept for somebody who may come back: the grace time. Then [`PartyEvent::Grace`].
    Grace,
}

/// What a replica must do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    /// Tell the router.
    Report(Report),
    /// Open the handoff to the target: header, then token ids. Freeze the session between two steps once they are out,
    /// and say [`PartyEvent::Frozen`]. Until then it steps.
    BeginHandoff {
        /// Its epoch at the target.
        next: u64,
    },
    /// The session stands still: send record, state and pages.
    SendFrozen {
        /// Its epoch at the target.
        next: u64,
    },
    /// Close the handoff to the target, which is no longer of use.
    CancelHandoff,
    /// Step the session under this epoch from now on. The report that comes with it leaves before any of its tokens.
    Resume {
        /// Its epoch.
        epoch: u64,
    },
    /// Stop stepping the session. State and pages are kept, in host memory if need be.
    Park,
    /// Keep references to the sealed pages of the session's local segments as a home entry, give back the last page.
    KeepHome,
    /// Give back the state slot.
    FreeState,
    /// Give back the pages of the session or of its home entry.
    FreePages,
    /// Take a slot, and pages for what the handoff brings.
    Reserve,
    /// Give back what was taken for a handoff.
    FreeReserved,
    /// Answer the handoff: everything arrived and is right.
    Accept,
    /// Answer the handoff: not taken, and why.
    Refuse(Failure),
    /// What was reserved is the session now, with the pages of its home entry if there is one: step it under this epoch.
    Run {
        /// Its epoch.
        epoch: u64,
    },
    /// Answer the attention query.
    AllowQuery,
    /// Refuse the attention query of an epoch that does not own the session.
    RefuseQuery {
        /// The highest epoch known.
        known: u64,
    },
}

/// A report that a command was not carried out.
fn failed(epoch: u64, failure: Failure) -> Action {
    Action::Report(Report { epoch, phase: Phase::Failed(failure) })
}

/// A report that a command was carried out.
fn done(epoch: u64, phase: Phase) -> Action {
    Action::Report(Report { epoch, phase })
}
