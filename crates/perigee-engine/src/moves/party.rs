//! Events of a session's moves and what follows from them: the rules are [`perigee_migration::Party`]'s, every action of
//! its is carried out here or in `source` and `target`. All of it happens between two steps.

use std::collections::VecDeque;
use std::time::Instant;

use perigee_migration::epochs::{
    Action, Command as MoveCommand, Failure, PartyEvent, Phase, Report, Side, SourceState, Timer,
};
use perigee_migration::{Mode, Place};

use super::{Reported, Target};
use crate::observer::{MoveRecord, MoveResult};
use crate::request::{FinishReason, RouterId, SessionId};
use crate::step::{EngineCore, Fatal, Sink};

/// What an action leads to.
pub(super) enum Then {
    /// Nothing more.
    Nothing,
    /// Something that happened at once.
    Event(PartyEvent),
    /// A word to whoever brought a handoff.
    Answer(Result<(), Failure>),
}

impl EngineCore {
    /// A router's command.
    pub(crate) fn take_move(
        &mut self,
        router: RouterId,
        session: SessionId,
        command: MoveCommand,
        order: Option<(Target, Mode)>,
    ) -> Result<(), Fatal> {
        if self.config.moves.is_none() {
            let report = Report { epoch: command.epoch(), phase: Phase::Failed(Failure::NotHere) };
            let message = "this replica takes no part in moves".to_owned();
            self.outbox.report(router, Reported { before: 0, session, report, message, facts: None });
            return Ok(());
        }
        let seat = self.seats.entry(session.clone()).or_default();
        seat.router = Some(router);
        seat.has_moved = true;
        seat.error.clear();
        if let MoveCommand::Prepare { .. } = command
            && seat.outgoing.is_none()
        {
            seat.order = order;
        }
        // Whoever decides over a session hears of it: its first router may have come back by another stream.
        if let Some(held) = self.names.get(&session).and_then(|id| self.sessions.get_mut(id))
            && let Sink::Router(owner) = &mut held.sink
        {
            *owner = router;
        }
        self.drive(&session, PartyEvent::Command(command)).map(drop)
    }

    /// Whether a session may be submitted under an epoch; if so, it runs here from now on.
    pub(crate) fn submit_party(&mut self, router: RouterId, session: &SessionId, epoch: u64) -> Result<bool, Fatal> {
        let known = self.seats.get(session).map_or(0, |seat| seat.party.known_epoch());
        if epoch <= known {
            tracing::warn!(session = session.0, epoch, known, "a submitted session is of the past and was dropped");
            return Ok(false);
        }
        self.drive(session, PartyEvent::Submit { epoch })?;
        if let Some(seat) = self.seats.get_mut(session) {
            seat.router = Some(router);
        }
        Ok(true)
    }

    /// A session ended here in this epoch: nothing of it is in the tables any more.
    pub(crate) fn party_ended(&mut self, session: &SessionId, epoch: u64) -> Result<(), Fatal> {
        match self.seats.get(session) {
            None => Ok(()),
            Some(seat) if !seat.has_moved => {
                self.seats.remove(session);
                Ok(())
            }
            Some(_) => self.drive(session, PartyEvent::Ended { epoch }).map(drop),
        }
    }

    /// A router's word that a session is over up to an epoch.
    pub(crate) fn take_abort(&mut self, session: &SessionId, up_to: u64) -> Result<(), Fatal> {
        let up_to = if up_to == 0 { u64::MAX } else { up_to };
        let running = self.names.get(session).copied();
        let epoch = running.and_then(|id| self.sessions.get(&id)).map(|held| held.sequence.epoch);
        if let (Some(id), Some(epoch)) = (running, epoch)
            && epoch <= up_to
        {
            self.end(id, FinishReason::Aborted, None)?;
        }
        if self.seats.contains_key(session) {
            self.drive(session, PartyEvent::Ended { epoch: up_to })?;
        }
        Ok(())
    }

