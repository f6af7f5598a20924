//! One request in flight: its choices, what waits to be read, and how it ended. The rules of which token is taken in are
//! here and in `choice`; tables of requests and messages to replicas are not.

use std::sync::Arc;
use std::task::Waker;

use parking_lot::Mutex;
use perigee_proto::internal::{Counts, Finish, SessionEvent, Submit};
use perigee_proto::status::{ErrorKind, WireError};
use perigee_trace::Traced;
use smallvec::SmallVec;
use tokio::time::Instant;

use crate::batch::Token;
use crate::buffer::{EventBuffer, Full};
use crate::choice::Choice;
use crate::encoded;
use crate::error;
use crate::grpc::{Outlet, Piece};
use crate::reply::Read;
use crate::resume::Seal;

/// How a request ended.
pub(crate) type End = Result<(), WireError>;

/// One request in flight. What a token needs comes first, beside the count of references, in the order of these lines: a
/// router has thousands of requests, and waits for memory longer than for anything else that it does for a token.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Flight {
    pub(crate) state: Mutex<FlightState>,
    /// What was asked for, kept for replays. Its sessions are the choices' in order; epoch, deadline, delivered tokens and
    /// trace are set anew whenever it is sent.
    pub(crate) submit: Submit,
    pub(crate) arrived: Instant,
    pub(crate) deadline: Option<Instant>,
    /// Its span, which ends with it.
    pub(crate) traced: Traced,
}

/// The part that changes.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct FlightState {
    /// Where its answer leaves, if that is a gRPC stream.
    pub(crate) outlet: Option<Outlet>,
    pub(crate) buffer: EventBuffer,
    /// Makes resume tokens, where the request is to outlive this router.
    pub(crate) seal: Option<Box<Seal>>,
    /// Nearly all requests have one.
    pub(crate) choices: SmallVec<[Choice; 1]>,
    /// Set once. What is buffered is read before it.
    pub(crate) end: Option<End>,
    /// Who reads.
    pub(crate) waker: Option<Waker>,
    /// Whether the table of requests has forgotten it.
    pub(crate) is_forgotten: bool,
}

/// What became of an event.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Accepted {
    /// Nothing: another epoch's, or one that is known already.
    Ignored,
    /// It is on its way to the client, or waits for it.
    Taken(Milestones),
    /// The request failed by it.
    Failed(WireError),
}

/// What an accepted event was the first or last of, for the metrics.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Milestones {
    /// The first token of the request.
    pub(crate) first_token: bool,
    /// A token.
    pub(crate) token: bool,
    /// The end of a choice with at least two tokens: the mean time of those after the first, in seconds.
    pub(crate) seconds_per_token: Option<f64>,
}

impl Flight {
    pub(crate) fn request_id(&self) -> &str {
        &self.submit.request_id
    }

    /// Has the processor fetch what a token needs first. For one request that is no gain; over many, one after the other, it
    /// fetches several at a time, which it cannot where their locks are taken in between.
    pub(crate) fn fetch(&self) {
        std::hint::black_box(self.state.is_locked());
    }

    pub(crate) fn seed(&self) -> u64 {
        self.submit.sampling.as_ref().map_or(0, |sampling| sampling.seed)
    }

    /// What is sent to a replica so that it runs neighbouring choices of one epoch, the first of which is choice `first`:
    /// those without a token together, or one that goes on after those that its client has.
    pub(crate) fn submission(&self, group: &[Choice], first: usize, now: Instant) -> Submit {
        let left = self.deadline.map(|deadline| deadline.saturating_duration_since(now));
        Submit {
            sessions: group.iter().map(|choice| choice.session.clone()).collect(),
            epoch: group.first().map_or(0, |choice| choice.coordinator.epoch()),
            first_choice: first as u32,
            delivered: group.first().map(|choice| choice.tokens.clone()).unwrap_or_default(),
            deadline_ms: left.map(|left| left.as_millis() as u64),
            traceparent: self.traced.context().to_string(),
            ..self.submit.clone()
        }
    }
}

impl FlightState {
    /// Whether any choice had a token.
    pub(crate) fn has_token(&self) -> bool {
        self.choices.iter().any(|choice| choice.first_token.is_some())
    }

    /// Whether there is something to do about it after an event: a choice without a replica, or its end.
    pub(crate) fn is_unsettled(&self) -> bool {
        self.end.is_some() || self.choices.iter().any(Choice::needs_owner)
    }

