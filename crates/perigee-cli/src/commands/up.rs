//! `perigee up`: a router and replicas on this machine, in one command. The workers are the same processes as in
//! production; only the registry is in memory. With a prompt it answers that and ends.

use std::io::{IsTerminal, Write};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use perigee_registry::{InProcessRegistry, ReplicaRecord};
use perigee_router::{Router, RouterListeners, RouterParts};
use perigee_telemetry::TelemetryOptions;
use perigee_tls::ServerTlsOptions;
use perigee_worker::events::{ReadyEvent, WorkerEvent};
use perigee_worker::{Device, EngineOptions, MoveOptions};
use tokio::net::TcpListener;
use tokio::sync::mpsc;

use crate::client::ClientArgs;
use crate::client::generate::GenerateArgs;
use crate::commands::router::RouterOptions;
use crate::commands::{at_least_one, hint, interrupted, warn_of_missing, without_faults};
use crate::launch::{ReplicaLaunch, ReplicaProcesses};
use crate::{DEFAULT_HTTP_PORT, DEFAULT_PORT};

/// Arguments of `up`.
#[derive(clap::Args)]
pub(crate) struct UpArgs {
    /// Replicas.
    #[arg(long, value_parser = at_least_one(), default_value_t = 2)]
    replicas: usize,
    /// Ranks of each replica.
    #[arg(long, value_parser = at_least_one(), default_value_t = 2)]
    tp: usize,
    /// Port of the router's gRPC service on 127.0.0.1; 0 takes a free one.
    #[arg(long, default_value_t = DEFAULT_PORT)]
    port: u16,
    /// Port of the OpenAI-compatible API, /health and /metrics on 127.0.0.1; 0 takes a free one.
    #[arg(long, default_value_t = DEFAULT_HTTP_PORT)]
    http_port: u16,
    /// Answer this and end: drawn as the model's generation_config.json says, the same every time.
    #[arg(long)]
    prompt: Option<String>,
    /// Most tokens of that answer.
    #[arg(long, default_value_t = 64)]
    max_tokens: u32,
    /// Print one JSON line when ready: {grpc, http, model, replicas: [{replica, tp, pids, http}]}.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    router: RouterOptions,
    #[command(flatten)]
    engine: EngineOptions,
    #[command(flatten)]
    moves: MoveOptions,
    /// Logs and traces of all processes.
    #[command(flatten)]
    pub(crate) telemetry: TelemetryOptions,
    /// TLS of the router's listeners and the replicas'.
    #[command(flatten)]
    tls: ServerTlsOptions,
}

/// What the starting threads tell.
enum Progress {
    Loading { replica: usize, rank: usize, done: usize, all: usize },
    Ready { replica: usize, event: Box<ReadyEvent> },
    Lost { replica: usize, reason: String },
}

impl UpArgs {
    /// What is wrong with values by themselves: told once, and not by every rank.
    pub(crate) fn faults(&self) -> Vec<String> {
        let mut faults = self.engine.faults();
        faults.extend(self.moves.faults(Duration::from_secs(self.engine.step_timeout)));
        faults
    }
}

pub(crate) fn run(args: UpArgs) -> anyhow::Result<()> {
    let mut faults = args.faults();
    faults.extend(args.tls.faults(&[]));
    without_faults(&faults)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(serve(args))
}

