//! The owner's side of a move: from running to handed over and released, or back. It also keeps watch over the home entry
//! that remains.

use super::{Action, Command, Failure, Phase, Timer, done, failed};

/// What the owner of a session, or its former owner, is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SourceState {
    /// It steps the session.
    Running {
        /// The session's epoch.
        epoch: u64,
    },
    /// It steps the session while token ids are on their way to the target.
    Freezing {
        /// The session's epoch.
        epoch: u64,
        /// Its epoch at the target.
        next: u64,
    },
    /// The session stands still; what becomes of it is the router's decision.
    Handed {
        /// The session's epoch.
        epoch: u64,
        /// Its epoch at the target.
        next: u64,
        /// What the target answered.
        answer: HandoffAnswer,
        /// Whether pages of the session stay here.
        keeps_home: bool,
    },
    /// The router is silent. Nothing steps, everything is kept for the grace time.
    Parked {
        /// The session's epoch.
        epoch: u64,
        /// Its epoch at the target, if a handoff had been sent.
        handed: Option<u64>,
        /// Whether pages of the session stay here, once it is released.
        keeps_home: bool,
    },
    /// The session runs elsewhere. Who asks for it is told so; a home entry answers queries while the owner renews it.
    Released {
        /// The highest epoch known of the owner.
        owner_epoch: u64,
        /// Whether there is a home entry.
        home: bool,
    },
    /// Nothing is left.
    Gone {
        /// The highest epoch known.
        known: u64,
    },
}

/// What the target said to a handoff.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum HandoffAnswer {
    /// Nothing yet.
    Pending,
    /// Its digests are right.
    Verified,
    /// It refused, or broke off.
    Failed,
}

/// What happens to the owner's side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SourceEvent {
    /// The router said something other than start.
    Command(Command),
    /// The session stands still and its token ids are out.
    Frozen {
        /// Whether full pages stay here: the table that goes along names this replica.
        keeps_home: bool,
    },
    /// The target answered with the right digests.
    HandoffVerified {
        /// The session's epoch at the target.
        next: u64,
    },
    /// The target refused, its digests are wrong, or it cannot be reached.
    HandoffFailed {
        /// The session's epoch at the target.
        next: u64,
    },
    /// An attention query, or another sign of the owner's care for its home.
    Query {
        /// The asking epoch.
        epoch: u64,
    },
    /// [`Timer::Silence`] ran out, or the router's lease did.
    Silence,
    /// [`Timer::Grace`] ran out.
    Grace,
    /// The session ended: its last token is out, or it was aborted, or its owner let go of the home.
    Ended,
}

/// The owner's side of one session's moves.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Source {
    state: SourceState,
}

impl Source {
    /// A session that runs here.
    pub fn running(epoch: u64) -> Self {
        Self { state: SourceState::Running { epoch } }
    }

    /// The state.
    pub fn state(&self) -> SourceState {
        self.state
    }

    /// Whether the session may be stepped, and under which epoch.
    pub fn stepping(&self) -> Option<u64> {
        match self.state {
            SourceState::Running { epoch } | SourceState::Freezing { epoch, .. } => Some(epoch),
            _ => None,
        }
    }

    /// Whether a state slot is held.
    pub fn holds_state(&self) -> bool {
        !matches!(self.state, SourceState::Released { .. } | SourceState::Gone { .. })
    }

    /// Whether pages are held.
    pub fn holds_pages(&self) -> bool {
        match self.state {
            SourceState::Released { home, .. } => home,
            SourceState::Gone { .. } => false,
            _ => true,
        }
    }

    /// The highest epoch known of the session, that of a target included.
    pub fn known_epoch(&self) -> u64 {
        match self.state {
            SourceState::Running { epoch } => epoch,
            SourceState::Freezing { next, .. } | SourceState::Handed { next, .. } => next,
            SourceState::Parked { epoch, handed, .. } => handed.unwrap_or(epoch),
            SourceState::Released { owner_epoch, .. } => owner_epoch,
            SourceState::Gone { known } => known,
        }
    }

