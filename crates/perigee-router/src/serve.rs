//! A router from its parts to its end: builds every part in order, opens the services on the listeners it was given, and
//! drains when told to stop. Whoever starts it chooses registry, listeners, connector and random source.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use perigee_proto::ids::RouterId;
use perigee_proto::standard;
use perigee_proto::v1::cluster_server::ClusterServer;
use perigee_registry::Registry;
use perigee_telemetry::{Metrics, Readiness, probes};
use perigee_text::{ChatTemplate, Tokenizer};
use perigee_tls::{Dialer, Listening, Purpose, Tls, require_certificate, serve_http};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_stream::Stream;
use tonic::service::RoutesBuilder;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::server::Connected;

use crate::admission::Admission;
use crate::balance::Balance;
use crate::cluster_service::ClusterService;
use crate::config::RouterConfig;
use crate::error::RouterError;
use crate::front::Front;
use crate::grpc::GrpcServer;
use crate::http;
use crate::membership;
use crate::metrics::RouterMetrics;
use crate::random::Random;
use crate::readiness;
use crate::relay::Relay;
use crate::replica_client::{ClientContext, Connect, TcpConnector};
use crate::replicas::Replicas;
use crate::resume::ResumeKey;
use crate::service::InferenceService;
use crate::text::Text;

/// Names under which health is reported, beside the empty one for the whole.
const SERVICES: [&str; 2] = ["perigee.v1.Inference", "perigee.v1.Cluster"];

/// What a router works with and does not make itself.
pub struct RouterParts {
    /// Who is in the cluster.
    pub registry: Arc<dyn Registry>,
    /// Encodes prompts; without one, clients send token ids.
    pub tokenizer: Option<Arc<Tokenizer>>,
    /// Renders conversations; without one, clients send prompts.
    pub template: Option<Arc<ChatTemplate>>,
    /// Reaches replicas.
    pub connector: Arc<dyn Connect>,
    /// Names sessions and draws seeds.
    pub random: Random,
    /// TLS of the listeners; none where they are plain TCP.
    pub tls: Option<Arc<Tls>>,
    /// Signs resume tokens; without one they are good at this router only.
    pub resume_key: Option<ResumeKey>,
}

impl RouterParts {
    /// Parts for production: TCP, and the system's random numbers.
    ///
    /// # Errors
    /// [`RouterError::Random`].
    pub fn new(registry: Arc<dyn Registry>, tokenizer: Option<Arc<Tokenizer>>) -> Result<Self, RouterError> {
        Ok(Self {
            registry,
            tokenizer,
            template: None,
            connector: Arc::new(TcpConnector::default()),
            random: Random::system()?,
            tls: None,
            resume_key: None,
        })
    }

    /// The same with a key that routers share.
    pub fn with_resume_key(self, resume_key: Option<ResumeKey>) -> Self {
        Self { resume_key, ..self }
    }

    /// The same with a chat template, where there is one.
    pub fn with_template(self, template: Option<Arc<ChatTemplate>>) -> Self {
        Self { template, ..self }
    }

    /// The same with TLS, where there is some, on the listeners and towards replicas.
    pub fn with_tls(self, tls: Option<Arc<Tls>>) -> Self {
        Self { connector: Arc::new(TcpConnector(Dialer::new(tls.clone()))), tls, ..self }
    }
}

/// The two ports of a router, bound by whoever starts it.
#[derive(Debug)]
pub struct RouterListeners {
    /// For gRPC.
    pub grpc: TcpListener,
    /// For the OpenAI-compatible API, /live, /health and /metrics.
    pub http: TcpListener,
}

/// A router whose parts are built and whose streams to replicas are being opened. Clients are answered while
/// [`Router::serve`] runs; dropping it ends all streams.
pub struct Router {
    config: RouterConfig,
    pub(crate) inference: InferenceService,
    cluster: ClusterService,
    metrics: Metrics,
    /// Whether to be sent requests.
    readiness: watch::Receiver<Readiness>,
    closing: watch::Sender<bool>,
    tls: Option<Arc<Tls>>,
    pub(crate) tasks: JoinSet<()>,
}

