//! The async side's door to an engine: requests, aborts and questions go in through one channel, events come out through
//! one channel for each router. Nothing here waits for the step loop except answers that are awaited.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Instant;

use perigee_migration::epochs::Command as MoveCommand;
use perigee_migration::handoff::{Expected, Summary, Totals};
use perigee_migration::{Header, Mode, PageSlice, Part};
use perigee_text::grammar::{Grammar, GrammarCompiler};
use tokio::sync::{mpsc as async_mpsc, oneshot, watch};

use crate::config::{EngineConfig, StartError};
use crate::door::Door;
use crate::executor::Executor;
use crate::moves::{Demand, FetchReply, HomeAnswer, Incoming, Prepare, Reply, Room, TakeOver, Target};
use crate::remote::RemoteHome;
use crate::request::{EventBatch, Load, PositionLogprobs, RefusedRequest, Request, RouterId, SessionId, SessionInfo};
use crate::scheduler::TaskId;
use crate::step::EngineCore;

/// Whether an engine serves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EngineHealth {
    /// It takes requests.
    Serving,
    /// It takes no requests; its sessions go on.
    Draining,
    /// It was shut down.
    Stopped,
    /// Its ranks failed and all its sessions ended; the replica must be started anew.
    Failed {
        /// What failed.
        message: String,
    },
}

/// A prompt whose tokens' log-probabilities are wanted, and nothing generated.
#[derive(Debug, Clone)]
pub struct ScoreRequest {
    /// Request id for log lines.
    pub request_id: String,
    /// The tokens, at least one.
    pub tokens: Vec<u32>,
    /// Alternatives for each token, at most 20.
    pub top: u32,
    /// Larger goes first; 0 is the default.
    pub priority: i32,
    /// When the client stops waiting.
    pub deadline: Option<Instant>,
}

/// Log-probabilities of a prompt: none for its first token.
pub type Scores = Vec<Option<PositionLogprobs>>;

/// Why a prompt was not scored.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ScoreError {
    /// It was refused at the door.
    #[error(transparent)]
    Refused(#[from] RefusedRequest),
    /// Its deadline passed.
    #[error("the deadline passed before the prompt was scored")]
    DeadlineExceeded,
    /// The engine failed or stopped on the way.
    #[error("the prompt was not scored: {0}; try again elsewhere")]
    Failed(String),
}

/// Most bytes of a session's record: the log-probabilities of a long prompt are the largest part.
const RECORD_LIMIT: u64 = 256 << 20;

/// Answers of the loop to a score request.
pub(crate) type ScoreReply = oneshot::Sender<Result<Scores, ScoreError>>;

/// What the handle tells the loop.
#[derive(Debug)]
pub(crate) enum Command {
    Attach(RouterId, async_mpsc::UnboundedSender<EventBatch>),
    Detach(RouterId),
    Renew(RouterId, Instant),
    Submit(RouterId, Box<Request>, QueuePermit),
    Score(Box<ScoreRequest>, QueuePermit, ScoreReply),
    Abort(SessionId, u64),
    Move(RouterId, SessionId, MoveCommand, Option<(Target, Mode)>),
    TakeOver(RouterId, TakeOver),
    /// The first tokens of a handoff from here are out, and the target has room for it.
    HandoffOpened {
        session: SessionId,
        next: u64,
        room: Room,
    },
    /// A state is on its way by a pair: how far is it?
    HandoffUnderway {
        session: SessionId,
        next: u64,
    },
    /// How a handoff from here ended.
    HandoffDone {
        session: SessionId,
        next: u64,
        result: Result<Totals, String>,
    },
    HandoffOffer {
        header: Box<Header>,
        demand: Demand,
        /// How the state is to come.
        reply: Reply<Room>,
    },
    HandoffParts {
        session: SessionId,
        next: u64,
        parts: Vec<Part>,
        reply: Reply<()>,
    },
    HandoffVerify {
        session: SessionId,
        next: u64,
        summary: Box<Summary>,
        grammar: Option<Box<Grammar>>,
        reply: Reply<Vec<u64>>,
    },
    /// A handoff to here broke off.
    HandoffBroken {
        session: SessionId,
        next: u64,
    },
    /// Pages of a segment that is being brought here.
    PagesCame {
        task: TaskId,
        number: u64,
        pages: Vec<PageSlice>,
        reply: FetchReply,
    },
    /// A segment does not come.
    FetchFailed {
        task: TaskId,
        number: u64,
        why: String,
    },
    /// A home answered.
    HomeSaid {
        home: RemoteHome,
        answer: HomeAnswer,
    },
    /// An owner needs a session's latents here no more.
    HomeGivenUp(SessionId, u64),
    Sessions(oneshot::Sender<Vec<SessionInfo>>),
    FlushCache(oneshot::Sender<u64>),
    Shutdown,
}

