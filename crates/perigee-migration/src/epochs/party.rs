//! One session at one replica, on whichever side of a move it is. A replica may be the home of a session's former pages
//! and the target of its next move at once; this decides which side an event is for.

use super::source::{Source, SourceEvent, SourceState};
use super::target::{Target, TargetEvent, TargetState};
use super::{Action, Command, Failure, Side, Timer, failed};

/// What happens to a session at a replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PartyEvent {
    /// A router submits the session, as new or replayed. It runs from now on, unless the actions have a failed report;
    /// what they free is an earlier copy's.
    Submit {
        /// Its epoch.
        epoch: u64,
    },
    /// The router said something.
    Command(Command),
    /// See [`SourceEvent::Frozen`].
    Frozen {
        /// Whether full pages stay here.
        keeps_home: bool,
    },
    /// See [`SourceEvent::HandoffVerified`].
    HandoffVerified {
        /// The session's epoch at the target.
        next: u64,
    },
    /// See [`SourceEvent::HandoffFailed`].
    HandoffFailed {
        /// The session's epoch at the target.
        next: u64,
    },
    /// See [`TargetEvent::Offer`].
    Offer {
        /// The session's epoch at the source.
        epoch: u64,
        /// Its epoch here.
        next: u64,
        /// Whether there is a slot for it.
        has_room: bool,
    },
    /// See [`TargetEvent::Part`].
    Part {
        /// The session's epoch here.
        next: u64,
    },
    /// See [`TargetEvent::Verified`].
    Verified {
        /// The session's epoch here.
        next: u64,
    },
    /// See [`TargetEvent::Broken`].
    Broken {
        /// The session's epoch here.
        next: u64,
    },
    /// See [`SourceEvent::Query`].
    Query {
        /// The asking epoch.
        epoch: u64,
    },
    /// A side's [`Timer::Silence`] ran out; also both sides', when the router's lease did.
    Silence(Side),
    /// A side's [`Timer::Grace`] ran out.
    Grace(Side),
    /// The session ended, or its router aborted it in this epoch or before.
    Ended {
        /// The last epoch that is over.
        epoch: u64,
    },
}

/// One session at one replica.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Party {
    source: Option<Source>,
    target: Target,
}

impl Party {
    /// A session of which nothing is known.
    pub fn new() -> Self {
        Self::default()
    }

    /// The owner's side, if there was one.
    pub fn source(&self) -> Option<&Source> {
        self.source.as_ref()
    }

    /// The other side.
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// The epoch under which the session may be stepped, if it may.
    pub fn stepping(&self) -> Option<u64> {
        self.source.as_ref().and_then(|source| source.stepping())
    }

    /// The highest epoch known: what a handoff decoder asks for.
    pub fn known_epoch(&self) -> u64 {
        self.source.as_ref().map_or(0, |source| source.known_epoch()).max(self.target.known_epoch())
    }

    /// The timer that a side needs. A home entry does not run out while its session is on its way back.
    pub fn timer(&self, side: Side) -> Option<Timer> {
        match side {
            Side::Target => self.target.timer(),
            Side::Source if self.target.holding().is_some() => None,
            Side::Source => self.source.as_ref().and_then(|source| source.timer()),
        }
    }

    /// Whether the replica may forget the session altogether: nothing is held. It should wait for a grace time, in which
    /// late messages are still told what they missed.
    pub fn is_over(&self) -> bool {
        let is_gone = self.source.as_ref().is_none_or(|source| !source.holds_state() && !source.holds_pages());
        is_gone && self.target.holding().is_none()
    }

