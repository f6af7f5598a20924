//! Replicas of random:tiny on the CPU, whole but for their processes: real ranks, engine, services and connections to each
//! other. A test is their router.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use perigee_collectives::Solo;
use perigee_engine::executor::Executor;
use perigee_engine::moves::FollowPolicy;
use perigee_engine::ranks::Ranks;
use perigee_engine::{Engine, EngineConfig, EngineHandle};
use perigee_proto::internal::{
    self, AbortMove, Finish, MoveMode, MoveReport, Prepare, Release, SessionEvent, Start, Submit, replica_message,
    router_message,
};
use perigee_telemetry::Metrics;
use perigee_worker::front::{Front, FrontListeners};
use perigee_worker::handoff::GrpcConnector;
use perigee_worker::load::{cpu_backend, open};
use perigee_worker::moving::{self, LeaderPlace};
use perigee_worker::peers::Peers;
use perigee_worker::serve::{LeaderParts, serve};
use perigee_worker::{ReplicaIdentity, WorkerConfig, WorkerError, WorkerMetrics};
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::sandbox::{HandMade, PATIENCE, bind, hello};

/// A lease that does not run out in a test.
pub(crate) const LONG: Duration = Duration::from_secs(60);
/// Tokens of most sessions here: more than a move takes steps.
pub(crate) const TOKENS: u32 = 400;
/// Two full pages and a bit.
pub(crate) const PROMPT: usize = 150;
/// Least distance between the two most likely tokens at which another order of sums cannot exchange them.
const CLEAR_MARGIN: f32 = 1e-4;

/// What a replica is made with.
#[derive(Debug, Clone)]
pub(crate) struct ReplicaOptions {
    pub(crate) model: &'static str,
    pub(crate) slots: usize,
    pub(crate) silence: Duration,
    pub(crate) grace: Duration,
    pub(crate) patience: Duration,
    pub(crate) follow: FollowPolicy,
}

impl Default for ReplicaOptions {
    fn default() -> Self {
        Self {
            model: "random:tiny",
            slots: 8,
            silence: LONG,
            grace: LONG,
            patience: Duration::from_secs(5),
            follow: FollowPolicy::Never,
        }
    }
}

/// A running replica.
pub(crate) struct Replica {
    pub(crate) name: &'static str,
    pub(crate) engine: EngineHandle,
    pub(crate) internal: SocketAddr,
    pub(crate) metrics: Metrics,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<Result<(), WorkerError>>,
}

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    worker: WorkerConfig,
}

impl Replica {
    pub(crate) async fn start(name: &'static str, options: ReplicaOptions) -> Self {
        let line = [
            "worker".to_owned(),
            format!("--model={}", options.model),
            format!("--replica={name}"),
            format!("--state-slots={}", options.slots),
            "--max-model-len=1024".to_owned(),
            "--threads=1".to_owned(),
        ];
        let config = Line::try_parse_from(line).expect("known options").worker;
        let opened = open(&config).expect("a model");
        let model = opened.source.config();
        let mut rank = opened.load(&config, cpu_backend(&config, Box::new(Solo))).expect("loaded");
        let peers = Peers::default();
        moving::let_ask(&mut rank, model, peers.clone()).expect("a thread");
        let ranks = Ranks::new(rank, Vec::new(), PATIENCE).expect("one rank");
        let ((internal_port, internal), (public, _), (http, _)) = (bind().await, bind().await, bind().await);
        let place = LeaderPlace {
            replica: name.to_owned(),
            incarnation: incarnation(name),
            tp: 1,
            endpoint: internal.to_string(),
            digest: opened.digest.clone(),
        };
        let move_costs = ranks.geometry().map(|geometry| moving::move_costs(model, &geometry));
        let connector = GrpcConnector::new(Handle::current(), peers.clone(), &place.replica, &place.incarnation);
        let (mut moves, homes) =
            moving::set_up(place, model, &config.moves, Arc::new(connector), (ranks.latent_reader(), ranks.geometry()));
        (moves.silence, moves.grace, moves.patience) = (options.silence, options.grace, options.patience);
        moves.follow = options.follow;
        let metrics = Metrics::default();
        let worker_metrics = WorkerMetrics::register(&metrics).expect("registered");
        let observer = Arc::new(worker_metrics.clone());
        let settings = EngineConfig { observer, moves: Some(moves), ..EngineConfig::default() };
        let engine = Engine::start(Box::new(ranks), settings).expect("the engine starts");
        let identity = ReplicaIdentity {
            replica: name.to_owned(),
            incarnation: incarnation(name),
            model: options.model.to_owned(),
            digest: opened.digest.clone(),
            vocab: opened.limits.vocab as u32,
            max_model_len: opened.limits.max_model_len as u32,
            eos_token_ids: vec![],
            has_tokenizer: false,
            generation: Default::default(),
            tp: 1,
            device: "cpu".to_owned(),
            pids: vec![std::process::id()],
            weight_bytes: vec![0],
            step_tokens: opened.limits.step_tokens as u32,
            move_costs,
        };
        let listeners = FrontListeners { public: Some(public), http };
        let front = Front::start(listeners, metrics.clone(), None).expect("it opens");
        let parts = LeaderParts {
            engine: engine.clone(),
            identity,
            front,
            drain: tokio::sync::watch::channel(false).0,
            worker_metrics,
            grace: Duration::ZERO,
            tls: None,
            links: peers.links().clone(),
            homes,
        };
        let (stop, stopped) = oneshot::channel::<()>();
        let task = tokio::spawn(async move {
            serve(parts, internal_port, async {
                // Dropped or sent: stop.
                let _ = stopped.await;
            })
            .await
        });
        Self { name, engine, internal, metrics, stop: Some(stop), task }
    }

