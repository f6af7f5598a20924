//! An actor at work: perigee-migration's machine for each session, a handoff that is a message in memory, a token for every
//! session a tick. What it does to messages is what the test said.

use std::sync::Arc;

use parking_lot::Mutex;
use perigee_migration::epochs::{Action, Command, Failure, PartyEvent, Phase, Report, Side, Timer};
use perigee_proto::internal::{
    Counts, EventBatch, Finish, MoveFailure, MoveMode, MovePhase, MoveReport, Prepare, ReplicaMessage, SessionEvent,
    Submit, replica_message, router_message,
};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use super::super::fake::{Attached, roomy};
use super::{Fate, GRACE, Hub, Offer, Own, Record, SILENCE, Said, Shared, TICK, token_of};

/// The actor at work.
pub(super) struct Stage {
    attached: Attached,
    shared: Arc<Mutex<Shared>>,
    hub: Hub,
    own: mpsc::UnboundedSender<Own>,
    own_events: Option<mpsc::UnboundedReceiver<Own>>,
    events: Vec<SessionEvent>,
    is_dying: bool,
    /// Handoffs that nobody will ever answer.
    unanswered: Vec<oneshot::Sender<bool>>,
}

impl Stage {
    pub(super) fn new(attached: Attached, shared: Arc<Mutex<Shared>>, hub: Hub) -> Self {
        let (own, own_events) = mpsc::unbounded_channel();
        let (events, unanswered) = (Vec::new(), Vec::new());
        Self { attached, shared, hub, own, own_events: Some(own_events), events, is_dying: false, unanswered }
    }

    pub(super) async fn run(mut self, mut offers: mpsc::UnboundedReceiver<Offer>) {
        let Some(mut own) = self.own_events.take() else { return };
        let mut tick = tokio::time::interval(TICK);
        while !self.is_dying {
            tokio::select! {
                biased;
                message = self.attached.from_router.message() => match message {
                    Ok(Some(message)) => self.hear(message.body.expect("a body")),
                    Ok(None) | Err(_) => return,
                },
                Some(event) = own.recv() => match event {
                    Own::Answered { session, next, is_right: true } => {
                        self.event(&session, PartyEvent::HandoffVerified { next });
                    }
                    Own::Answered { session, next, is_right: false } => {
                        self.event(&session, PartyEvent::HandoffFailed { next });
                    }
                    Own::Verify { session, next } => self.event(&session, PartyEvent::Verified { next }),
                },
                Some(offer) = offers.recv() => self.offered(offer),
                _ = tick.tick() => self.step(),
            }
            self.flush();
        }
    }

    /// What becomes of a message, decided once.
    fn fate(&self, said: Said) -> Option<Fate> {
        let mut shared = self.shared.lock();
        let index = shared.fates.iter().position(|(kind, _)| *kind == said)?;
        Some(shared.fates.remove(index).1)
    }

    fn hear(&mut self, body: router_message::Body) {
        use router_message::Body;
        let said = match &body {
            Body::Prepare(_) => Said::Prepare,
            Body::Start(_) => Said::Start,
            Body::Release(_) => Said::Release,
            Body::AbortMove(_) => Said::AbortMove,
            Body::Abort(_) => Said::Abort,
            Body::Submit(submit) => {
                self.shared.lock().submits.push(submit.clone());
                return self.submit(submit);
            }
            Body::ListSessions(_)
            | Body::Hello(_)
            | Body::Renew(_)
            | Body::Flush(_)
            | Body::Drain(_)
            // Another router's sessions are none of these tests'.
            | Body::TakeOver(_) => return,
        };
        self.shared.lock().heard.push(said);
        let times = match self.fate(said) {
            Some(Fate::Lost) => 0,
            Some(Fate::Doubled) => 2,
            Some(Fate::Last) => {
                self.is_dying = true;
                0
            }
            Some(Fate::Refused) | None => 1,
        };
        for _ in 0..times {
            self.carry_out(body.clone());
        }
    }

    fn carry_out(&mut self, body: router_message::Body) {
        use router_message::Body;
        let (session, command) = match body {
            Body::Prepare(order) => {
                let command = Command::Prepare { epoch: order.epoch, next: order.next_epoch };
                let session = order.session.clone();
                self.shared.lock().sessions.entry(session.clone()).or_default().order = Some(order);
                (session, command)
            }
            Body::Start(start) => (start.session, Command::Start { epoch: start.epoch }),
            Body::Release(release) => {
                (release.session, Command::Release { epoch: release.epoch, owner_epoch: release.owner_epoch })
            }
            Body::AbortMove(abort) => {
                (abort.session, Command::AbortMove { next: abort.next_epoch, epoch: abort.epoch })
            }
            Body::Abort(abort) => {
                for session in abort.sessions {
                    let up_to = if abort.epoch == 0 { u64::MAX } else { abort.epoch };
                    let stepping = self.shared.lock().sessions.get(&session).and_then(|held| held.party.stepping());
                    self.event(&session, PartyEvent::Ended { epoch: up_to });
                    if let Some(epoch) = stepping.filter(|epoch| *epoch <= up_to) {
                        self.say(&session, epoch, None, Some(Finish::Aborted));
                    }
                }
                return;
            }
            _ => return,
        };
        self.event(&session, PartyEvent::Command(command));
    }

