//! The coordinators' hands: what the state machines of moves decide is carried out here, on a flight whose lock is held.
//! Events, reports, losses and alarms come in; commands to replicas, new owners and accounts of moves come out. The rules
//! are perigee-migration's, and where a session without an owner goes is `recovery`'s business.

use std::sync::Arc;
use std::time::Duration;

use perigee_migration::epochs::{
    Command, CoordinatorAction, CoordinatorEvent, CoordinatorState, Failure, Outcome, Phase, Side, TokenVerdict,
    last_beside,
};
use perigee_proto::internal::{Abort, Finish, MoveReport, SessionEvent, router_message::Body};
use perigee_proto::status::WireError;
use tokio::time::Instant;

use crate::attachment::Attachment;
use crate::choice::{Choice, Pending, Replay};
use crate::error;
use crate::flight::{Accepted, Flight, FlightState};
use crate::relay::Relay;
use crate::transit::Told;
use crate::wire;

/// Engine failures in a row, without a token between them, after which a session is given up: it is its own fault then.
const MOST_FAILURES: u32 = 3;

/// One choice of a flight whose lock is held.
pub(crate) struct Seat<'a> {
    pub(crate) flight: &'a Arc<Flight>,
    pub(crate) state: &'a mut FlightState,
    pub(crate) index: usize,
    pub(crate) now: Instant,
}

impl Seat<'_> {
    pub(crate) fn choice(&mut self) -> Option<&mut Choice> {
        self.state.choices.get_mut(self.index)
    }
}

impl Relay {
    /// Judges an event by its epoch, takes it in if it is the owner's, and does what follows from it.
    pub(crate) fn take_event(&self, seat: &mut Seat<'_>, from: &Arc<Attachment>, event: SessionEvent) -> Accepted {
        let now = seat.now;
        let is_over = seat.state.end.is_some();
        let Some(choice) = seat.choice().filter(|choice| !choice.is_finished && !is_over) else {
            return Accepted::Ignored;
        };
        let before = choice.coordinator.state();
        let mut actions = Vec::new();
        let verdict = choice.coordinator.token(event.epoch, &mut actions);
        if verdict == TokenVerdict::Stray && choice.is_new_stray(from, event.epoch) {
            let sessions = vec![choice.session.clone()];
            // A lost stream has ended it.
            let _ = from.send(Body::Abort(Abort { sessions, epoch: event.epoch }));
        }
        self.follow(seat, before, actions, None);
        if verdict == TokenVerdict::Stray {
            return Accepted::Ignored;
        }

        let replica = &from.identity.replica;
        match event.finish() {
            Finish::Error => return self.engine_failed(seat, from, &event.error),
            Finish::Deadline => return Accepted::Failed(error::deadline_exceeded()),
            Finish::Unspecified | Finish::Stop | Finish::Length | Finish::Aborted => {}
        }
        let accepted = seat.state.accept(seat.index, event, replica, now, self.buffered_bytes);
        if let Accepted::Taken(milestones) = &accepted {
            if milestones.token {
                self.token_taken(seat, replica);
            }
            if seat.choice().is_some_and(|choice| choice.is_finished) {
                self.close(seat, true);
            }
        }
        accepted
    }

    /// A replica's engine failed under a session that it owns.
    fn engine_failed(&self, seat: &mut Seat<'_>, from: &Attachment, message: &str) -> Accepted {
        let why = error::engine_failed(&from.identity.replica, message);
        let Some(choice) = seat.choice() else { return Accepted::Ignored };
        choice.failures += 1;
        if choice.failures >= MOST_FAILURES {
            return Accepted::Failed(why);
        }
        let side = choice.owning_side();
        if let Some(transit) = choice.moving() {
            transit.troubled("ENGINE_FAILED", why.message.clone());
        }
        self.drive(seat, CoordinatorEvent::Lost(side), Some(&why));
        Accepted::Ignored
    }

    /// A token was accepted: moves and replays that waited for it are over.
    fn token_taken(&self, seat: &mut Seat<'_>, replica: &Arc<str>) {
        let (flight, now) = (seat.flight, seat.now);
        let Some(choice) = seat.choice() else { return };
        if let Some(transit) = &mut choice.transit {
            transit.first_token(now);
        }
        if let Some(replay) = choice.replay.take() {
            self.metrics.migrations.with_label_values(&["replay", "done"]).inc();
            tracing::info!(
                parent: flight.traced.span(),
                session = choice.session,
                request_id = flight.request_id(),
                from = &*replay.from,
                to = &**replica,
                epoch = choice.coordinator.epoch(),
                delivered = choice.due() - 1,
                gap_ms = (now - replay.since).as_secs_f64() * 1e3,
                "session replayed"
            );
        }
        self.conclude(seat);
    }