    /// What the state waits for.
    pub fn timer(&self) -> Option<Timer> {
        match self.state {
            // The router's lease watches over these.
            SourceState::Running { .. } => None,
            SourceState::Freezing { .. } | SourceState::Handed { .. } => Some(Timer::Silence),
            SourceState::Parked { .. } | SourceState::Released { .. } | SourceState::Gone { .. } => Some(Timer::Grace),
        }
    }

    /// Takes an event.
    pub fn on(&mut self, event: SourceEvent) -> Vec<Action> {
        match event {
            SourceEvent::Command(Command::Prepare { epoch, next }) => self.prepare(epoch, next),
            SourceEvent::Command(Command::Release { epoch, owner_epoch }) => self.release(epoch, owner_epoch),
            SourceEvent::Command(Command::AbortMove { next, epoch }) => self.abort(next, epoch),
            SourceEvent::Command(Command::Start { epoch }) => self.started(epoch),
            SourceEvent::Command(Command::TakeOver { epoch }) => self.take_over(epoch),
            SourceEvent::Frozen { keeps_home } => self.frozen(keeps_home),
            SourceEvent::HandoffVerified { next } => self.answered(next, HandoffAnswer::Verified),
            SourceEvent::HandoffFailed { next } => self.answered(next, HandoffAnswer::Failed),
            SourceEvent::Query { epoch } => self.query(epoch),
            SourceEvent::Silence => self.silence(),
            SourceEvent::Grace => self.grace(),
            SourceEvent::Ended => self.ended(),
        }
    }

    /// The session is known to run in `epoch` elsewhere: a copy that stands still here is of no more use than as a home.
    /// False where it is in use here, so that somebody is wrong.
    pub(super) fn supersede(&mut self, epoch: u64, actions: &mut Vec<Action>) -> bool {
        match self.state {
            SourceState::Handed { next, keeps_home, answer, .. } if epoch >= next => {
                actions.extend((answer == HandoffAnswer::Pending).then_some(Action::CancelHandoff));
                self.give_up(epoch, keeps_home, actions);
            }
            SourceState::Parked { handed: Some(next), keeps_home, .. } if epoch >= next => {
                self.give_up(epoch, keeps_home, actions);
            }
            SourceState::Parked { epoch: mine, .. } if epoch > mine => self.give_up(epoch, false, actions),
            SourceState::Released { ref mut owner_epoch, .. } if epoch >= *owner_epoch => *owner_epoch = epoch,
            SourceState::Gone { ref mut known } if epoch >= *known => *known = epoch,
            _ => return false,
        }
        true
    }

    fn prepare(&mut self, epoch: u64, next: u64) -> Vec<Action> {
        let failure = match self.state {
            SourceState::Running { epoch: mine } if mine == epoch && next > epoch => {
                self.state = SourceState::Freezing { epoch, next };
                return vec![Action::BeginHandoff { next }];
            }
            SourceState::Running { epoch: known } => Failure::Stale { known },
            // The same once more: it is under way, or the answer is said again.
            SourceState::Freezing { epoch: mine, next: known } if (mine, known) == (epoch, next) => return Vec::new(),
            SourceState::Handed { epoch: mine, next: known, answer, .. } if (mine, known) == (epoch, next) => {
                return Self::answer_report(epoch, answer);
            }
            SourceState::Freezing { .. } | SourceState::Handed { .. } => Failure::Busy,
            SourceState::Parked { .. } => Failure::Parked,
            SourceState::Released { owner_epoch, .. } => Failure::Stale { known: owner_epoch },
            SourceState::Gone { .. } => Failure::NotHere,
        };
        vec![failed(epoch, failure)]
    }