    /// Takes in a token and sends it, where that is all there is to do about it: it is its choice's next one, of the epoch
    /// that is accepted while nothing moves, neither the first nor the last, and its client takes it now. False where it is
    /// anything else; nothing is changed then. Some of what is asked follows from the rest, as that nothing is accepted after
    /// a choice's end; it is asked all the same, since this stands for all rules of `Relay::take_event` and `accept`. A choice
    /// that failed somewhere has a replay, so there is nothing to forgive here.
    pub(crate) fn pass(&mut self, index: usize, token: &Token<'_>, replica: &str, now: Instant) -> bool {
        let Some(choice) = self.choices.get_mut(index) else { return false };
        let is_settled = choice.coordinator.is_idle() && choice.transit.is_none() && choice.replay.is_none();
        let is_due = token.epoch == choice.coordinator.epoch()
            && token.index == choice.due()
            && choice.is_answered
            && choice.first_token.is_some()
            && choice.withheld <= token.index
            && !choice.is_finished;
        if !is_settled || !is_due || self.end.is_some() || self.seal.is_some() || !self.buffer.is_empty() {
            return false;
        }
        let Some(outlet) = self.outlet.as_mut() else { return false };
        if !outlet.has_room() {
            return false;
        }
        choice.tokens.push(token.token);
        choice.last_token = Some(now);
        outlet.send(encoded::token(token, index, replica));
        true
    }

    /// Takes in an event of a choice's owner: only the index that is due, nothing after the end.
    pub(crate) fn accept(
        &mut self,
        index: usize,
        mut event: SessionEvent,
        replica: &Arc<str>,
        now: Instant,
        buffer_limit: usize,
    ) -> Accepted {
        let had_token = self.has_token();
        let Some(choice) = self.choices.get_mut(index) else { return Accepted::Ignored };
        if self.end.is_some() || choice.is_finished || event.index < choice.due() {
            return Accepted::Ignored;
        }
        if event.index > choice.due() {
            return Accepted::Failed(error::event_gap(replica, choice.due(), event.index));
        }

        let mut milestones = Milestones::default();
        if let Some(token) = event.token {
            choice.tokens.push(token);
            choice.first_token.get_or_insert(now);
            choice.last_token = Some(now);
            choice.failures = 0;
            choice.tried.clear();
            milestones.token = true;
            milestones.first_token = !had_token;
        }
        if event.finish() != Finish::Unspecified {
            choice.is_finished = true;
            if let Some(first) = choice.first_token.filter(|_| choice.due() > 1) {
                milestones.seconds_per_token = Some((now - first).as_secs_f64() / (choice.due() - 1) as f64);
            }
        }
        if event.token.is_some() && event.index < choice.withheld {
            if event.finish() == Finish::Unspecified {
                return Accepted::Taken(milestones);
            }
            event.token = None;
            event.index += 1;
        }
        event.choice = index as u32;
        if let Err(Full) = self.buffer.push(event, replica) {
            return Accepted::Failed(error::slow_reader(buffer_limit));
        }
        self.end_with_the_last();
        self.wake();
        Accepted::Taken(milestones)
    }

    /// The oldest event that waits to be read.
    pub(crate) fn next<'a>(&'a mut self, flight: &'a Flight) -> Option<Read<'a>> {
        let (event, replica) = self.buffer.pop()?;
        let choice = self.choices.get_mut(event.choice as usize);
        let is_first = choice.is_some_and(|choice| !std::mem::replace(&mut choice.is_answered, true));
        Some(Read { flight, seal: self.seal.as_deref_mut(), event, replica, is_first })
    }

    /// Sends a message to the client.
    pub(crate) fn send(&mut self, message: Piece) {
        if let Some(outlet) = &mut self.outlet {
            outlet.send(message);
        }
    }

    /// Ends a choice that nobody steps any more, as aborted.
    pub(crate) fn end_aborted(&mut self, index: usize, prompt: u64, replica: &Arc<str>) {
        let Some(choice) = self.choices.get_mut(index) else { return };
        choice.is_finished = true;
        let mut event = SessionEvent {
            epoch: choice.coordinator.epoch(),
            choice: index as u32,
            index: choice.due(),
            usage: Some(Box::new(Counts { prompt, completion: choice.due(), cached: 0 })),
            ..SessionEvent::default()
        };
        event.set_finish(Finish::Aborted);
        // A reader so slow that there is no room for its end is not left without one: the request fails instead.
        if let Err(Full) = self.buffer.push(event, replica) {
            self.end.get_or_insert(Err(WireError::new(ErrorKind::Cancelled, "the request was aborted")));
        }
        self.end_with_the_last();
        self.wake();
    }

    fn end_with_the_last(&mut self) {
        if self.choices.iter().all(|choice| choice.is_finished) {
            self.end.get_or_insert(Ok(()));
        }
    }

    /// Ends the request, unless it ended before. True where it had not.
    pub(crate) fn finish(&mut self, end: End) -> bool {
        if self.end.is_some() {
            return false;
        }
        // What came before a replica was lost is still worth reading; in all other cases nobody reads on.
        if end.as_ref().is_err_and(|error| error.kind != ErrorKind::Unavailable) {
            self.buffer.clear();
        }
        self.end = Some(end);
        true
    }

    /// Wakes who reads.
    pub(crate) fn wake(&mut self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }
}
