//! A leader's services from the first router to the drain: the internal port for routers and replicas, beside the front
//! that was open before. The engine, the front and the listener are made by whoever starts it.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use perigee_engine::request::Load;
use perigee_engine::{EngineHandle, EngineHealth};
use perigee_proto::internal::replica_server::ReplicaServer;
use perigee_proto::standard;
use perigee_registry::ReplicaStatus;
use perigee_telemetry::Readiness;
use perigee_tls::{Listening, Purpose, Tls};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_stream::Stream;
use tonic::service::RoutesBuilder;
use tonic::transport::Server;
use tonic::transport::server::Connected;

use crate::attend::{HomeParts, HomeServices};
use crate::error::{Result, WorkerError};
use crate::front::{Front, readiness};
use crate::identity::ReplicaIdentity;
use crate::links::Links;
use crate::metrics::WorkerMetrics;
use crate::peers::WINDOW_BYTES;
use crate::service::{Measures, ReplicaService};

/// Largest message from a router or a replica: the longest prompt, or a layer's queries of a whole batch.
const MAX_INTERNAL_BYTES: usize = 64 << 20;
/// Largest frame, so that a session's last page is a few of them.
const FRAME_BYTES: u32 = 256 << 10;
/// Names under which health is reported, beside the empty one.
const INTERNAL_SERVICES: [&str; 1] = ["perigee.internal.v1.Replica"];
/// How long the streams may take to carry the last events of an engine that ended.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// A leader's engine and what it says about itself.
pub struct LeaderParts {
    /// The running engine.
    pub engine: EngineHandle,
    /// What it serves.
    pub identity: ReplicaIdentity,
    /// What anybody may look at.
    pub front: Front,
    /// The gauges of its /metrics; the same value is the engine's observer.
    pub worker_metrics: WorkerMetrics,
    /// Set by a router that was told to have this replica drain; whoever made it completes `shutdown` then.
    pub drain: watch::Sender<bool>,
    /// How long running sessions may go on after the order to shut down.
    pub grace: Duration,
    /// What other replicas' questions are answered from; none where the device cannot.
    pub homes: Option<HomeParts>,
    /// TLS of the internal port; none where it is plain TCP.
    pub tls: Option<Arc<Tls>>,
    /// What is measured of the ways to other replicas.
    pub links: Links,
}

/// Serves routers and replicas at `internal` until `shutdown` completes, then drains: no new requests, and the grace time
/// for running ones.
///
/// # Errors
/// [`WorkerError::Serve`] where a listener fails, or the engine does: the replica must be started anew.
pub async fn serve(parts: LeaderParts, internal: TcpListener, shutdown: impl Future<Output = ()> + Send) -> Result<()> {
    let incoming = Listening::new(internal, parts.tls.clone(), Purpose::Internal).incoming();
    serve_over(parts, incoming, shutdown).await
}

/// The same over connections of any kind, which a simulation opens in its own way.
///
/// # Errors
/// As [`serve`].
pub async fn serve_over<C>(
    parts: LeaderParts,
    incoming: impl Stream<Item = std::io::Result<C>>,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<()>
where
    C: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
{
    let LeaderParts { engine, identity, mut front, worker_metrics, drain, grace, homes, tls: _, links } = parts;
    let identity = Arc::new(identity);
    let refresh = {
        let (engine, metrics) = (engine.clone(), worker_metrics.clone());
        Arc::new(move || metrics.show(&engine.load()))
    };
    front.introduce(identity.clone(), refresh);
    let closing = front.closing();
    let mut tasks = JoinSet::new();
    tasks.spawn(follow_health(engine.health(), front.readiness()));

    let mut routes = RoutesBuilder::default();
    let homes = homes.map(HomeServices::start).transpose();
    let homes = homes.map_err(WorkerError::io("starting the threads that answer other replicas"))?;
    let measures = Measures { metrics: worker_metrics, links };
    let replica = ReplicaService::new(engine.clone(), identity, homes, measures, drain);
    routes.add_service(ReplicaServer::new(replica).max_decoding_message_size(MAX_INTERNAL_BYTES));
    let reporter = standard::add_services(&mut routes).map_err(|error| WorkerError::Serve(error.to_string()))?;
    let health = front.readiness().subscribe();
    tasks.spawn(standard::report_health(reporter, &INTERNAL_SERVICES, health, |now: &Readiness| now.is_ready));
    let mut closed = closing.subscribe();
    let until_closed = async move {
        // An error would mean that the front is gone, and this with it.
        let _ = closed.wait_for(|closed| *closed).await;
    };
    // One stream carries all of a router's prompts, or a session that stands still until it is here.
    let mut server = Server::builder()
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .max_frame_size(FRAME_BYTES);
    let internal = server.add_routes(routes.routes()).serve_with_incoming_shutdown(incoming, until_closed);
    let services = async {
        let internal = async { internal.await.map_err(|error| WorkerError::Serve(format!("internal port: {error}"))) };
        tokio::try_join!(internal, front.ended()).map(|_| ())
    };
    tokio::pin!(services);
    let outcome = tokio::select! {
        result = &mut services => return result,
        outcome = run_to_end(&engine, shutdown, grace) => outcome,
    };
    // Streams end with the engine; what they still carry are the ends of its sessions.
    closing.send_replace(true);
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
    tracing::info!(?grace, "shutting down, running sessions may leave or end");
    engine.drain();
    let idle = async {
        while !is_idle(engine) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::select! {
        outcome = &mut failure => return outcome,
        in_time = tokio::time::timeout(grace, idle) => {
            if in_time.is_err() {
                let Load { running, waiting, parked, homes, .. } = engine.load();
                tracing::warn!(running, waiting, parked, homes, "the grace time is over, what is left here ends");
            }
        }
    }
    engine.shutdown();
    failure.await
}

fn is_idle(engine: &EngineHandle) -> bool {
    let load = engine.load();
    load.running == 0 && load.waiting == 0 && load.parked == 0 && load.homes == 0
}

/// Tells probes how the engine is, as long as it lives.
async fn follow_health(mut health: watch::Receiver<EngineHealth>, told: watch::Sender<Readiness>) {
    loop {
        let status = match &*health.borrow_and_update() {
            EngineHealth::Serving => ReplicaStatus::Ready,
            EngineHealth::Draining => ReplicaStatus::Draining,
            EngineHealth::Stopped | EngineHealth::Failed { .. } => ReplicaStatus::Gone,
        };
        let now = readiness(status);
        told.send_if_modified(|current| std::mem::replace(current, now) != now);
        if health.changed().await.is_err() {
            told.send_replace(readiness(ReplicaStatus::Gone));
            return;
        }
    }
}
