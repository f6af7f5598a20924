//! Leaders on free ports, each over a modelled executor, and a router in front of them.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use perigee_engine::testing::{Faults, ModelExecutor, ModelSizes};
use perigee_engine::{Engine, EngineConfig, EngineHandle};
use perigee_proto::internal::replica_client::ReplicaClient;
use perigee_proto::internal::{
    Hello, Link, ReplicaMessage, RouterMessage, Submit, Welcome, replica_message, router_message,
};
use perigee_proto::v1::cluster_client::ClusterClient;
use perigee_proto::v1::inference_client::InferenceClient;
use perigee_proto::{PROTOCOL_VERSION, internal};
use perigee_registry::{InProcessRegistry, ReplicaRecord};
use perigee_router::{Router, RouterConfig, RouterListeners, RouterParts};
use perigee_telemetry::Metrics;
use perigee_worker::attend::HomeParts;
use perigee_worker::front::{Front, FrontListeners};
use perigee_worker::serve::{LeaderParts, serve};
use perigee_worker::{ReplicaIdentity, WorkerError, WorkerMetrics};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::transport::Channel;
use tonic::{Status, Streaming};

/// How long anything may take that does not depend on a lease; only a hang is that slow.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// What a leader is made with.
#[derive(Default)]
pub(crate) struct LeaderOptions {
    pub(crate) sizes: ModelSizes,
    pub(crate) faults: Faults,
    pub(crate) queue_limit: Option<usize>,
    /// Time of a step; as fast as it goes without.
    pub(crate) step: Duration,
    /// What it answers other replicas from.
    pub(crate) homes: Option<HomeParts>,
}

/// A running leader.
pub(crate) struct Leader {
    pub(crate) engine: EngineHandle,
    pub(crate) internal: SocketAddr,
    pub(crate) public: SocketAddr,
    pub(crate) http: SocketAddr,
    metrics: Metrics,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<Result<(), WorkerError>>,
}

pub(crate) async fn bind() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("an address");
    (listener, address)
}

impl Leader {
    pub(crate) async fn start(name: &str, options: LeaderOptions) -> Self {
        let metrics = Metrics::default();
        let worker_metrics = WorkerMetrics::register(&metrics).expect("registered");
        let limits = options.sizes.limits;
        let step = options.step;
        let executor = ModelExecutor::new(options.sizes)
            .with_faults(options.faults)
            .with_step_hook(move |_| std::thread::sleep(step));
        let config = EngineConfig { observer: Arc::new(worker_metrics.clone()), ..EngineConfig::default() };
        let config = EngineConfig { queue_limit: options.queue_limit.unwrap_or(config.queue_limit), ..config };
        let engine = Engine::start(Box::new(executor), config).expect("the engine starts");
        let identity = ReplicaIdentity {
            replica: name.to_owned(),
            incarnation: "1".to_owned(),
            model: "modelled".to_owned(),
            digest: "m".to_owned(),
            vocab: limits.vocab as u32,
            max_model_len: limits.max_model_len as u32,
            eos_token_ids: vec![],
            has_tokenizer: false,
            generation: Default::default(),
            tp: 1,
            device: "cpu".to_owned(),
            pids: vec![std::process::id()],
            weight_bytes: vec![0],
            step_tokens: limits.step_tokens as u32,
            move_costs: None,
        };
        let ((internal_port, internal), (public_port, public), (http_port, http)) =
            (bind().await, bind().await, bind().await);
        let listeners = FrontListeners { public: Some(public_port), http: http_port };
        let front = Front::start(listeners, metrics.clone(), None).expect("it opens");
        let grace = Duration::from_secs(5);
        let parts = LeaderParts {
            engine: engine.clone(),
            identity,
            front,
            drain: tokio::sync::watch::channel(false).0,
            worker_metrics,
            grace,
            homes: options.homes,
            tls: None,
            links: Default::default(),
        };
        let (stop, stopped) = oneshot::channel::<()>();
        let task = tokio::spawn(async move {
            serve(parts, internal_port, async {
                // Dropped or sent: stop.
                let _ = stopped.await;
            })
            .await
        });
        Self { engine, internal, public, http, metrics, stop: Some(stop), task }
    }

    /// The value of a metric without labels.
    pub(crate) fn metric(&self, name: &str) -> f64 {
        let text = self.metrics.text().expect("written");
        let line = text.lines().find(|line| line.split(' ').next() == Some(name)).expect("registered");
        line.rsplit(' ').next().and_then(|value| value.parse().ok()).expect("a number")
    }

    /// Tells it to drain and waits for its end.
    pub(crate) async fn stop(mut self) -> Result<(), WorkerError> {
        drop(self.stop.take());
        self.ended().await
    }

    /// Waits for its end.
    pub(crate) async fn ended(&mut self) -> Result<(), WorkerError> {
        tokio::time::timeout(PATIENCE, &mut self.task).await.expect("it ends").expect("no panic")
    }

