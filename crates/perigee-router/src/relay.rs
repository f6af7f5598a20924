//! Between replicas and clients: finds the request of every event, report and loss, and ends requests. It reads no socket
//! itself; what events mean for a session is `driver`'s business, and where sessions without an owner go `recovery`'s.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use perigee_migration::epochs::last_beside;
use perigee_proto::ids::SessionId;
use perigee_proto::internal::{Abort, MoveReport, SessionEvent, Submit, router_message::Body};
use perigee_proto::status::{ErrorKind, WireError};
use perigee_trace::Traced;
use smallvec::SmallVec;
use tokio::time::Instant;

use crate::admission::{self, Place};
use crate::attachment::Attachment;
use crate::batch::Event;
use crate::buffer::EventBuffer;
use crate::choice::Choice;
use crate::config::MoveTimes;
use crate::driver::Seat;
use crate::error;
use crate::flight::{Accepted, End, Flight, FlightState, Milestones};
use crate::metrics::RouterMetrics;
use crate::orphans::Orphan;
use crate::recovery::demand;
use crate::replicas::{Placement, Replicas};
use crate::reply::Reply;
use crate::resume::{ResumeKey, Resumed, Seal};
use crate::timers::Timers;
use crate::trace;

/// How often a router that ends looks whether requests still run.
const IDLE_LOOK: Duration = Duration::from_millis(20);

/// All requests of this router.
#[derive(Debug)]
pub(crate) struct Relay {
    /// A session's number to its request and choice: a key that lies in the table itself, so that a token waits for no other
    /// memory to be found.
    sessions: Mutex<HashMap<u128, (Arc<Flight>, usize)>>,
    pub(crate) replicas: Arc<Replicas>,
    pub(crate) metrics: RouterMetrics,
    pub(crate) timers: Timers,
    pub(crate) times: MoveTimes,
    pub(crate) buffered_bytes: usize,
    /// Whether nobody need wait for replicas that may yet come.
    pub(crate) is_closing: AtomicBool,
}

/// A request that is ready to run.
#[derive(Debug)]
pub(crate) struct NewFlight {
    /// Names of request and sessions set; epoch and deadline are set when it is sent.
    pub(crate) submit: Submit,
    pub(crate) arrived: Instant,
    pub(crate) deadline: Option<Instant>,
    pub(crate) place: Place,
    /// Its span.
    pub(crate) traced: Traced,
    /// Where it goes on, if another router began it.
    pub(crate) resumed: Option<Resumed>,
    /// Of each choice the session that is still somewhere, under the name that it has in `submit`; nothing where it is to be
    /// computed anew.
    pub(crate) orphans: Vec<Option<Orphan>>,
    /// Signs its resume tokens, where it is to have some.
    pub(crate) key: Option<ResumeKey>,
}

impl Relay {
    pub(crate) fn new(
        replicas: Arc<Replicas>,
        metrics: RouterMetrics,
        times: MoveTimes,
        buffered_bytes: usize,
    ) -> Self {
        let (sessions, timers, is_closing) = (Mutex::default(), Timers::default(), AtomicBool::new(false));
        Self { sessions, replicas, metrics, timers, times, buffered_bytes, is_closing }
    }

