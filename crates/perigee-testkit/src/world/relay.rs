//! A router for one session at a time: it submits, reads every replica's stream, moves the session as ordered, and accepts
//! tokens as the rules of epochs say. Messages can get lost or come twice, the owner can count as lost while it runs on, and
//! the check of epochs can be left out.

use std::collections::{BTreeSet, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use perigee_engine::moves::{MoveFacts, Prepare, Reported, Target};
use perigee_engine::request::{EventBatch, Request, RouterId, SessionEvent, SessionId};
use perigee_migration::Mode;
use perigee_migration::epochs::{
    Command, Coordinator, CoordinatorAction, CoordinatorEvent, CoordinatorState, Outcome, Phase, Side, TokenVerdict,
};
use tokio::sync::mpsc;

use super::World;
use super::course::{Course, Message, Moment, Order, Trouble};
use crate::error::{Result, TestkitError};
use crate::reference::Observed;

/// How long a session may take that does not hang.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long each phase of a move may take before its message counts as lost, where a test does not say.
const PHASE: Duration = Duration::from_secs(2);

/// Routers of a world.
pub struct Relay<'a> {
    world: &'a World,
    router: RouterId,
    inbox: mpsc::UnboundedReceiver<(usize, EventBatch)>,
    patience: Duration,
}

impl<'a> Relay<'a> {
    /// A router with a stream to every member.
    pub fn attach(world: &'a World) -> Self {
        static ROUTERS: AtomicU64 = AtomicU64::new(1);
        let router = RouterId(ROUTERS.fetch_add(1, Ordering::Relaxed));
        let (sender, inbox) = mpsc::unbounded_channel();
        for (index, member) in world.members.iter().enumerate() {
            let (mut events, sender) = (member.engine.attach(router), sender.clone());
            tokio::spawn(async move {
                while let Some(batch) = events.recv().await {
                    if sender.send((index, batch)).is_err() {
                        break;
                    }
                }
            });
        }
        Self { world, router, inbox, patience: PHASE }
    }

    /// Another time that each phase of a move may take before its message counts as lost.
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Runs a request of one session to its end, from member `at` on.
    ///
    /// # Errors
    /// It is refused, or does not end.
    pub async fn run(&mut self, request: &Request, at: usize, orders: &[Order], trouble: Trouble) -> Result<Course> {
        let session = request.sessions[0].clone();
        let mut run = Run {
            world: self.world,
            router: self.router,
            request,
            session,
            coordinator: Coordinator::new(request.epoch),
            owner: at,
            source: at,
            target: at,
            holders: BTreeSet::from([at]),
            orders: orders.iter().copied().collect(),
            order: None,
            facts: None,
            message: String::new(),
            trouble,
            patience: self.patience,
            phase: (CoordinatorState::Idle, Instant::now()),
            has_ended: false,
            course: Course { observed: Observed { disturbed: usize::MAX, ..Observed::default() }, ..Course::default() },
        };
        self.world.members[at]
            .engine
            .submit(self.router, request.clone())
            .map_err(|refused| TestkitError::Options(refused.to_string()))?;
        let began = Instant::now();
        while !run.has_ended {
            if began.elapsed() > PATIENCE {
                let what = format!("the end of {}: {:?}, {:?}", run.session.0, run.coordinator, run.course);
                return Err(TestkitError::Deadline { what, seconds: PATIENCE.as_secs() });
            }
            let next = tokio::time::timeout(Duration::from_millis(50), self.inbox.recv()).await;
            if let Ok(Some((member, batch))) = next {
                run.batch(member, batch);
            }
            run.mind_time();
            run.begin_what_is_due();
        }
        run.clean_up();
        Ok(run.course)
    }
}

impl Drop for Relay<'_> {
    fn drop(&mut self) {
        self.world.members.iter().for_each(|member| member.engine.detach(self.router));
    }
}

struct Run<'a> {
    world: &'a World,
    router: RouterId,
    request: &'a Request,
    session: SessionId,
    coordinator: Coordinator,
    owner: usize,
    source: usize,
    target: usize,
    /// Everybody who ever had something of it.
    holders: BTreeSet<usize>,
    orders: VecDeque<Order>,
    order: Option<Order>,
    facts: Option<MoveFacts>,
    message: String,
    trouble: Trouble,
    patience: Duration,
    /// The coordinator's state, and since when.
    phase: (CoordinatorState, Instant),
    has_ended: bool,
    course: Course,
}

