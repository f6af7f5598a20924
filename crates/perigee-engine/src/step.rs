//! The step loop: it owns the executor, and turns commands and plans into steps and events. Who runs is the scheduler's
//! decision, how a token is drawn the sampler's, what a session is its sequence's.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use perigee_text::grammar::Grammar;

use crate::ahead::Flight;
use crate::cache::CacheError;
use crate::config::EngineConfig;
use crate::executor::{Executor, ExecutorError};
use crate::handle::{Command, EngineHealth, QueuePermit, ScoreReply, Shared};
use crate::moves::{Arriving, Follows, Homes, KeptEvents, PairBook, Seats};
use crate::observer::{Preemption, StepPhase, TokenKind};
use crate::outbox::{LOAD_INTERVAL, Outbox};
use crate::request::{Load, RouterId, SessionId};
use crate::scheduler::{Limits, Plan, PlannedRow, Scheduler, TaskId};
use crate::sequence::Sequence;
use crate::traces::{SessionSpan, TraceNotes};
use crate::turns::Turns;

/// What a turn did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// A step ran; there may be more to do at once.
    Stepped,
    /// There is nothing to do until a command comes.
    Idle,
    /// The engine ended: it was shut down or its ranks failed.
    Stopped,
}

/// Why the engine cannot go on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Fatal {
    #[error(transparent)]
    Executor(ExecutorError),
    #[error(transparent)]
    Cache(#[from] CacheError),
}

/// Where a session's results go.
#[derive(Debug)]
pub(crate) enum Sink {
    Router(RouterId),
    Score(ScoreReply),
}

/// A session as the loop knows it.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) sequence: Sequence,
    /// What may be drawn, where that is bound.
    pub(crate) grammar: Option<Grammar>,
    pub(crate) sink: Sink,
    pub(crate) deadline: Option<Instant>,
    pub(crate) arrived: Instant,
    pub(crate) last_token: Option<Instant>,
    /// Shared by the sessions of a request.
    pub(crate) permit: Arc<QueuePermit>,
    /// Steps in a row that missed an answer of a home.
    pub(crate) misses: u32,
    /// When it steps again after that.
    pub(crate) retry_at: Option<Instant>,
    /// Whether its draws are made between steps, because the device could not make one.
    pub(crate) draws_late: bool,
    /// What another router may still want to hear, where it may come to have one.
    pub(crate) kept: Option<KeptEvents>,
    pub(crate) span: SessionSpan,
}

impl Session {
    pub(crate) fn new(
        sequence: Sequence,
        sink: Sink,
        deadline: Option<Instant>,
        arrived: Instant,
        permit: Arc<QueuePermit>,
    ) -> Self {
        let kept = sequence.resumable.then(|| KeptEvents::from(sequence.completion()));
        let span = SessionSpan::open(&sequence, arrived);
        let (grammar, last_token, retry_at) = (None, None, None);
        let draws_late = false;
        Self {
            sequence,
            grammar,
            sink,
            deadline,
            arrived,
            last_token,
            permit,
            misses: 0,
            retry_at,
            draws_late,
            kept,
            span,
        }
    }
}

/// An engine without its thread: [`EngineCore::turn`] by [`EngineCore::turn`].
pub struct EngineCore {
    pub(crate) executor: Box<dyn Executor>,
    pub(crate) scheduler: Scheduler,
    pub(crate) config: EngineConfig,
    pub(crate) sessions: BTreeMap<TaskId, Session>,
    pub(crate) names: HashMap<SessionId, TaskId>,
    pub(crate) outbox: Outbox,
    pub(crate) next_task: u64,
    pub(crate) ended: bool,
    pub(crate) shared: Arc<Shared>,
    /// Sessions as far as moves are concerned.
    pub(crate) seats: Seats,
    /// Pairs with targets of moves.
    pub(crate) pairs: PairBook,
    /// Latents on their way here.
    pub(crate) follows: Follows,
    /// What homes and this replica have to tell each other.
    pub(crate) home_words: Homes,
    /// What ranks have not been told of traces yet.
    pub(crate) notes: TraceNotes,
    /// The handoff that is being offered, until its party takes it.
    pub(crate) offered: Option<Box<Arriving>>,
    /// The way in for tasks that carry handoffs.
    pub(crate) commands: mpsc::Sender<Command>,
    pub(crate) inbox: mpsc::Receiver<Command>,
    /// A command that came while a step was in flight.
    pub(crate) held_back: Option<Command>,
    /// The step that was launched and not read.
    pub(crate) flight: Option<Flight>,
    /// When the last step in flight was read.
    pub(crate) landed: Option<Instant>,
    turns: Turns,
    steps: u64,
    step_ms: f32,
}