    /// Sends a request to the replica where it would have its first token soonest.
    ///
    /// # Errors
    /// UNAVAILABLE without a replica, RESOURCE_EXHAUSTED and DEADLINE_EXCEEDED where its deadline comes too soon.
    pub(crate) fn start(self: &Arc<Self>, new: NewFlight) -> Result<Reply, WireError> {
        if self.is_closing.load(Ordering::Relaxed) {
            return Err(error::closing());
        }
        let is_adopted = |index: usize| new.orphans.get(index).is_some_and(Option::is_some);
        let needs_place = (0..new.submit.sessions.len()).any(|index| !is_adopted(index));
        let placement = if needs_place { Some(self.choose_place(&new)?) } else { None };

        let choice = |(index, session): (usize, &String)| {
            let mut choice = Choice::new(session.clone(), new.arrived, error::no_replica());
            if let Some(resumed) = &new.resumed {
                resumed.bring(index, &mut choice);
            }
            choice
        };
        let choices: SmallVec<[Choice; 1]> = new.submit.sessions.iter().enumerate().map(choice).collect();
        let seal = new.key.as_ref().map(|key| match new.resumed {
            Some(resumed) => resumed.into_seal(key, &new.submit),
            None => Seal::new(key, &new.submit, choices.len()),
        });
        let state = FlightState {
            outlet: None,
            buffer: EventBuffer::new(self.buffered_bytes),
            seal: seal.map(Box::new),
            end: choices.iter().all(|choice| choice.is_finished).then_some(Ok(())),
            choices,
            waker: None,
            is_forgotten: false,
        };
        let numbers: Vec<_> = new.submit.sessions.iter().map(|name| SessionId::number(name)).collect();
        let flight = Arc::new(Flight {
            submit: new.submit,
            arrived: new.arrived,
            deadline: new.deadline,
            traced: new.traced,
            state: Mutex::new(state),
        });
        // Known before it is sent: an event or the loss of the replica must find it.
        {
            let mut sessions = self.sessions.lock();
            let choices = numbers.into_iter().enumerate();
            sessions.extend(choices.filter_map(|(index, number)| Some((number?, (flight.clone(), index)))));
        }
        self.metrics.waiting.inc();
        let reply = Reply::new(self.clone(), flight.clone(), new.place);
        for (index, orphan) in new.orphans.into_iter().enumerate() {
            let mut state = flight.state.lock();
            let mut seat = Seat { flight: &flight, state: &mut state, index, now: new.arrived };
            if let Some(orphan) = orphan.filter(|_| seat.choice().is_some_and(|choice| !choice.is_finished)) {
                self.adopt(&mut seat, orphan);
            }
        }
        self.settle(&flight, placement);
        Ok(reply)
    }

    /// Where a new request would have its first token soonest, if that is in time.
    fn choose_place(&self, new: &NewFlight) -> Result<Placement, WireError> {
        let demand = demand(&new.submit);
        let began = Instant::now();
        let placement = self.replicas.place(demand, &[]).ok_or_else(error::no_replica)?;
        self.metrics.placement.observe(began.elapsed().as_secs_f64());
        let report = placement.report;
        let room = report.waiting == 0 && report.slots_free >= demand.sessions;
        admission::check_wait(placement.expected_ms, room, new.deadline)?;
        Ok(placement)
    }

    /// The request and choice of a session.
    pub(crate) fn find(&self, session: &str) -> Option<(Arc<Flight>, usize)> {
        self.sessions.lock().get(&SessionId::number(session)?).cloned()
    }

    /// What one step of a replica did.
    pub(crate) fn deliver(&self, from: &Arc<Attachment>, events: Vec<Event<'_>>, now: Instant) {
        let flights: Vec<Option<(Arc<Flight>, usize)>> = {
            let sessions = self.sessions.lock();
            let found: Vec<_> = events.iter().map(|event| sessions.get(&event.session()?)).collect();
            found.iter().flatten().for_each(|(flight, _)| flight.fetch());
            found.into_iter().map(Option::<&_>::cloned).collect()
        };
        let mut tokens = 0;
        for (event, found) in events.into_iter().zip(flights) {
            // A session that nobody waits for was abandoned, and its end is on the way.
            let Some((flight, index)) = found else { continue };
            let event = match event {
                Event::Token(token) if flight.state.lock().pass(index, &token, &from.identity.replica, now) => {
                    tokens += 1;
                    continue;
                }
                Event::Token(token) => token.to_event(),
                Event::Other(event) => *event,
            };
            tokens += self.deliver_one(from, &flight, index, event, now);
        }
        self.metrics.completion_tokens.inc_by(tokens);
    }

    /// Takes in an event by all rules that there are, and says how many tokens that was.
    fn deliver_one(
        &self,
        from: &Arc<Attachment>,
        flight: &Arc<Flight>,
        index: usize,
        event: SessionEvent,
        now: Instant,
    ) -> u64 {
        let (accepted, is_unsettled) = {
            let mut state = flight.state.lock();
            let accepted = self.take_event(&mut Seat { flight, state: &mut state, index, now }, from, event);
            (accepted, state.is_unsettled())
        };
        let mut tokens = 0;
        match accepted {
            Accepted::Ignored => {
                tracing::debug!(parent: flight.traced.span(), "event of another epoch or index dropped");
            }
            Accepted::Taken(milestones) => {
                tokens = u64::from(milestones.token);
                self.count(flight, milestones, now);
            }
            Accepted::Failed(error) => self.end(flight, Err(error)),
        }
        if is_unsettled {
            self.settle(flight, None);
        }
        tokens
    }

    fn count(&self, flight: &Flight, milestones: Milestones, now: Instant) {
        if milestones.first_token {
            self.metrics.ttft.observe((now - flight.arrived).as_secs_f64());
            self.metrics.waiting.dec();
            self.metrics.running.inc();
        }
        if let Some(seconds) = milestones.seconds_per_token {
            self.metrics.tpot.observe(seconds);
        }
    }

