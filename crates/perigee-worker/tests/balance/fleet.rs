//! Replicas of modelled engines and routers before them, in one process on one clock.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use perigee_backend::DType;
use perigee_engine::executor::{Executor, ExecutorLimits};
use perigee_engine::homes::{AnswerModel, HomeDirectory};
use perigee_engine::moves::{FollowPolicy, MoveConfig};
use perigee_engine::testing::{ModelExecutor, ModelPages, ModelSizes, RemoteAnswer};
use perigee_engine::{Engine, EngineConfig, EngineHandle};
use perigee_migration::attend::attention_bytes;
use perigee_migration::{AttendShape, Layout, Place};
use perigee_proto::internal::MoveCosts;
use perigee_proto::v1::inference_client::InferenceClient;
use perigee_registry::{InProcessRegistry, ReplicaRecord};
use perigee_router::{Balance, Random, Router, RouterConfig, RouterParts};
use perigee_telemetry::Metrics;
use perigee_testkit::Numbers;
use perigee_worker::attend::HomeParts;
use perigee_worker::front::{Front, FrontListeners};
use perigee_worker::handoff::GrpcConnector;
use perigee_worker::peers::Peers;
use perigee_worker::serve::{LeaderParts, serve_over};
use perigee_worker::{ReplicaIdentity, WorkerMetrics};
use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tokio::task::JoinSet;
use tonic::transport::Channel;

use super::network::Network;
use super::timed::{StepClock, StepCost, run, spender};

/// Attention of the 48B model.
const SHAPE: AttendShape = AttendShape { layers: 7, heads: 32, latent: 512, rope: 64, tokens: 64 };

const LIMITS: ExecutorLimits =
    ExecutorLimits { vocab: 16, slots: 48, pages: 800, step_tokens: 512, step_rows: 48, max_model_len: 16_384 };

/// Whom to ask for whose latents.
type Homes = Arc<Mutex<HashMap<String, (HomeDirectory, ModelPages)>>>;

/// Replicas and their routers.
pub(crate) struct Fleet {
    pub(crate) engines: Vec<EngineHandle>,
    /// One for each router.
    pub(crate) inference: Vec<InferenceClient<Channel>>,
    tasks: JoinSet<()>,
}

impl Fleet {
    /// So many replicas that are ready, behind so many routers.
    pub(crate) async fn start(replicas: usize, routers: usize, balance: Balance) -> Self {
        let (network, registry, homes) = (Network::default(), InProcessRegistry::default(), Homes::default());
        let mut tasks = JoinSet::new();
        let mut engines = Vec::new();
        for index in 0..replicas {
            engines.push(start_replica(&format!("r{index}"), &network, &registry, &homes, &mut tasks).await);
        }
        let mut inference = Vec::new();
        for router in 0..routers {
            let numbers = Mutex::new(Numbers::new(router as u64));
            let parts = RouterParts {
                registry: Arc::new(registry.clone()),
                tokenizer: None,
                template: None,
                connector: Arc::new(network.clone()),
                random: Random::from_source(move || numbers.lock().next_u64()),
                tls: None,
                resume_key: None,
            };
            let config = RouterConfig { balance, ..RouterConfig::default() };
            let running = Router::start(config, parts).expect("started");
            let mut ready = running.ready_replicas();
            let address = format!("router-{router}");
            let incoming = network.listen(&address);
            tasks.spawn(async move { running.serve_over(incoming).await.expect("served") });
            ready.wait_for(|count| *count == replicas).await.expect("attached");
            inference.push(InferenceClient::new(network.channel(&address).await.expect("connected")));
        }
        Self { engines, inference, tasks }
    }

    /// Ends everything.
    pub(crate) async fn stop(mut self) {
        self.tasks.shutdown().await;
    }
}

fn address(name: &str) -> String {
    format!("{name}:1")
}

async fn start_replica(
    name: &str,
    network: &Network,
    registry: &InProcessRegistry,
    homes: &Homes,
    tasks: &mut JoinSet<()>,
) -> EngineHandle {
    let (clock, directory) = (Arc::new(StepClock::default()), HomeDirectory::default());
    let executor = ModelExecutor::new(ModelSizes { limits: LIMITS, ..ModelSizes::default() }).without_reading();
    let (counters, pages, geometry) = (executor.counters(), executor.pages(), executor.geometry());
    homes.lock().insert(name.to_owned(), (directory.clone(), pages.clone()));
    let asked = homes.clone();
    let executor = executor.with_step_hook(spender(clock.clone(), StepCost::USUAL, counters)).with_homes(
        move |home, row, range| match asked.lock().get(&home.replica) {
            Some((directory, pages)) => pages.answer(directory, row, range),
            None => RemoteAnswer::Missed,
        },
    );
    let peers = Peers::over(Arc::new(network.clone()));
    let moves = MoveConfig {
        place: Place { replica: name.to_owned(), incarnation: "1".to_owned(), ranks: 1, layout: Layout::Replicated },
        endpoint: address(name),
        model: "m".to_owned(),
        homes: directory.clone(),
        can_answer: true,
        connector: Arc::new(GrpcConnector::new(Handle::current(), peers.clone(), name, "1")),
        silence: Duration::from_secs(2),
        grace: Duration::from_secs(15),
        patience: Duration::from_millis(100),
        misses: 20,
        shape: SHAPE,
        follow: FollowPolicy::ByCost,
        ways: Vec::new(),
    };
    let metrics = Metrics::default();
    let worker_metrics = WorkerMetrics::register(&metrics).expect("registered");
    let observer = Arc::new(worker_metrics.clone());
    let config = EngineConfig { observer, clock: clock.clone(), moves: Some(moves), ..EngineConfig::default() };
    let (core, engine) = Engine::by_hand(Box::new(executor), config).expect("limits are good");
    tasks.spawn(run(core, clock));

    // The published sizes: what moves here is a stand-in of some bytes.
    let move_costs = MoveCosts {
        state_bytes: 43_417_600,
        token_bytes: 8064,
        ask_bytes: attention_bytes(&SHAPE, DType::Bf16, 1),
        ask_rounds: SHAPE.layers,
    };
    let identity = ReplicaIdentity {
        replica: name.to_owned(),
        incarnation: "1".to_owned(),
        model: "modelled".to_owned(),
        digest: "m".to_owned(),
        vocab: LIMITS.vocab as u32,
        max_model_len: LIMITS.max_model_len as u32,
        eos_token_ids: vec![],
        has_tokenizer: false,
        generation: Default::default(),
        tp: 1,
        device: "cpu".to_owned(),
        pids: vec![std::process::id()],
        weight_bytes: vec![0],
        step_tokens: LIMITS.step_tokens as u32,
        move_costs: Some(move_costs),
    };
    // Nobody knocks there; what is spoken of goes over the network in memory.
    let http = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let parts = LeaderParts {
        engine: engine.clone(),
        identity,
        front: Front::start(FrontListeners { public: None, http }, metrics, None).expect("it opens"),
        worker_metrics,
        drain: tokio::sync::watch::channel(false).0,
        grace: Duration::from_secs(5),
        homes: Some(HomeParts {
            homes: directory,
            reader: Arc::new(pages),
            model: AnswerModel { shape: SHAPE, scale: 1.0 },
            geometry,
        }),
        tls: None,
        links: peers.links().clone(),
    };
    let incoming = network.listen(&address(name));
    tasks.spawn(async move { serve_over(parts, incoming, std::future::pending()).await.expect("served") });
    registry.register(ReplicaRecord::new(name, address(name))).expect("registered");
    engine
}
