//! A leader's services from the first listener to the drain: the internal port for routers, the public one for health,
//! reflection and the model, and HTTP for probes. The engine and the listeners are made by whoever starts it.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use perigee_engine::{EngineHandle, EngineHealth};
use perigee_proto::internal::replica_server::ReplicaServer;
use perigee_proto::standard;
use perigee_proto::v1::inference_server::InferenceServer;
use perigee_telemetry::{Metrics, probes};
use perigee_tls::{Listening, Purpose, Tls};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tonic::service::RoutesBuilder;
use tonic::transport::Server;

use crate::attend::{HomeParts, HomeServices};
use crate::error::{Result, WorkerError};
use crate::identity::ReplicaIdentity;
use crate::metrics::WorkerMetrics;
use crate::public::PublicService;
use crate::service::ReplicaService;

/// Largest message from a router or a replica: the longest prompt, or a layer's queries of a whole batch.
const MAX_INTERNAL_BYTES: usize = 64 << 20;
/// Largest message from anybody else.
const MAX_PUBLIC_BYTES: usize = 64 << 10;
/// Names under which health is reported, beside the empty one.
const INTERNAL_SERVICES: [&str; 1] = ["perigee.internal.v1.Replica"];
const PUBLIC_SERVICES: [&str; 1] = ["perigee.v1.Inference"];
/// How long the streams may take to carry the last events of an engine that ended.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// The ports of a leader, bound by whoever starts it.
#[derive(Debug)]
pub struct LeaderListeners {
    /// For routers and replicas.
    pub internal: TcpListener,
    /// For health, reflection and the model.
    pub public: TcpListener,
    /// For /health and /metrics.
    pub http: TcpListener,
}

/// A leader's engine and what it says about itself.
pub struct LeaderParts {
    /// The running engine.
    pub engine: EngineHandle,
    /// What it serves.
    pub identity: ReplicaIdentity,
    /// What /metrics shows.
    pub metrics: Metrics,
    /// The gauges among them; the same value is the engine's observer.
    pub worker_metrics: WorkerMetrics,
    /// How long running sessions may go on after the order to shut down.
    pub grace: Duration,
    /// What other replicas' questions are answered from; none where the device cannot.
    pub homes: Option<HomeParts>,
    /// TLS of the listeners; none where they are plain TCP.
    pub tls: Option<Arc<Tls>>,
}

/// Serves until `shutdown` completes, then drains: no new requests, and the grace time for running ones.
///
/// # Errors
/// [`WorkerError::Serve`] where a listener fails, or the engine does: the replica must be started anew.
pub async fn serve(
    parts: LeaderParts,
    listeners: LeaderListeners,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<()> {
    let engine = parts.engine;
    let identity = Arc::new(parts.identity);
    let (stop, stopped) = watch::channel(false);
    let until_stopped = || {
        let mut stopped = stopped.clone();
        async move {
            // An error would mean that this function ended, and the services with it.
            let _ = stopped.wait_for(|stop| *stop).await;
        }
    };
    let mut tasks = JoinSet::new();
    let (serving_sender, serving) = watch::channel(true);
    tasks.spawn(follow_health(engine.health(), serving_sender));

    let mut internal = RoutesBuilder::default();
    let homes = parts.homes.map(HomeServices::start).transpose();
    let homes = homes.map_err(WorkerError::io("starting the threads that answer other replicas"))?;
    let replica = ReplicaService::new(engine.clone(), identity.clone(), homes, parts.worker_metrics.clone());
    internal.add_service(ReplicaServer::new(replica).max_decoding_message_size(MAX_INTERNAL_BYTES));
    let mut public = RoutesBuilder::default();
    public.add_service(InferenceServer::new(PublicService { identity }).max_decoding_message_size(MAX_PUBLIC_BYTES));
    for (routes, services) in [(&mut internal, &INTERNAL_SERVICES), (&mut public, &PUBLIC_SERVICES)] {
        let reporter = standard::add_services(routes).map_err(|error| WorkerError::Serve(error.to_string()))?;
        tasks.spawn(standard::report_health(reporter, services, serving.clone()));
    }
    let tls = parts.tls;
    let listening = |listener, purpose| Listening::new(listener, tls.clone(), purpose);
    let grpc = |routes: RoutesBuilder, listener: Listening| {
        let incoming = listener.incoming();
        // One stream carries all of a router's prompts.
        let mut server = Server::builder().initial_stream_window_size(1 << 20).initial_connection_window_size(1 << 20);
        server.add_routes(routes.routes()).serve_with_incoming_shutdown(incoming, until_stopped())
    };
    let refresh = {
        let (engine, metrics) = (engine.clone(), parts.worker_metrics);
        Arc::new(move || metrics.show(&engine.load()))
    };
    let http = axum::serve(listening(listeners.http, Purpose::Http), probes::routes(parts.metrics, serving, refresh));
    let http = http.with_graceful_shutdown(until_stopped());

    let failed = |what: &str, reason: String| WorkerError::Serve(format!("{what}: {reason}"));
    let internal_port = listening(listeners.internal, Purpose::Internal);
    let public_port = listening(listeners.public, Purpose::Public);
    let services = async {
        tokio::try_join!(
            async { grpc(internal, internal_port).await.map_err(|e| failed("internal port", e.to_string())) },
            async { grpc(public, public_port).await.map_err(|e| failed("public port", e.to_string())) },
            async { http.await.map_err(|error| failed("HTTP port", error.to_string())) },
        )
        .map(|_| ())
    };
    tokio::pin!(services);
    let outcome = tokio::select! {
        result = &mut services => return result,
        outcome = run_to_end(&engine, shutdown, parts.grace) => outcome,
    };
    // Streams end with the engine; what they still carry are the ends of its sessions.
    stop.send_replace(true);
    match tokio::time::timeout(LAST_WORDS, services).await {
        Ok(result) => outcome.and(result),
        Err(_) => outcome,
    }
}

/// Waits for the order to shut down and drains, or for the engine to fail.
async fn run_to_end(engine: &EngineHandle, shutdown: impl Future<Output = ()>, grace: Duration) -> Result<()> {
    let mut health = engine.health();
    let failure = async {
        match health
            .wait_for(|health| matches!(health, EngineHealth::Failed { .. } | EngineHealth::Stopped))
            .await
            .as_deref()
        {
            Ok(EngineHealth::Failed { message }) => Err(WorkerError::Serve(format!("the engine failed: {message}"))),
            Ok(_) => Ok(()),
            Err(_) => Err(WorkerError::Serve("the engine's thread ended".to_owned())),
        }
    };
    tokio::pin!(failure);
    tokio::select! {
        outcome = &mut failure => return outcome,
        () = shutdown => {}
    }
    tracing::info!(?grace, "shutting down, running sessions may end");
    engine.drain();
    let idle = async {
        while !is_idle(engine) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::select! {
        outcome = &mut failure => return outcome,
        _ = tokio::time::timeout(grace, idle) => {}
    }
    engine.shutdown();
    failure.await
}

fn is_idle(engine: &EngineHandle) -> bool {
    let load = engine.load();
    load.running == 0 && load.waiting == 0 && load.parked == 0 && load.homes == 0
}

async fn follow_health(mut health: watch::Receiver<EngineHealth>, serving: watch::Sender<bool>) {
    loop {
        let serves = *health.borrow_and_update() == EngineHealth::Serving;
        serving.send_if_modified(|current| std::mem::replace(current, serves) != serves);
        if health.changed().await.is_err() {
            serving.send_replace(false);
            return;
        }
    }
}