    /// The router committed: only where the session stands still and was handed to that epoch.
    fn release(&mut self, epoch: u64, owner_epoch: u64) -> Vec<Action> {
        let mut actions = Vec::new();
        match self.state {
            SourceState::Handed { next, keeps_home, .. } if next == owner_epoch => {
                self.give_up(owner_epoch, keeps_home, &mut actions);
            }
            SourceState::Parked { handed: Some(next), keeps_home, .. } if next == owner_epoch => {
                self.give_up(owner_epoch, keeps_home, &mut actions);
            }
            SourceState::Released { owner_epoch: known, .. } | SourceState::Gone { known } if known >= owner_epoch => {}
            SourceState::Gone { .. } => return vec![failed(epoch, Failure::NotHere)],
            _ => return vec![failed(epoch, Failure::Stale { known: self.known_epoch() })],
        }
        actions.push(done(epoch, Phase::Released));
        actions
    }

    /// The move to `next` is off. A session goes on only if it was handed to `next`, or never heard of it.
    fn abort(&mut self, next: u64, epoch: u64) -> Vec<Action> {
        let mut actions = Vec::new();
        match self.state {
            SourceState::Running { epoch: mine } | SourceState::Freezing { epoch: mine, .. } if mine == epoch => {
                return vec![done(epoch, Phase::Aborted)];
            }
            SourceState::Running { epoch: mine } if next > mine && epoch > next => {}
            SourceState::Freezing { next: mine, .. } if mine == next && epoch > next => {
                actions.push(Action::CancelHandoff);
            }
            SourceState::Handed { next: mine, answer, .. } if mine == next && epoch > next => {
                actions.extend((answer == HandoffAnswer::Pending).then_some(Action::CancelHandoff));
            }
            SourceState::Parked { handed: Some(mine), .. } if mine == next && epoch > next => {}
            SourceState::Parked { .. } => return vec![failed(epoch, Failure::Parked)],
            SourceState::Gone { .. } => return vec![failed(epoch, Failure::NotHere)],
            _ => return vec![failed(epoch, Failure::Stale { known: self.known_epoch() })],
        }
        self.state = SourceState::Running { epoch };
        actions.extend([done(epoch, Phase::Aborted), Action::Resume { epoch }]);
        actions
    }

    /// A start that comes again once the session runs.
    fn started(&self, epoch: u64) -> Vec<Action> {
        match self.state {
            SourceState::Running { epoch: mine }
            | SourceState::Freezing { epoch: mine, .. }
            | SourceState::Handed { epoch: mine, .. }
                if mine == epoch =>
            {
                vec![done(epoch, Phase::Started)]
            }
            SourceState::Parked { .. } => vec![failed(epoch, Failure::Parked)],
            _ if self.known_epoch() >= epoch => vec![failed(epoch, Failure::Stale { known: self.known_epoch() })],
            _ => vec![failed(epoch, Failure::NotHere)],
        }
    }

    /// Another router's client is this session's: it runs on under it. One in the middle of a move has two owners to be, and
    /// which of them the lost router chose nobody knows.
    fn take_over(&mut self, epoch: u64) -> Vec<Action> {
        let failure = match self.state {
            SourceState::Running { epoch: mine } if mine == epoch => return vec![done(epoch, Phase::Started)],
            SourceState::Running { epoch: mine } | SourceState::Parked { epoch: mine, handed: None, .. }
                if epoch > mine =>
            {
                self.state = SourceState::Running { epoch };
                return vec![done(epoch, Phase::Started), Action::Resume { epoch }];
            }
            SourceState::Freezing { .. } | SourceState::Handed { .. } => Failure::Busy,
            SourceState::Parked { handed: Some(_), .. } => Failure::Parked,
            SourceState::Gone { .. } => Failure::NotHere,
            _ => Failure::Stale { known: self.known_epoch() },
        };
        vec![failed(epoch, failure)]
    }

    fn frozen(&mut self, keeps_home: bool) -> Vec<Action> {
        let SourceState::Freezing { epoch, next } = self.state else { return Vec::new() };
        self.state = SourceState::Handed { epoch, next, answer: HandoffAnswer::Pending, keeps_home };
        vec![Action::SendFrozen { next }]
    }

