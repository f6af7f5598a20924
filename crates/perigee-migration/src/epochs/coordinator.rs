//! The router's side of a session's moves: it makes the epochs, decides, and accepts one owner's tokens. It is the commit
//! point: before `Commit` a move can be taken back, after it the session is the target's, or replayed.

use super::{Command, Failure, Phase, Report, Side, first_after};

/// How often a command is repeated that nobody answers.
const TRIES: u8 = 3;

/// How far the coordinator is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CoordinatorState {
    /// The owner steps the session; nothing is under way.
    Idle,
    /// The source was asked to hand the session over.
    Preparing {
        /// The session's epoch at the target.
        next: u64,
    },
    /// The target holds the session. [`CoordinatorEvent::Commit`] or [`CoordinatorEvent::Cancel`] comes next.
    Ready {
        /// The session's epoch at the target.
        next: u64,
        /// Whether the source is lost, so that there is no way back.
        is_source_lost: bool,
    },
    /// The session is the target's.
    Committed {
        /// Its epoch at the source.
        old: u64,
        /// Whether the target said so.
        is_started: bool,
        /// Whether the source said so, or is lost.
        is_released: bool,
        /// How often the commands were repeated.
        tries: u8,
    },
    /// The session is the source's again.
    Aborting {
        /// Its epoch at the target, which it never had.
        next: u64,
        /// Its epoch at the source from now on.
        resumed: u64,
        /// Whether the source said so.
        is_resumed: bool,
        /// Whether the target said so, or is lost.
        is_dropped: bool,
        /// How often the commands were repeated.
        tries: u8,
    },
    /// The session was another router's; its owner is to say that it is this one's now.
    TakingOver {
        /// How often the command was repeated.
        tries: u8,
    },
    /// The session ended.
    Ended,
}

/// What happens to the coordinator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CoordinatorEvent {
    /// The session shall move. Only while [`Coordinator::is_idle`].
    Begin,
    /// Another router ran the session until now, in this epoch or a later one of its own. First of all events.
    TakeOver {
        /// The highest epoch that was heard of.
        known: u64,
    },
    /// A replica of this move reported; it came by the same stream as its tokens.
    Report(Side, Report),
    /// The session shall really move: its client is still there, the target still wanted. Only in
    /// [`CoordinatorState::Ready`].
    Commit,
    /// The move shall not be, if it can still be taken back.
    Cancel,
    /// Nothing was heard in the time that the phase may take.
    Timeout,
    /// A replica of this move was seen to end, or its lease ran out: it steps nothing. While idle, the source is the owner.
    Lost(Side),
    /// The session's last token was accepted, or its client is gone.
    Ended,
}

/// What the router must do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CoordinatorAction {
    /// Send a command to a replica of this move.
    Send(Side, Command),
    /// Submit the session anew, its prompt and all accepted tokens, under this epoch, to any replica; that is its owner.
    Replay {
        /// Its epoch there.
        epoch: u64,
    },
    /// The move is over.
    Finished(Outcome),
}

/// What became of a move.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// The target owns the session.
    Moved,
    /// The source owns it as before.
    Aborted,
    /// Neither does: it is replayed.
    Replayed,
    /// It ended on the way.
    Ended,
}

/// What a token's epoch says of its sender.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TokenVerdict {
    /// It is the owner's. Its index must still be the one that is due.
    Accepted,
    /// Its sender runs a session that it does not own: drop the token, and abort the session there up to that epoch.
    Stray,
}

/// The coordinator of one session.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Coordinator {
    state: CoordinatorState,
    /// The epoch whose tokens are accepted.
    accepted: u64,
    /// The highest epoch ever made.
    highest: u64,
}

impl Coordinator {
    /// A session that was submitted under `epoch`.
    pub fn new(epoch: u64) -> Self {
        Self { state: CoordinatorState::Idle, accepted: epoch, highest: epoch }
    }

    /// The state.
    pub fn state(&self) -> CoordinatorState {
        self.state
    }

    /// The epoch whose tokens are accepted.
    pub fn epoch(&self) -> u64 {
        self.accepted
    }

