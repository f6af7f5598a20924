//! The target's side of a move inside the engine: room is reserved, parts go to slot and pages as they come, digests are
//! taken over what was written, and at the router's word the session runs.

use std::ops::Range;

use perigee_migration::epochs::{Failure, PartyEvent};
use perigee_migration::handoff::Summary;
use perigee_migration::{
    Digest, Header, HeldState, Mode, PAGE_POSITIONS, PageSlice, Part, SegmentTable, StateSlice, Tensor, TensorDigests,
};

use perigee_text::grammar::Grammar;

use super::incoming::{Arriving, Reply};
use super::pairs::ArrivingPair;
use super::party::Then;
use super::record::{Record, RecordError};
use super::source::non_fatal;
use super::{Demand, HandoffRefused, PairAnswer, Room, Way, pairs};
use crate::cache::{HomePages, Latents, SlotPair};
use crate::executor::PageSpan;
use crate::handle::{EngineHealth, QueuePermit};
use crate::request::SessionId;
use crate::scheduler::{Adopted, TaskId};
use crate::sequence::Sequence;
use crate::step::{EngineCore, Fatal, Session, Sink};

/// A refusal, or that the ranks are broken.
enum Stop {
    Refused(HandoffRefused),
    Fatal(Fatal),
}

impl<E: Into<HandoffRefused>> From<E> for Stop {
    fn from(error: E) -> Self {
        Self::Refused(error.into())
    }
}

impl EngineCore {
    /// A handoff's header arrived. What the session needs is reserved before its source lets it stand still, so that a
    /// refusal costs it nothing.
    pub(crate) fn handoff_offer(&mut self, header: Header, demand: Demand, reply: Reply<Room>) -> Result<(), Fatal> {
        let session = SessionId(header.session.clone());
        let (epoch, next) = (header.epoch, header.next_epoch);
        let seat = self.seats.entry(session.clone()).or_default();
        seat.has_moved = true;
        let task = TaskId(self.next_task);
        self.next_task += 1;
        let serves = *self.shared.health.borrow() == EngineHealth::Serving;
        let room = if serves { self.room(task, header.mode, &demand)? } else { None };
        let offer = PartyEvent::Offer { epoch, next, has_room: room.is_some() };
        let answer = self.drive_offer(&session, header, (task, room), offer)?;
        let answer = match answer {
            Ok(()) => Ok(self.choose_way(&session, next, demand)?),
            Err(failure) => Err(failure.into()),
        };
        self.answer(reply, answer);
        Ok(())
    }

    /// How the state is to come: by the first of this replica's ways that the source offers and that is open.
    fn choose_way(&mut self, session: &SessionId, next: u64, demand: Demand) -> Result<Room, Fatal> {
        let ways = self.config.moves.as_ref().map(|config| config.ways.clone());
        let Some(ways) = ways.filter(|_| self.arriving(session, next).is_ok()) else { return Ok(Room::default()) };
        let pair = self.answer_pair(demand.pair.as_ref());
        for way in ways {
            match way {
                Way::Stream => break,
                Way::Slots if self.open_slots(session, next, &demand.slots)? => return Ok(Room { way, pair }),
                Way::Pair if pair == PairAnswer::Ready => {
                    if let (Some(offer), Ok(arriving)) = (demand.pair, self.arriving(session, next)) {
                        arriving.pair = Some(ArrivingPair { invitations: offer.invitations, is_expected: false });
                    }
                    return Ok(Room { way, pair });
                }
                Way::Slots | Way::Pair => {}
            }
        }
        Ok(Room { way: Way::Stream, pair })
    }

    /// Opens the source's slots where they can be reached from here, before the session stands still.
    fn open_slots(&mut self, session: &SessionId, next: u64, slots: &[Vec<u8>]) -> Result<bool, Fatal> {
        if slots.is_empty() || self.arriving(session, next).is_err() {
            return Ok(false);
        }
        if let Err(error) = self.executor.open_slots(slots) {
            let why = non_fatal(error)?;
            tracing::debug!(session = session.0, why, "the state comes through the connection");
            return Ok(false);
        }
        if let Ok(arriving) = self.arriving(session, next) {
            arriving.source_slots = Some(slots.to_vec());
        }
        Ok(true)
    }

