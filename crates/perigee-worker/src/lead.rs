//! The leader's part once its ranks are loaded: a first step to warm them, the engine on a thread of its own, the services
//! on a small runtime, and an end as soon as a rank is lost.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use perigee_backend::Backend;
use perigee_collectives::AbortHandle;
use perigee_engine::executor::{Executor, ExecutorError};
use perigee_engine::ranks::Ranks;
use perigee_engine::{Engine, EngineConfig};
use perigee_registry::ReplicaStatus;
use perigee_text::grammar::GrammarCompiler;
use perigee_text::{GenerationConfig, Tokenizer};
use perigee_tls::Tls;
use tokio::runtime::Handle;
use tokio::sync::{oneshot, watch};

use crate::addresses::published;
use crate::announce::Announcer;
use crate::config::WorkerConfig;
use crate::error::{Result, WorkerError};
use crate::events::{ReadyEvent, WorkerEvent, emit};
use crate::front::{Front, OpenFront, listen};
use crate::handoff::GrpcConnector;
use crate::identity::ReplicaIdentity;
use crate::load::{Opened, tokenizer};
use crate::metrics::WorkerMetrics;
use crate::moving::{self, LeaderPlace};
use crate::peers::Peers;
use crate::run::Shown;
use crate::serve::{LeaderParts, serve};
use crate::signals::told_to_end;
use crate::warm::warm;

/// How long a failing step may take to tell its sessions, once a rank is lost.
const LAST_STEP: Duration = Duration::from_millis(1200);

/// The other ranks, as the leader watches them.
pub(crate) struct Members {
    /// Process ids in rank order.
    pub(crate) pids: Vec<u32>,
    /// Breaks the exchange of activations; none in a group of one.
    pub(crate) abort: Option<AbortHandle>,
    /// Numbers of lost ranks.
    pub(crate) lost: Receiver<usize>,
}

/// Serves until told to end, or until a rank is lost.
///
/// # Errors
/// A port cannot be opened, or the replica broke.
pub(crate) fn run<B: Backend + 'static>(
    config: &WorkerConfig,
    opened: &Opened,
    mut ranks: Ranks<B>,
    members: Members,
    shown: Shown<'_>,
) -> Result<()> {
    shown.announcer.tell(ReplicaStatus::Warming)?;
    warm(&mut ranks, &config.engine.device)?;
    let Shown { announcer, front, tls, peers } = shown;
    let Some(OpenFront { front, http, public: Some(public), runtime }) = front else {
        return Err(WorkerError::Serve("a leader without its ports".to_owned()));
    };
    let place = Place { announcer, front, http, public, tls, peers };
    runtime.block_on(lead(config, opened, ranks, members, place))
}

/// What a leader has opened before its ranks were loaded.
struct Place<'a> {
    announcer: &'a Announcer,
    front: Front,
    http: SocketAddr,
    public: SocketAddr,
    tls: Option<Arc<Tls>>,
    peers: Peers,
}