impl EngineCore {
    pub(crate) fn new(
        executor: Box<dyn Executor>,
        limits: Limits,
        config: EngineConfig,
        (commands, inbox): (mpsc::Sender<Command>, mpsc::Receiver<Command>),
        shared: Arc<Shared>,
    ) -> Self {
        Self {
            executor,
            turns: Turns::new(config.prompt_slowdown),
            scheduler: Scheduler::new(limits),
            config,
            sessions: BTreeMap::new(),
            names: HashMap::new(),
            outbox: Outbox::default(),
            next_task: 0,
            ended: false,
            shared,
            seats: Seats::new(),
            pairs: PairBook::default(),
            follows: Follows::default(),
            home_words: Homes::default(),
            notes: TraceNotes::default(),
            offered: None,
            commands,
            inbox,
            held_back: None,
            flight: None,
            landed: None,
            steps: 0,
            step_ms: 0.0,
        }
    }

    /// Makes turns until the engine ends; waits on the command channel while there is nothing to do.
    pub fn run(mut self) {
        loop {
            match self.turn() {
                Turn::Stepped => {}
                Turn::Idle => self.wait(),
                Turn::Stopped => break,
            }
        }
    }

    /// Takes the commands that came, ends what is due, runs one step, and sends its events.
    pub fn turn(&mut self) -> Turn {
        let turn = self.work();
        self.tell();
        if self.ended { Turn::Stopped } else { turn }
    }

    /// A turn whose events wait for [`Self::tell`]: in a simulation the time that the step takes passes between the two.
    pub fn work(&mut self) -> Turn {
        let done =
            if self.flight.is_some() { self.go_on() } else { self.take_commands().and_then(|()| self.try_turn()) };
        let worked = match done {
            Ok(worked) => worked,
            Err(fatal) => {
                self.fail(&fatal);
                false
            }
        };
        match (self.ended, worked) {
            (true, _) => Turn::Stopped,
            (false, true) => Turn::Stepped,
            (false, false) => Turn::Idle,
        }
    }

    /// Checks that slots, pages, park memory and queues add up.
    ///
    /// # Errors
    /// [`CacheError`] says what does not.
    pub fn audit(&self) -> Result<(), CacheError> {
        self.scheduler.audit()
    }

    /// Load as the handle and the routers see it.
    pub fn load(&self) -> Load {
        let occupancy = self.scheduler.occupancy();
        let limits = self.scheduler.limits();
        let count = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
        Load {
            running: count(occupancy.running),
            waiting: count(occupancy.waiting),
            queued_tokens: occupancy.queued_tokens,
            slots_free: count(occupancy.slots_free),
            slots_total: limits.slots,
            pages_free: count(occupancy.pages_free),
            pages_total: limits.pages,
            parked: count(occupancy.parked),
            homes: count(occupancy.homes),
            step_ms: self.step_ms,
            steps: self.steps,
            context_tokens: occupancy.context_tokens,
        }
    }