    /// A router is gone: sessions that are being moved for it stand still and wait, for a while. True if this one does.
    pub(crate) fn park_for(&mut self, session: &SessionId) -> Result<bool, Fatal> {
        let state = self.seats.get(session).and_then(|seat| seat.party.source()).map(|source| source.state());
        match state {
            Some(SourceState::Freezing { .. } | SourceState::Handed { .. }) => {
                self.drive(session, PartyEvent::Silence(Side::Source))?;
                Ok(true)
            }
            Some(SourceState::Parked { .. }) => Ok(true),
            _ => Ok(false),
        }
    }

    /// Whether [`Self::mind_moves`] has something to do that cannot wait for long.
    pub(crate) fn moves_are_due(&self, now: Instant) -> bool {
        self.config.moves.as_ref().is_some_and(|config| {
            let ends = self.seats.values().any(|seat| seat.is_due(now));
            ends || !self.follows.is_empty() || self.homes_are_due(now, config)
        })
    }

    /// Minds the timers and what homes were asked.
    pub(crate) fn mind_moves(&mut self, now: Instant) -> Result<(), Fatal> {
        let Some(config) = self.config.moves.clone() else { return Ok(()) };
        for (session, epoch) in config.homes.asked() {
            let session = SessionId(session);
            if self.seats.contains_key(&session) {
                self.drive(&session, PartyEvent::Query { epoch })?;
            }
        }
        self.tell_homes(now);
        self.follow_pages(now)?;
        let mut due = Vec::new();
        for (session, seat) in &mut self.seats {
            while let Some((side, timer)) = seat.expired(now) {
                // A router that is there is not silent: it has time limits of its own.
                let is_heard = side == Side::Source
                    && timer == Timer::Silence
                    && seat.router.is_some_and(|router| self.outbox.is_attached(router));
                if is_heard {
                    seat.wait_on(side, timer, now, &config);
                } else {
                    due.push((session.clone(), side, timer));
                }
            }
        }
        for (session, side, timer) in due {
            let event = match timer {
                Timer::Silence => PartyEvent::Silence(side),
                Timer::Grace => PartyEvent::Grace(side),
            };
            self.drive(&session, event)?;
        }
        self.seats.retain(|_, seat| !seat.is_over(now, &config) || seat.party.stepping().is_some());
        Ok(())
    }