    /// Whether a move can begin.
    pub fn is_idle(&self) -> bool {
        self.state == CoordinatorState::Idle
    }

    /// Whether the phase waits for a replica, so that it needs a time limit.
    pub fn is_waiting(&self) -> bool {
        use CoordinatorState::{Aborting, Committed, Preparing, TakingOver};
        matches!(self.state, Preparing { .. } | Committed { .. } | Aborting { .. } | TakingOver { .. })
    }

    /// Judges a token by its epoch. A token may be the first word of a replica whose report got lost; what follows from
    /// that is added to `actions`.
    pub fn token(&mut self, epoch: u64, actions: &mut Vec<CoordinatorAction>) -> TokenVerdict {
        match &mut self.state {
            CoordinatorState::Aborting { resumed, is_resumed, .. } if epoch == *resumed && !*is_resumed => {
                *is_resumed = true;
                self.accepted = epoch;
            }
            CoordinatorState::Committed { is_started, .. } if epoch == self.accepted => *is_started = true,
            CoordinatorState::TakingOver { .. } if epoch == self.accepted => self.state = CoordinatorState::Idle,
            _ => {}
        }
        self.settle(actions);
        if epoch == self.accepted && self.state != CoordinatorState::Ended {
            TokenVerdict::Accepted
        } else {
            TokenVerdict::Stray
        }
    }

    /// Takes an event. Events that make no sense in a state change nothing.
    pub fn on(&mut self, event: CoordinatorEvent) -> Vec<CoordinatorAction> {
        let mut actions = Vec::new();
        match event {
            CoordinatorEvent::Begin if self.is_idle() => {
                let next = self.raise();
                self.state = CoordinatorState::Preparing { next };
                let prepare = Command::Prepare { epoch: self.accepted, next };
                actions.push(CoordinatorAction::Send(Side::Source, prepare));
            }
            CoordinatorEvent::TakeOver { known } if self.is_idle() => {
                let epoch = first_after(known.max(self.highest));
                (self.accepted, self.highest) = (epoch, epoch);
                self.state = CoordinatorState::TakingOver { tries: 0 };
                self.repeat(&mut actions);
            }
            CoordinatorEvent::Begin | CoordinatorEvent::TakeOver { .. } => {}
            CoordinatorEvent::Report(side, report) => self.report(side, report, &mut actions),
            CoordinatorEvent::Commit => self.commit(&mut actions),
            CoordinatorEvent::Cancel => self.cancel(&mut actions),
            CoordinatorEvent::Timeout => self.timeout(&mut actions),
            CoordinatorEvent::Lost(side) => self.lost(side, &mut actions),
            CoordinatorEvent::Ended => self.ended(&mut actions),
        }
        self.settle(&mut actions);
        actions
    }

    fn report(&mut self, side: Side, report: Report, actions: &mut Vec<CoordinatorAction>) {
        let Report { epoch, phase } = report;
        match (&mut self.state, side, phase) {
            (CoordinatorState::TakingOver { .. }, Side::Source, Phase::Started) if epoch == self.accepted => {
                self.state = CoordinatorState::Idle;
            }
            (CoordinatorState::TakingOver { .. }, Side::Source, Phase::Failed(_)) if epoch == self.accepted => {
                self.replay(actions);
            }
            (CoordinatorState::Preparing { next }, Side::Source, Phase::Ready) if epoch == self.accepted => {
                self.state = CoordinatorState::Ready { next: *next, is_source_lost: false };
            }
            // The source's last token is on its way, by the same stream and before this; or it was aborted.
            (CoordinatorState::Preparing { .. }, Side::Source, Phase::Failed(Failure::Ended))
                if epoch == self.accepted =>
            {
                self.ended(actions);
            }
            (CoordinatorState::Preparing { .. }, Side::Source, Phase::Failed(_)) if epoch == self.accepted => {
                self.abort(false, actions);
            }
            (CoordinatorState::Committed { is_started, .. }, Side::Target, Phase::Started)
                if epoch == self.accepted =>
            {
                *is_started = true;
            }
            (CoordinatorState::Committed { is_started: false, .. }, Side::Target, Phase::Failed(_))
                if epoch == self.accepted =>
            {
                self.replay(actions);
            }
            // A source that cannot release has nothing to release, or will find out by itself.
            (
                CoordinatorState::Committed { old, is_released, .. },
                Side::Source,
                Phase::Released | Phase::Failed(_),
            ) if epoch == *old => {
                *is_released = true;
            }
            (CoordinatorState::Aborting { resumed, is_resumed, .. }, Side::Source, Phase::Aborted)
                if epoch == *resumed =>
            {
                *is_resumed = true;
                self.accepted = epoch;
            }
            (CoordinatorState::Aborting { resumed, is_resumed: false, .. }, Side::Source, Phase::Failed(_))
                if epoch == *resumed =>
            {
                self.replay(actions);
            }
            (
                CoordinatorState::Aborting { resumed, is_dropped, .. },
                Side::Target,
                Phase::Aborted | Phase::Failed(_),
            ) if epoch == *resumed => {
                *is_dropped = true;
            }
            _ => {}
        }
    }