    /// Takes an event.
    pub fn on(&mut self, event: PartyEvent) -> Vec<Action> {
        match event {
            PartyEvent::Submit { epoch } => self.submit(epoch),
            PartyEvent::Command(Command::Start { epoch }) => self.start(epoch),
            PartyEvent::Command(Command::AbortMove { next, epoch }) => self.abort(next, epoch),
            PartyEvent::Command(command) => match &mut self.source {
                Some(source) => source.on(SourceEvent::Command(command)),
                None => vec![failed(command.epoch(), Failure::NotHere)],
            },
            PartyEvent::Frozen { keeps_home } => self.source_on(SourceEvent::Frozen { keeps_home }),
            PartyEvent::HandoffVerified { next } => self.source_on(SourceEvent::HandoffVerified { next }),
            PartyEvent::HandoffFailed { next } => self.source_on(SourceEvent::HandoffFailed { next }),
            PartyEvent::Offer { epoch, next, has_room } => self.offer(epoch, next, has_room),
            PartyEvent::Part { next } => self.target.on(TargetEvent::Part { next }),
            PartyEvent::Verified { next } => self.target.on(TargetEvent::Verified { next }),
            PartyEvent::Broken { next } => self.target.on(TargetEvent::Broken { next }),
            PartyEvent::Query { epoch } => match &mut self.source {
                Some(source) => source.on(SourceEvent::Query { epoch }),
                None => vec![Action::RefuseQuery { known: self.target.known_epoch() }],
            },
            PartyEvent::Silence(Side::Source) => self.source_on(SourceEvent::Silence),
            PartyEvent::Silence(Side::Target) => self.target.on(TargetEvent::Silence),
            PartyEvent::Grace(Side::Source) if self.target.holding().is_some() => Vec::new(),
            PartyEvent::Grace(Side::Source) => self.source_on(SourceEvent::Grace),
            PartyEvent::Grace(Side::Target) => self.target.on(TargetEvent::Grace),
            PartyEvent::Ended { epoch } => self.ended(epoch),
        }
    }

    fn source_on(&mut self, event: SourceEvent) -> Vec<Action> {
        self.source.as_mut().map(|source| source.on(event)).unwrap_or_default()
    }

    /// What is known here of an earlier epoch is of the past: the router submits only what runs nowhere else.
    fn submit(&mut self, epoch: u64) -> Vec<Action> {
        let known = self.known_epoch();
        if epoch <= known {
            return vec![failed(epoch, Failure::Stale { known })];
        }
        let mut actions = self.target.on(TargetEvent::Ended);
        actions.extend(self.source_on(SourceEvent::Ended));
        self.source = Some(Source::running(epoch));
        actions
    }

    fn offer(&mut self, epoch: u64, next: u64, has_room: bool) -> Vec<Action> {
        let mut actions = Vec::new();
        if let Some(source) = &mut self.source {
            let known = source.known_epoch();
            if epoch < known || next <= known {
                return vec![Action::Refuse(Failure::Stale { known })];
            }
            if !source.supersede(epoch, &mut actions) {
                return vec![Action::Refuse(Failure::Busy)];
            }
        }
        actions.extend(self.target.on(TargetEvent::Offer { epoch, next, has_room }));
        actions
    }

    fn start(&mut self, epoch: u64) -> Vec<Action> {
        let is_prepared = self.target.holding() == Some(epoch);
        let actions = match &mut self.source {
            // The session ran here since: the source knows what became of it.
            Some(source) if !is_prepared => source.on(SourceEvent::Command(Command::Start { epoch })),
            _ => self.target.on(TargetEvent::Start { epoch }),
        };
        if let TargetState::Started { epoch } = self.target.state()
            && actions.contains(&Action::Run { epoch })
        {
            self.source = Some(Source::running(epoch));
        }
        actions
    }

    /// For the target if it holds that handoff; for the source if the session is still here; else it is noted, so that a
    /// handoff that comes later finds itself of the past.
    fn abort(&mut self, next: u64, epoch: u64) -> Vec<Action> {
        if self.target.holding().is_none_or(|mine| mine > next)
            && let Some(source) = &mut self.source
        {
            let is_of_this_move = match source.state() {
                SourceState::Running { .. } | SourceState::Freezing { .. } | SourceState::Handed { .. } => true,
                SourceState::Parked { handed, .. } => handed == Some(next),
                SourceState::Released { .. } | SourceState::Gone { .. } => false,
            };
            if is_of_this_move {
                return source.on(SourceEvent::Command(Command::AbortMove { next, epoch }));
            }
        }
        self.target.on(TargetEvent::AbortMove { next, epoch })
    }

    fn ended(&mut self, epoch: u64) -> Vec<Action> {
        let mut actions = Vec::new();
        if self.target.holding().is_some_and(|mine| mine <= epoch) {
            actions.extend(self.target.on(TargetEvent::Ended));
        }
        if let Some(source) = &mut self.source {
            let mine = match source.state() {
                SourceState::Running { epoch }
                | SourceState::Freezing { epoch, .. }
                | SourceState::Handed { epoch, .. }
                | SourceState::Parked { epoch, .. } => epoch,
                SourceState::Released { owner_epoch, .. } => owner_epoch,
                SourceState::Gone { known } => known,
            };
            if mine <= epoch {
                actions.extend(source.on(SourceEvent::Ended));
            }
        }
        actions
    }
}