    /// Blocks until a command comes, or until routers are due to hear of the load.
    fn wait(&mut self) {
        let nobody_listens = self.outbox.is_empty() && self.sessions.is_empty() && self.seats.is_empty();
        let command = if nobody_listens {
            self.inbox.recv().map_err(|_| mpsc::RecvTimeoutError::Disconnected)
        } else {
            let now = self.config.clock.now();
            let due = self.next_due().map_or(LOAD_INTERVAL, |due| due.saturating_duration_since(now));
            self.inbox.recv_timeout(due.min(LOAD_INTERVAL))
        };
        let done = match command {
            Ok(command) => self.handle(command),
            Err(mpsc::RecvTimeoutError::Timeout) => Ok(()),
            Err(mpsc::RecvTimeoutError::Disconnected) => self.shut_down(),
        };
        if let Err(fatal) = done {
            self.fail(&fatal);
        }
    }

    fn take_commands(&mut self) -> Result<(), Fatal> {
        if let Some(command) = self.held_back.take() {
            self.handle(command)?;
        }
        while !self.ended {
            match self.inbox.try_recv() {
                Ok(command) => self.handle(command)?,
                Err(mpsc::TryRecvError::Empty) => break,
                Err(mpsc::TryRecvError::Disconnected) => self.shut_down()?,
            }
        }
        Ok(())
    }

    fn try_turn(&mut self) -> Result<bool, Fatal> {
        if self.ended {
            return Ok(false);
        }
        let now = self.config.clock.now();
        self.end_what_is_due(now)?;
        self.mind_moves(now)?;
        self.end_pauses(now);
        let worked = self.step()?;
        if !worked {
            self.tell_notes()?;
        }
        Ok(worked)
    }

    /// Plans a step and runs it; false if there was nothing to do.
    fn step(&mut self) -> Result<bool, Fatal> {
        if self.scheduler.is_empty() {
            return Ok(false);
        }
        if !self.scheduler.decodes_prevail() {
            self.turns.forget();
        }
        self.scheduler.set_prompts_wait(self.turns.prompts_wait());
        let plan = self.scheduler.plan()?;
        self.note_admissions(&plan);
        let lost = self.move_parked(&plan)?;
        self.hand_down_prompt_logprobs(&plan);
        let broken = self.prepare_grammars(&plan, &lost)?;
        let runs = |row: &&PlannedRow| !lost.contains(&row.task) && !broken.contains(&row.task);
        let rows: Vec<&PlannedRow> = plan.rows.iter().filter(runs).collect();
        if rows.is_empty() {
            // Those that decode lack pages that a waiting prompt may hold: it goes on.
            let waited = self.turns.prompts_wait();
            self.turns.forget();
            return Ok(waited || !plan.is_empty());
        }
        let started = self.config.clock.now();
        let done = if self.may_launch(&rows) {
            self.take_off(&plan, &rows).map(|()| None)
        } else {
            self.execute(&plan, &rows).map(Some)
        };
        let output = match done {
            Ok(Some(output)) => output,
            Ok(None) => return Ok(true),
            Err(error) => return self.end_failed(&rows, error).map(|()| true),
        };
        let now = self.config.clock.now();
        self.note_step(&rows, now.saturating_duration_since(started));
        self.apply(&rows, output, now)?;
        Ok(true)
    }

    fn note_admissions(&mut self, plan: &Plan) {
        let now = self.config.clock.now();
        for id in &plan.admitted {
            let Some(session) = self.sessions.get(id) else { continue };
            session.span.note_slot(now);
            if session.permit.release() {
                self.config.observer.queued(now.saturating_duration_since(session.arrived));
            }
        }
    }

    /// Moves sessions to and from host memory. Where that was refused, the session is computed again; returned are those that lost
    /// the row which the plan has for them.
    fn move_parked(&mut self, plan: &Plan) -> Result<BTreeSet<TaskId>, Fatal> {
        let mut lost = BTreeSet::new();
        for _ in &plan.restarts {
            self.config.observer.preempted(Preemption::Recomputed);
        }
        for &(id, never) in &plan.evicted {
            self.end_never_fits(id, never)?;
        }
        for park in &plan.parks {
            let done = self.executor.park(park.key, park.slot, &park.pages);
            if self.refused(done, "a session could not be parked; it will be computed again")? {
                if let Err(never) = self.scheduler.park_failed(park.task) {
                    self.end_never_fits(park.task, never)?;
                }
                self.config.observer.preempted(Preemption::Recomputed);
            } else {
                self.config.observer.preempted(Preemption::Parked);
            }
        }
        for unpark in &plan.unparks {
            let done = self.executor.unpark(unpark.key, unpark.slot, &unpark.pages);
            if self.refused(done, "a session could not be brought back; it will be computed again")? {
                // It is on the device in the scheduler's books; its copy is dropped below.
                if let Some(never) = self.scheduler.restart(unpark.task)?.never {
                    self.end_never_fits(unpark.task, never)?;
                }
                lost.insert(unpark.task);
            }
            self.drop_parked(unpark.key)?;
        }
        Ok(lost)
    }