    /// A replica reported on a move. Its events from before are delivered already.
    pub(crate) fn reported(&self, from: &Attachment, report: &MoveReport, now: Instant) {
        let Some((flight, index)) = self.find(&report.session) else { return };
        let taken = {
            let mut state = flight.state.lock();
            if state.end.is_some() {
                return;
            }
            self.take_report(&mut Seat { flight: &flight, state: &mut state, index, now }, from, report)
        };
        if let Err(error) = taken {
            self.end(&flight, Err(error));
        }
        self.settle(&flight, None);
    }

    /// The stream to a replica is lost, and with it what ran there. The attachment is closed already, so that nothing can
    /// join it after this.
    pub(crate) fn lost(&self, attachment: &Attachment, why: &str) {
        let now = Instant::now();
        for flight in self.flights() {
            {
                let mut state = flight.state.lock();
                if state.end.is_some() {
                    continue;
                }
                for index in 0..state.choices.len() {
                    let mut seat = Seat { flight: &flight, state: &mut state, index, now };
                    self.take_loss(&mut seat, attachment, why);
                }
                if !state.is_unsettled() {
                    continue;
                }
            }
            self.settle(&flight, None);
        }
    }

    /// Every request once.
    pub(crate) fn flights(&self) -> Vec<Arc<Flight>> {
        let sessions = self.sessions.lock();
        sessions.values().filter(|(_, index)| *index == 0).map(|(flight, _)| flight.clone()).collect()
    }

    /// Looks at sessions again whose time has come, or that wait for a replica when there may be a new one; as long as
    /// the router lives.
    pub(crate) async fn keep_time(self: Arc<Self>) {
        let mut ready = self.replicas.ready();
        loop {
            tokio::select! {
                () = self.timers.wait() => self.ring(Instant::now()),
                // An error would mean that the replicas are gone, and they are this relay's.
                _ = ready.changed() => self.settle_waiting(),
            }
        }
    }

    fn ring(&self, now: Instant) {
        for due in self.timers.due(now) {
            let Some(flight) = due.flight.upgrade() else { continue };
            {
                let mut state = flight.state.lock();
                let is_over = state.end.is_some();
                let mut seat = Seat { flight: &flight, state: &mut state, index: due.choice, now };
                let Some(choice) = seat.choice().filter(|choice| choice.alarm == Some(due.alarm) && !is_over) else {
                    continue;
                };
                choice.alarm = None;
                if choice.pending.is_some() {
                    choice.tried.clear();
                } else {
                    self.take_timeout(&mut seat);
                }
            }
            self.settle(&flight, None);
        }
    }

    /// Tries again whatever waits for a replica.
    fn settle_waiting(&self) {
        for flight in self.flights() {
            let mut is_waiting = false;
            for choice in &mut flight.state.lock().choices {
                if choice.pending.is_some() {
                    is_waiting = true;
                    choice.alarm.take().into_iter().for_each(|alarm| self.timers.cancel(alarm));
                }
            }
            if is_waiting {
                self.settle(&flight, None);
            }
        }
    }

    /// Nobody need wait for replicas that may yet come: the router is about to end.
    pub(crate) fn stop_waiting(&self) {
        self.is_closing.store(true, Ordering::Relaxed);
        self.settle_waiting();
    }

    /// Completes once no request runs here. To be waited for when no more are taken.
    pub(crate) async fn until_idle(&self) {
        while !self.sessions.lock().is_empty() {
            tokio::time::sleep(IDLE_LOOK).await;
        }
    }

    /// Tells replicas to end the sessions of this router that `wanted` names and that have not ended; their streams end by
    /// themselves then. A session that is between two replicas ends here.
    pub(crate) fn abort(&self, wanted: impl Fn(&Flight, &str) -> bool) -> Vec<String> {
        let now = Instant::now();
        let sessions: Vec<(String, Arc<Flight>, usize)> = {
            let sessions = self.sessions.lock();
            let named = |(flight, index): &(Arc<Flight>, usize)| {
                let session = flight.submit.sessions.get(*index)?;
                wanted(flight, session).then(|| (session.clone(), flight.clone(), *index))
            };
            sessions.values().filter_map(named).collect()
        };
        let mut told = Vec::new();
        for (session, flight, index) in sessions {
            {
                let mut state = flight.state.lock();
                let is_over = state.end.is_some();
                let mut seat = Seat { flight: &flight, state: &mut state, index, now };
                let Some(choice) = seat.choice().filter(|choice| !choice.is_finished && !is_over) else { continue };
                choice.is_aborted = true;
                let abort = Body::Abort(Abort { sessions: vec![session.clone()], epoch: 0 });
                let owner = choice.owner.clone().filter(|_| choice.coordinator.is_idle());
                if owner.as_ref().is_none_or(|owner| owner.send(abort).is_err()) {
                    let replica = owner.map(|owner| owner.identity.replica.clone()).unwrap_or_default();
                    seat.state.end_aborted(index, flight.submit.prompt.len() as u64, &replica);
                    self.close(&mut seat, false);
                }
            }
            told.push(session);
            self.settle(&flight, None);
        }
        told.sort();
        told
    }

