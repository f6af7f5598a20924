//! One live stream to a replica's leader, as the rest of the router uses it: messages out, the last reported load, and
//! questions that wait for their answer. Opening and reading the stream is `replica_client`'s work.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use perigee_proto::internal::{
    Flush, Link, ListSessions, Load, MoveCosts, RouterMessage, Session, Submit, router_message::Body,
};
use tokio::sync::{mpsc, oneshot};

use crate::balance::Way;
use crate::board::Row;
use crate::model::Model;
use crate::route::Report;

/// What a leader said of its replica when it was attached to.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Identity {
    pub(crate) replica: Arc<str>,
    pub(crate) incarnation: String,
    pub(crate) model: Arc<Model>,
    pub(crate) tp: u32,
    pub(crate) device: String,
    pub(crate) pids: Vec<u32>,
    pub(crate) weight_bytes: Vec<u64>,
    pub(crate) step_tokens: u32,
    /// What a session's move takes; none where none leaves it.
    pub(crate) move_costs: Option<MoveCosts>,
}

impl Identity {
    /// Whether both are the same run of the same replica.
    pub(crate) fn is_same_run(&self, other: &Self) -> bool {
        self.replica == other.replica && self.incarnation == other.incarnation
    }
}

/// A live stream. It dies once and does not come back; a new stream to the same replica is another attachment.
#[derive(Debug)]
pub(crate) struct Attachment {
    /// Unique in this process.
    pub(crate) id: u64,
    pub(crate) identity: Identity,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// None once the stream is lost.
    outbox: Option<mpsc::UnboundedSender<RouterMessage>>,
    load: Load,
    /// What the leader measured of its ways to other replicas, by name.
    links: HashMap<String, Way>,
    /// Sent since the load was reported, and so not in it.
    sent_sessions: u64,
    sent_tokens: u64,
    /// Where its report is written for choices to read.
    row: Option<Row>,
    next_call: u64,
    calls: HashMap<u64, Call>,
}

#[derive(Debug)]
enum Call {
    Sessions(oneshot::Sender<Vec<Session>>),
    Flush(oneshot::Sender<()>),
}

/// The stream is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Lost;

impl Attachment {
    pub(crate) fn new(id: u64, identity: Identity, outbox: mpsc::UnboundedSender<RouterMessage>) -> Self {
        let state = State {
            outbox: Some(outbox),
            load: Load::default(),
            links: HashMap::new(),
            sent_sessions: 0,
            sent_tokens: 0,
            row: None,
            next_call: 0,
            calls: HashMap::new(),
        };
        Self { id, identity, state: Mutex::new(state) }
    }

    /// Sends a message, or says that the stream is lost.
    pub(crate) fn send(&self, body: Body) -> Result<(), Lost> {
        self.state.lock().send(body)
    }

    /// Sends a request, and counts it into the load until the replica reports a new one.
    pub(crate) fn submit(&self, submit: Submit) -> Result<(), Lost> {
        let mut state = self.state.lock();
        let (sessions, tokens) = (submit.sessions.len() as u64, (submit.prompt.len() + submit.delivered.len()) as u64);
        state.send(Body::Submit(submit))?;
        state.sent_sessions += sessions;
        state.sent_tokens += tokens;
        self.publish(&state);
        Ok(())
    }

    /// Whether the stream is not lost, as far as is known.
    pub(crate) fn is_live(&self) -> bool {
        self.state.lock().outbox.is_some()
    }

    /// The last reported load.
    pub(crate) fn load(&self) -> Load {
        self.state.lock().load
    }

    /// The last reported load with what was sent since, for placement; none for a replica that takes no requests.
    pub(crate) fn report(&self) -> Option<Report> {
        self.report_of(&self.state.lock())
    }

    /// Writes its reports, now and as they change, into a row of a board, and no other any more.
    pub(crate) fn report_to(&self, row: Row) {
        let mut state = self.state.lock();
        state.row = Some(row);
        self.publish(&state);
    }

    fn publish(&self, state: &State) {
        if let Some(row) = &state.row {
            row.write(self.report_of(state));
        }
    }

