//! A leader that does what a test says, and a router in front of it.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use perigee_proto::PROTOCOL_VERSION;
use perigee_proto::internal::replica_server::{Replica, ReplicaServer};
use perigee_proto::internal::{
    AttendAnswer, AttendQuery, EventBatch, FetchPagesRequest, Finish, HandoffAnswer, HandoffChunk, KeepHomesAnswer,
    KeepHomesRequest, Load, ModelInfo, PageChunk, ReplicaMessage, RouterMessage, SessionEvent, Submit, Welcome,
    replica_message, router_message,
};
use perigee_proto::v1::cluster_client::ClusterClient;
use perigee_proto::v1::inference_client::InferenceClient;
use perigee_registry::{BoxFuture, InProcessRegistry, ReplicaRecord};
use perigee_text::{ChatTemplate, Tokenizer};
use tokio::io::DuplexStream;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::transport::{Channel, Endpoint, Server, Uri};
use tonic::{Request, Response, Status, Streaming};

use crate::replica_client::Connect;
use crate::serve::{Router, RouterParts};
use crate::{MoveTimes, Random, RouterConfig};

pub(super) const LEASE: Duration = Duration::from_secs(2);

/// A router that gives a session up at once where no replica can take it over.
pub(super) fn impatient() -> RouterConfig {
    let moves = MoveTimes { replay: Duration::ZERO, ..MoveTimes::default() };
    RouterConfig { moves, ..RouterConfig::default() }
}

/// One router's stream, in the hands of the test.
pub(super) struct Attached {
    pub(super) from_router: Streaming<RouterMessage>,
    pub(super) to_router: mpsc::UnboundedSender<Result<ReplicaMessage, Status>>,
}

impl Attached {
    pub(super) fn send(&self, body: replica_message::Body) {
        self.to_router.send(Ok(ReplicaMessage { body: Some(body) })).expect("the router listens");
    }

    /// Sends events as one step would, with a load that shows room.
    pub(super) fn step(&self, events: Vec<SessionEvent>) {
        self.step_at(1, events);
    }

    /// The same with a reading of the leader's clock.
    pub(super) fn step_at(&self, clock: u64, events: Vec<SessionEvent>) {
        self.send(replica_message::Body::Batch(EventBatch { events, load: Some(roomy()), clock }));
    }

    /// The next message that is not about the lease.
    pub(super) async fn next(&mut self) -> router_message::Body {
        loop {
            let message = self.from_router.message().await.expect("the stream lives").expect("a message");
            match message.body.expect("a body") {
                router_message::Body::Renew(_) => {}
                body => return body,
            }
        }
    }

    pub(super) async fn next_submit(&mut self) -> Submit {
        match self.next().await {
            router_message::Body::Submit(submit) => submit,
            other => panic!("expected a request, got {other:?}"),
        }
    }

    pub(super) async fn next_abort(&mut self) -> Vec<String> {
        match self.next().await {
            router_message::Body::Abort(abort) => abort.sessions,
            other => panic!("expected an abort, got {other:?}"),
        }
    }
}

pub(super) fn roomy() -> Load {
    Load {
        slots_free: 8,
        slots_total: 8,
        pages_free: 100,
        pages_total: 100,
        step_ms: 1.0,
        decode_ms: 1.0,
        prompt_token_ms: 0.01,
        ..Load::default()
    }
}

/// A token event of choice 0 in the first epoch.
pub(super) fn token(submit: &Submit, index: u64) -> SessionEvent {
    SessionEvent {
        session: submit.sessions[0].clone(),
        epoch: submit.epoch,
        index,
        token: Some(100 + index as u32),
        text: format!("t{index} "),
        ..SessionEvent::default()
    }
}

pub(super) fn finished(mut event: SessionEvent, finish: Finish) -> SessionEvent {
    event.set_finish(finish);
    event
}

