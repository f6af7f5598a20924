//! Between replicas and clients: finds the request of every event, moves refused requests on, ends those whose replica was
//! lost, and tells replicas when a client no longer wants its answer. It reads no socket itself.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use perigee_proto::internal::{self, EventBatch, Refused, RefusedReason, Submit, router_message::Body};
use perigee_proto::status::{ErrorKind, WireError};
use tokio::time::Instant;

use crate::admission::{self, Place};
use crate::attachment::Attachment;
use crate::buffer::EventBuffer;
use crate::error;
use crate::flight::{Accepted, Choice, End, Flight, FlightState, Milestones};
use crate::metrics::RouterMetrics;
use crate::replicas::{Placement, Replicas};
use crate::reply::Reply;
use crate::route::Demand;

/// The first epoch of a session.
const FIRST_EPOCH: u64 = 1;

/// All requests of this router.
#[derive(Debug)]
pub(crate) struct Relay {
    /// Session to request and choice.
    sessions: Mutex<HashMap<String, Arc<Flight>>>,
    replicas: Arc<Replicas>,
    metrics: RouterMetrics,
    buffered_bytes: usize,
}

/// A request that is ready to run.
#[derive(Debug)]
pub(crate) struct NewFlight {
    /// Names of request and sessions set; epoch and deadline are set here.
    pub(crate) submit: Submit,
    pub(crate) arrived: Instant,
    pub(crate) deadline: Option<Instant>,
    pub(crate) place: Place,
}

impl Relay {
    pub(crate) fn new(replicas: Arc<Replicas>, metrics: RouterMetrics, buffered_bytes: usize) -> Self {
        Self { sessions: Mutex::default(), replicas, metrics, buffered_bytes }
    }

    /// Sends a request to the replica where it would have its first token soonest.
    ///
    /// # Errors
    /// UNAVAILABLE without a replica, RESOURCE_EXHAUSTED and DEADLINE_EXCEEDED where its deadline comes too soon.
    pub(crate) fn start(self: &Arc<Self>, new: NewFlight) -> Result<Reply, WireError> {
        let demand = demand(&new.submit);
        let placement = self.replicas.place(demand, &[]).ok_or_else(error::no_replica)?;
        let report = placement.report;
        let room = report.waiting == 0 && report.slots_free >= demand.sessions;
        admission::check_wait(placement.expected_ms, room, new.deadline)?;

        let choices = new.submit.sessions.len();
        let flight = Arc::new(Flight {
            request_id: new.submit.request_id.clone(),
            sessions: new.submit.sessions.clone(),
            seed: new.submit.sampling.as_ref().map_or(0, |sampling| sampling.seed),
            arrived: new.arrived,
            deadline: new.deadline,
            state: Mutex::new(FlightState {
                attachment: placement.attachment.clone(),
                epoch: FIRST_EPOCH - 1,
                tried: Vec::new(),
                submit: Some(new.submit),
                choices: std::iter::repeat_with(Choice::default).take(choices).collect(),
                buffer: EventBuffer::new(self.buffered_bytes),
                end: None,
                waker: None,
            }),
        });
        // Known before it is sent: an event or the loss of the replica must find it.
        {
            let mut sessions = self.sessions.lock();
            sessions.extend(flight.sessions.iter().map(|session| (session.clone(), flight.clone())));
        }
        self.metrics.waiting.inc();
        let reply = Reply::new(self.clone(), flight.clone(), new.place);
        self.submit(&flight, Some(placement), error::no_replica());
        Ok(reply)
    }

    /// Sends a request to `placement` or, where that is lost already, to the next best replica; without any it ends with
    /// `otherwise`.
    fn submit(&self, flight: &Arc<Flight>, mut placement: Option<Placement>, otherwise: WireError) {
        let mut state = flight.state.lock();
        if state.end.is_some() {
            return;
        }
        let Some(submit) = state.submit.clone() else { return };
        let demand = demand(&submit);
        while let Some(Placement { attachment, .. }) = placement {
            state.epoch += 1;
            state.tried.push(attachment.id);
            state.attachment = attachment.clone();
            let left = flight.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            let message =
                Submit { epoch: state.epoch, deadline_ms: left.map(|left| left.as_millis() as u64), ..submit.clone() };
            let epoch = state.epoch;
            if attachment.submit(message).is_ok() {
                tracing::debug!(
                    request_id = flight.request_id,
                    replica = &*attachment.identity.replica,
                    epoch,
                    "request placed"
                );
                return;
            }
            placement = self.replicas.place(demand, &state.tried);
        }
        drop(state);
        self.end(flight, Err(otherwise));
    }

    /// What one step of a replica did.
    pub(crate) fn deliver(&self, batch: EventBatch, now: Instant) {
        let flights: Vec<Option<Arc<Flight>>> = {
            let sessions = self.sessions.lock();
            batch.events.iter().map(|event| sessions.get(&event.session).cloned()).collect()
        };
        for (event, flight) in batch.events.into_iter().zip(flights) {
            // A session that nobody waits for was abandoned, and its end is on the way.
            let Some(flight) = flight else { continue };
            let accepted = {
                let mut state = flight.state.lock();
                let accepted = state.accept(event, now, self.buffered_bytes);
                if matches!(accepted, Accepted::Buffered(_) | Accepted::Finished(_)) {
                    state.wake();
                }
                accepted
            };
            match accepted {
                Accepted::Ignored => {
                    tracing::debug!(request_id = flight.request_id, "event of a past epoch or index dropped");
                }
                Accepted::Buffered(milestones) => self.count(&flight, milestones, now),
                Accepted::Finished(milestones) => {
                    self.count(&flight, milestones, now);
                    self.forget(&flight);
                }
                Accepted::Failed(error) => self.end(&flight, Err(error)),
            }
        }
    }