    pub(crate) async fn attach(&self) -> HandMade {
        HandMade::attach_to(self.internal, hello(LONG)).await.expect("attached").0
    }

    /// Ends it at once with everything that it has.
    pub(crate) async fn kill(mut self) {
        drop(self.stop.take());
        let ended = tokio::time::timeout(PATIENCE, &mut self.task).await;
        ended.expect("it ends").expect("no panic").expect("in order");
    }

    /// Waits until nothing of any session is here, and everything is free.
    pub(crate) async fn assert_free(&self) {
        let is_free = || {
            let load = self.engine.load();
            let is_idle = load.running == 0 && load.waiting == 0 && load.parked == 0 && load.homes == 0;
            is_idle && load.slots_free == load.slots_total && load.pages_free == load.pages_total
        };
        assert!(eventually(is_free).await, "{} is not free: {:?}", self.name, self.engine.load());
    }

    /// A move of a session in epoch 1 to this replica in epoch 2.
    pub(crate) fn invite(&self, session: &str, mode: MoveMode) -> Prepare {
        Prepare {
            session: session.to_owned(),
            epoch: 1,
            next_epoch: 2,
            target: self.name.to_owned(),
            target_endpoint: self.internal.to_string(),
            target_incarnation: incarnation(self.name),
            mode: mode.into(),
        }
    }
}

fn incarnation(name: &str) -> String {
    format!("first run of {name}")
}

/// Whether something comes true in good time.
pub(crate) async fn eventually(mut is_true: impl FnMut() -> bool) -> bool {
    let waited = async {
        while !is_true() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(PATIENCE, waited).await.is_ok()
}

/// A greedy session that draws `TOKENS` tokens behind a prompt of its own.
pub(crate) fn long_session(name: &str) -> Submit {
    let prompt = (0..PROMPT as u32).map(|position| (position * 37 + 11) % 250).collect();
    Submit { ignore_eos: true, ..super::sandbox::submit(name, prompt, TOKENS) }
}

/// The tokens of [`long_session`] where nobody disturbs it. No choice among them is close, so that a session that moves
/// must draw the very same.
pub(crate) async fn undisturbed() -> Vec<u32> {
    let alone = Replica::start("alone", ReplicaOptions::default()).await;
    let mut router = alone.attach().await;
    let mut submit = long_session("s");
    submit.sampling.as_mut().expect("set").logprobs = Some(2);
    router.send(router_message::Body::Submit(submit));
    let mut story = Story::default();
    story.follow_to_end(&mut router).await;
    let margins = story.events.iter().filter_map(|event| {
        let [_, first, second, ..] = event.logprobs.as_ref()?.logprobs[..] else { return None };
        Some(first - second)
    });
    let margin = margins.fold(f32::INFINITY, f32::min);
    assert!(margin > CLEAR_MARGIN, "a choice of the undisturbed session is close: {margin}");
    story.tokens()
}

/// What a router heard of one session, from all its owners.
#[derive(Debug, Default)]
pub(crate) struct Story {
    pub(crate) events: Vec<SessionEvent>,
}

impl Story {
    pub(crate) fn tokens(&self) -> Vec<u32> {
        self.events.iter().filter_map(|event| event.token).collect()
    }

    pub(crate) fn last(&self) -> &SessionEvent {
        self.events.last().expect("an event")
    }

    /// Takes a batch over: indices follow each other without gap or repeat, whoever tells them.
    fn take(&mut self, batch: internal::EventBatch) {
        for event in batch.events {
            if event.token.is_some() {
                assert_eq!(event.index, self.tokens().len() as u64, "the next token");
            }
            self.events.push(event);
        }
    }

    /// Listens until a number of tokens is here.
    pub(crate) async fn follow_to(&mut self, router: &mut HandMade, tokens: usize) {
        while self.tokens().len() < tokens {
            match router.next().await.expect("no error").expect("open") {
                replica_message::Body::Batch(batch) => self.take(batch),
                other => panic!("{tokens} tokens expected, got {other:?}"),
            }
        }
    }

    /// Listens until the session ends.
    pub(crate) async fn follow_to_end(&mut self, router: &mut HandMade) {
        while self.events.last().is_none_or(|event| event.finish() == Finish::Unspecified) {
            if let replica_message::Body::Batch(batch) = router.next().await.expect("no error").expect("open") {
                self.take(batch);
            }
        }
    }

    /// Listens until the next report on a move.
    pub(crate) async fn follow_to_report(&mut self, router: &mut HandMade) -> MoveReport {
        loop {
            match router.next().await.expect("no error").expect("open") {
                replica_message::Body::Batch(batch) => self.take(batch),
                replica_message::Body::MoveReport(report) => return report,
                other => panic!("a report expected, got {other:?}"),
            }
        }
    }
}

pub(crate) fn start(epoch: u64) -> router_message::Body {
    router_message::Body::Start(Start { session: "s".to_owned(), epoch })
}

pub(crate) fn release(epoch: u64, owner: &Replica, owner_epoch: u64) -> router_message::Body {
    let (session, owner) = ("s".to_owned(), owner.name.to_owned());
    router_message::Body::Release(Release { session, epoch, owner, owner_epoch })
}

pub(crate) fn abort_move(next_epoch: u64, epoch: u64) -> router_message::Body {
    router_message::Body::AbortMove(AbortMove { session: "s".to_owned(), next_epoch, epoch })
}

/// The session is over in all epochs up to this one.
pub(crate) fn over(epoch: u64) -> router_message::Body {
    router_message::Body::Abort(internal::Abort { sessions: vec!["s".to_owned()], epoch })
}