async fn serve(args: UpArgs) -> anyhow::Result<()> {
    // Ports first: a taken one should be told before models load.
    let grpc = bind(args.prompt.as_ref().map_or(args.port, |_| 0), "--port").await?;
    let http = bind(args.prompt.as_ref().map_or(args.http_port, |_| 0), "--http-port").await?;
    let addresses = (grpc.local_addr()?, http.local_addr()?);
    let tls = args.tls.load()?;
    let spec: perigee_model::ModelSpec = args.engine.model.parse()?;
    let tokenizer = perigee_worker::load::tokenizer(&spec)?;
    let template = perigee_worker::load::chat_template(&spec)?;
    warn_of_missing(&args.engine.model, tokenizer.is_some(), template.is_some());
    let digest = perigee_worker::load::served_digest(&args.engine, &spec)?;

    let started = Instant::now();
    let registry = InProcessRegistry::default();
    let (notices, mut progress) = mpsc::unbounded_channel();
    for replica in 0..args.replicas {
        start_replica(&args, replica, notices.clone())?;
    }
    let config = args.router.config(Some(digest));
    let parts = RouterParts::new(Arc::new(registry.clone()), tokenizer)?.with_template(template).with_tls(tls);
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let router = Router::start(config, parts)?;
    let mut attached = router.ready_replicas();
    let router = tokio::spawn(router.serve(RouterListeners { grpc, http }, async {
        // A dropped sender means the same as a sent stop.
        let _ = stopped.await;
    }));

    let mut ready = wait_until_ready(args.replicas, &mut progress, &registry).await?;
    ready.sort_by(|a, b| a.replica.cmp(&b.replica));
    tracing::info!(seconds = started.elapsed().as_secs_f64(), "replicas are ready");
    attached.wait_for(|count| *count >= args.replicas).await.context("the router ended before it had replicas")?;
    if matches!(spec, perigee_model::ModelSpec::Random { .. }) {
        eprintln!(
            "note: {} has random weights, so answers are noise; --model DIR serves a checkpoint",
            args.engine.model
        );
    }
    if let Some(prompt) = &args.prompt {
        let client = ClientArgs { router: addresses.0.to_string(), json: args.json, tls: args.tls.as_client() };
        let answered = GenerateArgs::repeatable(prompt.clone(), args.max_tokens, client).ask().await;
        // Before the registry is gone, which the router would tell as a fault.
        router.abort();
        let _ = router.await;
        return answered;
    }
    announce(&args, addresses, &ready);
    let ended = tokio::select! {
        () = watch_replicas(&mut progress, &registry) => Err(anyhow::anyhow!("no replica is left")),
        signal = interrupted() => signal,
    };
    drop(stop);
    router.await?.map_err(anyhow::Error::from).and(ended)
}

async fn bind(port: u16, option: &str) -> anyhow::Result<TcpListener> {
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    TcpListener::bind(address).await.with_context(|| format!("{option}: listening at {address}"))
}

/// Starts a replica on a thread that follows it to its end.
fn start_replica(args: &UpArgs, replica: usize, notices: mpsc::UnboundedSender<Progress>) -> anyhow::Result<()> {
    let mut engine = args.engine.clone();
    if engine.device == Device::Cpu && engine.threads.is_none() {
        engine.threads = Some(engine.threads(args.tp * args.replicas));
    }
    if engine.device != Device::Cpu {
        engine.memory_fraction /= engine.device.replicas_beside(replica, (args.replicas, args.tp)) as f64;
        engine.device = engine.device.of_replica(replica, args.tp);
    }
    let mut arguments = vec![format!("--grace={}", args.router.grace)];
    arguments.extend(args.tls.to_arguments());
    arguments.extend(args.telemetry.to_arguments());
    let leader_arguments = args.moves.to_arguments();
    let (name, tp) = (format!("replica-{replica}"), args.tp);
    let launch = ReplicaLaunch { replica: name, tp, engine, arguments, leader_arguments };
    let work = move || {
        let follow = || -> anyhow::Result<()> {
            let mut processes = ReplicaProcesses::start(&launch)?;
            loop {
                let notice = match processes.next_event()? {
                    WorkerEvent::Loading { rank, done, all } => Progress::Loading { replica, rank, done, all },
                    WorkerEvent::Ready(event) => Progress::Ready { replica, event },
                    other => anyhow::bail!("{} reported {other:?}", launch.replica),
                };
                if notices.send(notice).is_err() {
                    return Ok(());
                }
            }
        };
        if let Err(error) = follow() {
            // Nobody listens when the whole cluster is ending.
            let _ = notices.send(Progress::Lost { replica, reason: format!("{error:#}") });
        }
    };
    std::thread::Builder::new().name(format!("perigee-replica-{replica}")).spawn(work)?;
    Ok(())
}