    /// Takes an event and carries out what follows. Returns what whoever brought a handoff is to be told.
    pub(crate) fn drive(
        &mut self,
        session: &SessionId,
        event: PartyEvent,
    ) -> Result<Option<Result<(), Failure>>, Fatal> {
        let now = self.config.clock.now();
        let mut answer = None;
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            let seat = self.seats.entry(session.clone()).or_default();
            let actions = seat.party.on(event);
            if let Some(config) = &self.config.moves {
                seat.touch(side_of(&event), now, config);
            }
            tracing::trace!(session = session.0, ?event, ?actions, "a session's move");
            for action in actions {
                match self.act(session, action)? {
                    Then::Nothing => {}
                    Then::Event(event) => events.push_back(event),
                    Then::Answer(told) => answer = Some(told),
                }
            }
        }
        Ok(answer)
    }

    fn act(&mut self, session: &SessionId, action: Action) -> Result<Then, Fatal> {
        match action {
            Action::Report(report) => self.report(session, report),
            Action::BeginHandoff { next } => {
                return Ok(match self.begin_handoff(session, next) {
                    Ok(()) => Then::Nothing,
                    Err(message) => self.handoff_failed(session, next, message),
                });
            }
            Action::SendFrozen { next } => {
                if let Err(message) = self.send_frozen(session, next)? {
                    return Ok(self.handoff_failed(session, next, message));
                }
            }
            Action::CancelHandoff => {
                if let Some(seat) = self.seats.get_mut(session) {
                    seat.outgoing = None;
                }
            }
            Action::Resume { epoch } => self.resume(session, epoch),
            Action::Park => self.park(session)?,
            Action::KeepHome => self.release_task(session, true)?,
            Action::FreeState => self.release_task(session, false)?,
            Action::FreePages => {
                self.release_task(session, false)?;
                self.free_home(session)?;
            }
            Action::Reserve => return self.reserve(session),
            Action::FreeReserved => self.free_reserved(session)?,
            Action::Accept => return Ok(Then::Answer(Ok(()))),
            Action::Refuse(failure) => return Ok(Then::Answer(Err(failure))),
            Action::Run { epoch } => return self.run_prepared(session, epoch),
            // The directory has answered already, or refused.
            Action::AllowQuery | Action::RefuseQuery { .. } => {}
        }
        Ok(Then::Nothing)
    }

    /// A handoff from here cannot go on.
    fn handoff_failed(&mut self, session: &SessionId, next: u64, message: String) -> Then {
        if let Some(seat) = self.seats.get_mut(session) {
            tracing::warn!(session = session.0, next, message, "a session could not be handed over");
            seat.outgoing = None;
            seat.error = message;
        }
        Then::Event(PartyEvent::HandoffFailed { next })
    }

    fn report(&mut self, session: &SessionId, report: Report) {
        let Some(seat) = self.seats.get_mut(session) else { return };
        let Some(router) = seat.router else { return };
        let mut facts = None;
        let mut message = String::new();
        match report.phase {
            Phase::Ready => facts = seat.course.facts,
            Phase::Failed(failure) => {
                let detail = std::mem::take(&mut seat.error);
                message = if detail.is_empty() { failure.to_string() } else { format!("{failure}: {detail}") };
            }
            _ => {}
        }
        let result = match report.phase {
            Phase::Released => Some(MoveResult::Moved),
            Phase::Aborted => Some(MoveResult::Aborted),
            Phase::Failed(_) => Some(MoveResult::Failed),
            Phase::Ready | Phase::Started => None,
        };
        if let Some(result) = result
            && let Some(mode) = seat.course.mode.take()
        {
            let facts = seat.course.facts.take();
            self.config.observer.moved(session, &MoveRecord { mode, result, facts });
        }
        self.outbox.report(router, Reported { before: 0, session: session.clone(), report, message, facts });
    }

    /// Steps the session on from where it stands.
    fn resume(&mut self, session: &SessionId, epoch: u64) {
        if let Some(config) = &self.config.moves {
            config.homes.withdraw(&session.0);
        }
        if let Some(seat) = self.seats.get_mut(session) {
            seat.outgoing = None;
        }
        let Some(&id) = self.names.get(session) else { return };
        if let Some(held) = self.sessions.get_mut(&id) {
            held.sequence.epoch = epoch;
        }
        self.scheduler.thaw(id);
    }

    /// Stops the session where it is.
    fn park(&mut self, session: &SessionId) -> Result<(), Fatal> {
        let Some(&id) = self.names.get(session) else { return Ok(()) };
        if self.scheduler.frozen(id).is_some() {
            return Ok(());
        }
        match self.freeze(id)? {
            Ok(()) => Ok(()),
            Err(message) => {
                tracing::warn!(session = session.0, message, "a session could not be parked and ends");
                self.end(id, FinishReason::Aborted, None)
            }
        }
    }

    /// The home entry ends: its pages are free.
    pub(super) fn free_home(&mut self, session: &SessionId) -> Result<(), Fatal> {
        let Some(config) = self.config.moves.clone() else { return Ok(()) };
        config.homes.withdraw(&session.0);
        let Some(key) = self.seats.get_mut(session).and_then(|seat| seat.home.take()) else { return Ok(()) };
        let pages = self.scheduler.free_home(key)?;
        self.poison(&[], &pages)
    }

    /// This replica, as others name it.
    pub(super) fn place(&self) -> Option<Place> {
        self.config.moves.as_ref().map(|config| config.place.clone())
    }
}

/// The side whose timer an event sets anew; none for both.
fn side_of(event: &PartyEvent) -> Option<Side> {
    match event {
        PartyEvent::Frozen { .. }
        | PartyEvent::HandoffVerified { .. }
        | PartyEvent::HandoffFailed { .. }
        | PartyEvent::Query { .. }
        | PartyEvent::Silence(Side::Source)
        | PartyEvent::Grace(Side::Source) => Some(Side::Source),
        PartyEvent::Offer { .. }
        | PartyEvent::Part { .. }
        | PartyEvent::Verified { .. }
        | PartyEvent::Broken { .. }
        | PartyEvent::Silence(Side::Target)
        | PartyEvent::Grace(Side::Target) => Some(Side::Target),
        PartyEvent::Submit { .. } | PartyEvent::Command(_) | PartyEvent::Ended { .. } => None,
    }
}
