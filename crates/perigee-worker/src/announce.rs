//! Tells the registry, and this rank's probes, where the replica is from before its ranks meet to its end. The registry has
//! a thread of its own: one that is away delays only the moment when the replica is ready. What routers learn over their
//! streams is not repeated here.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{SystemTime, UNIX_EPOCH};

use perigee_registry::{Registry, ReplicaRecord, ReplicaStatus};
use perigee_telemetry::Readiness;
use tokio::sync::{oneshot, watch};

use crate::addresses::published;
use crate::config::WorkerConfig;
use crate::error::{Result, WorkerError};
use crate::events::ReadyEvent;
use crate::front::readiness;
use crate::load::Opened;

/// How far the registry is behind what it should be told.
#[derive(Debug, Clone, PartialEq)]
enum Told {
    /// It has not answered yet.
    Nothing,
    /// It has this record, or keeps trying to take it.
    Record(Box<ReplicaRecord>),
    /// It refused the replica.
    Refused(String),
}

/// This replica's record, and the thread that publishes it. Dropping it withdraws the record.
pub(crate) struct Announcer {
    wanted: watch::Sender<ReplicaRecord>,
    /// None where this rank has no probes.
    probes: Option<watch::Sender<Readiness>>,
    /// None where somebody else registers the replica.
    thread: Option<Thread>,
}

struct Thread {
    told: watch::Receiver<Told>,
    stop: oneshot::Sender<()>,
    handle: JoinHandle<()>,
}

impl Announcer {
    /// Begins with a forming replica, in the registry only on the leader of one that is to be published.
    ///
    /// # Errors
    /// [`WorkerError::Options`] for `--registry`.
    pub(crate) fn begin(
        config: &WorkerConfig,
        opened: &Opened,
        probes: Option<watch::Sender<Readiness>>,
    ) -> Result<Self> {
        let record = ReplicaRecord {
            incarnation: incarnation(),
            digest: opened.digest.clone(),
            tp: config.tp as u32,
            device: config.engine.device.to_string(),
            status: ReplicaStatus::Forming,
            ..ReplicaRecord::new(config.replica.clone(), "")
        };
        let (wanted, changes) = watch::channel(record);
        let publishes = config.rank == 0 && config.score_job.is_none();
        let Some(specification) = config.registry.as_deref().filter(|_| publishes) else {
            return Ok(Self { wanted, probes, thread: None });
        };
        let registry = perigee_registry::open(specification, &config.etcd)
            .map_err(|error| WorkerError::Options(format!("--registry: {error}")))?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(WorkerError::io("starting the runtime of the registry"))?;
        let (stop, stopped) = oneshot::channel();
        let (telling, told) = watch::channel(Told::Nothing);
        let publish = move || {
            runtime.block_on(async {
                tokio::select! {
                    () = announce(registry, changes, telling) => {}
                    // Dropped, never sent.
                    _ = stopped => {}
                }
            });
        };
        let handle = std::thread::Builder::new()
            .name("perigee-announce".to_owned())
            .spawn(publish)
            .map_err(WorkerError::io("starting the thread of the registry"))?;
        Ok(Self { wanted, probes, thread: Some(Thread { told, stop, handle }) })
    }

    /// What tells this start of the replica from others.
    pub(crate) fn incarnation(&self) -> String {
        self.wanted.borrow().incarnation.clone()
    }

    /// Passes on where the replica is now, without waiting for the registry. That it is ready is told by
    /// [`Self::ready`] on a leader, and its probes follow its engine from then on.
    ///
    /// # Errors
    /// [`WorkerError::Serve`] where the registry has refused the replica.
    pub(crate) fn tell(&self, status: ReplicaStatus) -> Result<()> {
        self.wanted.send_modify(|record| record.status = status);
        if let Some(probes) = &self.probes {
            probes.send_replace(readiness(status));
        }
        match self.thread.as_ref().map(|thread| thread.told.borrow().clone()) {
            Some(Told::Refused(reason)) => Err(WorkerError::Serve(reason)),
            _ => Ok(()),
        }
    }

    /// Publishes a replica that takes requests, under the host `advertise` or where it listens, and waits until the
    /// registry knows of it.
    ///
    /// # Errors
    /// [`WorkerError::Serve`] where the registry refuses the replica.
    pub(crate) async fn ready(&self, ready: &ReadyEvent, advertise: Option<&str>) -> Result<()> {
        self.wanted.send_modify(|record| {
            record.status = ReplicaStatus::Ready;
            record.internal = published(advertise, ready.internal);
            record.endpoint = published(advertise, ready.listen);
            record.pids = ready.pids.clone();
            record.weight_bytes = ready.weight_bytes.clone();
        });
        let Some(thread) = &self.thread else { return Ok(()) };
        let wanted = Told::Record(Box::new(self.wanted.borrow().clone()));
        let mut told = thread.told.clone();
        let told = told.wait_for(|told| *told == wanted || matches!(told, Told::Refused(_))).await;
        match told.as_deref() {
            Ok(Told::Refused(reason)) => Err(WorkerError::Serve(reason.clone())),
            Ok(_) => Ok(()),
            Err(_) => Err(WorkerError::Serve("the thread of the registry ended".to_owned())),
        }
    }
}

impl Drop for Announcer {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            drop(thread.stop);
            if thread.handle.join().is_err() {
                tracing::warn!("the thread of the registry broke; the replica's record may stay for a while");
            }
        }
    }
}

/// Publishes, and passes on every change, until it is dropped.
async fn announce(registry: Arc<dyn Registry>, mut changes: watch::Receiver<ReplicaRecord>, told: watch::Sender<Told>) {
    let first = changes.borrow_and_update().clone();
    let publication = match registry.publish(first.clone()).await {
        Ok(publication) => publication,
        Err(error) => {
            told.send_replace(Told::Refused(error.to_string()));
            return;
        }
    };
    told.send_replace(Told::Record(Box::new(first)));
    while changes.changed().await.is_ok() {
        let record = changes.borrow_and_update().clone();
        let status = record.status.as_str();
        match publication.update(record.clone()).await {
            Ok(()) => tracing::debug!(status, "the registry knows"),
            // The publication goes on trying.
            Err(error) => tracing::warn!(status, %error, "the registry does not know yet"),
        }
        told.send_replace(Told::Record(Box::new(record)));
    }
}

/// Tells starts of a replica apart: when it started and as which process.
fn incarnation() -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    format!("{:x}-{:x}", since.as_nanos(), std::process::id())
}