    pub(crate) fn drop_parked(&mut self, key: u64) -> Result<(), Fatal> {
        let done = self.executor.drop_parked(key);
        self.refused(done, "a parked copy could not be dropped; host memory stays taken").map(drop)
    }

    /// Whether an operation was refused, which is logged; a broken executor is an error.
    fn refused(&self, done: Result<(), ExecutorError>, what: &'static str) -> Result<bool, Fatal> {
        match done {
            Ok(()) => Ok(false),
            Err(error) if error.fatal => Err(Fatal::Executor(error)),
            Err(error) => {
                tracing::warn!(%error, "{what}");
                Ok(true)
            }
        }
    }

    /// A session that forks gets the log-probabilities of the prompt which was computed for it.
    fn hand_down_prompt_logprobs(&mut self, plan: &Plan) {
        for fork in &plan.forks {
            self.copy_prompt_logprobs(fork.parent, fork.child);
        }
    }

    pub(crate) fn copy_prompt_logprobs(&mut self, from: TaskId, to: TaskId) {
        let logprobs = self.sessions.get(&from).and_then(|session| session.sequence.prompt_logprobs.clone());
        if let Some(session) = self.sessions.get_mut(&to) {
            session.sequence.prompt_logprobs = logprobs;
        }
    }

    pub(crate) fn note_step(&mut self, rows: &[&PlannedRow], time: Duration) {
        let (decode, prefill): (Vec<&PlannedRow>, Vec<&PlannedRow>) =
            rows.iter().copied().partition(|row| row.draws && row.tokens == 1);
        let phase = match (decode.is_empty(), prefill.is_empty()) {
            (true, _) => StepPhase::Prefill,
            (false, true) => StepPhase::Decode,
            (false, false) => StepPhase::Mixed,
        };
        let milliseconds = time.as_secs_f32() * 1000.0;
        self.step_ms = if self.steps == 0 { milliseconds } else { self.step_ms * 0.9 + milliseconds * 0.1 };
        self.steps += 1;
        let observer = &self.config.observer;
        observer.stepped(phase, time);
        self.turns.stepped(phase, time);
        let drawn = rows.iter().filter(|row| row.draws).count() as u64;
        observer.tokens(TokenKind::Completion, drawn);
        observer.tokens(TokenKind::Prompt, prefill.iter().map(|row| row.tokens).sum());
    }

    /// Sends what the turn did, and ends the sessions of routers that are gone.
    pub fn tell(&mut self) {
        let load = self.load();
        self.shared.load.send_replace(load);
        loop {
            let gone = self.outbox.flush(self.config.clock.now(), load);
            if gone.is_empty() {
                break;
            }
            let detached = self.settle().and_then(|()| gone.into_iter().try_for_each(|router| self.detach(router)));
            if let Err(fatal) = detached {
                self.fail(&fatal);
            }
        }
    }

    /// The ranks are broken: every session ends, and so does the engine.
    fn fail(&mut self, fatal: &Fatal) {
        let message = fatal.to_string();
        tracing::error!(error = %message, sessions = self.sessions.len(), "the replica failed");
        self.flight = None;
        self.end_without_ranks(&message);
        self.shared.health.send_replace(EngineHealth::Failed { message });
        self.ended = true;
    }
}

impl std::fmt::Debug for EngineCore {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("EngineCore").field("sessions", &self.sessions.len()).finish_non_exhaustive()
    }
}