/// What handles and loop both see.
#[derive(Debug)]
pub(crate) struct Shared {
    door: Door,
    queue_limit: usize,
    /// Requests that were let in and have not got their first slot.
    waiting: AtomicUsize,
    pub(crate) health: watch::Sender<EngineHealth>,
    pub(crate) load: watch::Sender<Load>,
    /// What handoffs to here must be; none where none is taken.
    expected: Option<Expected>,
    grammars: Option<Arc<GrammarCompiler>>,
}

impl Shared {
    pub(crate) fn new(door: Door, config: &EngineConfig, load: Load, expected: Option<Expected>) -> Self {
        let (health, _) = watch::channel(EngineHealth::Serving);
        let (load, _) = watch::channel(load);
        let (queue_limit, grammars) = (config.queue_limit, config.grammars.clone());
        Self { door, queue_limit, waiting: AtomicUsize::new(0), health, load, expected, grammars }
    }
}

/// A request's place among those that wait for their first slot. It is given up once, when told or dropped.
#[derive(Debug)]
pub(crate) struct QueuePermit {
    shared: Arc<Shared>,
    held: AtomicBool,
}

impl QueuePermit {
    fn take(shared: &Arc<Shared>) -> Result<Self, RefusedRequest> {
        let limit = shared.queue_limit;
        let another = |waiting: usize| (waiting < limit).then_some(waiting + 1);
        match shared.waiting.fetch_update(Ordering::Relaxed, Ordering::Relaxed, another) {
            Ok(_) => Ok(Self { shared: Arc::clone(shared), held: AtomicBool::new(true) }),
            Err(waiting) => Err(RefusedRequest::Full { waiting, limit }),
        }
    }

    /// The place of a session that came from another replica: it waited there.
    pub(crate) fn used(shared: &Arc<Shared>) -> Self {
        Self { shared: Arc::clone(shared), held: AtomicBool::new(false) }
    }

    /// The request waits no longer; true the first time.
    pub(crate) fn release(&self) -> bool {
        let was_held = self.held.swap(false, Ordering::Relaxed);
        if was_held {
            self.shared.waiting.fetch_sub(1, Ordering::Relaxed);
        }
        was_held
    }
}

impl Drop for QueuePermit {
    fn drop(&mut self) {
        self.release();
    }
}

/// Starts engines.
#[derive(Debug)]
pub struct Engine;

impl Engine {
    /// An engine on a thread of its own, which ends after [`EngineHandle::shutdown`], after a fatal failure, or when every
    /// handle is gone.
    ///
    /// # Errors
    /// [`StartError`] for limits with which nothing could run, and where there is no thread.
    pub fn start(executor: Box<dyn Executor>, config: EngineConfig) -> Result<EngineHandle, StartError> {
        let (core, handle) = Self::by_hand(executor, config)?;
        std::thread::Builder::new().name("perigee-engine".into()).spawn(move || core.run())?;
        Ok(handle)
    }

