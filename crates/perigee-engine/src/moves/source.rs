//! The source's side of a move inside the engine: a session is frozen between two steps, taken off the device tensor by
//! tensor, and given up once the router has committed.

use std::ops::Range;

use perigee_migration::epochs::PartyEvent;
use perigee_migration::handoff::{Frozen, Totals};
use perigee_migration::segments::sealed;
use perigee_migration::{Header, HeldState, Mode, PAGE_POSITIONS, Place};

use super::pairs::OfferedPair;
use super::record::{HomeAddress, Record};
use super::seat::{Course, Link};
use super::target::most;
use super::{Demand, Outgoing, Room, SourcePart, Target, Way};
use crate::cache::{Home, HomePages};
use crate::executor::{ExecutorError, PageSpan, StateSource, StepPlan};
use crate::request::{FinishReason, SessionId};
use crate::scheduler::{StateAt, Status, TaskId};
use crate::step::{EngineCore, Fatal};
use crate::traces::handoff_span;

/// Steps that a session is expected to make until its target has said that it has room.
const STEPS_MEANWHILE: u64 = 8;
/// Pages that are taken off the device at a time.
const PAGES_AT_ONCE: usize = 64;

impl EngineCore {
    /// Opens the handoff with the header and the tokens so far; the session goes on meanwhile.
    pub(super) fn begin_handoff(&mut self, session: &SessionId, next: u64) -> Result<(), String> {
        let config = self.config.moves.clone().ok_or("this replica takes no part in moves")?;
        let geometry = self.executor.geometry().ok_or("the ranks do not move sessions")?;
        let order = self.seats.get_mut(session).ok_or("nobody asked for it")?.order.take();
        let (target, mode) = order.ok_or("nobody said where to")?;
        // Without answers the pages have to come along.
        let mode = if config.can_answer { mode } else { Mode::Whole };
        let mut demand = self.demand(session, mode, &target);
        let shared = if config.ways.contains(&Way::Slots) { self.executor.share_slots() } else { Ok(None) };
        demand.slots = match shared {
            Ok(slots) => slots.unwrap_or_default(),
            // It is sent, then; an executor that is broken shows at the next step.
            Err(error) => {
                tracing::warn!(%error, "the slots cannot be shared");
                Vec::new()
            }
        };
        let pair = self.offer_pair(session, next, &target);
        demand.pair = pair.as_ref().map(OfferedPair::offer);
        let held = self.names.get(session).and_then(|id| self.sessions.get(id)).ok_or("the session is not here")?;
        let header = Header {
            session: session.0.clone(),
            epoch: held.sequence.epoch,
            next_epoch: next,
            model: config.model,
            geometry,
            source: config.place,
            mode,
        };
        let traced = handoff_span(&held.sequence, &target.replica);
        let (outgoing, parts) =
            Outgoing::new(header, demand, self.commands.clone(), traced).map_err(|error| error.to_string())?;
        let tokens = held.sequence.tokens.clone();
        let seat = self.seats.get_mut(session).ok_or("nobody asked for it")?;
        seat.course = Course { mode: Some(mode), ..Course::default() };
        let (parts_in, way) = (parts.clone(), Way::Stream);
        seat.outgoing = Some(Link { next, parts: parts_in, tokens: tokens.len(), mode, way, pair });
        hand_in(&parts, SourcePart::Tokens(tokens))?;
        config.connector.open(target, outgoing);
        Ok(())
    }

    /// What the session will need at its target, which must say that it has it before anything stands still.
    fn demand(&self, session: &SessionId, mode: Mode, target: &Target) -> Demand {
        let id = self.names.get(session).copied();
        let view = id.and_then(|id| self.scheduler.session(id));
        let held = id.and_then(|id| self.sessions.get(&id));
        let (Some(view), Some(held), Some(here)) = (view, held, self.place()) else { return Demand::default() };
        // It is stepped until the target has answered, a prompt by many positions at once.
        let reached = if view.status == Status::Prefill { held.sequence.length() } else { view.computed };
        let context = (reached + STEPS_MEANWHILE).min(most(&held.sequence));
        let there = Place { replica: target.replica.clone(), incarnation: target.incarnation.clone(), ..here.clone() };
        let arrival = view.latents.table().hand_over(&here, context, mode).arrive(&there);
        let pages = |range: Range<u64>| range.end.div_ceil(PAGE_POSITIONS) - range.start / PAGE_POSITIONS;
        let local: u64 = arrival.table.gaps(context).into_iter().map(pages).sum();
        let returned: u64 = arrival.returned.into_iter().map(pages).sum();
        Demand {
            pages: local.saturating_sub(returned),
            positions: most(&held.sequence).max(held.sequence.length()),
            remote: arrival.table.tokens(),
            slots: Vec::new(),
            pair: None,
        }
    }