/// What a fake leader says first.
pub(super) fn welcome(replica: &str) -> Welcome {
    Welcome {
        protocol_version: PROTOCOL_VERSION,
        replica: replica.to_owned(),
        incarnation: "1".to_owned(),
        model: Some(ModelInfo {
            name: "random:tiny@0".to_owned(),
            digest: "abc".to_owned(),
            vocab_size: 300,
            max_model_len: 100,
            eos_token_ids: vec![2],
            has_tokenizer: true,
            defaults: None,
        }),
        tp: 2,
        pids: vec![11, 12],
        weight_bytes: vec![5, 5],
        device: "cpu".to_owned(),
        step_tokens: 512,
        move_costs: None,
    }
}

struct FakeLeader {
    welcome: Welcome,
    attached: mpsc::UnboundedSender<Attached>,
}

#[tonic::async_trait]
impl Replica for FakeLeader {
    type AttachStream = UnboundedReceiverStream<Result<ReplicaMessage, Status>>;
    type HandoffStream = UnboundedReceiverStream<Result<HandoffAnswer, Status>>;
    type AttendStream = UnboundedReceiverStream<Result<AttendAnswer, Status>>;
    type FetchPagesStream = UnboundedReceiverStream<Result<PageChunk, Status>>;

    async fn attach(&self, request: Request<Streaming<RouterMessage>>) -> Result<Response<Self::AttachStream>, Status> {
        let mut from_router = request.into_inner();
        let first = from_router.message().await?.and_then(|message| message.body);
        assert!(matches!(first, Some(router_message::Body::Hello(_))), "the first message is hello, not {first:?}");
        let (to_router, out) = mpsc::unbounded_channel();
        let attached = Attached { from_router, to_router };
        attached.send(replica_message::Body::Welcome(self.welcome.clone()));
        self.attached.send(attached).map_err(|_| Status::unavailable("the test is over"))?;
        Ok(Response::new(UnboundedReceiverStream::new(out)))
    }

    async fn handoff(&self, _: Request<Streaming<HandoffChunk>>) -> Result<Response<Self::HandoffStream>, Status> {
        Err(Status::unimplemented("handoff"))
    }

    async fn attend(&self, _: Request<Streaming<AttendQuery>>) -> Result<Response<Self::AttendStream>, Status> {
        Err(Status::unimplemented("attend"))
    }

    async fn fetch_pages(&self, _: Request<FetchPagesRequest>) -> Result<Response<Self::FetchPagesStream>, Status> {
        Err(Status::unimplemented("fetch_pages"))
    }

    async fn keep_homes(&self, _: Request<KeepHomesRequest>) -> Result<Response<KeepHomesAnswer>, Status> {
        Err(Status::unimplemented("keep_homes"))
    }
}

/// In-memory network: an address leads to whoever listens there.
#[derive(Clone, Default)]
pub(super) struct Network {
    listeners: Arc<Mutex<HashMap<String, mpsc::UnboundedSender<DuplexStream>>>>,
}

impl Network {
    pub(super) fn listen(&self, address: &str) -> mpsc::UnboundedReceiver<DuplexStream> {
        let (sender, incoming) = mpsc::unbounded_channel();
        self.listeners.lock().insert(address.to_owned(), sender);
        incoming
    }

    pub(super) fn dial(&self, address: &str) -> Result<DuplexStream, String> {
        let (ours, theirs) = tokio::io::duplex(1 << 16);
        let listeners = self.listeners.lock();
        let listener = listeners.get(address).ok_or_else(|| format!("{address}: nobody listens"))?;
        listener.send(theirs).map_err(|_| format!("{address}: closed"))?;
        Ok(ours)
    }

    pub(super) async fn channel(&self, address: &str) -> Result<Channel, String> {
        let (network, address) = (self.clone(), address.to_owned());
        let connector = tower::service_fn(move |_: Uri| {
            let io = network.dial(&address).map(TokioIo::new).map_err(std::io::Error::other);
            async move { io }
        });
        Endpoint::from_static("http://memory")
            .connect_with_connector(connector)
            .await
            .map_err(|error| error.to_string())
    }
}

impl Connect for Network {
    fn connect<'a>(&'a self, address: &'a str) -> BoxFuture<'a, Result<Channel, String>> {
        Box::pin(self.channel(address))
    }
}

