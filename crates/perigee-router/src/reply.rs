//! A request's answer as its client reads it: a stream that yields what the relay buffered, ends once, and aborts the
//! request when it is dropped before that. No task runs for it; the transport polls it.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use perigee_proto::internal::SessionEvent;
use perigee_proto::status::WireError;
use perigee_proto::{internal, v1};
use tokio::time::Sleep;
use tokio_stream::Stream;
use tonic::Status;

use crate::admission::Place;
use crate::error;
use crate::flight::Flight;
use crate::relay::Relay;
use crate::resume::Seal;

/// A stream of responses.
#[derive(Debug)]
pub(crate) struct Reply {
    relay: Arc<Relay>,
    flight: Arc<Flight>,
    deadline: Option<Pin<Box<Sleep>>>,
    /// Whether the end was read.
    done: bool,
    _place: Place,
}

impl Reply {
    pub(crate) fn new(relay: Arc<Relay>, flight: Arc<Flight>, place: Place) -> Self {
        let deadline = flight.deadline.map(|deadline| Box::pin(tokio::time::sleep_until(deadline)));
        Self { relay, flight, deadline, done: false, _place: place }
    }
}

impl Stream for Reply {
    type Item = Result<v1::GenerateResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.poll_response(context).map(|item| item.map(|response| response.map_err(Status::from)))
    }
}

/// The same answer with its error as the router knows it, for readers that do not speak gRPC.
#[derive(Debug)]
pub(crate) struct Responses(pub(crate) Reply);

impl Stream for Responses {
    type Item = Result<v1::GenerateResponse, WireError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_response(context)
    }
}

impl Reply {
    /// Tokens of the prompt.
    pub(crate) fn prompt(&self) -> &[u32] {
        &self.flight.submit.prompt
    }

    /// Name of the request.
    pub(crate) fn request_id(&self) -> &str {
        self.flight.request_id()
    }

    fn poll_response(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<v1::GenerateResponse, WireError>>> {
        self.poll_with(context, |read| read.into_response())
    }

    /// The next event, as `read` makes something of it.
    pub(crate) fn poll_with<T>(
        &mut self,
        context: &mut Context<'_>,
        read: impl FnOnce(Read<'_>) -> T,
    ) -> Poll<Option<Result<T, WireError>>> {
        let this = self;
        if this.done {
            return Poll::Ready(None);
        }
        if let Some(deadline) = &mut this.deadline
            && deadline.as_mut().poll(context).is_ready()
        {
            this.deadline = None;
            this.relay.end(&this.flight, Err(error::deadline_exceeded()));
        }
        let mut state = this.flight.state.lock();
        if let Some((event, replica)) = state.buffer.pop() {
            let is_first = state
                .choices
                .get_mut(event.choice as usize)
                .is_some_and(|choice| !std::mem::replace(&mut choice.is_answered, true));
            let seal = state.seal.as_mut();
            return Poll::Ready(Some(Ok(read(Read {
                flight: &this.flight,
                seal,
                event,
                replica: &replica,
                is_first,
            }))));
        }
        let Some(end) = &state.end else {
            state.waker = Some(context.waker().clone());
            return Poll::Pending;
        };
        this.done = true;
        Poll::Ready(end.clone().err().map(Err))
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        self.relay.abandon(&self.flight);
    }
}

/// An event that its client reads.
pub(crate) struct Read<'a> {
    flight: &'a Flight,
    /// Makes its resume token, where there is to be one.
    pub(crate) seal: Option<&'a mut Seal>,
    pub(crate) event: SessionEvent,
    /// Where it came from.
    pub(crate) replica: &'a str,
    /// Whether it is the first of its choice.
    pub(crate) is_first: bool,
}

impl Read<'_> {
    pub(crate) fn into_response(self) -> v1::GenerateResponse {
        let mut response = response(self.flight, self.event, self.replica, self.is_first);
        if let Some(seal) = self.seal {
            response.resume_token = seal.with(&response);
        }
        response
    }
}

/// An event as clients see it; `first` where it is the first response of its choice.
fn response(flight: &Flight, event: SessionEvent, replica: &str, first: bool) -> v1::GenerateResponse {
    let finish_reason = match event.finish() {
        internal::Finish::Stop => v1::FinishReason::Stop,
        internal::Finish::Length => v1::FinishReason::Length,
        internal::Finish::Aborted => v1::FinishReason::Aborted,
        // Failures are statuses, not responses.
        internal::Finish::Unspecified | internal::Finish::Deadline | internal::Finish::Error => {
            v1::FinishReason::Unspecified
        }
    };
    let session_id = if event.session.is_empty() {
        // The router's own word for the end of a session.
        flight.submit.sessions.get(event.choice as usize).cloned().unwrap_or_default()
    } else {
        event.session
    };
    v1::GenerateResponse {
        session_id,
        choice: event.choice,
        index: event.index,
        token_id: event.token,
        text: event.text,
        logprobs: event.logprobs.map(|logprobs| position(*logprobs)),
        finish_reason: finish_reason.into(),
        usage: event.usage.map(|counts| v1::Usage {
            prompt: counts.prompt,
            completion: counts.completion,
            cached: counts.cached,
        }),
        resume_token: Vec::new(),
        replica: replica.to_owned(),
        epoch: event.epoch,
        prompt_logprobs: event.prompt_logprobs.into_iter().map(position).collect(),
        seed: first.then_some(flight.seed()),
        request_id: if first { flight.submit.request_id.clone() } else { String::new() },
    }
}

fn position(position: internal::Position) -> v1::PositionLogprobs {
    let pairs = position.ids.into_iter().zip(position.logprobs);
    let mut pairs = pairs.map(|(token_id, logprob)| v1::TokenLogprob { token_id, logprob });
    let chosen = if position.has_chosen { pairs.next() } else { None };
    v1::PositionLogprobs { chosen, top: pairs.collect() }
}