    fn close_slots(&mut self, slots: Option<Vec<Vec<u8>>>) -> Result<(), Fatal> {
        let Some(slots) = slots else { return Ok(()) };
        match self.executor.close_slots(&slots) {
            Ok(()) => Ok(()),
            Err(error) => non_fatal(error).map(|message| tracing::warn!(message, "slots of a source stay open")),
        }
    }

    /// Slots and pages for a session, if it fits.
    fn room(&mut self, task: TaskId, mode: Mode, demand: &Demand) -> Result<Option<(SlotPair, Vec<u32>)>, Fatal> {
        if self.scheduler.limits().check_arrival(demand.positions, demand.remote).is_err() {
            return Ok(None);
        }
        // A session with latents elsewhere needs a slot to read and one to write.
        let Some(slots) = self.scheduler.reserve(task, mode == Mode::Split || demand.remote > 0) else {
            return Ok(None);
        };
        let pages = self.scheduler.reserve_pages(task, demand.pages as usize);
        if pages.is_none() {
            self.note_shortage();
            self.scheduler.cancel_reserve(task)?;
        }
        Ok(pages.map(|pages| (slots, pages)))
    }

    fn drive_offer(
        &mut self,
        session: &SessionId,
        header: Header,
        (task, room): (TaskId, Option<(SlotPair, Vec<u32>)>),
        offer: PartyEvent,
    ) -> Result<Result<(), Failure>, Fatal> {
        self.offered = room.map(|(slots, reserved)| {
            Box::new(Arriving {
                task,
                slots,
                reserved,
                header,
                tokens: Vec::new(),
                frozen: None,
                record: None,
                table: SegmentTable::new(),
                pages: HomePages::default(),
                spans: Vec::new(),
                summary: None,
                grammar: None,
                source_slots: None,
                pair: None,
            })
        });
        let answer = self.drive(session, offer)?;
        if self.offered.take().is_some() {
            // It was not taken.
            self.scheduler.cancel_reserve(task)?;
        }
        Ok(answer.unwrap_or(Ok(())))
    }

    /// The party takes the handoff that was just offered.
    pub(super) fn reserve(&mut self, session: &SessionId) -> Result<Then, Fatal> {
        let Some(seat) = self.seats.get_mut(session) else { return Ok(Then::Nothing) };
        match self.offered.take() {
            Some(arriving) => {
                seat.arriving = Some(arriving);
                Ok(Then::Nothing)
            }
            // What was held made room in the party's eyes; the next handoff finds it.
            None => Ok(Then::Event(PartyEvent::Broken { next: seat.party.target().holding().unwrap_or_default() })),
        }
    }

    pub(super) fn free_reserved(&mut self, session: &SessionId) -> Result<(), Fatal> {
        let Some(arriving) = self.seats.get_mut(session).and_then(|seat| seat.arriving.take()) else { return Ok(()) };
        self.close_slots(arriving.source_slots)?;
        self.drop_expected(arriving.pair)?;
        let released = self.scheduler.cancel_reserve(arriving.task)?;
        self.poison(&released.slots, &released.pages)
    }

    /// More of a handoff arrived.
    pub(crate) fn handoff_parts(
        &mut self,
        session: &SessionId,
        next: u64,
        parts: Vec<Part>,
        reply: Reply<()>,
    ) -> Result<(), Fatal> {
        let answer = match self.take_parts(session, next, parts) {
            Ok(()) => {
                self.drive(session, PartyEvent::Part { next })?;
                Ok(())
            }
            Err(Stop::Refused(refused)) => {
                self.drive(session, PartyEvent::Broken { next })?;
                Err(refused)
            }
            Err(Stop::Fatal(fatal)) => return Err(fatal),
        };
        self.answer(reply, answer);
        Ok(())
    }