    /// Nobody reads a request's answer any more.
    pub(crate) fn abandon(&self, flight: &Arc<Flight>) {
        self.end(flight, Err(WireError::new(ErrorKind::Cancelled, "the client went away")));
    }

    /// Ends a request before its time: what still runs is aborted wherever anything of it is, and who reads is woken.
    pub(crate) fn end(&self, flight: &Arc<Flight>, end: End) {
        let now = Instant::now();
        {
            let mut state = flight.state.lock();
            let is_failure = end.as_ref().is_err_and(|error| error.kind == ErrorKind::Unavailable);
            let result = if is_failure { "failed" } else { "aborted" };
            if !state.finish(end) {
                return;
            }
            state.wake();
            // One message a replica, not one a choice.
            let mut aborts: Vec<(Arc<Attachment>, u64, Vec<String>)> = Vec::new();
            for index in 0..state.choices.len() {
                let mut seat = Seat { flight, state: &mut state, index, now };
                let Some(choice) = seat.choice().filter(|choice| !choice.is_finished) else { continue };
                choice.is_finished = true;
                // Not those of a router to which the client has turned.
                let epoch = last_beside(choice.coordinator.epoch());
                for holder in std::mem::take(&mut choice.holders) {
                    let Some(holder) = self.replicas.live(&holder) else { continue };
                    match aborts.iter_mut().find(|(known, up_to, _)| (known.id, *up_to) == (holder.id, epoch)) {
                        Some((.., sessions)) => sessions.push(choice.session.clone()),
                        None => aborts.push((holder, epoch, vec![choice.session.clone()])),
                    }
                }
                if choice.replay.take().is_some() {
                    self.metrics.migrations.with_label_values(&["replay", result]).inc();
                }
                self.close(&mut seat, false);
            }
            for (holder, epoch, sessions) in aborts {
                // A lost replica ends them itself.
                let _ = holder.send(Body::Abort(Abort { sessions, epoch }));
            }
        }
        self.forget_if_over(flight);
    }

    /// Forgets a request that ended, once.
    pub(crate) fn forget_if_over(&self, flight: &Flight) {
        let gauge = {
            let mut state = flight.state.lock();
            if state.end.is_none() || std::mem::replace(&mut state.is_forgotten, true) {
                return;
            }
            note_end(flight, &state);
            if state.has_token() { &self.metrics.running } else { &self.metrics.waiting }
        };
        gauge.dec();
        let mut sessions = self.sessions.lock();
        for number in flight.submit.sessions.iter().filter_map(|session| SessionId::number(session)) {
            sessions.remove(&number);
        }
    }

    /// Sessions that are known, for tests of what is left behind.
    #[cfg(test)]
    pub(crate) fn session_count(&self) -> usize {
        self.sessions.lock().len()
    }
}

/// The one line of a request that ended.
fn note_end(flight: &Flight, state: &FlightState) {
    let failure = match &state.end {
        Some(Err(error)) => Some(error),
        _ => None,
    };
    if let Some(error) = failure {
        trace::note_failure(&flight.traced, error);
    }
    let first_token = state.choices.iter().filter_map(|choice| choice.first_token).min();
    tracing::info!(
        parent: flight.traced.span(),
        request_id = flight.request_id(),
        choices = state.choices.len() as i64,
        prompt_tokens = flight.submit.prompt.len() as i64,
        completion_tokens = state.choices.iter().map(Choice::due).sum::<u64>() as i64,
        ttft_ms = first_token.map(|first| (first - flight.arrived).as_secs_f64() * 1e3),
        seconds = flight.arrived.elapsed().as_secs_f64(),
        error = failure.map(|error| error.message.as_str()),
        "request ended"
    );
}