    /// An engine without a thread: whoever holds the core makes its turns. For simulations and tests.
    ///
    /// # Errors
    /// [`StartError`] for limits with which nothing could run.
    pub fn by_hand(
        executor: Box<dyn Executor>,
        config: EngineConfig,
    ) -> Result<(EngineCore, EngineHandle), StartError> {
        let sizes = executor.limits();
        let limits = config.limits(&sizes, executor.cache_bytes())?;
        let door = Door { limits, vocab: sizes.vocab, has_tokenizer: config.tokenizer.is_some() };
        let load = Load {
            slots_free: limits.slots,
            slots_total: limits.slots,
            pages_free: limits.pages,
            pages_total: limits.pages,
            ..Load::default()
        };
        let expected = config.moves.as_ref().zip(executor.geometry()).map(|(moves, geometry)| Expected {
            model: moves.model.clone(),
            geometry,
            context: limits.max_length,
            record: RECORD_LIMIT,
        });
        let shared = Arc::new(Shared::new(door, &config, load, expected));
        // Requests hold a permit each, so their number is bounded before they come here; aborts and questions must
        // never find the channel full.
        let (commands, inbox) = mpsc::channel();
        let core = EngineCore::new(executor, limits, config, (commands.clone(), inbox), Arc::clone(&shared));
        let last = Arc::new(LastHandle { commands: commands.clone() });
        Ok((core, EngineHandle { commands, shared, _last: last }))
    }
}

/// The way to a running engine. Clones are equal; when the last is gone the engine ends.
#[derive(Debug, Clone)]
pub struct EngineHandle {
    commands: mpsc::Sender<Command>,
    shared: Arc<Shared>,
    _last: Arc<LastHandle>,
}

/// Ends the engine with the last handle. The loop itself holds a way into its inbox, for the tasks that carry handoffs.
#[derive(Debug)]
struct LastHandle {
    commands: mpsc::Sender<Command>,
}

impl Drop for LastHandle {
    fn drop(&mut self) {
        // The engine may have ended before.
        let _ = self.commands.send(Command::Shutdown);
    }
}

impl EngineHandle {
    /// Opens a router's stream of events. The load comes at once and then at least twice a second. A second stream for the
    /// same router takes the place of the first. The stream ends when the engine does.
    pub fn attach(&self, router: RouterId) -> async_mpsc::UnboundedReceiver<EventBatch> {
        let (sender, receiver) = async_mpsc::unbounded_channel();
        self.send(Command::Attach(router, sender));
        receiver
    }

    /// A router's sessions may be stepped until then and no longer: at the first turn after it, its stream closes as by
    /// [`Self::detach`]. A router whose lease was never told has one without an end.
    pub fn renew(&self, router: RouterId, until: Instant) {
        self.send(Command::Renew(router, until));
    }

    /// Closes a router's stream and ends its sessions, except those that may outlive it.
    pub fn detach(&self, router: RouterId) {
        self.send(Command::Detach(router));
    }

    /// Hands in a request. Its events leave by the stream of `router`, which must be attached: a request of another one is
    /// dropped. A request that repeats a session's name is dropped as a repeated message.
    ///
    /// # Errors
    /// [`RefusedRequest`]: a field that this replica cannot serve, a full queue, or an engine that takes no requests.
    pub fn submit(&self, router: RouterId, request: Request) -> Result<(), RefusedRequest> {
        self.must_serve()?;
        self.shared.door.check(&request)?;
        let permit = QueuePermit::take(&self.shared)?;
        self.try_send(Command::Submit(router, Box::new(request), permit))
    }

    /// Ends a session, within two steps; its last event says so. With an epoch other than 0, only in that epoch or an
    /// earlier one. What is kept for it as a home ends too. Without effect if nothing of it is here.
    pub fn abort(&self, session: SessionId, up_to_epoch: u64) {
        self.send(Command::Abort(session, up_to_epoch));
    }

    /// Has a session handed over; reports follow in the events of `router`.
    pub fn prepare(&self, router: RouterId, order: Prepare) {
        let Prepare { session, epoch, next, target, mode } = order;
        self.send(Command::Move(router, session, MoveCommand::Prepare { epoch, next }, Some((target, mode))));
    }

    /// Has a prepared session run. Its events go to `router` from now on.
    pub fn start(&self, router: RouterId, session: SessionId, epoch: u64) {
        self.send(Command::Move(router, session, MoveCommand::Start { epoch }, None));
    }

    /// Gives a session up that runs elsewhere.
    pub fn release(&self, router: RouterId, session: SessionId, epoch: u64, owner_epoch: u64) {
        self.send(Command::Move(router, session, MoveCommand::Release { epoch, owner_epoch }, None));
    }