    /// All of it arrived: what is in slot and pages now?
    pub(crate) fn handoff_verify(
        &mut self,
        session: &SessionId,
        next: u64,
        (summary, grammar): (Summary, Option<Box<Grammar>>),
        reply: Reply<Vec<u64>>,
    ) -> Result<(), Fatal> {
        let answer = match self.verify(session, next, summary, grammar) {
            Ok(digests) => match self.drive(session, PartyEvent::Verified { next })? {
                Some(Err(failure)) => Err(failure.into()),
                _ => Ok(digests.numbers()),
            },
            Err(Stop::Refused(refused)) => {
                self.drive(session, PartyEvent::Broken { next })?;
                Err(refused)
            }
            Err(Stop::Fatal(fatal)) => return Err(fatal),
        };
        self.answer(reply, answer);
        Ok(())
    }

    /// The session's handoff, if it is still this one.
    pub(super) fn arriving(&mut self, session: &SessionId, next: u64) -> Result<&mut Arriving, HandoffRefused> {
        let seat = self.seats.get_mut(session).ok_or(HandoffRefused::Failure(Failure::NotHere))?;
        let known = seat.party.known_epoch();
        let arriving = seat.arriving.as_deref_mut().filter(|arriving| arriving.header.next_epoch == next);
        arriving.ok_or(HandoffRefused::Failure(Failure::Stale { known }))
    }

    fn take_parts(&mut self, session: &SessionId, next: u64, parts: Vec<Part>) -> Result<(), Stop> {
        let (mut slices, mut pages) = (Vec::new(), Vec::new());
        for part in parts {
            match part {
                Part::Header(_) | Part::End(_) => {}
                Part::Tokens(tokens) => self.arriving(session, next)?.tokens.extend(tokens),
                Part::Frozen(frozen) => {
                    let record = Record::decode(&frozen.record)?;
                    check(&record, session, &frozen)?;
                    let arriving = self.arriving(session, next)?;
                    arriving.record = Some(record);
                    arriving.frozen = Some(frozen);
                }
                Part::Segments(table) => {
                    self.take_table(session, next, table)?;
                    self.expect_pair(session, next).map_err(Stop::Fatal)?;
                }
                Part::State(slice) => slices.push(slice),
                Part::Held(held) => self.take_held(session, next, &held)?,
                Part::Page(slice) => pages.push(slice),
            }
        }
        self.import_state(session, next, &slices)?;
        self.import_pages(session, next, pages)
    }