impl Run<'_> {
    fn batch(&mut self, member: usize, batch: EventBatch) {
        let mut reports: VecDeque<Reported> = batch.reports.into();
        for (index, event) in batch.events.into_iter().enumerate() {
            while let Some(report) = reports.pop_front_if(|report| report.before <= index) {
                self.report(member, &report);
            }
            self.event(member, event);
        }
        reports.iter().for_each(|report| self.report(member, report));
    }

    fn event(&mut self, member: usize, event: SessionEvent) {
        if event.session != self.session || self.has_ended {
            return;
        }
        let mut actions = Vec::new();
        let verdict = self.coordinator.token(event.epoch, &mut actions);
        self.act(actions);
        if verdict == TokenVerdict::Stray && !self.trouble.accepts_all_epochs {
            self.course.strays += usize::from(event.token.is_some());
            self.world.members[member].engine.abort(self.session.clone(), event.epoch);
            return;
        }
        let seen = &mut self.course.observed;
        if event.index != seen.tokens.len() as u64 {
            self.course.broken.push(format!("a gap or a repeat: {event:?} after {} tokens", seen.tokens.len()));
            self.has_ended = true;
            return;
        }
        if self.course.epochs.last().is_some_and(|epoch| *epoch > event.epoch) {
            self.course.broken.push(format!("an epoch of the past: {event:?}"));
        }
        if let Some(token) = event.token {
            seen.tokens.push(token);
            seen.logprobs.extend(event.logprobs);
            self.course.epochs.push(event.epoch);
        }
        seen.text.push_str(&event.text);
        seen.prompt_logprobs.extend(event.prompt_logprobs.into_iter().flatten());
        if event.finish.is_some() {
            seen.finish = event.finish;
            if let Some(error) = event.error {
                self.course.broken.push(error);
            }
            let actions = self.coordinator.on(CoordinatorEvent::Ended);
            self.act(actions);
            self.has_ended = true;
        }
        if self.trouble.presumed_lost.is_some_and(|after| seen_tokens(&self.course) >= after) {
            self.trouble.presumed_lost = None;
            self.disturb();
            let actions = self.coordinator.on(CoordinatorEvent::Lost(Side::Source));
            self.act(actions);
        }
    }

    fn report(&mut self, member: usize, reported: &Reported) {
        if reported.session != self.session || self.has_ended {
            return;
        }
        let copies = match message_of(reported.report.phase) {
            Some(message) => self.copies(message),
            None => 1,
        };
        // What went wrong first says why; what follows from it does not.
        if self.message.is_empty() {
            self.message.clone_from(&reported.message);
        }
        self.facts = reported.facts.or(self.facts);
        let side = if member == self.source { Side::Source } else { Side::Target };
        for _ in 0..copies {
            let actions = self.coordinator.on(CoordinatorEvent::Report(side, reported.report));
            self.act(actions);
            self.decide();
        }
    }

    /// Kills the side that is to die at this moment, and learns of it at once.
    fn let_die(&mut self, moment: Moment) {
        let Some((when, side)) = self.trouble.dies else { return };
        if when != moment {
            return;
        }
        self.trouble.dies = None;
        self.world.kill(if side == Side::Source { self.source } else { self.target });
        // A home is no side of a move any more.
        if moment != Moment::Moved {
            let actions = self.coordinator.on(CoordinatorEvent::Lost(side));
            self.act(actions);
        }
    }

    /// The target holds the session: what now?
    fn decide(&mut self) {
        if matches!(self.coordinator.state(), CoordinatorState::Ready { .. }) {
            self.let_die(Moment::Ready);
        }
        if !matches!(self.coordinator.state(), CoordinatorState::Ready { .. }) {
            return;
        }
        if self.trouble.dies_when_ready {
            self.has_ended = true;
            return;
        }
        let decision = if self.trouble.cancels { CoordinatorEvent::Cancel } else { CoordinatorEvent::Commit };
        let actions = self.coordinator.on(decision);
        self.act(actions);
        self.let_die(Moment::Committed);
    }

    fn mind_time(&mut self) {
        let state = self.coordinator.state();
        if state != self.phase.0 {
            self.phase = (state, Instant::now());
        }
        if self.coordinator.is_waiting() && self.phase.1.elapsed() > self.patience {
            self.phase.1 = Instant::now();
            let actions = self.coordinator.on(CoordinatorEvent::Timeout);
            self.act(actions);
        }
    }

    fn begin_what_is_due(&mut self) {
        let tokens = seen_tokens(&self.course);
        if self.has_ended || !self.coordinator.is_idle() {
            return;
        }
        let Some(order) = self.orders.pop_front_if(|order| order.after <= tokens) else { return };
        let count = self.world.members.len();
        self.source = self.owner;
        self.target = if order.to == self.owner { (order.to + 1) % count } else { order.to };
        self.holders.insert(self.target);
        (self.order, self.facts) = (Some(order), None);
        self.message.clear();
        self.disturb();
        let actions = self.coordinator.on(CoordinatorEvent::Begin);
        self.act(actions);
        self.let_die(Moment::Preparing);
    }

    /// From the last token on, something may be otherwise than undisturbed.
    fn disturb(&mut self) {
        let tokens = seen_tokens(&self.course);
        let position = if tokens == 0 { 0 } else { self.request.prompt.len() + tokens - 1 };
        let disturbed = &mut self.course.observed.disturbed;
        *disturbed = position.min(*disturbed);
    }

    fn act(&mut self, actions: Vec<CoordinatorAction>) {
        for action in actions {
            match action {
                CoordinatorAction::Send(side, command) => self.send(side, command),
                CoordinatorAction::Replay { epoch } => self.replay(epoch),
                CoordinatorAction::Finished(outcome) => self.finished(outcome),
            }
        }
    }

    fn send(&mut self, side: Side, command: Command) {
        let member = if side == Side::Source { self.source } else { self.target };
        let (session, router) = (self.session.clone(), self.router);
        let message = match command {
            Command::Prepare { .. } => Message::Prepare,
            Command::Start { .. } => Message::Start,
            Command::Release { .. } => Message::Release,
            Command::AbortMove { .. } => Message::AbortMove,
            // There is one router here.
            Command::TakeOver { .. } => return,
        };
        let copies = self.copies(message);
        for _ in 0..copies {
            let engine = &self.world.members[member].engine;
            match command {
                Command::Prepare { epoch, next } => {
                    let name = self.world.members[self.target].name.clone();
                    let target = Target { replica: name.clone(), incarnation: "1".into(), endpoint: name };
                    let mode = self.order.map_or(Mode::Split, |order| order.mode);
                    engine.prepare(router, Prepare { session: session.clone(), epoch, next, target, mode });
                }
                Command::Start { epoch } => engine.start(router, session.clone(), epoch),
                Command::Release { epoch, owner_epoch } => engine.release(router, session.clone(), epoch, owner_epoch),
                Command::AbortMove { next, epoch } => engine.abort_move(router, session.clone(), next, epoch),
                Command::TakeOver { .. } => {}
            }
        }
    }

    /// How often a message arrives.
    fn copies(&mut self, message: Message) -> usize {
        if self.trouble.lost == Some(message) {
            self.trouble.lost = None;
            return 0;
        }
        if self.trouble.doubled == Some(message) { 2 } else { 1 }
    }

    fn replay(&mut self, epoch: u64) {
        let count = self.world.members.len();
        let others = (1..=count).map(|further| (self.owner + further) % count);
        self.owner = others.into_iter().find(|&member| self.world.members[member].is_alive()).unwrap_or(self.owner);
        self.holders.insert(self.owner);
        (self.source, self.target) = (self.owner, self.owner);
        let request = Request { epoch, delivered: self.course.observed.tokens.clone(), ..self.request.clone() };
        if let Err(refused) = self.world.members[self.owner].engine.submit(self.router, request) {
            self.course.broken.push(format!("a replay was refused: {refused}"));
            self.has_ended = true;
        }
    }

    fn finished(&mut self, outcome: Outcome) {
        match outcome {
            Outcome::Moved => {
                self.owner = self.target;
                self.let_die(Moment::Moved);
            }
            Outcome::Aborted => self.owner = self.source,
            Outcome::Replayed | Outcome::Ended => {}
        }
        let Some(order) = self.order.take() else { return };
        let result = match (outcome, self.facts) {
            (Outcome::Moved, Some(facts)) => Ok(facts),
            _ => Err(format!("{outcome:?}: {}", self.message)),
        };
        self.course.moves.push((order, result));
    }

    /// Nobody need keep anything of the session any more.
    fn clean_up(&self) {
        if self.trouble.dies_when_ready {
            return;
        }
        for &member in &self.holders {
            self.world.members[member].engine.abort(self.session.clone(), 0);
        }
    }
}

fn seen_tokens(course: &Course) -> usize {
    course.observed.tokens.len()
}

fn message_of(phase: Phase) -> Option<Message> {
    match phase {
        Phase::Ready => Some(Message::Ready),
        Phase::Started => Some(Message::Started),
        Phase::Released => Some(Message::Released),
        Phase::Aborted => Some(Message::Aborted),
        Phase::Failed(_) => None,
    }
}
