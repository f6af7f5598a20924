//! Sessions without an owner, new ones and those whose owner was lost: which replica gets them, together where they can be
//! prefilled together, and how long they wait for one. A replay is a submission with the tokens that the client has.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use perigee_migration::epochs::{CoordinatorEvent, Outcome, Side};
use perigee_proto::internal::{Refused, RefusedReason, Submit};
use perigee_proto::status::WireError;
use tokio::time::Instant;

use crate::attachment::Attachment;
use crate::choice::Choice;
use crate::driver::Seat;
use crate::error;
use crate::flight::{Flight, FlightState};
use crate::relay::Relay;
use crate::replicas::Placement;
use crate::route::Demand;

/// How often a session that waits for a replica tries again those that could not take it.
const RETRY: Duration = Duration::from_millis(250);

/// What a submission needs before its first token.
pub(crate) fn demand(submit: &Submit) -> Demand {
    let prompt_tokens = (submit.prompt.len() + submit.delivered.len()) as u64;
    Demand { prompt_tokens, sessions: submit.sessions.len() as u64 }
}

impl Relay {
    /// Does what is to be done about a flight after its lock was free: choices without an owner go to replicas, and a
    /// flight that ended is forgotten.
    pub(crate) fn settle(&self, flight: &Arc<Flight>, placement: Option<Placement>) {
        let failed = {
            let mut state = flight.state.lock();
            if state.end.is_some() { None } else { self.place_all(flight, &mut state, placement) }
        };
        if let Some(error) = failed {
            self.end(flight, Err(error));
        }
        self.forget_if_over(flight);
    }

    /// Sends all choices without an owner to replicas, the first of them to `placement` if there is one. Returns why the
    /// request fails, if it does.
    fn place_all(
        &self,
        flight: &Arc<Flight>,
        state: &mut FlightState,
        mut placement: Option<Placement>,
    ) -> Option<WireError> {
        let now = Instant::now();
        let mut next = 0;
        while let Some(range) = next_group(&state.choices, next) {
            next = range.end;
            if !self.place(flight, &mut state.choices[range.clone()], range.start, placement.take(), now) {
                let indices = range.clone();
                if let Some(error) = state.choices[range].iter().find_map(|choice| self.gives_up(flight, choice, now)) {
                    return Some(error);
                }
                for index in indices {
                    self.set_alarm(&mut Seat { flight, state, index, now }, Some(RETRY));
                }
            }
        }
        for index in 0..state.choices.len() {
            let is_replayed = |choice: &Choice| {
                choice.transit.as_ref().is_some_and(|transit| transit.outcome == Some(Outcome::Replayed))
            };
            if state.choices.get(index).is_some_and(is_replayed) {
                self.conclude_anyway(&mut Seat { flight, state, index, now });
            }
        }
        None
    }

    /// Sends choices of one epoch, the first of which is `first`, to `placement` or the next best replica that they were
    /// not sent to before. False where there is none.
    fn place(
        &self,
        flight: &Flight,
        group: &mut [Choice],
        first: usize,
        mut placement: Option<Placement>,
        now: Instant,
    ) -> bool {
        let submit = flight.submission(group, first, now);
        let demand = demand(&submit);
        let mut tried: Vec<u64> = group.iter().flat_map(|choice| choice.tried.iter().copied()).collect();
        while let Some(Placement { attachment, .. }) = placement.take().or_else(|| self.replicas.place(demand, &tried))
        {
            tried.push(attachment.id);
            // Its loss, if it comes now, waits for this flight's lock and finds the owner.
            if attachment.submit(submit.clone()).is_err() {
                continue;
            }
            tracing::debug!(
                parent: flight.traced.span(),
                replica = &*attachment.identity.replica,
                epoch = submit.epoch,
                delivered = submit.delivered.len(),
                "request placed"
            );
            for choice in group {
                choice.tried.push(attachment.id);
                choice.is_held_by(&attachment);
                choice.owner = Some(attachment.clone());
                choice.pending = None;
            }
            return true;
        }
        false
    }

