//! What a rank shows from its start on, long before it serves: probes and metrics, and on the leader's public port health,
//! reflection and, once it is known, the model. Whether the rank takes work is told to it; it decides nothing.

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};

use perigee_proto::standard;
use perigee_proto::v1::inference_server::InferenceServer;
use perigee_registry::ReplicaStatus;
use perigee_telemetry::probes::Refresh;
use perigee_telemetry::{Metrics, Readiness, probes};
use perigee_tls::{Listening, Purpose, Tls, serve_http};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tonic::service::RoutesBuilder;
use tonic::transport::Server;

use crate::config::WorkerConfig;
use crate::error::{Result, WorkerError};
use crate::identity::ReplicaIdentity;
use crate::public::PublicService;

/// Largest message from a client: they ask only who is there.
const MAX_PUBLIC_BYTES: usize = 64 << 10;
/// Names under which health is reported, beside the empty one.
const PUBLIC_SERVICES: [&str; 1] = ["perigee.v1.Inference"];

/// Where a rank is, as probes tell it.
pub(crate) fn readiness(status: ReplicaStatus) -> Readiness {
    match status {
        ReplicaStatus::Ready => Readiness::READY,
        other => Readiness::not_ready(other.as_str()),
    }
}

/// A rank's front with the runtime that it answers on, and where.
pub(crate) struct OpenFront {
    pub(crate) front: Front,
    pub(crate) http: SocketAddr,
    /// None on a rank that does not lead.
    pub(crate) public: Option<SocketAddr>,
    /// What else this process serves runs here too.
    pub(crate) runtime: Runtime,
}

/// Opens the front of a rank that serves; none where the rank shows nothing.
///
/// # Errors
/// A port cannot be opened.
pub(crate) fn open(config: &WorkerConfig, tls: Option<&Arc<Tls>>) -> Result<Option<OpenFront>> {
    let leads = config.rank == 0;
    if config.score_job.is_some() || !(leads || config.http.port() != 0) {
        return Ok(None);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(if leads { 2 } else { 1 })
        .enable_all()
        .build()
        .map_err(WorkerError::io("starting the runtime"))?;
    let (front, http, public) = runtime.block_on(async {
        let public = if leads { Some(listen(config.listen, "--listen").await?) } else { None };
        let http = listen(config.http, "--http").await?;
        let address = |listener: &TcpListener| listener.local_addr().map_err(WorkerError::io("reading an address"));
        let addresses = (address(&http)?, public.as_ref().map(address).transpose()?);
        let front = Front::start(FrontListeners { public, http }, Metrics::default(), tls)?;
        Ok::<_, WorkerError>((front, addresses.0, addresses.1))
    })?;
    Ok(Some(OpenFront { front, http, public, runtime }))
}

/// Opens a port that `option` names.
pub(crate) async fn listen(address: SocketAddr, option: &str) -> Result<TcpListener> {
    TcpListener::bind(address).await.map_err(WorkerError::io(format!("{option}: listening at {address}")))
}

/// The ports, bound by whoever starts the rank.
#[derive(Debug)]
pub struct FrontListeners {
    /// For health, reflection and the model; only a leader has it.
    pub public: Option<TcpListener>,
    /// For /live, /health and /metrics.
    pub http: TcpListener,
}

/// The services on those ports. They end when it is dropped.
pub struct Front {
    /// What /metrics shows.
    pub metrics: Metrics,
    readiness: watch::Sender<Readiness>,
    identity: Arc<OnceLock<Arc<ReplicaIdentity>>>,
    refresh: Arc<OnceLock<Refresh>>,
    closing: watch::Sender<bool>,
    services: JoinSet<Result<()>>,
}

impl Front {
    /// Begins to answer on the current runtime, as a rank that is forming.
    ///
    /// # Errors
    /// [`WorkerError::Serve`] for descriptors that do not load.
    pub fn start(listeners: FrontListeners, metrics: Metrics, tls: Option<&Arc<Tls>>) -> Result<Self> {
        let (readiness, _) = watch::channel(readiness(ReplicaStatus::Forming));
        let (closing, closed) = watch::channel(false);
        let mut front = Self {
            metrics,
            readiness,
            identity: Arc::default(),
            refresh: Arc::default(),
            closing,
            services: JoinSet::new(),
        };
        let until_closed = || {
            let mut closed = closed.clone();
            async move {
                // An error would mean that the front was dropped, and this service with it.
                let _ = closed.wait_for(|closed| *closed).await;
            }
        };
        let listening = |listener, purpose| Listening::new(listener, tls.cloned(), purpose);

        if let Some(public) = listeners.public {
            let mut routes = RoutesBuilder::default();
            let service = PublicService { identity: front.identity.clone() };
            routes.add_service(InferenceServer::new(service).max_decoding_message_size(MAX_PUBLIC_BYTES));
            let reporter =
                standard::add_services(&mut routes).map_err(|error| WorkerError::Serve(error.to_string()))?;
            let readiness = front.readiness.subscribe();
            let report = standard::report_health(reporter, &PUBLIC_SERVICES, readiness, |now| now.is_ready);
            let incoming = listening(public, Purpose::Public).incoming();
            let serve =
                Server::builder().add_routes(routes.routes()).serve_with_incoming_shutdown(incoming, until_closed());
            front.services.spawn(async {
                tokio::select! {
                    ended = serve => ended.map_err(|error| WorkerError::Serve(format!("public port: {error}"))),
                    // It ends with the front.
                    () = report => Ok(()),
                }
            });
        }
        let refresh = front.refresh.clone();
        let refresh: Refresh = Arc::new(move || refresh.get().into_iter().for_each(|refresh| refresh()));
        let routes = probes::routes(front.metrics.clone(), front.readiness.subscribe(), refresh);
        let http = serve_http(listening(listeners.http, Purpose::Http), routes, until_closed());
        front.services.spawn(async {
            http.await;
            Ok(())
        });
        Ok(front)
    }

    /// Says who is here, and how gauges are brought up to date. Only the first word counts.
    pub(crate) fn introduce(&self, identity: Arc<ReplicaIdentity>, refresh: Refresh) {
        // Either is set once, by the one that leads.
        let _ = self.identity.set(identity);
        let _ = self.refresh.set(refresh);
    }

    /// Where to tell how far the rank is.
    pub(crate) fn readiness(&self) -> watch::Sender<Readiness> {
        self.readiness.clone()
    }

    /// Where to tell that the ports are to close.
    pub(crate) fn closing(&self) -> watch::Sender<bool> {
        self.closing.clone()
    }

    /// Completes when all ports are closed.
    ///
    /// # Errors
    /// [`WorkerError::Serve`] as soon as one fails.
    pub(crate) async fn ended(&mut self) -> Result<()> {
        while let Some(ended) = self.services.join_next().await {
            ended.map_err(|error| WorkerError::Serve(error.to_string()))??;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probes_name_every_state_as_the_registry_does() {
        for status in [
            ReplicaStatus::Forming,
            ReplicaStatus::Loading,
            ReplicaStatus::Warming,
            ReplicaStatus::Ready,
            ReplicaStatus::Draining,
            ReplicaStatus::Gone,
        ] {
            let told = readiness(status);
            assert_eq!((told.state, told.is_ready), (status.as_str(), status == ReplicaStatus::Ready));
        }
    }
}