    /// The target has room, and the tokens so far: the session stands still from here on.
    pub(crate) fn handoff_opened(&mut self, session: &SessionId, next: u64, room: Room) -> Result<(), Fatal> {
        let link = self.seats.get_mut(session).and_then(|seat| seat.outgoing.as_mut()).filter(|link| link.next == next);
        let (Some(link), Some(&id)) = (link, self.names.get(session)) else { return Ok(()) };
        link.way = room.way;
        let mode = link.mode;
        if let Some(offered) = link.pair.take() {
            self.pair_answered(&offered, room);
            if room.way == Way::Pair
                && let Some(link) = self.seats.get_mut(session).and_then(|seat| seat.outgoing.as_mut())
            {
                link.pair = Some(offered);
            }
        }
        if let Err(message) = self.freeze(id)? {
            return self.handoff_done(session, next, Err(message));
        }
        let now = self.config.clock.now();
        let keeps_home = self.scheduler.frozen(id).is_some_and(|frozen| {
            mode == Mode::Split && !frozen.latents.home_pages(sealed(frozen.computed)).is_empty()
        });
        if let Some(seat) = self.seats.get_mut(session) {
            seat.course.frozen_at = Some(now);
        }
        self.drive(session, PartyEvent::Frozen { keeps_home }).map(drop)
    }

    /// How a handoff from here ended.
    pub(crate) fn handoff_done(
        &mut self,
        session: &SessionId,
        next: u64,
        result: Result<Totals, String>,
    ) -> Result<(), Fatal> {
        let now = self.config.clock.now();
        let Some(seat) = self.seats.get_mut(session) else { return Ok(()) };
        let Some(link) = seat.outgoing.take_if(|link| link.next == next) else { return Ok(()) };
        let event = match result {
            Ok(bytes) => {
                seat.course.verified(bytes, (link.mode, link.way), now);
                PartyEvent::HandoffVerified { next }
            }
            Err(message) => {
                let held = self.names.get(session).and_then(|id| self.sessions.get(id));
                let span = held.and_then(|held| held.span.id());
                tracing::warn!(parent: span, session = session.0, next, message, "a handoff failed");
                seat.error = message;
                PartyEvent::HandoffFailed { next }
            }
        };
        self.pair_left(link.pair);
        self.drive(session, event).map(drop)
    }

    /// Takes a session out of the steps, with a state of its own where it shared a prefill. The inner error says why that
    /// cannot be.
    pub(super) fn freeze(&mut self, id: TaskId) -> Result<Result<(), String>, Fatal> {
        let copies = match self.scheduler.freeze(id)? {
            Ok(copies) => copies,
            Err(refused) => return Ok(Err(format!("it cannot stand still now: {refused}"))),
        };
        match copies.shared_with {
            Some(heir) if copies.is_heir => self.copy_prompt_logprobs(id, heir),
            Some(leader) => self.copy_prompt_logprobs(leader, id),
            None => {}
        }
        let plan = StepPlan { copy_slots: copies.slots, copy_pages: copies.pages, ..StepPlan::default() };
        if plan == StepPlan::default() {
            return Ok(Ok(()));
        }
        match self.executor.step(&plan, &[], false) {
            Ok(_) => Ok(Ok(())),
            Err(error) if error.fatal => Err(Fatal::Executor(error)),
            Err(error) => {
                self.end(id, FinishReason::Error, Some(format!("a step failed: {error}; try again")))?;
                Ok(Err(error.to_string()))
            }
        }
    }