    /// A replica of a move said something.
    pub(crate) fn take_report(
        &self,
        seat: &mut Seat<'_>,
        from: &Attachment,
        message: &MoveReport,
    ) -> Result<(), WireError> {
        let now = seat.now;
        let (Some(report), Some(choice)) = (wire::report(message), seat.choice()) else { return Ok(()) };
        let Some(side) = choice.side_of(from) else { return Ok(()) };
        if let CoordinatorState::TakingOver { .. } = choice.coordinator.state() {
            self.taken_over(seat, from, report);
            return Ok(());
        }
        let Some(transit) = choice.moving() else { return Ok(()) };
        transit.heard(side, report.phase, message, now);
        let before = choice.coordinator.state();
        let actions = choice.coordinator.on(CoordinatorEvent::Report(side, report));
        if let Phase::Failed(failure) = report.phase
            && choice.coordinator.state() != before
            && let Some(transit) = choice.moving()
        {
            let why = format!("{}: {}", from.identity.replica, message.message);
            transit.troubled(wire::failure_word(failure), why);
        }
        let why = error::replica_lost(&from.identity.replica, "it does not have the session any more");
        self.follow(seat, before, actions, Some(&why));
        let Some(choice) = seat.choice() else { return Ok(()) };
        match choice.coordinator.state() {
            CoordinatorState::Ready { .. } => self.decide(seat),
            // It said that the session ended, and no end came before.
            CoordinatorState::Ended if !choice.is_finished && report.phase == Phase::Failed(Failure::Ended) => {
                return Err(error::engine_failed(&from.identity.replica, "it ended a session without saying how"));
            }
            _ => {}
        }
        Ok(())
    }

    /// The target holds the session. The flight is locked and has not ended, so its client is there.
    fn decide(&self, seat: &mut Seat<'_>) {
        let now = seat.now;
        let Some(choice) = seat.choice() else { return };
        let last_token = choice.last_token;
        let Some(transit) = choice.moving() else { return };
        if !transit.target.is_live() {
            transit.troubled("TARGET_LOST", "the target was lost");
            return self.drive(seat, CoordinatorEvent::Cancel, None);
        }
        transit.committed(last_token, now);
        let target = transit.target.clone();
        choice.is_held_by(&target);
        choice.owner = Some(target);
        self.drive(seat, CoordinatorEvent::Commit, None);
    }

    /// The stream to a replica is lost.
    pub(crate) fn take_loss(&self, seat: &mut Seat<'_>, attachment: &Attachment, why: &str) {
        let Some(choice) = seat.choice().filter(|choice| !choice.is_finished) else { return };
        let Some(side) = choice.side_of(attachment) else { return };
        if let Some(transit) = choice.moving() {
            let (cause, name) = match side {
                Side::Source => ("SOURCE_LOST", "source"),
                Side::Target => ("TARGET_LOST", "target"),
            };
            transit.troubled(cause, format!("the {name} was lost ({why})"));
        }
        let why = error::replica_lost(&attachment.identity.replica, why);
        self.drive(seat, CoordinatorEvent::Lost(side), Some(&why));
    }

    /// A phase took its time.
    pub(crate) fn take_timeout(&self, seat: &mut Seat<'_>) {
        let times = self.times;
        let Some(choice) = seat.choice().filter(|choice| choice.coordinator.is_waiting()) else { return };
        let state = choice.coordinator.state();
        let owner = choice.owner.as_ref().map(|owner| owner.identity.replica.clone()).unwrap_or_default();
        if let (CoordinatorState::Preparing { .. }, Some(transit)) = (state, choice.moving()) {
            transit.troubled("TIMEOUT", format!("it was not handed over within {:?}", times.prepare));
        }
        let why = error::replica_lost(&owner, "it does not say whether it has the session");
        self.drive(seat, CoordinatorEvent::Timeout, Some(&why));
        let Some(choice) = seat.choice().filter(|choice| choice.pending.is_some()) else { return };
        if let Some(transit) = &mut choice.transit {
            transit.troubled("TIMEOUT", format!("{owner} does not answer"));
        }
    }

    /// Tells a choice's coordinator what happened, and does what it says. `why` is what the client is told if nobody can
    /// take the session over.
    pub(crate) fn drive(&self, seat: &mut Seat<'_>, event: CoordinatorEvent, why: Option<&WireError>) {
        let Some(choice) = seat.choice() else { return };
        let before = choice.coordinator.state();
        let actions = choice.coordinator.on(event);
        self.follow(seat, before, actions, why);
    }