    fn submit(&mut self, submit: &Submit) {
        for (number, session) in submit.sessions.iter().enumerate() {
            let choice = submit.first_choice + number as u32;
            let expected: Vec<u32> = (0..submit.delivered.len() as u64).map(|index| token_of(choice, index)).collect();
            assert_eq!(submit.delivered, expected, "what is replayed is what the client has");
            let record = Record {
                choice,
                prompt: submit.prompt.len() as u64,
                index: submit.delivered.len() as u64,
                most: u64::from(submit.max_tokens),
            };
            self.event(session, PartyEvent::Submit { epoch: submit.epoch });
            let mut shared = self.shared.lock();
            let held = shared.sessions.entry(session.clone()).or_default();
            if held.party.stepping() == Some(submit.epoch) {
                held.record = Some(record);
            }
        }
    }

    fn offered(&mut self, offer: Offer) {
        let fate = self.fate(Said::Handoff);
        match fate {
            // Nobody answers: its source finds out by its own timer, or the router by its.
            Some(Fate::Lost) => self.unanswered.push(offer.reply),
            Some(Fate::Refused) => drop(offer.reply.send(false)),
            Some(Fate::Last) => self.is_dying = true,
            Some(Fate::Doubled) | None => {
                let Offer { session, epoch, next, record, reply } = offer;
                {
                    let mut shared = self.shared.lock();
                    let held = shared.sessions.entry(session.clone()).or_default();
                    (held.arriving, held.reply) = (Some(record), Some(reply));
                }
                self.event(&session, PartyEvent::Offer { epoch, next, has_room: true });
                self.event(&session, PartyEvent::Part { next });
                let (own, after) = (self.own.clone(), self.shared.lock().verify_after);
                tokio::spawn(async move {
                    tokio::time::sleep(after).await;
                    let _ = own.send(Own::Verify { session, next });
                });
            }
        }
    }

    /// One token for every session that may be stepped; then those freeze that are to, and timers run out.
    fn step(&mut self) {
        let now = Instant::now();
        let sessions: Vec<String> = self.shared.lock().sessions.keys().cloned().collect();
        for session in sessions {
            let stepped = {
                let mut shared = self.shared.lock();
                let Some(held) = shared.sessions.get_mut(&session) else { continue };
                let epoch = held.party.stepping();
                epoch.zip(held.record.as_mut()).map(|(epoch, record)| {
                    let token = token_of(record.choice, record.index);
                    record.index += 1;
                    (epoch, token, record.index == record.most)
                })
            };
            if let Some((epoch, token, is_last)) = stepped {
                self.say(&session, epoch, Some(token), is_last.then_some(Finish::Length));
                if is_last {
                    self.event(&session, PartyEvent::Ended { epoch });
                }
            }
            let is_freezing = {
                let mut shared = self.shared.lock();
                shared.sessions.get_mut(&session).is_some_and(|held| std::mem::take(&mut held.freezing))
            };
            if is_freezing {
                self.event(&session, PartyEvent::Frozen { keeps_home: true });
            }
            for side in [Side::Source, Side::Target] {
                let due = {
                    let shared = self.shared.lock();
                    let held = shared.sessions.get(&session);
                    held.filter(|held| held.timers.get(&(side == Side::Source)).is_some_and(|at| *at <= now))
                        .and_then(|held| held.party.timer(side))
                };
                match due {
                    Some(Timer::Silence) => self.event(&session, PartyEvent::Silence(side)),
                    Some(Timer::Grace) => self.event(&session, PartyEvent::Grace(side)),
                    None => {}
                }
            }
        }
    }

    fn say(&mut self, session: &str, epoch: u64, token: Option<u32>, finish: Option<Finish>) {
        let shared = self.shared.lock();
        let Some(record) = shared.sessions.get(session).and_then(|held| held.record.as_ref()) else { return };
        let index = record.index - u64::from(token.is_some());
        let usage = finish.map(|_| Box::new(Counts { prompt: record.prompt, completion: record.index, cached: 0 }));
        let choice = record.choice;
        let text = if token.is_some() { format!("t{index} ") } else { String::new() };
        let mut event = SessionEvent { epoch, choice, index, token, text, usage, ..SessionEvent::default() };
        event.session = session.to_owned();
        event.set_finish(finish.unwrap_or(Finish::Unspecified));
        drop(shared);
        self.events.push(event);
    }

    fn flush(&mut self) {
        let batch = EventBatch { events: std::mem::take(&mut self.events), load: Some(roomy()), clock: 1 };
        let message = ReplicaMessage { body: Some(replica_message::Body::Batch(batch)) };
        // The router may be gone at the end of a test.
        let _ = self.attached.to_router.send(Ok(message));
    }