    /// Hands everything in that the target needs. The inner error says what cannot be sent.
    pub(super) fn send_frozen(&mut self, session: &SessionId, next: u64) -> Result<Result<(), String>, Fatal> {
        let started = self.config.clock.now();
        let sent = match self.frozen_parts(session, next)? {
            Ok(parts) => parts,
            Err(message) => return Ok(Err(message)),
        };
        let Some(seat) = self.seats.get_mut(session) else { return Ok(Err("it is not here".into())) };
        seat.course.export = self.config.clock.now().saturating_duration_since(started);
        let Some(link) = &seat.outgoing else { return Ok(Err("the connection to the target broke".into())) };
        // Nobody takes them any more where the target has refused meanwhile. Why it did is in the inbox already and comes next.
        let _ = sent.into_iter().try_for_each(|part| hand_in(&link.parts, part));
        Ok(Ok(()))
    }

    fn frozen_parts(&mut self, session: &SessionId, next: u64) -> Result<Result<Vec<SourcePart>, String>, Fatal> {
        let Some(config) = self.config.moves.clone() else { return Ok(Err("moves are off".into())) };
        let Some(&id) = self.names.get(session) else { return Ok(Err("it is not here".into())) };
        let (Some(held), Some(frozen)) = (self.sessions.get_mut(&id), self.scheduler.frozen(id)) else {
            return Ok(Err("it does not stand still".into()));
        };
        let link = self.seats.get(session).and_then(|seat| seat.outgoing.as_ref()).filter(|link| link.next == next);
        let Some(link) = link else { return Ok(Err("the connection to the target broke".into())) };
        let now = self.config.clock.now();
        let (context, mode, way) = (frozen.computed, link.mode, link.way);
        let state = match frozen.state {
            StateAt::Slot(slot) => StateSource::Slot(slot),
            StateAt::Empty => StateSource::Empty,
            StateAt::Parked(_) => return Ok(Err("it is preempted to host memory; try again once it runs".into())),
        };
        let mut homes: Vec<HomeAddress> = Vec::new();
        for (home, _) in frozen.latents.remote_ranges() {
            if let Home::Remote { replica, incarnation, endpoint, .. } = home
                && !homes.iter().any(|known| known.replica == *replica && known.incarnation == *incarnation)
            {
                let (replica, incarnation) = (replica.clone(), incarnation.clone());
                homes.push(HomeAddress { replica, incarnation, endpoint: endpoint.clone() });
            }
        }
        let kept = frozen.latents.home_pages(sealed(context));
        if mode == Mode::Split && !kept.is_empty() {
            let place = &config.place;
            let (replica, incarnation) = (place.replica.clone(), place.incarnation.clone());
            homes.push(HomeAddress { replica, incarnation, endpoint: config.endpoint.clone() });
        }
        // The record is without them, and a copy of all would take the longer the more there are.
        let tokens = std::mem::take(&mut held.sequence.tokens);
        let sequence = held.sequence.clone();
        let (count, rest) = (tokens.len() as u64, tokens.get(link.tokens..).unwrap_or_default().to_vec());
        held.sequence.tokens = tokens;
        let record = Record {
            sequence,
            computed: context,
            scored: frozen.scored,
            prompt_logits: frozen.prompt_logits,
            time_left: held.deadline.map(|deadline| deadline.saturating_duration_since(now)),
            homes,
        };
        let record = match record.encode() {
            Ok(record) => record,
            Err(error) => return Ok(Err(error.to_string())),
        };
        let table = frozen.latents.table().hand_over(&config.place, context, mode);
        let spans = spans(&frozen.latents.home_pages(u64::MAX), context, mode);
        let mut parts = Vec::new();
        if !rest.is_empty() {
            parts.push(SourcePart::Tokens(rest));
        }
        parts.push(SourcePart::Frozen(Frozen { context, tokens: count, record }, table));
        let state = match state {
            // It stays as it is until this replica hears what became of it.
            StateSource::Slot(slot) if way != Way::Stream => match self.executor.digest_slot(slot) {
                Ok(digests) => self.held_part(session, HeldState { slot, digests }, way),
                Err(error) => Err(error),
            },
            _ => {
                self.note_way(session, Way::Stream);
                self.executor.export_slot(state).map(SourcePart::State)
            }
        };
        let last = match state {
            // Behind the pages, which go meanwhile.
            Ok(SourcePart::Underway) => SourcePart::Underway,
            Ok(part) => {
                parts.push(part);
                SourcePart::End
            }
            Err(error) => return non_fatal(error).map(Err),
        };
        for spans in spans.chunks(PAGES_AT_ONCE) {
            match self.executor.export_pages(spans) {
                Ok(slices) => parts.push(SourcePart::Pages(slices)),
                Err(error) => return non_fatal(error).map(Err),
            }
        }
        parts.push(last);
        // From now on the target may be started and ask, even where this replica never hears of it.
        if mode == Mode::Split && !kept.is_empty() {
            config.homes.publish(&session.0, kept, next);
        }
        Ok(Ok(parts))
    }

