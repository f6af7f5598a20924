//! The other side of a move: from a handoff that is offered to a session that is prepared and, only by the router's
//! word, started. Once started it is a source like any other.

use super::{Action, Failure, Phase, Timer, done, failed};

/// What a replica is about that was offered a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TargetState {
    /// A slot is taken, the header has arrived.
    Reserved {
        /// The session's epoch here, once started.
        next: u64,
    },
    /// State is arriving.
    Receiving {
        /// The session's epoch here, once started.
        next: u64,
    },
    /// Everything is here and verified. Nothing steps.
    Prepared {
        /// The session's epoch here, once started.
        next: u64,
    },
    /// The router is silent. Nothing steps, everything is kept for the grace time.
    Parked {
        /// The session's epoch here, once started.
        next: u64,
    },
    /// It runs: the rest is the source's side.
    Started {
        /// The session's epoch.
        epoch: u64,
    },
    /// Nothing is here; handoffs for this epoch and below are of the past.
    Dropped {
        /// The highest epoch known, 0 without any.
        known: u64,
    },
}

/// What happens to the target's side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TargetEvent {
    /// A handoff's header arrived.
    Offer {
        /// The session's epoch at the source.
        epoch: u64,
        /// Its epoch here.
        next: u64,
        /// Whether there is a slot for it.
        has_room: bool,
    },
    /// More of the handoff arrived.
    Part {
        /// The session's epoch here.
        next: u64,
    },
    /// All of it arrived, and the digests over slot and pages are right.
    Verified {
        /// The session's epoch here.
        next: u64,
    },
    /// It broke off, or something is wrong with it.
    Broken {
        /// The session's epoch here.
        next: u64,
    },
    /// The router says that it runs here from now on.
    Start {
        /// Its epoch here.
        epoch: u64,
    },
    /// The router says that it does not.
    AbortMove {
        /// The epoch that it would have had here.
        next: u64,
        /// The epoch that its source goes on with.
        epoch: u64,
    },
    /// [`Timer::Silence`] ran out.
    Silence,
    /// [`Timer::Grace`] ran out.
    Grace,
    /// The session ended or was aborted.
    Ended,
}

/// The other side of one session's moves.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Target {
    state: TargetState,
}

impl Default for Target {
    fn default() -> Self {
        Self { state: TargetState::Dropped { known: 0 } }
    }
}

impl Target {
    /// The state.
    pub fn state(&self) -> TargetState {
        self.state
    }

    /// The epoch of the session whose handoff is here or on its way, and not started.
    pub fn holding(&self) -> Option<u64> {
        match self.state {
            TargetState::Reserved { next }
            | TargetState::Receiving { next }
            | TargetState::Prepared { next }
            | TargetState::Parked { next } => Some(next),
            TargetState::Started { .. } | TargetState::Dropped { .. } => None,
        }
    }

    /// The highest epoch known.
    pub fn known_epoch(&self) -> u64 {
        match self.state {
            TargetState::Started { epoch } => epoch,
            TargetState::Dropped { known } => known,
            _ => self.holding().unwrap_or_default(),
        }
    }

    /// What the state waits for.
    pub fn timer(&self) -> Option<Timer> {
        match self.state {
            TargetState::Reserved { .. } | TargetState::Receiving { .. } | TargetState::Prepared { .. } => {
                Some(Timer::Silence)
            }
            TargetState::Parked { .. } => Some(Timer::Grace),
            TargetState::Started { .. } | TargetState::Dropped { .. } => None,
        }
    }