    /// Takes a move back: to `next`, whose session goes on in `epoch` where it was.
    pub fn abort_move(&self, router: RouterId, session: SessionId, next: u64, epoch: u64) {
        self.send(Command::Move(router, session, MoveCommand::AbortMove { next, epoch }, None));
    }

    /// Has a session go on for `router`, to which its client has turned. A report says whether it does; behind it come the
    /// tokens that the router or the client have not got, and the session's further events.
    pub fn take_over(&self, router: RouterId, order: TakeOver) {
        self.send(Command::TakeOver(router, order));
    }

    /// Makes grammars for requests of this engine.
    pub fn grammars(&self) -> Option<&Arc<GrammarCompiler>> {
        self.shared.grammars.as_ref()
    }

    /// The target's side of one handoff.
    pub fn incoming(&self) -> Incoming {
        Incoming::new(self.commands.clone(), self.shared.expected.clone(), self.shared.grammars.clone())
    }

    /// The owner of a session that ran here, in `epoch`, needs its latents no more.
    pub fn home_given_up(&self, session: SessionId, epoch: u64) {
        self.send(Command::HomeGivenUp(session, epoch));
    }

    /// Log-probabilities of every token of a prompt but the first. Dropping the future ends the work.
    ///
    /// # Errors
    /// [`ScoreError`].
    pub async fn score(&self, request: ScoreRequest) -> Result<Scores, ScoreError> {
        self.must_serve()?;
        self.shared.door.check_score(&request)?;
        let permit = QueuePermit::take(&self.shared)?;
        let (reply, answer) = oneshot::channel();
        self.try_send(Command::Score(Box::new(request), permit, reply))?;
        answer.await.unwrap_or_else(|_| Err(ScoreError::Failed(self.why_not_serving())))
    }

    /// The load after the last step.
    pub fn load(&self) -> Load {
        *self.shared.load.borrow()
    }

    /// Every session that is here, by age. None if the engine ended.
    pub async fn sessions(&self) -> Vec<SessionInfo> {
        let (reply, answer) = oneshot::channel();
        self.send(Command::Sessions(reply));
        answer.await.unwrap_or_default()
    }

    /// Drops what is cached for later requests; the number of pages that are free now because of it.
    pub async fn flush_cache(&self) -> u64 {
        let (reply, answer) = oneshot::channel();
        self.send(Command::FlushCache(reply));
        answer.await.unwrap_or_default()
    }

    /// Takes no further requests; sessions go on to their end.
    pub fn drain(&self) {
        self.shared.health.send_if_modified(|health| {
            let serves = *health == EngineHealth::Serving;
            if serves {
                *health = EngineHealth::Draining;
            }
            serves
        });
    }

    /// Ends every session and the engine. [`Self::health`] tells when it has ended.
    pub fn shutdown(&self) {
        self.drain();
        self.send(Command::Shutdown);
    }

    /// Whether the engine serves, now and whenever that changes.
    pub fn health(&self) -> watch::Receiver<EngineHealth> {
        self.shared.health.subscribe()
    }

    fn must_serve(&self) -> Result<(), RefusedRequest> {
        match *self.shared.health.borrow() {
            EngineHealth::Serving => Ok(()),
            _ => Err(RefusedRequest::Unavailable(self.why_not_serving())),
        }
    }

    fn why_not_serving(&self) -> String {
        match &*self.shared.health.borrow() {
            EngineHealth::Draining => "it is draining".into(),
            EngineHealth::Failed { message } => format!("it failed: {message}"),
            EngineHealth::Serving | EngineHealth::Stopped => "it was shut down".into(),
        }
    }

    fn try_send(&self, command: Command) -> Result<(), RefusedRequest> {
        self.commands.send(command).map_err(|_| RefusedRequest::Unavailable(self.why_not_serving()))
    }

    /// For commands that mean nothing to an engine that ended.
    fn send(&self, command: Command) {
        if self.commands.send(command).is_err() {
            tracing::debug!("a command came after the engine's end");
        }
    }
}