    fn count(&self, flight: &Flight, milestones: Milestones, now: Instant) {
        if milestones.token {
            self.metrics.completion_tokens.inc();
        }
        if milestones.first_token {
            self.metrics.ttft.observe((now - flight.arrived).as_secs_f64());
            self.metrics.waiting.dec();
            self.metrics.running.inc();
        }
        if let Some(seconds) = milestones.seconds_per_token {
            self.metrics.tpot.observe(seconds);
        }
    }

    /// A replica refused a request: it goes to the next best one, unless its fields are at fault.
    pub(crate) fn refused(&self, attachment: &Attachment, refused: Refused) {
        let Some(flight) = refused.sessions.first().and_then(|session| self.sessions.lock().get(session).cloned())
        else {
            return;
        };
        let reason = refused.reason();
        let replica = &attachment.identity.replica;
        tracing::debug!(
            request_id = flight.request_id,
            replica = &**replica,
            ?reason,
            message = refused.message,
            "request refused"
        );
        let error = match reason {
            RefusedReason::Invalid => {
                return self.end(&flight, Err(WireError::invalid(refused.field, refused.message)));
            }
            RefusedReason::Full => WireError::exhausted(refused.message, Duration::from_secs(1)),
            RefusedReason::Unavailable | RefusedReason::Unspecified => {
                WireError::unavailable("REPLICA_REFUSED", format!("{}: repeat the request", refused.message))
            }
        };
        let next = {
            let state = flight.state.lock();
            // An answer to an earlier submission is no news.
            if state.attachment.id != attachment.id {
                return;
            }
            state.submit.as_ref().map(|submit| self.replicas.place(demand(submit), &state.tried))
        };
        match next {
            Some(placement) => self.submit(&flight, placement, error),
            None => self.end(&flight, Err(error)),
        }
    }

    /// The stream to a replica is lost, and with it what ran there. The attachment is closed already, so that no request
    /// can join it after this.
    pub(crate) fn lost(&self, attachment: &Attachment, why: &str) {
        let flights: Vec<Arc<Flight>> = self.sessions.lock().values().cloned().collect();
        for flight in flights {
            if flight.state.lock().attachment.id == attachment.id {
                self.end(&flight, Err(error::replica_lost(&attachment.identity.replica, why)));
            }
        }
    }

    /// Tells replicas to end the sessions of this router that `wanted` names and that have not ended; their streams end by
    /// themselves then.
    pub(crate) fn abort(&self, wanted: impl Fn(&Flight, &str) -> bool) -> Vec<String> {
        let sessions: Vec<(String, Arc<Flight>)> = {
            let sessions = self.sessions.lock();
            let wanted = sessions.iter().filter(|(session, flight)| wanted(flight, session));
            wanted.map(|(session, flight)| (session.clone(), flight.clone())).collect()
        };
        let mut told = Vec::new();
        for (session, flight) in sessions {
            let attachment = {
                let state = flight.state.lock();
                if !state.unfinished(&flight.sessions).contains(&session) {
                    continue;
                }
                state.attachment.clone()
            };
            if attachment.send(Body::Abort(internal::Abort { sessions: vec![session.clone()], epoch: 0 })).is_ok() {
                told.push(session);
            }
        }
        told.sort();
        told
    }

    /// Nobody reads a request's answer any more.
    pub(crate) fn abandon(&self, flight: &Arc<Flight>) {
        self.end(flight, Err(WireError::new(ErrorKind::Cancelled, "the client went away")));
    }

    /// Ends a request before its time: what still runs is aborted, and who reads is woken.
    pub(crate) fn end(&self, flight: &Arc<Flight>, end: End) {
        let (attachment, sessions) = {
            let mut state = flight.state.lock();
            let sessions = state.unfinished(&flight.sessions);
            if !state.finish(end) {
                return;
            }
            state.wake();
            (state.attachment.clone(), sessions)
        };
        self.forget(flight);
        if !sessions.is_empty() {
            // A lost replica ends them itself.
            let _ = attachment.send(Body::Abort(internal::Abort { sessions, epoch: 0 }));
        }
    }

    fn forget(&self, flight: &Flight) {
        let gauge = if flight.state.lock().has_token() { &self.metrics.running } else { &self.metrics.waiting };
        gauge.dec();
        let mut sessions = self.sessions.lock();
        for session in &flight.sessions {
            sessions.remove(session);
        }
    }

    /// Sessions that are known, for tests of what is left behind.
    #[cfg(test)]
    pub(crate) fn session_count(&self) -> usize {
        self.sessions.lock().len()
    }
}

fn demand(submit: &Submit) -> Demand {
    Demand { prompt_tokens: submit.prompt.len() as u64, sessions: submit.sessions.len() as u64 }
}