async fn lead<B: Backend + 'static>(
    config: &WorkerConfig,
    opened: &Opened,
    ranks: Ranks<B>,
    members: Members,
    place: Place<'_>,
) -> Result<()> {
    let Place { announcer, front, http, public, tls, peers } = place;
    let internal = listen(config.internal, "--internal").await?;
    let tokenizer = tokenizer(&opened.spec)?;
    let weight_bytes = ranks.weight_bytes();
    let worker_metrics =
        WorkerMetrics::register(&front.metrics).map_err(|error| WorkerError::Serve(format!("metrics: {error}")))?;
    let generation = generation_config(opened, tokenizer.as_deref());
    let ready = ReadyEvent {
        replica: config.replica.clone(),
        incarnation: announcer.incarnation(),
        listen: public,
        internal: internal.local_addr().map_err(WorkerError::io("reading an address"))?,
        http,
        tp: config.tp,
        device: config.engine.device.to_string(),
        digest: opened.digest.clone(),
        pids: members.pids.clone(),
        weight_bytes: weight_bytes.clone(),
        slots: opened.limits.slots,
        pages: opened.limits.pages,
        max_model_len: opened.limits.max_model_len,
    };
    let own = LeaderPlace {
        replica: ready.replica.clone(),
        incarnation: ready.incarnation.clone(),
        tp: ready.tp,
        endpoint: published(config.advertise.as_deref(), ready.internal),
        digest: ready.digest.clone(),
    };
    let model = opened.source.config();
    let connector = GrpcConnector::new(Handle::current(), peers.clone(), &own.replica, &own.incarnation);
    let move_costs = ranks.geometry().map(|geometry| moving::move_costs(model, &geometry));
    let latents = (ranks.latent_reader(), ranks.geometry());
    let (moves, homes) = moving::set_up(own, model, &config.moves, Arc::new(connector), latents);
    let engine = Engine::start(
        Box::new(ranks),
        EngineConfig {
            token_budget: config.engine.step_tokens(),
            beside_tokens: config.engine.beside_tokens(),
            prompt_slowdown: config.engine.slowdown(),
            max_batch: config.engine.step_rows(),
            queue_limit: config.engine.queue_limit,
            eos_token_ids: generation.eos_token_ids.clone(),
            tokenizer: tokenizer.clone(),
            grammars: grammars(tokenizer.as_deref(), opened.limits.vocab),
            observer: Arc::new(worker_metrics.clone()),
            moves: Some(moves),
            ..EngineConfig::default()
        },
    )
    .map_err(|error| WorkerError::Serve(error.to_string()))?;

    let identity = ReplicaIdentity {
        replica: ready.replica.clone(),
        incarnation: ready.incarnation.clone(),
        model: public_name(&opened.spec),
        digest: opened.digest.clone(),
        vocab: opened.limits.vocab as u32,
        max_model_len: opened.limits.max_model_len as u32,
        eos_token_ids: generation.eos_token_ids.clone(),
        has_tokenizer: tokenizer.is_some(),
        generation,
        tp: config.tp as u32,
        device: ready.device.clone(),
        pids: members.pids.clone(),
        weight_bytes,
        step_tokens: opened.limits.step_tokens as u32,
        move_costs,
    };
    let lost = watch_ranks(members.lost, members.abort)?;
    tokio::pin!(lost);
    tokio::select! {
        published = announcer.ready(&ready, config.advertise.as_deref()) => published?,
        rank = &mut lost => return Err(rank_lost(rank)),
    }
    emit(config.supervised, &WorkerEvent::Ready(Box::new(ready)));
    tracing::info!(replica = config.replica, "serving");

    let grace = Duration::from_secs(config.grace);
    let (drain, mut ordered) = watch::channel(false);
    let links = peers.links().clone();
    let parts = LeaderParts { engine, identity, front, worker_metrics, drain, grace, homes, tls, links };
    let shutdown = async {
        tokio::select! {
            () = told_to_end() => {}
            // Its sender is this leader's.
            _ = ordered.wait_for(|drain| *drain) => {}
        }
        // The registry has taken this replica, so there is no refusal to hear of.
        let _ = announcer.tell(ReplicaStatus::Draining);
    };
    let serving = serve(parts, internal, shutdown);
    tokio::pin!(serving);
    tokio::select! {
        result = &mut serving => result,
        rank = lost => {
            // A step in flight has failed with it and is telling its sessions; an idle engine has nothing to tell.
            // Whichever it was, the replica is broken.
            // A replica that is ending in order closes its links too.
            if let Ok(Ok(())) = tokio::time::timeout(LAST_STEP, serving).await {
                return Ok(());
            }
            Err(rank_lost(rank))
        }
    }
}

fn rank_lost(rank: usize) -> WorkerError {
    let message = "the process was lost; the replica ends as a whole".to_string();
    WorkerError::Rank(ExecutorError { rank, message, fatal: true })
}

/// The model's own words on sampling and on the end of a text.
fn generation_config(opened: &Opened, tokenizer: Option<&Tokenizer>) -> GenerationConfig {
    if let Some(tokenizer) = tokenizer {
        return tokenizer.generation_config().clone();
    }
    let fallback =
        GenerationConfig { eos_token_ids: opened.source.config().eos.clone(), ..GenerationConfig::default() };
    match &opened.spec {
        perigee_model::ModelSpec::Directory(path) => GenerationConfig::load(path).unwrap_or(fallback),
        perigee_model::ModelSpec::Demo | perigee_model::ModelSpec::Random { .. } => fallback,
    }
}

/// Makes grammars for this model, unless its tokenizer cannot have any; requests with one are refused then.
fn grammars(tokenizer: Option<&Tokenizer>, vocab: usize) -> Option<Arc<GrammarCompiler>> {
    match GrammarCompiler::new(tokenizer?, vocab) {
        Ok(compiler) => Some(Arc::new(compiler)),
        Err(error) => {
            tracing::warn!(%error, "requests with a grammar are refused");
            None
        }
    }
}

/// The model as clients are told: the place of a checkpoint on this machine is not their business.
fn public_name(spec: &perigee_model::ModelSpec) -> String {
    let perigee_model::ModelSpec::Directory(path) = spec else { return spec.to_string() };
    // A path such as `.` has no last part of its own.
    let path = path.canonicalize().unwrap_or_else(|_| path.clone());
    path.file_name().map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned())
}

/// Completes with the number of the first rank that is lost; the exchange of activations is broken off at once, so that
/// no rank waits in it.
fn watch_ranks(lost: Receiver<usize>, abort: Option<AbortHandle>) -> Result<impl Future<Output = usize>> {
    let (sender, receiver) = oneshot::channel();
    let watch = move || {
        let Ok(rank) = lost.recv() else { return };
        if let Some(abort) = abort {
            abort.abort();
        }
        // The leader may be ending already.
        let _ = sender.send(rank);
    };
    std::thread::Builder::new()
        .name("perigee-ranks".into())
        .spawn(watch)
        .map_err(WorkerError::io("starting a thread"))?;
    Ok(async {
        match receiver.await {
            Ok(rank) => rank,
            // A group of one has nobody to lose.
            Err(_) => std::future::pending().await,
        }
    })
}