    /// Where the session's latents are; pages that came back are the home entry's, others are reserved.
    fn take_table(&mut self, session: &SessionId, next: u64, table: SegmentTable) -> Result<(), Stop> {
        let place = self.place().ok_or(HandoffRefused::NotOffered)?;
        let home = self.seats.get(session).and_then(|seat| seat.home);
        let kept = home.and_then(|key| self.scheduler.home(key)).cloned().unwrap_or_default();
        let arriving = self.arriving(session, next)?;
        let task = arriving.task;
        let (Some(frozen), Some(record)) = (&arriving.frozen, &arriving.record) else {
            return Err(HandoffRefused::Failure(Failure::Handoff).into());
        };
        let (context, tokens, most) = (frozen.context, frozen.tokens, most(&record.sequence));
        let arrival = table.arrive(&place);
        if self.scheduler.limits().check_arrival(most.max(tokens), arrival.table.tokens()).is_err() {
            return Err(HandoffRefused::Failure(Failure::Full).into());
        }
        let numbers = |range: &Range<u64>| range.start / PAGE_POSITIONS..range.end.div_ceil(PAGE_POSITIONS);
        let returned: Vec<Range<u64>> = arrival.returned.iter().map(numbers).collect();
        let mut lost: u64 = arrival.lost.iter().map(|range| range.end - range.start).sum();
        for range in &returned {
            // Of the others the entry ran out.
            let found: usize = kept.within(range.clone()).map(|(_, pages)| pages.len()).sum();
            lost += (range.end - range.start - found as u64) * PAGE_POSITIONS;
        }
        if lost > 0 {
            return Err(HandoffRefused::Lost { positions: lost }.into());
        }
        let pieces = pieces(arrival.table.gaps(context).iter().map(numbers), &returned);
        let due: u64 =
            pieces.iter().filter(|(_, has_come_back)| !has_come_back).map(|(range, _)| range.end - range.start).sum();
        if !arrival.table.is_empty() {
            self.need_shadow(session, next)?;
        }
        let mut reserved = std::mem::take(&mut self.arriving(session, next)?.reserved);
        if let Some(missing) = (due as usize).checked_sub(reserved.len()) {
            // It came further than was expected when room was made for it.
            let Some(more) = self.scheduler.reserve_pages(task, missing) else {
                self.note_shortage();
                return Err(HandoffRefused::Failure(Failure::Full).into());
            };
            reserved.extend(more);
        }
        // Those that are too many are given back when it runs.
        let mut reserved = reserved.as_slice();
        let mut pages = HomePages::default();
        for (range, has_come_back) in pieces {
            if has_come_back {
                kept.within(range).for_each(|(first, back)| pages.extend(first, back));
            } else if let Some((now, later)) = reserved.split_at_checked((range.end - range.start) as usize) {
                pages.extend(range.start, now);
                reserved = later;
            }
        }
        let arriving = self.arriving(session, next)?;
        arriving.table = arrival.table;
        arriving.pages = pages;
        Ok(())
    }

    /// A session that moves whole may still have latents elsewhere.
    fn need_shadow(&mut self, session: &SessionId, next: u64) -> Result<(), Stop> {
        let arriving = self.arriving(session, next)?;
        if arriving.slots.read != arriving.slots.write {
            return Ok(());
        }
        let task = arriving.task;
        // Nothing has been written yet.
        self.scheduler.cancel_reserve(task).map_err(|error| Stop::Fatal(error.into()))?;
        let slots = self.scheduler.reserve(task, true).ok_or(HandoffRefused::Failure(Failure::Full))?;
        let arriving = self.arriving(session, next)?;
        (arriving.slots, arriving.reserved) = (slots, Vec::new());
        Ok(())
    }

    fn import_state(&mut self, session: &SessionId, next: u64, slices: &[StateSlice]) -> Result<(), Stop> {
        if slices.is_empty() {
            return Ok(());
        }
        let arriving = self.arriving(session, next)?;
        let (slot, pair) = (arriving.slots.read, arriving.pair.take());
        self.drop_expected(pair).map_err(Stop::Fatal)?;
        self.executor.import_state(slot, slices).map_err(stop)
    }

    /// The state came by a pair, or is where the source had it: this replica copies it, and takes its digests in the end as over
    /// what was sent.
    fn take_held(&mut self, session: &SessionId, next: u64, held: &HeldState) -> Result<(), Stop> {
        let arriving = self.arriving(session, next)?;
        let slot = arriving.slots.read;
        if let Some(pair) = arriving.pair.as_mut() {
            let invitations = pair.invitations.clone();
            pairs::take(&mut *self.executor, &invitations, slot).map_err(stop)?;
            self.arriving(session, next)?.pair = None;
            return Ok(());
        }
        let Some(shared) = arriving.source_slots.clone() else {
            return Err(HandoffRefused::Failure(Failure::Handoff).into());
        };
        self.executor.take_slot(&shared, held.slot, slot).map_err(stop)
    }

    fn import_pages(&mut self, session: &SessionId, next: u64, slices: Vec<PageSlice>) -> Result<(), Stop> {
        let arriving = self.arriving(session, next)?;
        let mut pages = Vec::with_capacity(slices.len());
        for slice in slices {
            // The ledger has let through only what is due.
            let page = arriving.pages.get(slice.first / PAGE_POSITIONS);
            let page = page.ok_or(HandoffRefused::Failure(Failure::Handoff))?;
            let span = PageSpan { page, first: slice.first, positions: slice.positions };
            if !arriving.spans.contains(&span) {
                arriving.spans.push(span);
            }
            pages.push((page, slice));
        }
        if pages.is_empty() { Ok(()) } else { self.executor.import_pages(&pages).map_err(stop) }
    }

