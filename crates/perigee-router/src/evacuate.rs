//! Sessions of replicas that drain: each is moved to another replica, a few at a time, and one that does not come away as
//! it is goes on elsewhere from its tokens. Who drains is the replicas' own word; moves and replays are carried out by
//! `migrate` and `recovery`.

use std::sync::Arc;
use std::time::Duration;

use perigee_migration::Mode;
use perigee_migration::epochs::{CoordinatorEvent, Side};
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::attachment::Attachment;
use crate::choice::Leaving;
use crate::driver::Seat;
use crate::error;
use crate::flight::Flight;
use crate::migrate::PAGE_TOKENS;
use crate::relay::Relay;
use crate::replicas::{MoveTarget, Replicas};
use crate::route::Demand;

/// How often the sessions of a draining replica are looked at.
const LOOK: Duration = Duration::from_millis(25);
/// Moves from one replica at once: their handoffs share its steps and its connection.
const AT_ONCE: usize = 8;
/// Moves of a session that may fail before it is replayed elsewhere.
const TRIES: u32 = 4;
/// Time between the first two of them; it grows with each.
const PAUSE: Duration = Duration::from_millis(200);

/// What became of an attempt to have a session leave.
enum Attempt {
    /// It moves.
    Moves,
    /// It needs another owner.
    Replayed,
    /// Not now: it waits between two attempts, or no replica has room.
    Waits,
}

impl Relay {
    /// Has sessions leave replicas that drain, as long as the router lives.
    pub(crate) async fn evacuate(self: Arc<Self>) {
        let mut draining = self.replicas.is_any_draining();
        // An error would mean that the replicas are gone, and they are this relay's.
        while draining.wait_for(|any| *any).await.is_ok() {
            for from in self.replicas.draining() {
                self.empty(&from);
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Begins as many moves from a replica as there may be.
    fn empty(&self, from: &Arc<Attachment>) {
        let now = Instant::now();
        let is_there = |flight: &Arc<Flight>, index: usize| {
            let mut state = flight.state.lock();
            let is_over = state.end.is_some();
            let choice = state.choices.get_mut(index).filter(|choice| !choice.is_finished && !is_over)?;
            let is_owner = choice.owner.as_ref().is_some_and(|owner| owner.id == from.id);
            is_owner.then(|| choice.coordinator.is_idle())
        };
        let mut standing = Vec::new();
        let mut moving = 0;
        for flight in self.flights() {
            for index in 0..flight.submit.sessions.len() {
                match is_there(&flight, index) {
                    Some(true) => standing.push((flight.clone(), index)),
                    Some(false) => moving += 1,
                    None => {}
                }
            }
        }
        for (flight, index) in standing {
            if moving >= AT_ONCE {
                break;
            }
            let attempt = {
                let mut state = flight.state.lock();
                self.leave(&mut Seat { flight: &flight, state: &mut state, index, now }, from)
            };
            match attempt {
                Attempt::Moves => moving += 1,
                Attempt::Replayed => self.settle(&flight, None),
                Attempt::Waits => {}
            }
        }
    }

    /// Has one session leave, if its time has come.
    fn leave(&self, seat: &mut Seat<'_>, from: &Arc<Attachment>) -> Attempt {
        let (flight, now, is_over) = (seat.flight, seat.now, seat.state.end.is_some());
        let Some(choice) = seat.choice().filter(|choice| !choice.is_finished && !is_over) else {
            return Attempt::Waits;
        };
        let is_here = choice.owner.as_ref().is_some_and(|owner| owner.id == from.id);
        if !is_here || choice.is_aborted || !choice.coordinator.is_idle() {
            return Attempt::Waits;
        }
        let known = choice.leaving.filter(|leaving| leaving.from == from.id);
        let tries = known.map_or(0, |leaving| leaving.tries);
        if known.is_some_and(|leaving| leaving.again > now) {
            return Attempt::Waits;
        }
        let context = flight.submit.prompt.len() as u64 + choice.due();
        let Some(target) = refuge(&self.replicas, context) else { return Attempt::Waits };
        choice.leaving = Some(Leaving { from: from.id, tries: tries + 1, again: now + PAUSE * (tries + 1) });
        if tries < TRIES {
            let mode = mode(context, target.report.pages_free);
            // Nobody waits for the answer: it is looked for in the session itself.
            let (answer, _) = oneshot::channel();
            return match self.begin_move(seat, target, Some(mode), answer) {
                Ok(Some(_)) => Attempt::Moves,
                Ok(None) | Err(_) => Attempt::Waits,
            };
        }
        tracing::warn!(
            session = choice.session,
            request_id = flight.request_id(),
            replica = &*from.identity.replica,
            tries,
            "a session did not come away from a replica that drains; it goes on elsewhere from its tokens"
        );
        let why = error::left_behind(&from.identity.replica);
        self.drive(seat, CoordinatorEvent::Lost(Side::Source), Some(&why));
        Attempt::Replayed
    }
}

/// The replica that a session of so many tokens goes to; none where none has a slot for it.
fn refuge(replicas: &Replicas, context: u64) -> Option<MoveTarget> {
    let placement = replicas.place(Demand { prompt_tokens: context, sessions: 1 }, &[])?;
    if placement.report.slots_free == 0 {
        return None;
    }
    replicas.target(&placement.attachment.identity.replica).ok()
}

/// The pages leave too where there is room for them, because the replica that has them is about to end; else it goes on
/// answering for them until its grace time is over.
fn mode(context: u64, pages_free: u64) -> Mode {
    if context.div_ceil(PAGE_TOKENS) < pages_free { Mode::Whole } else { Mode::Split }
}