impl Router {
    /// Builds the parts and begins to follow the registry.
    ///
    /// # Errors
    /// [`RouterError`] for bad settings, all of them.
    pub fn start(config: RouterConfig, parts: RouterParts) -> Result<Self, RouterError> {
        let faults = config.faults();
        if !faults.is_empty() {
            return Err(RouterError::Config(faults.join("\n")));
        }
        let metrics = Metrics::default();
        let router_metrics = RouterMetrics::register(&metrics)?;
        let replicas = Arc::new(Replicas::new(config.model_digest.clone()));
        let buffered_bytes = config.limits.buffered_bytes;
        let relay = Arc::new(Relay::new(replicas.clone(), router_metrics.clone(), config.moves, buffered_bytes));
        let router = parts.random.next().map_err(|error| RouterError::Random(error.message))?;
        let context = ClientContext {
            connector: parts.connector,
            replicas: replicas.clone(),
            relay: relay.clone(),
            router: RouterId(router),
            lease: config.lease,
            next_attachment: AtomicU64::new(0),
            turns: Semaphore::new(Handle::current().metrics().num_workers()),
        };
        let resume_key = match parts.resume_key {
            Some(key) => key,
            None => {
                let drawn = (0..4).map(|_| parts.random.next().map(u64::to_le_bytes)).collect::<Result<Vec<_>, _>>();
                ResumeKey::new(&drawn.map_err(|error| RouterError::Random(error.message))?.concat())?
            }
        };
        let mut tasks = JoinSet::new();
        tasks.spawn(membership::follow(parts.registry.watch(), Arc::new(context)));
        tasks.spawn(relay.clone().keep_time());
        tasks.spawn(relay.clone().evacuate());
        if config.balance != Balance::Off {
            tasks.spawn(relay.clone().balance(config.balance, parts.random.clone()));
        }
        let inference = InferenceService {
            relay,
            replicas: replicas.clone(),
            admission: Admission::new(config.limits.requests),
            text: Text::new(parts.tokenizer, parts.template),
            limits: Arc::new(config.limits.clone()),
            metrics: router_metrics,
            random: parts.random,
            resume_key,
        };
        let (closing, closes) = watch::channel(false);
        let (ready, readiness) = watch::channel(readiness::WAITING);
        tasks.spawn(readiness::follow(replicas.serving(), closes, ready));
        let cluster = ClusterService { relay: inference.relay.clone(), replicas, patience: config.lease };
        Ok(Self { config, inference, cluster, metrics, readiness, closing, tls: parts.tls, tasks })
    }

    /// How many replicas take requests, now and whenever that changes.
    pub fn ready_replicas(&self) -> watch::Receiver<usize> {
        self.inference.replicas.ready()
    }

    /// A server with the limits of connections, and its gRPC services, with health and reflection.
    pub(crate) fn grpc(&mut self) -> Result<(GrpcServer, Front), RouterError> {
        let limits = &self.config.limits;
        let mut routes = RoutesBuilder::default();
        let reporter = standard::add_services(&mut routes)?;
        self.tasks.spawn(standard::report_health(reporter, &SERVICES, self.readiness.clone(), |now| now.is_ready));
        // Operators' messages are small.
        let cluster = ClusterServer::new(self.cluster.clone()).max_decoding_message_size(64 << 10);
        if self.tls.as_ref().is_some_and(|tls| tls.has_authority()) {
            routes.add_service(InterceptedService::new(cluster, require_certificate));
        } else {
            routes.add_service(cluster);
        }
        Ok((GrpcServer::new(limits), Front::new(self.inference.clone(), limits.message_bytes, routes.routes())))
    }

    /// Serves gRPC alone, over connections of any kind, which a simulation opens in its own way.
    ///
    /// # Errors
    /// [`RouterError`] for descriptors that do not load.
    pub async fn serve_over<C>(mut self, incoming: impl Stream<Item = std::io::Result<C>>) -> Result<(), RouterError>
    where
        C: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
    {
        let (server, front) = self.grpc()?;
        server.serve(front, incoming, std::future::pending()).await;
        Ok(())
    }

    /// Serves until `shutdown` completes; then takes no more calls and gives running ones the grace time.
    ///
    /// # Errors
    /// [`RouterError`] for descriptors that do not load.
    pub async fn serve(
        mut self,
        listeners: RouterListeners,
        shutdown: impl Future<Output = ()> + Send + 'static,
    ) -> Result<(), RouterError> {
        let grace = self.config.grace;
        let (stop, stopped) = (self.closing.clone(), self.closing.subscribe());
        let relay = self.inference.relay.clone();
        self.tasks.spawn(async move {
            shutdown.await;
            tracing::info!(?grace, "shutting down, running requests may end");
            relay.stop_waiting();
            stop.send_replace(true);
            // Kept open: those who wait see the value, not the end of the channel.
            std::future::pending::<()>().await;
        });
        let until_stopped = || {
            let mut stopped = stopped.clone();
            async move {
                // An error would mean that the task above is gone, and with it this router.
                let _ = stopped.wait_for(|stop| *stop).await;
            }
        };

        let listening = |listener, purpose| Listening::new(listener, self.tls.clone(), purpose);
        let (http, incoming) =
            (listening(listeners.http, Purpose::Http), listening(listeners.grpc, Purpose::Public).incoming());
        let probes = probes::routes(self.metrics.clone(), self.readiness.clone(), Arc::new(|| {}));
        // Probes are answered while requests still run, so that whoever asks hears why no more are taken.
        let http = serve_http(http, http::routes(self.inference.clone()).merge(probes), {
            let (stopped, relay) = (until_stopped(), self.inference.relay.clone());
            async move {
                stopped.await;
                relay.until_idle().await;
            }
        });
        let (server, front) = self.grpc()?;
        let both = async { tokio::join!(server.serve(front, incoming, until_stopped()), http) };
        let overdue = async {
            until_stopped().await;
            tokio::time::sleep(grace).await;
        };
        tokio::select! {
            _ = both => {}
            () = overdue => tracing::warn!(?grace, "requests still run after the grace time, ending them"),
        }
        Ok(())
    }
}

/// Starts a router and serves until `shutdown` completes.
///
/// # Errors
/// [`RouterError`] for bad settings, before anything is served.
pub async fn serve(
    config: RouterConfig,
    parts: RouterParts,
    listeners: RouterListeners,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), RouterError> {
    Router::start(config, parts)?.serve(listeners, shutdown).await
}