    /// Digests over slot and pages, which must be the source's.
    fn verify(
        &mut self,
        session: &SessionId,
        next: u64,
        summary: Summary,
        grammar: Option<Box<Grammar>>,
    ) -> Result<TensorDigests, Stop> {
        let arriving = self.arriving(session, next)?;
        let has_grammar = arriving.record.as_ref().is_some_and(|record| record.sequence.grammar.is_some());
        if has_grammar != grammar.is_some() {
            return Err(HandoffRefused::Grammar("it was not made".into()).into());
        }
        arriving.grammar = grammar;
        let (slot, spans) = (arriving.slots.read, arriving.spans.clone());
        let mut digests = self.executor.digest_slot(slot).map_err(stop)?;
        let latents: Vec<Digest> =
            if spans.is_empty() { Vec::new() } else { self.executor.digest_pages(&spans).map_err(stop)? };
        for (layer, digest) in (0..).zip(latents) {
            digests.add(Tensor::Latents { layer }, digest);
        }
        summary.digests.compare(&digests)?;
        let arriving = self.arriving(session, next)?;
        arriving.summary = Some(summary);
        let slots = arriving.source_slots.take();
        self.close_slots(slots).map_err(Stop::Fatal)?;
        Ok(digests)
    }

    /// The router said so: the session is this replica's.
    pub(super) fn run_prepared(&mut self, session: &SessionId, epoch: u64) -> Result<Then, Fatal> {
        let Some(seat) = self.seats.get_mut(session) else { return Ok(Then::Nothing) };
        let (router, home) = (seat.router, seat.home);
        let complete = |arriving: &mut Box<Arriving>| arriving.frozen.is_some() && arriving.record.is_some();
        let Some((router, arriving)) = router.zip(seat.arriving.take_if(complete)) else {
            tracing::error!(session = session.0, epoch, "a session was started of which nothing is here");
            self.free_reserved(session)?;
            self.free_home(session)?;
            return Ok(Then::Event(PartyEvent::Ended { epoch }));
        };
        seat.home = None;
        let Arriving { task, tokens, frozen: Some(frozen), record: Some(record), table, pages, grammar, .. } =
            *arriving
        else {
            return Ok(Then::Nothing);
        };
        if let Some(config) = &self.config.moves {
            config.homes.withdraw(&session.0);
        }
        let home = home.and_then(|key| self.scheduler.take_home(key));
        let endpoint = |place: &perigee_migration::Place| {
            let named =
                record.homes.iter().find(|home| home.replica == place.replica && home.incarnation == place.incarnation);
            named.map(|home| home.endpoint.clone()).unwrap_or_default()
        };
        let latents = Latents::assemble(&table, endpoint, &pages, frozen.context);
        self.adopt(session, epoch, Arrived { task, tokens, record, grammar, latents, home, router })
    }

    fn adopt(&mut self, session: &SessionId, epoch: u64, arrived: Arrived) -> Result<Then, Fatal> {
        let Arrived { task, tokens, record, grammar, latents, home, router } = arrived;
        let now = self.config.clock.now();
        let mut sequence = record.sequence;
        sequence.tokens = tokens;
        sequence.epoch = epoch;
        let deadline = record.time_left.map(|left| now + left);
        let adopted = Adopted {
            priority: sequence.priority,
            deadline,
            length: sequence.length(),
            most: most(&sequence),
            computed: record.computed,
            scored: record.scored,
            prompt_logits: record.prompt_logits,
            latents: latents.unwrap_or_default(),
            home,
        };
        if let Err(never) = self.scheduler.adopt(task, adopted)? {
            tracing::error!(session = session.0, epoch, ?never, "a session was started that can never fit");
            let released = self.scheduler.cancel_reserve(task)?;
            self.poison(&released.slots, &released.pages)?;
            return Ok(Then::Event(PartyEvent::Ended { epoch }));
        }
        self.scheduler.thaw(task);
        let permit = QueuePermit::used(&self.shared).into();
        let sink = Sink::Router(router);
        let has_tokens = sequence.completion() > 0;
        let held = Session {
            last_token: has_tokens.then_some(now),
            grammar: grammar.map(|grammar| *grammar),
            ..Session::new(sequence, sink, deadline, now, permit)
        };
        self.sessions.insert(task, held);
        self.names.insert(session.clone(), task);
        Ok(Then::Nothing)
    }
}

