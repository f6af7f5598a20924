//! One request in flight: which replica and epoch its tokens come from, which index each choice is due next, what waits to
//! be read and how it ended. The rules of what is accepted are here; tables of requests and messages to replicas are not.

use std::sync::Arc;
use std::task::Waker;

use parking_lot::Mutex;
use perigee_proto::internal::{Finish, SessionEvent, Submit};
use perigee_proto::status::{ErrorKind, WireError};
use tokio::time::Instant;

use crate::attachment::Attachment;
use crate::buffer::EventBuffer;
use crate::error;

/// How a request ended.
pub(crate) type End = Result<(), WireError>;

/// One request in flight.
#[derive(Debug)]
pub(crate) struct Flight {
    pub(crate) request_id: String,
    /// One for every choice, in order.
    pub(crate) sessions: Vec<String>,
    pub(crate) seed: u64,
    pub(crate) arrived: Instant,
    pub(crate) deadline: Option<Instant>,
    pub(crate) state: Mutex<FlightState>,
}

/// The part that changes.
#[derive(Debug)]
pub(crate) struct FlightState {
    /// Where it runs.
    pub(crate) attachment: Arc<Attachment>,
    /// The only epoch whose events are accepted.
    pub(crate) epoch: u64,
    /// Streams that it was sent to, so as not to ask twice.
    pub(crate) tried: Vec<u64>,
    /// What was submitted, kept until the first event in case the replica refuses it.
    pub(crate) submit: Option<Submit>,
    pub(crate) choices: Vec<Choice>,
    pub(crate) buffer: EventBuffer,
    /// Set once. What is buffered is read before it.
    pub(crate) end: Option<End>,
    /// Who reads.
    pub(crate) waker: Option<Waker>,
}

/// One choice.
#[derive(Debug, Default)]
pub(crate) struct Choice {
    /// Index that its next token must have.
    next: u64,
    finished: bool,
    first_token: Option<Instant>,
    /// Whether its first response was read.
    pub(crate) answered: bool,
}

/// What became of an event.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Accepted {
    /// Nothing: another epoch's, or one that is known already.
    Ignored,
    /// It is buffered.
    Buffered(Milestones),
    /// It is buffered, and all choices are finished.
    Finished(Milestones),
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

impl FlightState {
    /// Whether any choice had a token.
    pub(crate) fn has_token(&self) -> bool {
        self.choices.iter().any(|choice| choice.first_token.is_some())
    }

    /// Sessions that have not ended, of all.
    pub(crate) fn unfinished(&self, sessions: &[String]) -> Vec<String> {
        let running = self.choices.iter().zip(sessions).filter(|(choice, _)| !choice.finished);
        running.map(|(_, session)| session.clone()).collect()
    }

    /// Applies the rules: only the current epoch, only the index that is due, nothing after the end.
    pub(crate) fn accept(&mut self, mut event: SessionEvent, now: Instant, buffer_limit: usize) -> Accepted {
        let replica = self.attachment.identity.replica.clone();
        if self.end.is_some() || event.epoch != self.epoch {
            return Accepted::Ignored;
        }
        let had_token = self.has_token();
        let Some(choice) = self.choices.get_mut(event.choice as usize) else { return Accepted::Ignored };
        if choice.finished || event.index < choice.next {
            return Accepted::Ignored;
        }
        if event.index > choice.next {
            return Accepted::Failed(error::event_gap(&replica, choice.next, event.index));
        }
        match event.finish() {
            Finish::Error => return Accepted::Failed(error::engine_failed(&replica, &event.error)),
            Finish::Deadline => return Accepted::Failed(error::deadline_exceeded()),
            Finish::Unspecified | Finish::Stop | Finish::Length | Finish::Aborted => {}
        }

        let mut milestones = Milestones::default();
        if event.token.is_some() {
            choice.next += 1;
            choice.first_token.get_or_insert(now);
            milestones.token = true;
            milestones.first_token = !had_token;
        }
        if event.finish() != Finish::Unspecified {
            choice.finished = true;
            if let Some(first) = choice.first_token.filter(|_| choice.next > 1) {
                milestones.seconds_per_token = Some((now - first).as_secs_f64() / (choice.next - 1) as f64);
            }
        }
        // The reader names sessions by choice.
        event.session.clear();
        if self.buffer.push(event, &replica).is_err() {
            return Accepted::Failed(error::slow_reader(buffer_limit));
        }
        self.submit = None;
        if self.choices.iter().all(|choice| choice.finished) {
            self.end = Some(Ok(()));
            return Accepted::Finished(milestones);
        }
        Accepted::Buffered(milestones)
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