    fn report_of(&self, state: &State) -> Option<Report> {
        let load = &state.load;
        if state.outbox.is_none() || load.draining {
            return None;
        }
        Some(Report {
            decode_ms: measured(load.decode_ms),
            prompt_token_ms: measured(load.prompt_token_ms),
            step_tokens: u64::from(self.identity.step_tokens),
            queued_tokens: load.queued_tokens.saturating_add(state.sent_tokens),
            running: u64::from(load.running),
            waiting: u64::from(load.waiting) + state.sent_sessions,
            slots_free: u64::from(load.slots_free),
            pages_free: u64::from(load.pages_free),
        })
    }

    /// Takes over a reported load. True where it is the first that says that the replica drains.
    pub(crate) fn set_load(&self, load: Load) -> bool {
        let mut state = self.state.lock();
        let begins_to_drain = load.draining && !state.load.draining;
        state.load = load;
        state.sent_sessions = 0;
        state.sent_tokens = 0;
        self.publish(&state);
        begins_to_drain
    }

    /// Takes over what the leader measured of its ways to other replicas.
    pub(crate) fn set_links(&self, links: Vec<Link>) {
        self.state.lock().links = links.into_iter().map(|link| (link.replica.clone(), Way::measured(&link))).collect();
    }

    /// The way to another replica, as far as the leader measured it.
    pub(crate) fn way_to(&self, replica: &str) -> Way {
        self.state.lock().links.get(replica).copied().unwrap_or_default()
    }

    /// Asks for the replica's sessions.
    pub(crate) async fn list_sessions(&self) -> Result<Vec<Session>, Lost> {
        self.ask(Call::Sessions, |call| Body::ListSessions(ListSessions { call })).await
    }

    /// Has the replica drop its cached prefixes.
    pub(crate) async fn flush(&self) -> Result<(), Lost> {
        self.ask(Call::Flush, |call| Body::Flush(Flush { call })).await
    }

    async fn ask<T>(
        &self,
        waiting: impl FnOnce(oneshot::Sender<T>) -> Call,
        question: impl FnOnce(u64) -> Body,
    ) -> Result<T, Lost> {
        let (answer, wait) = oneshot::channel();
        let _forget = {
            let mut state = self.state.lock();
            let call = state.next_call;
            state.next_call += 1;
            state.send(question(call))?;
            state.calls.insert(call, waiting(answer));
            Forget { attachment: self, call }
        };
        wait.await.map_err(|_| Lost)
    }

    /// An answer came.
    pub(crate) fn answer_sessions(&self, call: u64, sessions: Vec<Session>) {
        if let Some(Call::Sessions(answer)) = self.state.lock().calls.remove(&call) {
            // Who asked may be gone.
            let _ = answer.send(sessions);
        }
    }

    /// An answer came.
    pub(crate) fn answer_flush(&self, call: u64) {
        if let Some(Call::Flush(answer)) = self.state.lock().calls.remove(&call) {
            let _ = answer.send(());
        }
    }

    /// The stream is lost: nothing can be sent from now on, and questions that wait fail.
    pub(crate) fn close(&self) {
        let mut state = self.state.lock();
        state.outbox = None;
        state.calls.clear();
        self.publish(&state);
    }
}

/// A time as a leader reports it, or none where that is no time.
fn measured(ms: f32) -> f64 {
    const LONGEST_MS: f64 = 1e9;
    if ms.is_finite() { f64::from(ms).clamp(0.0, LONGEST_MS) } else { 0.0 }
}

impl State {
    fn send(&mut self, body: Body) -> Result<(), Lost> {
        let outbox = self.outbox.as_ref().ok_or(Lost)?;
        outbox.send(RouterMessage { body: Some(body) }).map_err(|_| Lost)
    }
}

/// Forgets a question whose asker stopped waiting.
struct Forget<'a> {
    attachment: &'a Attachment,
    call: u64,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        self.attachment.state.lock().calls.remove(&self.call);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_time_is_not_taken_for_one() {
        for (reported, taken) in [(0.0, 0.0), (5.5, 5.5), (-1.0, 0.0), (f32::MAX, 1e9)] {
            assert_eq!(measured(reported), taken);
        }
        for broken in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert_eq!(measured(broken), 0.0);
        }
    }
}