/// Most positions that a session may ever compute.
pub(super) fn most(sequence: &Sequence) -> u64 {
    (sequence.prompt_length + u64::from(sequence.stop.max_tokens)).saturating_sub(1)
}

/// The page numbers of `gaps`, in order, cut where those begin and end that came back; whether each piece did.
fn pieces(gaps: impl Iterator<Item = Range<u64>>, returned: &[Range<u64>]) -> Vec<(Range<u64>, bool)> {
    let mut pieces = Vec::new();
    for gap in gaps {
        let mut next = gap.start;
        for back in returned {
            let back = back.start.max(next)..back.end.min(gap.end);
            if back.start < back.end {
                pieces.push((next..back.start, false));
                next = back.end;
                pieces.push((back, true));
            }
        }
        pieces.push((next..gap.end, false));
    }
    pieces.retain(|(range, _)| range.start < range.end);
    pieces
}

/// What becomes a session.
struct Arrived {
    task: TaskId,
    tokens: Vec<u32>,
    record: Record,
    grammar: Option<Box<Grammar>>,
    latents: Option<Latents>,
    home: Option<HomePages>,
    router: crate::request::RouterId,
}

fn stop(error: crate::executor::ExecutorError) -> Stop {
    match non_fatal(error) {
        Ok(message) => Stop::Refused(HandoffRefused::Ranks(message)),
        Err(fatal) => Stop::Fatal(fatal),
    }
}

/// The record must be of what came with it.
fn check(record: &Record, session: &SessionId, frozen: &perigee_migration::handoff::Frozen) -> Result<(), RecordError> {
    let contradiction = |what, expected, found| Err(RecordError::Contradiction { what, expected, found });
    if record.sequence.session != *session {
        return Err(RecordError::Malformed(format!("it is session {}'s", record.sequence.session.0)));
    }
    if record.computed != frozen.context {
        return contradiction("computed positions", frozen.context, record.computed);
    }
    if record.sequence.prompt_length > frozen.tokens {
        return contradiction("prompt tokens", frozen.tokens, record.sequence.prompt_length);
    }
    if record.computed >= frozen.tokens {
        return contradiction("computed positions below its tokens", frozen.tokens, record.computed);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::pieces;

    #[test]
    fn gaps_are_cut_where_pages_came_back() {
        let ranges = |pairs: &[(u64, u64)]| pairs.iter().map(|&(start, end)| start..end).collect::<Vec<_>>();
        let cut = |gaps: &[(u64, u64)], returned: &[(u64, u64)]| {
            let pieces = pieces(ranges(gaps).into_iter(), &ranges(returned));
            pieces.into_iter().map(|(range, came_back)| (range.start, range.end, came_back)).collect::<Vec<_>>()
        };
        assert_eq!(cut(&[(0, 9)], &[]), [(0, 9, false)]);
        assert_eq!(cut(&[(0, 9)], &[(0, 9)]), [(0, 9, true)]);
        let both = [(0, 2, false), (2, 4, true), (4, 5, true), (5, 9, false)];
        assert_eq!(cut(&[(0, 9)], &[(2, 4), (4, 5)]), both);
        assert_eq!(cut(&[(0, 3), (5, 9)], &[(0, 3), (8, 9)]), [(0, 3, true), (5, 8, false), (8, 9, true)]);
    }
}