    /// The one decision that cannot be taken back.
    fn commit(&mut self, actions: &mut Vec<CoordinatorAction>) {
        let CoordinatorState::Ready { next, is_source_lost } = self.state else { return };
        let old = self.accepted;
        self.accepted = next;
        self.state = CoordinatorState::Committed { old, is_started: false, is_released: is_source_lost, tries: 0 };
        self.repeat(actions);
    }

    fn cancel(&mut self, actions: &mut Vec<CoordinatorAction>) {
        match self.state {
            CoordinatorState::Preparing { .. } | CoordinatorState::Ready { is_source_lost: false, .. } => {
                self.abort(false, actions);
            }
            CoordinatorState::Ready { is_source_lost: true, .. } => self.replay(actions),
            _ => {}
        }
    }

    fn timeout(&mut self, actions: &mut Vec<CoordinatorAction>) {
        match &mut self.state {
            CoordinatorState::Preparing { .. } => self.abort(false, actions),
            CoordinatorState::Committed { tries, .. }
            | CoordinatorState::Aborting { tries, .. }
            | CoordinatorState::TakingOver { tries }
                if *tries < TRIES =>
            {
                *tries += 1;
                self.repeat(actions);
            }
            // Nobody answers on a stream that lives: whoever was to run the session does not.
            CoordinatorState::Committed { is_started: false, .. }
            | CoordinatorState::Aborting { is_resumed: false, .. }
            | CoordinatorState::TakingOver { .. } => self.replay(actions),
            // Who was only to let go does so by its own timers.
            CoordinatorState::Committed { is_released, .. } => *is_released = true,
            CoordinatorState::Aborting { is_dropped, .. } => *is_dropped = true,
            _ => {}
        }
    }

    fn lost(&mut self, side: Side, actions: &mut Vec<CoordinatorAction>) {
        match (&mut self.state, side) {
            (CoordinatorState::Idle | CoordinatorState::Preparing { .. }, Side::Source)
            | (CoordinatorState::Aborting { .. } | CoordinatorState::TakingOver { .. }, Side::Source)
            | (CoordinatorState::Ready { is_source_lost: true, .. }, Side::Target)
            | (CoordinatorState::Committed { .. }, Side::Target) => self.replay(actions),
            (CoordinatorState::Preparing { .. } | CoordinatorState::Ready { .. }, Side::Target) => {
                self.abort(true, actions);
            }
            (CoordinatorState::Ready { is_source_lost, .. }, Side::Source) => *is_source_lost = true,
            (CoordinatorState::Committed { is_released, .. }, Side::Source) => *is_released = true,
            (CoordinatorState::Aborting { is_dropped, .. }, Side::Target) => *is_dropped = true,
            (CoordinatorState::Idle | CoordinatorState::TakingOver { .. } | CoordinatorState::Ended, _) => {}
        }
    }