    fn answered(&mut self, of: u64, found: HandoffAnswer) -> Vec<Action> {
        match &mut self.state {
            // The target refused before anything stood still: nothing happened.
            SourceState::Freezing { epoch, next } if *next == of && found == HandoffAnswer::Failed => {
                let epoch = *epoch;
                self.state = SourceState::Running { epoch };
                vec![failed(epoch, Failure::Handoff)]
            }
            SourceState::Handed { epoch, next, answer, .. } if *next == of && *answer == HandoffAnswer::Pending => {
                *answer = found;
                Self::answer_report(*epoch, found)
            }
            _ => Vec::new(),
        }
    }

    /// Only an owner that was started asks, so a query in the target's epoch is a release that got here by itself.
    fn query(&mut self, epoch: u64) -> Vec<Action> {
        let known = self.known_epoch();
        let mut actions = Vec::new();
        let is_owner = match self.state {
            SourceState::Running { .. } | SourceState::Freezing { .. } | SourceState::Gone { .. } => false,
            SourceState::Parked { handed: None, .. } => false,
            _ => self.supersede(epoch, &mut actions),
        };
        let may_answer = is_owner && self.holds_pages();
        actions.push(if may_answer { Action::AllowQuery } else { Action::RefuseQuery { known } });
        actions
    }

    fn silence(&mut self) -> Vec<Action> {
        let (parked, action) = match self.state {
            SourceState::Running { epoch } => ((epoch, None, false), None),
            // Without its record the handoff is nothing: it will never be committed.
            SourceState::Freezing { epoch, .. } => ((epoch, None, false), Some(Action::CancelHandoff)),
            SourceState::Handed { epoch, next, answer, keeps_home } => {
                let pending = answer == HandoffAnswer::Pending;
                ((epoch, Some(next), keeps_home), pending.then_some(Action::CancelHandoff))
            }
            _ => return Vec::new(),
        };
        let (epoch, handed, keeps_home) = parked;
        self.state = SourceState::Parked { epoch, handed, keeps_home };
        action.into_iter().chain([Action::Park]).collect()
    }

    fn grace(&mut self) -> Vec<Action> {
        match self.state {
            SourceState::Parked { .. } | SourceState::Released { .. } => self.end(),
            _ => Vec::new(),
        }
    }

    fn ended(&mut self) -> Vec<Action> {
        let mut actions = Vec::new();
        match self.state {
            SourceState::Freezing { epoch, .. } => {
                actions.extend([Action::CancelHandoff, failed(epoch, Failure::Ended)]);
            }
            SourceState::Handed { answer: HandoffAnswer::Pending, .. } => actions.push(Action::CancelHandoff),
            _ => {}
        }
        actions.extend(self.end());
        actions
    }

    /// Gives up the state; pages stay where they are a home.
    fn give_up(&mut self, owner_epoch: u64, home: bool, actions: &mut Vec<Action>) {
        self.state = SourceState::Released { owner_epoch, home };
        actions.extend([if home { Action::KeepHome } else { Action::FreePages }, Action::FreeState]);
    }

    /// Gives up everything.
    fn end(&mut self) -> Vec<Action> {
        let (state, pages) = (self.holds_state(), self.holds_pages());
        self.state = SourceState::Gone { known: self.known_epoch() };
        let actions = [state.then_some(Action::FreeState), pages.then_some(Action::FreePages)];
        actions.into_iter().flatten().collect()
    }

    fn answer_report(epoch: u64, answer: HandoffAnswer) -> Vec<Action> {
        match answer {
            HandoffAnswer::Pending => Vec::new(),
            HandoffAnswer::Verified => vec![done(epoch, Phase::Ready)],
            HandoffAnswer::Failed => vec![failed(epoch, Failure::Handoff)],
        }
    }
}