    /// Why a choice that found no replica waits no longer, if so. One whose client named a deadline waits until then.
    fn gives_up(&self, flight: &Flight, choice: &Choice, now: Instant) -> Option<WireError> {
        let pending = choice.pending.as_ref()?;
        if !pending.may_wait {
            return Some(pending.cause.clone());
        }
        let waited = now.saturating_duration_since(pending.since);
        let is_patience_over = flight.deadline.is_none() && waited >= self.times.replay;
        let is_over = is_patience_over || self.is_closing.load(Ordering::Relaxed);
        is_over.then(|| error::nobody_took_over(&pending.cause, waited))
    }

    /// A replica refused a submission: it goes to the next best one, unless its fields are at fault.
    pub(crate) fn refused(&self, attachment: &Attachment, refused: &Refused) {
        let now = Instant::now();
        // One submission is of one request.
        let Some((flight, _)) = refused.sessions.first().and_then(|session| self.find(session)) else { return };
        tracing::debug!(
            parent: flight.traced.span(),
            replica = &*attachment.identity.replica,
            reason = ?refused.reason(),
            message = refused.message,
            "request refused"
        );
        let failed = {
            let mut state = flight.state.lock();
            let has_token = state.has_token();
            let mut failed = None;
            for index in 0..state.choices.len() {
                let mut seat = Seat { flight: &flight, state: &mut state, index, now };
                let is_meant = seat.choice().is_some_and(|choice| refused.sessions.contains(&choice.session));
                if is_meant && failed.is_none() {
                    failed = self.take_refusal(&mut seat, attachment, refused, has_token);
                }
            }
            failed
        };
        if let Some(error) = failed {
            self.end(&flight, Err(error));
        }
        self.settle(&flight, None);
    }

    /// One choice of it. Returns why the request fails, if it does.
    fn take_refusal(
        &self,
        seat: &mut Seat<'_>,
        attachment: &Attachment,
        refused: &Refused,
        has_token: bool,
    ) -> Option<WireError> {
        let now = seat.now;
        let choice = seat.choice()?;
        // An answer to an earlier submission is no news.
        if choice.is_finished || choice.owner.as_ref().is_none_or(|owner| owner.id != attachment.id) {
            return None;
        }
        let was_lost = choice.replay.is_some();
        let (cause, may_wait) = match refused.reason() {
            RefusedReason::Invalid if !has_token => {
                return Some(WireError::invalid(refused.field.clone(), refused.message.clone()));
            }
            RefusedReason::Full if !has_token => {
                (WireError::exhausted(refused.message.clone(), Duration::from_secs(1)), false)
            }
            _ => {
                let message = format!("{}: repeat the request", refused.message);
                (WireError::unavailable("REPLICA_REFUSED", message), has_token || was_lost)
            }
        };
        // It has nothing of the session.
        choice.holders.retain(|holder| holder.id != attachment.id);
        let replay = choice.replay.take();
        self.drive(seat, CoordinatorEvent::Lost(Side::Source), Some(&cause));
        let choice = seat.choice()?;
        if let Some(pending) = &mut choice.pending {
            pending.may_wait = may_wait;
            pending.since = replay.as_ref().map_or(now, |replay| replay.lost);
        }
        choice.replay = replay;
        None
    }
}

/// Choices that need an owner now, from `from` on: one that goes on, or neighbours of one epoch that begin.
fn next_group(choices: &[Choice], from: usize) -> Option<Range<usize>> {
    let start = (from..choices.len()).find(|&index| choices[index].needs_owner())?;
    let begins = |choice: &Choice| choice.needs_owner() && choice.tokens.is_empty();
    let epoch = choices[start].coordinator.epoch();
    let mut end = start + 1;
    if begins(&choices[start]) {
        while choices.get(end).is_some_and(|choice| begins(choice) && choice.coordinator.epoch() == epoch) {
            end += 1;
        }
    }
    Some(start..end)
}