    /// Takes an event.
    pub fn on(&mut self, event: TargetEvent) -> Vec<Action> {
        match event {
            TargetEvent::Offer { epoch, next, has_room } => self.offer(epoch, next, has_room),
            TargetEvent::Part { next } => {
                if self.state == (TargetState::Reserved { next }) {
                    self.state = TargetState::Receiving { next };
                }
                Vec::new()
            }
            TargetEvent::Verified { next } if self.is_receiving(next) => {
                self.state = TargetState::Prepared { next };
                vec![Action::Accept]
            }
            // What was reserved is gone meanwhile.
            TargetEvent::Verified { .. } => vec![Action::Refuse(Failure::Stale { known: self.known_epoch() })],
            TargetEvent::Broken { next } if self.is_receiving(next) => self.refuse(next, Failure::Handoff),
            TargetEvent::Broken { .. } => Vec::new(),
            TargetEvent::Start { epoch } => self.start(epoch),
            TargetEvent::AbortMove { next, epoch } => self.abort(next, epoch),
            TargetEvent::Silence => match self.state {
                TargetState::Prepared { next } => {
                    self.state = TargetState::Parked { next };
                    vec![Action::Park]
                }
                TargetState::Reserved { next } | TargetState::Receiving { next } => self.refuse(next, Failure::Handoff),
                _ => Vec::new(),
            },
            TargetEvent::Grace => match self.state {
                TargetState::Parked { next } => self.drop_to(next),
                _ => Vec::new(),
            },
            TargetEvent::Ended => self.holding().map(|next| self.drop_to(next)).unwrap_or_default(),
        }
    }

    /// A later offer may take the place of an earlier one: its source runs in an epoch above the earlier one's, so the
    /// router has given that one up.
    fn offer(&mut self, epoch: u64, next: u64, has_room: bool) -> Vec<Action> {
        let known = self.known_epoch();
        if next <= epoch || epoch < known || next <= known {
            return vec![Action::Refuse(Failure::Stale { known })];
        }
        let holding = self.holding();
        if holding.is_some_and(|earlier| epoch <= earlier) {
            return vec![Action::Refuse(Failure::Busy)];
        }
        let mut actions = holding.map(|earlier| self.drop_to(earlier)).unwrap_or_default();
        // What was held makes room for the same session.
        if has_room || !actions.is_empty() {
            self.state = TargetState::Reserved { next };
            actions.push(Action::Reserve);
        } else {
            actions.push(Action::Refuse(Failure::Full));
        }
        actions
    }

    fn start(&mut self, epoch: u64) -> Vec<Action> {
        match self.state {
            TargetState::Prepared { next } | TargetState::Parked { next } if next == epoch => {
                self.state = TargetState::Started { epoch };
                vec![done(epoch, Phase::Started), Action::Run { epoch }]
            }
            TargetState::Started { epoch: mine } if mine == epoch => vec![done(epoch, Phase::Started)],
            _ if self.known_epoch() > epoch => vec![failed(epoch, Failure::Stale { known: self.known_epoch() })],
            _ => vec![failed(epoch, Failure::NotHere)],
        }
    }

    /// Also where nothing is here yet: a handoff for `next` that comes later finds that it is of the past. That nothing was
    /// here is said, because a source that has lost its session is told the same and must not seem to go on with it.
    fn abort(&mut self, next: u64, epoch: u64) -> Vec<Action> {
        let mut actions = match self.holding() {
            Some(mine) if mine > next => return vec![failed(epoch, Failure::Stale { known: mine })],
            Some(mine) if self.is_receiving(mine) => self.refuse(epoch, Failure::Stale { known: epoch }),
            Some(_) => self.drop_to(epoch),
            None => {
                if let TargetState::Dropped { known } = &mut self.state {
                    *known = epoch.max(*known);
                }
                return vec![failed(epoch, Failure::NotHere)];
            }
        };
        actions.push(done(epoch, Phase::Aborted));
        actions
    }

    fn is_receiving(&self, next: u64) -> bool {
        self.state == (TargetState::Reserved { next }) || self.state == (TargetState::Receiving { next })
    }

    fn refuse(&mut self, known: u64, failure: Failure) -> Vec<Action> {
        let mut actions = self.drop_to(known);
        actions.push(Action::Refuse(failure));
        actions
    }

    fn drop_to(&mut self, known: u64) -> Vec<Action> {
        self.state = TargetState::Dropped { known };
        vec![Action::FreeReserved]
    }
}