    fn event(&mut self, session: &str, event: PartyEvent) {
        let actions = {
            let mut shared = self.shared.lock();
            let held = shared.sessions.entry(session.to_owned()).or_default();
            let actions = held.party.on(event);
            for side in [Side::Source, Side::Target] {
                let time = held.party.timer(side).map(|timer| match timer {
                    Timer::Silence => SILENCE,
                    Timer::Grace => GRACE,
                });
                match time {
                    Some(time) => drop(held.timers.insert(side == Side::Source, Instant::now() + time)),
                    None => drop(held.timers.remove(&(side == Side::Source))),
                }
            }
            actions
        };
        for action in actions {
            self.act(session, action);
        }
    }

    fn act(&mut self, session: &str, action: Action) {
        let mut shared = self.shared.lock();
        let Some(held) = shared.sessions.get_mut(session) else { return };
        match action {
            Action::Report(report) => {
                let order = held.order.clone();
                let context = held.record.as_ref().map_or(0, |record| record.prompt + record.index);
                drop(shared);
                self.report(session, report, order, context);
            }
            Action::BeginHandoff { .. } => held.freezing = true,
            Action::SendFrozen { next } => {
                let (Some(record), Some(order)) = (held.record.clone(), held.order.clone()) else { return };
                drop(shared);
                self.hand_over(session, next, record, &order);
            }
            Action::Run { .. } => held.record = held.arriving.take(),
            Action::Accept => drop(held.reply.take().map(|reply| reply.send(true))),
            Action::Refuse(_) => drop(held.reply.take().map(|reply| reply.send(false))),
            Action::CancelHandoff => held.freezing = false,
            Action::Resume { .. }
            | Action::Park
            | Action::KeepHome
            | Action::FreeState
            | Action::FreePages
            | Action::Reserve
            | Action::FreeReserved
            | Action::AllowQuery
            | Action::RefuseQuery { .. } => {}
        }
    }

    fn hand_over(&self, session: &str, next: u64, record: Record, order: &Prepare) {
        let (reply, answer) = oneshot::channel();
        let (session, epoch) = (session.to_owned(), order.epoch);
        let door = self.hub.doors.lock().get(&order.target).cloned();
        let offer = Offer { session: session.clone(), epoch, next, record, reply };
        let is_sent = door.is_some_and(|door| door.send(offer).is_ok());
        let own = self.own.clone();
        tokio::spawn(async move {
            let is_right = is_sent && answer.await.unwrap_or(false);
            let _ = own.send(Own::Answered { session, next, is_right });
        });
    }

    fn report(&mut self, session: &str, report: Report, order: Option<Prepare>, context: u64) {
        let (said, phase) = match report.phase {
            Phase::Ready => (Said::Ready, MovePhase::Ready),
            Phase::Started => (Said::Started, MovePhase::Started),
            Phase::Released => (Said::Released, MovePhase::Released),
            Phase::Aborted => (Said::Aborted, MovePhase::Aborted),
            Phase::Failed(_) => (Said::Failed, MovePhase::Failed),
        };
        let mut wire = MoveReport {
            session: session.to_owned(),
            epoch: report.epoch,
            phase: phase.into(),
            ..MoveReport::default()
        };
        if let Phase::Failed(failure) = report.phase {
            let (kind, known) = match failure {
                Failure::Stale { known } => (MoveFailure::Stale, known),
                Failure::Busy => (MoveFailure::Busy, 0),
                Failure::NotHere => (MoveFailure::NotHere, 0),
                Failure::Parked => (MoveFailure::Parked, 0),
                Failure::Full => (MoveFailure::Full, 0),
                Failure::Handoff => (MoveFailure::Handoff, 0),
                Failure::Ended => (MoveFailure::Ended, 0),
            };
            (wire.failure, wire.known, wire.message) = (kind.into(), known, failure.to_string());
        }
        if let (Phase::Ready, Some(order)) = (report.phase, order) {
            let is_whole = order.mode() == MoveMode::Whole;
            (wire.state_bytes, wire.token_bytes) = (1000, 4 * context);
            wire.page_bytes = if is_whole { 64 * context } else { 0 };
            (wire.frozen_us, wire.export_us, wire.mode) = (5000, 1000, order.mode);
        }
        // Behind the events so far, by the same stream.
        self.flush();
        let times = match self.fate(said) {
            Some(Fate::Lost) => 0,
            Some(Fate::Doubled) => 2,
            Some(Fate::Last) => {
                self.is_dying = true;
                1
            }
            Some(Fate::Refused) | None => 1,
        };
        for _ in 0..times {
            let body = Some(replica_message::Body::MoveReport(wire.clone()));
            let _ = self.attached.to_router.send(Ok(ReplicaMessage { body }));
        }
    }
}
