//! A request's answer as its client reads it: what the relay takes in, and its end, once. Dropped before that, it aborts the
//! request. A gRPC stream is sent to; other readers ask.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use perigee_proto::internal::SessionEvent;
use perigee_proto::status::WireError;
use perigee_proto::{internal, v1};
use tokio::time::Sleep;
use tokio_stream::Stream;
use tonic::Status;

use crate::admission::Place;
use crate::encoded;
use crate::error;
use crate::flight::{End, Flight};
use crate::grpc::{Gone, Outlet};
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

    /// Sends the answer to its client, until its end or until the client is gone. From here on whoever takes a token in
    /// sends it, where that needs nothing else: this runs for the first of each choice, for ends, and where the client
    /// did not take something at once.
    pub(crate) async fn send_to(mut self, outlet: Outlet) {
        self.flight.state.lock().outlet = Some(outlet);
        let end = poll_fn(|context| self.poll_send(context)).await;
        let outlet = self.flight.state.lock().outlet.take();
        if let (Some(end), Some(outlet)) = (end, outlet) {
            outlet.end(end.map_err(Status::from));
        }
    }

    /// Sends what waits; ready with the end, or with nothing once the client is gone.
    fn poll_send(&mut self, context: &mut Context<'_>) -> Poll<Option<End>> {
        self.poll_deadline(context);
        let mut state = self.flight.state.lock();
        let gone = state.outlet.as_mut().map(|outlet| outlet.poll_gone(context));
        if !matches!(gone, Some(Poll::Pending)) {
            return Poll::Ready(None);
        }
        // Also while the client takes nothing: the end may come, and clears what waits.
        state.waker = Some(context.waker().clone());
        while !state.buffer.is_empty()
            && let Some(outlet) = &mut state.outlet
        {
            if let Err(Gone) = ready!(outlet.poll_room(context)) {
                return Poll::Ready(None);
            }
            let message = state.next(&self.flight).map(encoded::response);
            message.into_iter().for_each(|message| state.send(message));
        }
        if let Some(end) = &state.end {
            self.done = true;
            return Poll::Ready(Some(end.clone()));
        }
        Poll::Pending
    }

    fn poll_deadline(&mut self, context: &mut Context<'_>) {
        if let Some(deadline) = &mut self.deadline
            && deadline.as_mut().poll(context).is_ready()
        {
            self.deadline = None;
            self.relay.end(&self.flight, Err(error::deadline_exceeded()));
        }
    }

    /// The next response, for who asks.
    fn poll_response(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<v1::GenerateResponse, WireError>>> {
        if self.done {
            return Poll::Ready(None);
        }
        self.poll_deadline(context);
        let mut state = self.flight.state.lock();
        if let Some(read) = state.next(&self.flight) {
            return Poll::Ready(Some(Ok(read.into_response())));
        }
        let Some(end) = &state.end else {
            state.waker = Some(context.waker().clone());
            return Poll::Pending;
        };
        self.done = true;
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
    pub(crate) flight: &'a Flight,
    /// Makes its resume token, where there is to be one.
    pub(crate) seal: Option<&'a mut Seal>,
    pub(crate) event: SessionEvent,
    /// Where it came from.
    pub(crate) replica: Arc<str>,
    /// Whether it is the first of its choice.
    pub(crate) is_first: bool,
}

impl Read<'_> {
    pub(crate) fn into_response(self) -> v1::GenerateResponse {
        let mut response = response(self.flight, self.event, &self.replica, self.is_first);
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