async fn wait_until_ready(
    replicas: usize,
    progress: &mut mpsc::UnboundedReceiver<Progress>,
    registry: &InProcessRegistry,
) -> anyhow::Result<Vec<ReadyEvent>> {
    let shown = std::io::stderr().is_terminal();
    let mut ready = Vec::new();
    while ready.len() < replicas {
        match progress.recv().await {
            Some(Progress::Loading { replica, rank, done, all }) => {
                if shown {
                    eprint!("\r\x1b[Kreplica-{replica} rank {rank}: layer {done} of {all}");
                }
            }
            Some(Progress::Ready { replica, event }) => {
                let end = if shown { "\r\x1b[K" } else { "" };
                eprintln!("{end}replica-{replica} ready: {} ranks, pids {:?}", event.tp, event.pids);
                registry.register(record(&event))?;
                ready.push(*event);
            }
            Some(Progress::Lost { replica, reason }) => anyhow::bail!("replica-{replica} did not start: {reason}"),
            None => anyhow::bail!("no replica is starting"),
        }
    }
    Ok(ready)
}

/// Removes replicas that end from the registry; returns when none is left.
async fn watch_replicas(progress: &mut mpsc::UnboundedReceiver<Progress>, registry: &InProcessRegistry) {
    let mut left = registry.records().len();
    while left > 0 {
        match progress.recv().await {
            Some(Progress::Lost { replica, reason }) => {
                registry.remove(&format!("replica-{replica}"));
                left -= 1;
                eprintln!("perigee: replica-{replica} is gone: {reason}");
            }
            Some(_) => {}
            None => return,
        }
    }
}

fn record(event: &ReadyEvent) -> ReplicaRecord {
    ReplicaRecord {
        incarnation: event.incarnation.clone(),
        endpoint: event.listen.to_string(),
        digest: event.digest.clone(),
        tp: event.tp as u32,
        device: event.device.clone(),
        pids: event.pids.clone(),
        weight_bytes: event.weight_bytes.clone(),
        ..ReplicaRecord::new(event.replica.clone(), event.internal.to_string())
    }
}

fn announce(args: &UpArgs, (grpc, http): (SocketAddr, SocketAddr), ready: &[ReadyEvent]) {
    if args.json {
        let replicas: Vec<_> = ready
            .iter()
            .map(|event| {
                let http = event.http.to_string();
                serde_json::json!({"replica": event.replica, "tp": event.tp, "pids": event.pids, "http": http})
            })
            .collect();
        let line = serde_json::json!({
            "grpc": grpc.to_string(), "http": http.to_string(), "model": args.engine.model, "replicas": replicas,
        });
        println!("{line}");
    } else {
        println!("Perigee serves {} on {} replicas of {} ranks.", args.engine.model, args.replicas, args.tp);
        println!("  gRPC   {grpc}");
        let (scheme, client) = match (&args.tls.tls_cert, &args.tls.tls_ca) {
            (None, _) => ("http", String::new()),
            (Some(_), None) => ("https", " --tls-ca AUTHORITY".to_owned()),
            (Some(_), Some(ca)) => ("https", format!(" --tls-ca {}", ca.display())),
        };
        println!("  HTTP   {scheme}://{http}/v1 (OpenAI-compatible), /health and /metrics");
        println!("Ask something from another terminal:");
        println!("  {}", hint::request(&args.engine.model, &grpc.to_string(), &client));
        println!("Stop with Ctrl-C.");
    }
    // A closed pipe is the reader's business.
    let _ = std::io::stdout().flush();
}