    /// Does what a coordinator said, and sets the clock for the state that it is in.
    fn follow(
        &self,
        seat: &mut Seat<'_>,
        before: CoordinatorState,
        actions: Vec<CoordinatorAction>,
        why: Option<&WireError>,
    ) {
        for action in actions {
            match action {
                CoordinatorAction::Send(side, command) => self.command(seat, side, command),
                CoordinatorAction::Replay { epoch } => self.lose(seat, epoch, why),
                CoordinatorAction::Finished(outcome) => {
                    if let Some(transit) = seat.choice().and_then(Choice::moving) {
                        transit.outcome = Some(outcome);
                    }
                    // A replayed session's new owner is to be told too.
                    if outcome != Outcome::Replayed {
                        self.conclude(seat);
                    }
                }
            }
        }
        let times = self.times;
        let Some(choice) = seat.choice() else { return };
        let after = choice.coordinator.state();
        if after == before {
            return;
        }
        let time = match after {
            CoordinatorState::Preparing { .. } => Some(times.prepare),
            CoordinatorState::Committed { .. }
            | CoordinatorState::Aborting { .. }
            | CoordinatorState::TakingOver { .. } => Some(times.answer),
            CoordinatorState::Idle | CoordinatorState::Ready { .. } | CoordinatorState::Ended => None,
        };
        self.set_alarm(seat, time);
    }

    /// Has a choice looked at again after a time, or not at all.
    pub(crate) fn set_alarm(&self, seat: &mut Seat<'_>, after: Option<Duration>) {
        let (flight, index, now) = (seat.flight, seat.index, seat.now);
        let Some(choice) = seat.choice() else { return };
        if let Some(alarm) = choice.alarm.take() {
            self.timers.cancel(alarm);
        }
        choice.alarm = after.map(|after| self.timers.set(now + after, Arc::downgrade(flight), index));
    }

    fn command(&self, seat: &mut Seat<'_>, side: Side, command: Command) {
        if let Command::TakeOver { .. } = command {
            return self.send_take_over(seat, command);
        }
        let Some(choice) = seat.choice() else { return };
        let Some(transit) = &choice.transit else { return };
        if let Some(live) = self.replicas.live(transit.side(side)) {
            // Where it is lost meanwhile, that is told soon.
            let _ = live.send(wire::command(&choice.session, command, transit));
        }
    }

    /// Nobody owns a session any more: it goes to another replica under `epoch`, unless its end was asked for.
    fn lose(&self, seat: &mut Seat<'_>, epoch: u64, why: Option<&WireError>) {
        let now = seat.now;
        let prompt = seat.flight.submit.prompt.len() as u64;
        let Some(choice) = seat.choice() else { return };
        let former = choice.owner.take();
        if let Some(owner) = &former
            && !choice.tried.contains(&owner.id)
        {
            choice.tried.push(owner.id);
        }
        let from = former.map(|owner| owner.identity.replica.clone()).unwrap_or_default();
        self.end_at_holders(choice, epoch - 1);
        if choice.is_aborted {
            seat.state.end_aborted(seat.index, prompt, &from);
            return self.close(seat, false);
        }
        let cause = why.cloned().unwrap_or_else(|| error::replica_lost(&from, "it does not answer"));
        choice.pending = Some(Box::new(Pending { since: now, cause, may_wait: true }));
        choice.replay = Some(Box::new(Replay { lost: now, since: choice.last_token.unwrap_or(now), from }));
    }

    /// A choice is finished: nobody need hold anything of it any more. One that `ended_by_itself` has ended at its owner.
    pub(crate) fn close(&self, seat: &mut Seat<'_>, ended_by_itself: bool) {
        self.drive(seat, CoordinatorEvent::Ended, None);
        self.set_alarm(seat, None);
        let Some(choice) = seat.choice() else { return };
        choice.pending = None;
        let owner = choice.owner.clone().filter(|_| ended_by_itself);
        choice
            .holders
            .retain(|holder| owner.as_ref().is_none_or(|owner| !owner.identity.is_same_run(&holder.identity)));
        self.end_at_holders(choice, last_beside(choice.coordinator.epoch()));
        self.conclude_anyway(seat);
    }

    /// Tells every replica that ever held something of a session that it is over there, up to an epoch: never those of a
    /// router that took it over.
    fn end_at_holders(&self, choice: &Choice, epoch: u64) {
        for holder in choice.holders.iter().filter_map(|holder| self.replicas.live(holder)) {
            let sessions = vec![choice.session.clone()];
            let _ = holder.send(Body::Abort(Abort { sessions, epoch }));
        }
    }

    /// Closes the account of a move that is complete.
    pub(crate) fn conclude(&self, seat: &mut Seat<'_>) {
        if seat.choice().is_some_and(|choice| choice.transit.as_ref().is_some_and(|transit| transit.is_complete())) {
            self.conclude_anyway(seat);
        }
    }

    /// Closes the account of the last move, even if its client has not had a token since.
    pub(crate) fn conclude_anyway(&self, seat: &mut Seat<'_>) {
        let (flight, now) = (seat.flight, seat.now);
        let Some(choice) = seat.choice() else { return };
        let Some(transit) = choice.transit.take() else { return };
        let owner = choice.owner.as_ref().map(|owner| owner.identity.replica.clone()).unwrap_or_default();
        let (session, epoch) = (choice.session.as_str(), choice.coordinator.epoch());
        let (request_id, span) = (flight.request_id(), flight.traced.span());
        transit.conclude(&Told { session, request_id, span, owner: &owner, epoch }, &self.metrics, now);
    }
}
