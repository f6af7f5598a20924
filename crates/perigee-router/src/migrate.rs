//! The beginning of a move: whether it can be, what moves, and an operator's wait for what becomes of it. How a session moves
//! is the coordinator's and `driver`'s business.

use std::sync::Arc;

use perigee_migration::Mode;
use perigee_migration::epochs::{CoordinatorEvent, CoordinatorState};
use perigee_proto::status::{ErrorKind, WireError};
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::driver::Seat;
use crate::error;
use crate::flight::Flight;
use crate::relay::Relay;
use crate::replicas::MoveTarget;
use crate::transit::{MoveAnswer, Sides, Transit};

/// Positions of a latent page.
pub(crate) const PAGE_TOKENS: u64 = 64;
/// Contexts up to here move whole where nobody says otherwise: 8 pages, 4 MB at the 8 KB a token of the 48B model, add less
/// than a step to the time of a state of 42 MB, and spare every token the questions to another replica.
const WHOLE_CONTEXT: u64 = 512;

/// A move under way. Dropped before the session is the target's, it takes the move back.
#[derive(Debug)]
pub(crate) struct Ticket {
    relay: Arc<Relay>,
    flight: Arc<Flight>,
    choice: usize,
    /// The epoch that the session will have.
    next: u64,
    answer: oneshot::Receiver<MoveAnswer>,
}

impl Ticket {
    /// What became of it.
    ///
    /// # Errors
    /// ABORTED where the session did not move; owner and epoch are told.
    pub(crate) async fn answer(mut self) -> MoveAnswer {
        let lost = |_| WireError::new(ErrorKind::Internal, "the account of the move was lost");
        (&mut self.answer).await.map_err(lost)?
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.relay.cancel_move(&self.flight, self.choice, self.next);
    }
}

impl Relay {
    /// Begins to move a session of this router for an operator; none where it has no such session.
    ///
    /// # Errors
    /// NOT_FOUND for an unknown replica, FAILED_PRECONDITION where it cannot take the session or nobody can give it,
    /// ABORTED where the session is moving.
    pub(crate) fn migrate(
        self: &Arc<Self>,
        session: &str,
        to: &str,
        mode: Option<Mode>,
    ) -> Result<Option<Ticket>, WireError> {
        let Some((flight, index)) = self.find(session) else { return Ok(None) };
        let target = self.replicas.target(to)?;
        let (answer, receiver) = oneshot::channel();
        let begun = {
            let mut state = flight.state.lock();
            let mut seat = Seat { flight: &flight, state: &mut state, index, now: Instant::now() };
            self.begin_move(&mut seat, target, mode, answer)?
        };
        Ok(begun.map(|next| Ticket { relay: self.clone(), flight, choice: index, next, answer: receiver }))
    }

    /// Begins to move a session, and says under which epoch; `answer` gets what becomes of it. None where it has ended.
    ///
    /// # Errors
    /// FAILED_PRECONDITION where it cannot move as things are, ABORTED where it is moving.
    pub(crate) fn begin_move(
        &self,
        seat: &mut Seat<'_>,
        target: MoveTarget,
        mode: Option<Mode>,
        answer: oneshot::Sender<MoveAnswer>,
    ) -> Result<Option<u64>, WireError> {
        let (flight, now, is_over) = (seat.flight, seat.now, seat.state.end.is_some());
        let Some(choice) = seat.choice().filter(|choice| !choice.is_finished && !is_over) else { return Ok(None) };
        let (session, to) = (&choice.session, &target.attachment.identity.replica);
        if choice.is_aborted {
            return Err(error::cannot_move("ENDING", format!("{session} is being aborted")));
        }
        let Some(owner) = choice.owner.clone() else {
            let message = format!("{session} waits for a replica: its last one was lost");
            return Err(error::cannot_move("NO_OWNER", message));
        };
        if !choice.coordinator.is_idle() {
            return Err(error::moving(session, &owner.identity.replica, choice.coordinator.epoch()));
        }
        if owner.identity.replica == *to {
            return Err(error::cannot_move("ALREADY_THERE", format!("{session} runs on {to} already")));
        }
        // Its loss, if it comes now, waits for this flight's lock and finds the move.
        if !target.attachment.is_live() {
            return Err(error::cannot_move("TARGET_NOT_READY", format!("replica {to} was lost this moment")));
        }
        let context = flight.submit.prompt.len() as u64 + choice.due();
        let mode = mode.unwrap_or_else(|| cheaper_mode(context, target.report.pages_free));
        // The client's next token will not tell any more what the last move cost it.
        self.conclude_anyway(seat);
        let Some(choice) = seat.choice() else { return Ok(None) };
        choice.is_held_by(&target.attachment);
        let sides = Sides { source: owner, target: target.attachment, endpoint: target.endpoint, mode };
        choice.transit = Some(Box::new(Transit::new(sides, 0, now, answer)));
        choice.last_move = Some(now);
        self.drive(seat, CoordinatorEvent::Begin, None);
        let Some(choice) = seat.choice() else { return Ok(None) };
        let CoordinatorState::Preparing { next } = choice.coordinator.state() else { return Ok(None) };
        if let Some(transit) = &mut choice.transit {
            transit.next = next;
        }
        Ok(Some(next))
    }

    /// Takes a move back whose asker is gone, unless it is too late or over.
    fn cancel_move(&self, flight: &Arc<Flight>, index: usize, next: u64) {
        {
            let mut state = flight.state.lock();
            let mut seat = Seat { flight, state: &mut state, index, now: Instant::now() };
            let Some(transit) = seat.choice().and_then(|choice| choice.moving()) else { return };
            if transit.next != next || transit.is_committed() {
                return;
            }
            transit.troubled("CANCELLED", "whoever asked for the move went away");
            self.drive(&mut seat, CoordinatorEvent::Cancel, None);
        }
        self.settle(flight, None);
    }
}

/// What moves where nobody says: pages too where they are few and the target has room, else the state alone.
fn cheaper_mode(context: u64, pages_free: u64) -> Mode {
    let is_short = context <= WHOLE_CONTEXT && context.div_ceil(PAGE_TOKENS) < pages_free;
    if is_short { Mode::Whole } else { Mode::Split }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_contexts_move_whole_where_there_is_room() {
        assert_eq!(cheaper_mode(1, 100), Mode::Whole);
        assert_eq!(cheaper_mode(WHOLE_CONTEXT, 100), Mode::Whole);
        assert_eq!(cheaper_mode(WHOLE_CONTEXT + 1, 1000), Mode::Split);
        assert_eq!(cheaper_mode(WHOLE_CONTEXT, 8), Mode::Split, "no page would be left for what it generates");
    }
}
