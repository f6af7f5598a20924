//! One worker process from start to end: check the options, show itself, open the model, meet the other ranks, load, then
//! lead or follow.

use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use perigee_backend::Backend;
use perigee_engine::ranks::Ranks;
use perigee_registry::ReplicaStatus;
use perigee_tls::Tls;

use crate::announce::Announcer;
use crate::config::WorkerConfig;
use crate::device::Device;
use crate::error::{Result, WorkerError};
use crate::events;
use crate::front::{self, OpenFront};
use crate::group::{Control, Group, form};
use crate::lead;
use crate::load::{Opened, cpu_backend, open};
use crate::moving;
use crate::peers::Peers;
use crate::score;
use crate::signals;

/// Runs a worker until it is told to end.
///
/// # Errors
/// The options, the model or another rank make it impossible to go on.
pub fn run(config: &WorkerConfig) -> Result<()> {
    let faults = config.faults();
    if !faults.is_empty() {
        return Err(WorkerError::Options(faults.join("\n")));
    }
    if config.supervised {
        events::end_with_parent();
    }
    let tls = config.tls.load()?;
    let front = front::open(config, tls.as_ref())?;
    let opened = open(config)?;
    if let Some(plan) = opened.memory.filter(|_| config.rank == 0 && config.score_job.is_none()) {
        // In one write: the processes of a replica share one standard error. Nobody reads it where it is closed.
        let _ = std::io::stderr().write_all(format!("{}: memory {plan}\n", config.replica).as_bytes());
    }
    let identity = opened.identity(config);
    let probes = front.as_ref().map(|open| open.front.readiness());
    let announcer = Announcer::begin(config, &opened, probes)?;
    let peers = Peers::new(tls.clone());
    let shown = Shown { announcer: &announcer, front, tls, peers };
    match &config.engine.device {
        Device::Cpu => {
            let mut group = form(config, &identity, shown.tls.as_deref())?;
            let collective = std::mem::replace(&mut group.collective, Box::new(perigee_collectives::Solo));
            let backend = cpu_backend(config, collective);
            run_rank(config, opened, backend, group, shown)
        }
        Device::Cuda(_) => run_cuda(config, opened, &identity, shown),
    }
}

/// How this rank shows itself to the registry, to probes and to its peers.
pub(crate) struct Shown<'a> {
    pub(crate) announcer: &'a Announcer,
    /// None on a rank that shows nothing.
    pub(crate) front: Option<OpenFront>,
    pub(crate) tls: Option<Arc<Tls>>,
    /// How it reaches other replicas.
    pub(crate) peers: Peers,
}

#[cfg(feature = "cuda")]
fn run_cuda(config: &WorkerConfig, opened: Opened, identity: &str, shown: Shown<'_>) -> Result<()> {
    let card = config.engine.card(config.rank).unwrap_or(0);
    // Before the ranks meet: a machine without a usable card should say so at once.
    perigee_cuda::check(card)?;
    let mut group = form(config, identity, shown.tls.as_deref())?;
    let collective = std::mem::replace(&mut group.collective, Box::new(perigee_collectives::Solo));
    let options = perigee_cuda::Options { device: card, precision: config.engine.activation() };
    let backend = perigee_cuda::CudaBackend::open(options, collective)?;
    run_rank(config, opened, backend, group, shown)
}

#[cfg(not(feature = "cuda"))]
fn run_cuda(config: &WorkerConfig, _: Opened, _: &str, _: Shown<'_>) -> Result<()> {
    // The crate without its feature only knows why it cannot help.
    Ok(perigee_cuda::check(config.engine.card(config.rank).unwrap_or(0))?)
}

fn run_rank<B: Backend + 'static>(
    config: &WorkerConfig,
    opened: Opened,
    backend: B,
    group: Group,
    shown: Shown<'_>,
) -> Result<()> {
    shown.announcer.tell(ReplicaStatus::Loading)?;
    let mut rank = opened.load(config, backend)?;
    moving::let_ask(&mut rank, opened.source.config(), shown.peers.clone())?;
    match group.control {
        Control::Follower(mut link) => {
            shown.announcer.tell(ReplicaStatus::Ready)?;
            signals::follow_to_the_end(Duration::from_secs(config.grace))?;
            Ok(rank.follow(link.as_mut())?)
        }
        Control::Leader { links, lost } => {
            let mut ranks = Ranks::new(rank, links, config.step_timeout())?;
            if let Some(job) = &config.score_job {
                let result = score::run(&mut ranks, &opened, job, config.supervised);
                ranks.shutdown();
                return result;
            }
            let members = lead::Members { pids: group.pids, abort: group.abort, lost };
            lead::run(config, &opened, ranks, members, shown)
        }
    }
}