    fn ended(&mut self, actions: &mut Vec<CoordinatorAction>) {
        let next = match self.state {
            CoordinatorState::Ended => return,
            CoordinatorState::Preparing { next } | CoordinatorState::Ready { next, .. } => Some(next),
            CoordinatorState::Aborting { next, is_dropped: false, .. } => Some(next),
            _ => None,
        };
        let was_idle = self.is_idle();
        if let Some(next) = next {
            let epoch = self.raise();
            actions.push(CoordinatorAction::Send(Side::Target, Command::AbortMove { next, epoch }));
        }
        self.state = CoordinatorState::Ended;
        actions.extend((!was_idle).then_some(CoordinatorAction::Finished(Outcome::Ended)));
    }

    /// Takes the move back: an epoch above the target's makes whatever the target may still hear stale.
    fn abort(&mut self, is_target_lost: bool, actions: &mut Vec<CoordinatorAction>) {
        let (CoordinatorState::Preparing { next } | CoordinatorState::Ready { next, .. }) = self.state else { return };
        let resumed = self.raise();
        let is_dropped = is_target_lost;
        self.state = CoordinatorState::Aborting { next, resumed, is_resumed: false, is_dropped, tries: 0 };
        self.repeat(actions);
    }

    /// Neither side can go on.
    fn replay(&mut self, actions: &mut Vec<CoordinatorAction>) {
        let was_idle = self.is_idle();
        match self.state {
            CoordinatorState::Preparing { next }
            | CoordinatorState::Ready { next, .. }
            | CoordinatorState::Aborting { next, is_dropped: false, .. } => {
                // Below the epoch of the replay, which may be placed on that very target.
                let epoch = self.raise();
                actions.push(CoordinatorAction::Send(Side::Target, Command::AbortMove { next, epoch }));
            }
            // The source stands still with what nobody wants any more.
            CoordinatorState::Committed { old, is_released: false, .. } => {
                let release = Command::Release { epoch: old, owner_epoch: self.accepted };
                actions.push(CoordinatorAction::Send(Side::Source, release));
            }
            _ => {}
        }
        let epoch = self.raise();
        self.accepted = epoch;
        self.state = CoordinatorState::Idle;
        actions.push(CoordinatorAction::Replay { epoch });
        actions.extend((!was_idle).then_some(CoordinatorAction::Finished(Outcome::Replayed)));
    }

    /// Sends, or sends again, what was not answered.
    fn repeat(&self, actions: &mut Vec<CoordinatorAction>) {
        match self.state {
            CoordinatorState::Committed { old, is_started, is_released, .. } => {
                let start = Command::Start { epoch: self.accepted };
                let release = Command::Release { epoch: old, owner_epoch: self.accepted };
                actions.extend((!is_started).then_some(CoordinatorAction::Send(Side::Target, start)));
                actions.extend((!is_released).then_some(CoordinatorAction::Send(Side::Source, release)));
            }
            CoordinatorState::TakingOver { .. } => {
                let command = Command::TakeOver { epoch: self.accepted };
                actions.push(CoordinatorAction::Send(Side::Source, command));
            }
            CoordinatorState::Aborting { next, resumed, is_resumed, is_dropped, .. } => {
                let abort = Command::AbortMove { next, epoch: resumed };
                actions.extend((!is_resumed).then_some(CoordinatorAction::Send(Side::Source, abort)));
                actions.extend((!is_dropped).then_some(CoordinatorAction::Send(Side::Target, abort)));
            }
            _ => {}
        }
    }

    /// A move whose both sides have answered is over.
    fn settle(&mut self, actions: &mut Vec<CoordinatorAction>) {
        let outcome = match self.state {
            CoordinatorState::Committed { is_started: true, is_released: true, .. } => Outcome::Moved,
            CoordinatorState::Aborting { is_resumed: true, is_dropped: true, .. } => Outcome::Aborted,
            _ => return,
        };
        self.state = CoordinatorState::Idle;
        actions.push(CoordinatorAction::Finished(outcome));
    }

    fn raise(&mut self) -> u64 {
        self.highest += 1;
        self.highest
    }
}