/// A fake replica; dropping `kill` ends its process, so to speak.
pub(super) struct FakeReplica {
    attached: mpsc::UnboundedReceiver<Attached>,
    pub(super) kill: Option<oneshot::Sender<()>>,
}

impl FakeReplica {
    pub(super) fn start(network: &Network, welcome: Welcome) -> Self {
        let (sender, attached) = mpsc::unbounded_channel();
        let incoming = UnboundedReceiverStream::new(network.listen(&format!("{}:1", welcome.replica)));
        let (kill, killed) = oneshot::channel::<()>();
        let leader = ReplicaServer::new(FakeLeader { welcome, attached: sender });
        let incoming = tokio_stream::StreamExt::map(incoming, Ok::<_, std::io::Error>);
        let server = Server::builder().add_service(leader).serve_with_incoming(incoming);
        tokio::spawn(async move {
            tokio::select! {
                result = server => result.expect("served"),
                _ = killed => {}
            }
        });
        Self { attached, kill: Some(kill) }
    }

    /// The next router that said hello.
    pub(super) async fn greeted(&mut self) -> Attached {
        self.attached.recv().await.expect("a router attaches")
    }

    /// The next router that attaches, with a load sent to it.
    pub(super) async fn attached(&mut self) -> Attached {
        let attached = self.greeted().await;
        attached.step(vec![]);
        attached
    }
}

/// A router and its replicas.
pub(super) struct Sandbox {
    pub(super) network: Network,
    pub(super) registry: InProcessRegistry,
    pub(super) router: Router,
    pub(super) inference: InferenceClient<Channel>,
    pub(super) cluster: ClusterClient<Channel>,
}

impl Sandbox {
    pub(super) async fn start(config: RouterConfig) -> Self {
        Self::start_with(config, None, None).await
    }

    /// The same with what makes tokens of text and conversations.
    pub(super) async fn start_with(
        config: RouterConfig,
        tokenizer: Option<Arc<Tokenizer>>,
        template: Option<Arc<ChatTemplate>>,
    ) -> Self {
        let (network, registry) = (Network::default(), InProcessRegistry::default());
        let counter = AtomicU64::new(1);
        let parts = RouterParts {
            resume_key: None,
            registry: Arc::new(registry.clone()),
            tokenizer,
            template,
            connector: Arc::new(network.clone()),
            random: Random::from_source(move || counter.fetch_add(1, Ordering::Relaxed)),
            tls: None,
        };
        let mut router = Router::start(config, parts).expect("started");
        let incoming = UnboundedReceiverStream::new(network.listen("router:1"));
        let incoming = tokio_stream::StreamExt::map(incoming, Ok::<_, std::io::Error>);
        let (server, front) = router.grpc().expect("services");
        router.tasks.spawn(server.serve(front, incoming, std::future::pending()));
        let channel = network.channel("router:1").await.expect("connected");
        let inference = InferenceClient::new(channel.clone());
        Self { network, registry, router, inference, cluster: ClusterClient::new(channel) }
    }

    /// A replica that is attached and known to have room.
    pub(super) async fn add(&self, name: &str) -> (FakeReplica, Attached) {
        let mut replica = FakeReplica::start(&self.network, welcome(name));
        self.registry.register(ReplicaRecord::new(name, format!("{name}:1"))).expect("registered");
        let attached = replica.attached().await;
        self.until_status(name, "ready").await;
        (replica, attached)
    }

    /// Waits until the router sees a replica in a state.
    pub(super) async fn until_status(&self, name: &str, status: &str) {
        let reached = || {
            let all = self.router.inference.replicas.describe();
            let found = all.iter().find(|info| info.replica == name).map_or("", |info| info.status.as_str());
            found == status
        };
        while !reached() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// Asserts that no request is left behind.
    pub(super) async fn assert_idle(&self) {
        while self.router.inference.relay.session_count() > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let metrics = &self.router.inference.metrics;
        assert_eq!((metrics.running.get(), metrics.waiting.get()), (0, 0));
    }
}