    /// How a state leaves that its target takes out of a slot: at once, or by a pair, in the background.
    fn held_part(&mut self, session: &SessionId, held: HeldState, way: Way) -> Result<SourcePart, ExecutorError> {
        let slot = held.slot;
        if way == Way::Slots {
            return Ok(SourcePart::Held(held));
        }
        if self.send_by_pair(session, held) {
            return Ok(SourcePart::Underway);
        }
        self.note_way(session, Way::Stream);
        self.executor.export_slot(StateSource::Slot(slot)).map(SourcePart::State)
    }

    pub(super) fn note_way(&mut self, session: &SessionId, way: Way) {
        if let Some(link) = self.seats.get_mut(session).and_then(|seat| seat.outgoing.as_mut()) {
            link.way = way;
        }
    }

    /// Gives a session up that stands still here, all but the pages of a home.
    pub(super) fn release_task(&mut self, session: &SessionId, keep: bool) -> Result<(), Fatal> {
        let Some(&id) = self.names.get(session) else { return Ok(()) };
        let Some(released) = self.scheduler.release(id, keep)? else {
            // It never stood still: another one of its name takes its place.
            return self.drop_session(id).map(drop);
        };
        self.names.remove(session);
        if let Some(held) = self.sessions.remove(&id) {
            self.note_left(id, &held);
        }
        if let Some(key) = released.parked {
            self.drop_parked(key)?;
        }
        if keep {
            self.scheduler.keep_home(id.0, released.home);
            if let Some(seat) = self.seats.get_mut(session) {
                seat.home = Some(id.0);
            }
        } else if let Some(config) = &self.config.moves
            && self.seats.get(session).is_some_and(|seat| seat.home.is_none())
        {
            config.homes.withdraw(&session.0);
        }
        // A stale read of what was given up must show.
        self.poison(&released.slots, &released.pages)
    }

    pub(super) fn poison(&mut self, slots: &[u32], pages: &[u32]) -> Result<(), Fatal> {
        match self.executor.poison(slots, pages) {
            Ok(()) => Ok(()),
            Err(error) => non_fatal(error).map(|message| tracing::warn!(message, "slots were given up as they are")),
        }
    }
}

/// What travels of the pages that are here: the unfilled last one, and in whole mode all of them.
fn spans(pages: &HomePages, context: u64, mode: Mode) -> Vec<PageSpan> {
    let spans = pages.numbered().filter_map(|(number, page)| {
        let first = number * PAGE_POSITIONS;
        let positions = context.saturating_sub(first).min(PAGE_POSITIONS);
        let travels = positions > 0 && (mode == Mode::Whole || positions < PAGE_POSITIONS);
        travels.then_some(PageSpan { page, first, positions: positions as u32 })
    });
    spans.collect()
}

fn hand_in(parts: &tokio::sync::mpsc::UnboundedSender<SourcePart>, part: SourcePart) -> Result<(), String> {
    parts.send(part).map_err(|_| "the connection to the target broke".to_owned())
}

/// The message of an error after which the ranks go on.
pub(super) fn non_fatal(error: ExecutorError) -> Result<String, Fatal> {
    if error.fatal { Err(Fatal::Executor(error)) } else { Ok(error.to_string()) }
}
