//! Sessions whose router is gone. Those of a request that may outlive it stand still for the grace time, with what they have
//! computed; a router that the client has turned to takes them over from the token that the client has not got yet. All
//! others end at once.

use std::collections::VecDeque;
use std::time::Instant;

use perigee_migration::epochs::{Command as MoveCommand, Failure, PartyEvent, Phase, Report, Side};

use super::Reported;
use crate::request::{FinishReason, RouterId, SessionEvent, SessionId};
use crate::scheduler::TaskId;
use crate::step::{EngineCore, Fatal, Sink};

/// Events that are kept of a session: so far may its client be behind it.
const MOST_EVENTS: usize = 1024;

/// A router's word that a session's client has turned to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TakeOver {
    /// The session.
    pub session: SessionId,
    /// The epoch that it goes on with.
    pub epoch: u64,
    /// Index of the first token that the router does not know.
    pub first: u64,
    /// Index of the first token that the client has not got: events of earlier ones have nothing but their tokens.
    pub next: u64,
    /// When the client stops waiting.
    pub deadline: Option<Instant>,
}

/// The last events of a session that may come to another router, a bounded number of them.
#[derive(Debug)]
pub(crate) struct KeptEvents {
    /// Token index of the oldest.
    first: u64,
    events: VecDeque<SessionEvent>,
}

impl KeptEvents {
    /// None so far; the next token has index `first`.
    pub(crate) fn from(first: u64) -> Self {
        Self { first, events: VecDeque::new() }
    }

    /// Keeps the event of the next token.
    pub(crate) fn push(&mut self, event: &SessionEvent) {
        if self.events.len() == MOST_EVENTS {
            self.events.pop_front();
            self.first += 1;
        }
        self.events.push_back(event.clone());
    }

    /// The events of all tokens from `next` on, if they are all here.
    fn since(&self, next: u64) -> Option<impl Iterator<Item = &SessionEvent>> {
        let skipped = usize::try_from(next.checked_sub(self.first)?).ok()?;
        (skipped <= self.events.len()).then(|| self.events.iter().skip(skipped))
    }
}

impl EngineCore {
    /// A session's router is gone. True if the session stands still now and waits for another one.
    pub(crate) fn orphan(&mut self, id: TaskId, session: &SessionId) -> Result<bool, Fatal> {
        let is_kept = self.sessions.get(&id).is_some_and(|held| held.kept.is_some());
        if !is_kept || self.config.moves.is_none() {
            return Ok(false);
        }
        let Some(seat) = self.seats.get_mut(session) else { return Ok(false) };
        seat.has_moved = true;
        self.drive(session, PartyEvent::Silence(Side::Source))?;
        // It ended where it cannot stand still.
        let waits = self.sessions.contains_key(&id);
        if waits {
            tracing::info!(session = session.0, "a session waits for another router");
        }
        Ok(true)
    }

    /// Another router has the client of a session.
    pub(crate) fn take_over(&mut self, router: RouterId, order: &TakeOver) -> Result<(), Fatal> {
        let TakeOver { session, epoch, first, next, deadline } = order;
        let events = match self.events_for(session, *epoch, (*first, *next)) {
            Ok(events) => events,
            Err(failure) => {
                let report = Report { epoch: *epoch, phase: Phase::Failed(failure) };
                let message = failure.to_string();
                self.outbox
                    .report(router, Reported { before: 0, session: session.clone(), report, message, facts: None });
                return Ok(());
            }
        };
        let Some(&id) = self.names.get(session) else { return Ok(()) };
        let Some(seat) = self.seats.get_mut(session) else { return Ok(()) };
        seat.has_moved = true;
        let former = seat.router.replace(router);
        let was = self.sessions.get(&id).map(|held| held.sequence.epoch);
        self.drive(session, PartyEvent::Command(MoveCommand::TakeOver { epoch: *epoch }))?;
        let is_taken = self.seats.get(session).is_some_and(|seat| seat.party.stepping() == Some(*epoch));
        if !is_taken {
            if let Some(seat) = self.seats.get_mut(session) {
                seat.router = former;
            }
            return Ok(());
        }
        if was == Some(*epoch) {
            // The same word again.
            return Ok(());
        }
        self.change_router(id, router, was.unwrap_or_default());
        self.set_deadline(id, *deadline);
        tracing::info!(session = session.0, epoch, repeated = events.len(), "a session was taken over");
        events.into_iter().for_each(|event| self.outbox.push(router, event));
        Ok(())
    }

    /// What a router has to hear to know a session as its client does.
    fn events_for(
        &self,
        session: &SessionId,
        epoch: u64,
        (first, next): (u64, u64),
    ) -> Result<Vec<SessionEvent>, Failure> {
        let held = self.names.get(session).and_then(|id| self.sessions.get(id)).ok_or(Failure::NotHere)?;
        let sequence = &held.sequence;
        let kept = held.kept.as_ref().ok_or(Failure::NotHere)?;
        let later = kept.since(next).ok_or(Failure::NotHere)?;
        let output = sequence.tokens.get(sequence.prompt_length as usize..).unwrap_or_default();
        let known = (0..next).zip(output).skip(first as usize).map(|(index, &token)| SessionEvent {
            epoch,
            index,
            token: Some(token),
            ..sequence.event()
        });
        Ok(known.chain(later.map(|event| SessionEvent { epoch, ..event.clone() })).collect())
    }

    /// A session's events go to another router from now on; the one before, if it is still there, hears of an end.
    fn change_router(&mut self, id: TaskId, router: RouterId, was: u64) {
        let Some(held) = self.sessions.get_mut(&id) else { return };
        let Sink::Router(former) = std::mem::replace(&mut held.sink, Sink::Router(router)) else { return };
        if former == router {
            return;
        }
        let sequence = &held.sequence;
        let end = SessionEvent {
            epoch: was,
            finish: Some(FinishReason::Aborted),
            usage: Some(sequence.usage()),
            ..sequence.event()
        };
        self.outbox.push(former, end);
    }

    fn set_deadline(&mut self, id: TaskId, deadline: Option<Instant>) {
        if let Some(held) = self.sessions.get_mut(&id) {
            held.deadline = deadline;
        }
        self.scheduler.set_deadline(id, deadline);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(index: u64) -> SessionEvent {
        SessionEvent {
            session: SessionId("s".into()),
            epoch: 1,
            choice: 0,
            index,
            token: Some(index as u32),
            text: String::new(),
            logprobs: None,
            prompt_logprobs: None,
            finish: None,
            error: None,
            usage: None,
        }
    }

    fn since(kept: &KeptEvents, next: u64) -> Option<Vec<u64>> {
        kept.since(next).map(|events| events.map(|event| event.index).collect())
    }

    #[test]
    fn kept_events_are_the_last_ones_and_no_more_than_the_bound() {
        let mut kept = KeptEvents::from(5);
        assert_eq!((since(&kept, 5), since(&kept, 4), since(&kept, 6)), (Some(vec![]), None, None));
        (5..8).for_each(|index| kept.push(&event(index)));
        assert_eq!((since(&kept, 6), since(&kept, 8)), (Some(vec![6, 7]), Some(vec![])));
        assert_eq!((since(&kept, 4), since(&kept, 9)), (None, None), "the client has what never was");
        (8..6 + MOST_EVENTS as u64).for_each(|index| kept.push(&event(index)));
        assert_eq!(kept.events.len(), MOST_EVENTS);
        assert_eq!(since(&kept, 5), None, "the oldest is gone");
        assert_eq!(since(&kept, 6).map(|events| events.len()), Some(MOST_EVENTS));
    }
}