    /// Waits until nothing runs, and checks that everything is free.
    pub(crate) async fn assert_free(&self) {
        let free = async {
            loop {
                let load = self.engine.load();
                let idle = load.running == 0 && load.waiting == 0 && load.parked == 0;
                if idle && load.slots_free == load.slots_total && load.pages_free == load.pages_total {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        let waited = tokio::time::timeout(PATIENCE, free).await;
        assert!(waited.is_ok(), "not free: {:?}", self.engine.load());
    }
}

/// A router's end of one stream, in the hands of a test.
pub(crate) struct HandMade {
    pub(crate) to_leader: mpsc::UnboundedSender<RouterMessage>,
    /// What the leader last told of its ways to other replicas.
    pub(crate) links: Vec<Link>,
    from_leader: Streaming<ReplicaMessage>,
}

impl HandMade {
    pub(crate) async fn attach(leader: &Leader, hello: Hello) -> Result<(Self, Welcome), Status> {
        Self::attach_to(leader.internal, hello).await
    }

    pub(crate) async fn attach_to(internal: SocketAddr, hello: Hello) -> Result<(Self, Welcome), Status> {
        let url = format!("http://{internal}");
        let mut client = ReplicaClient::connect(url).await.expect("connected");
        let (to_leader, out) = mpsc::unbounded_channel();
        let first = RouterMessage { body: Some(router_message::Body::Hello(hello)) };
        to_leader.send(first).expect("open");
        let from_leader = client.attach(UnboundedReceiverStream::new(out)).await?.into_inner();
        let mut stream = Self { to_leader, links: Vec::new(), from_leader };
        match stream.next().await? {
            Some(replica_message::Body::Welcome(welcome)) => Ok((stream, welcome)),
            other => panic!("expected a welcome, got {other:?}"),
        }
    }

    pub(crate) fn send(&self, body: router_message::Body) {
        self.to_leader.send(RouterMessage { body: Some(body) }).expect("open");
    }

    pub(crate) async fn next(&mut self) -> Result<Option<replica_message::Body>, Status> {
        loop {
            let message =
                tokio::time::timeout(PATIENCE, self.from_leader.message()).await.expect("a message in time")?;
            match message.and_then(|message| message.body) {
                Some(replica_message::Body::Links(links)) => self.links = links.links,
                other => return Ok(other),
            }
        }
    }

    /// The leader's clock in the next batch; none once the stream has ended.
    pub(crate) async fn clock(&mut self) -> Option<u64> {
        loop {
            if let replica_message::Body::Batch(batch) = self.next().await.ok()?? {
                return Some(batch.clock);
            }
        }
    }

    /// The next message that is not a batch, and the batches before it are forgotten.
    pub(crate) async fn next_answer(&mut self) -> replica_message::Body {
        loop {
            match self.next().await.expect("no error").expect("open") {
                replica_message::Body::Batch(_) => {}
                other => return other,
            }
        }
    }

    /// The first events of a session.
    pub(crate) async fn first_events(&mut self) -> Vec<internal::SessionEvent> {
        loop {
            if let Some(replica_message::Body::Batch(batch)) = self.next().await.expect("no error")
                && !batch.events.is_empty()
            {
                return batch.events;
            }
        }
    }

    /// Events up to the first end of a session.
    pub(crate) async fn events_to_end(&mut self) -> Vec<internal::SessionEvent> {
        let mut events = Vec::new();
        loop {
            if let Some(replica_message::Body::Batch(batch)) = self.next().await.expect("no error") {
                events.extend(batch.events);
                if events.last().is_some_and(|event| event.finish() != internal::Finish::Unspecified) {
                    return events;
                }
            }
        }
    }
}

pub(crate) fn hello(lease: Duration) -> Hello {
    Hello { protocol_version: PROTOCOL_VERSION, router_id: 7, lease_ms: lease.as_millis() as u32 }
}

/// A greedy request of one session.
pub(crate) fn submit(session: &str, prompt: Vec<u32>, max_tokens: u32) -> Submit {
    Submit {
        request_id: session.to_owned(),
        sessions: vec![session.to_owned()],
        epoch: 1,
        prompt,
        max_tokens,
        sampling: Some(internal::Sampling { top_p: 1.0, repetition_penalty: 1.0, ..Default::default() }),
        ..Submit::default()
    }
}

/// A router in front of leaders.
pub(crate) struct Cluster {
    pub(crate) inference: InferenceClient<Channel>,
    pub(crate) operator: ClusterClient<Channel>,
    pub(crate) grpc: SocketAddr,
    pub(crate) http: SocketAddr,
    pub(crate) registry: InProcessRegistry,
    _stop: oneshot::Sender<()>,
}

impl Cluster {
    /// A router that is attached to all of `leaders`.
    pub(crate) async fn start(leaders: &[(&str, &Leader)]) -> Self {
        let registry = InProcessRegistry::default();
        for (name, leader) in leaders {
            registry.register(ReplicaRecord::new(*name, leader.internal.to_string())).expect("registered");
        }
        let parts = RouterParts::new(Arc::new(registry.clone()), None).expect("parts");
        let router = Router::start(RouterConfig::default(), parts).expect("started");
        let mut ready = router.ready_replicas();
        let ((grpc_port, grpc), (http_port, http)) = (bind().await, bind().await);
        let (stop, stopped) = oneshot::channel::<()>();
        let listeners = RouterListeners { grpc: grpc_port, http: http_port };
        tokio::spawn(router.serve(listeners, async {
            let _ = stopped.await;
        }));
        let all = ready.wait_for(|count| *count == leaders.len());
        tokio::time::timeout(PATIENCE, all).await.expect("in time").expect("attached");
        let channel =
            Channel::from_shared(format!("http://{grpc}")).expect("a URL").connect().await.expect("connected");
        let (inference, operator) = (InferenceClient::new(channel.clone()), ClusterClient::new(channel));
        Self { inference, operator, grpc, http, registry, _stop: stop }
    }
}
