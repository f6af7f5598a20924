//! `perigee router`: the front door as a process of its own. Replicas are found in the registry.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use perigee_registry::EtcdOptions;
use perigee_router::{Balance, MoveTimes, ResumeKey, RouterConfig, RouterListeners, RouterParts};
use perigee_telemetry::TelemetryOptions;
use perigee_tls::ServerTlsOptions;
use tokio::net::TcpListener;

use crate::commands::{UsageError, at_least_one, interrupted, one_for_every, runtime, warn_of_missing, without_faults};
use crate::{DEFAULT_HTTP_PORT, DEFAULT_PORT};

const HOUR_MS: u64 = 3_600_000;
/// Processors for each thread of a router. One thread relays the tokens of many replicas; more of them take work of each other,
/// and a token costs half as much again and more.
const PROCESSORS_PER_THREAD: usize = 16;

/// What a router does with requests, wherever it runs.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct RouterOptions {
    /// Milliseconds after which a silent replica counts as lost.
    #[arg(long, default_value_t = 2000, value_parser = clap::value_parser!(u64).range(100..=HOUR_MS))]
    lease_ms: u64,
    /// Seconds that running requests may go on after the order to end.
    #[arg(long, default_value_t = 30)]
    pub(crate) grace: u64,
    /// Milliseconds that a moving session may take until its target holds it; then the move is taken back.
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u64).range(10..=HOUR_MS))]
    prepare_ms: u64,
    /// Milliseconds that a session whose replica was lost may wait for another one; then its request fails. One with a
    /// deadline waits until that.
    #[arg(long, default_value_t = 30_000, value_parser = clap::value_parser!(u64).range(..=24 * HOUR_MS))]
    replay_ms: u64,
    /// Whether sessions move by themselves to even out the replicas' loads: dry-run logs what would move, and why.
    #[arg(long, value_enum, default_value_t = BalanceOption::Off)]
    balance: BalanceOption,
}

/// [`Balance`] on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum BalanceOption {
    Off,
    DryRun,
    On,
}

impl RouterOptions {
    /// The router's settings, for one model where it is known.
    pub(crate) fn config(&self, model_digest: Option<String>) -> RouterConfig {
        RouterConfig {
            lease: Duration::from_millis(self.lease_ms),
            grace: Duration::from_secs(self.grace),
            moves: MoveTimes {
                prepare: Duration::from_millis(self.prepare_ms),
                replay: Duration::from_millis(self.replay_ms),
                ..MoveTimes::default()
            },
            balance: match self.balance {
                BalanceOption::Off => Balance::Off,
                BalanceOption::DryRun => Balance::DryRun,
                BalanceOption::On => Balance::On,
            },
            model_digest,
            ..RouterConfig::default()
        }
    }
}

/// Arguments of `router`.
#[derive(clap::Args)]
pub(crate) struct RouterArgs {
    /// Address of the gRPC service.
    #[arg(long, default_value_t = SocketAddr::from(([127, 0, 0, 1], DEFAULT_PORT)))]
    listen: SocketAddr,
    /// Address of the OpenAI-compatible API, /live, /health and /metrics. /health is 200 while requests are taken, else 503
    /// and waiting or draining.
    #[arg(long, default_value_t = SocketAddr::from(([127, 0, 0, 1], DEFAULT_HTTP_PORT)))]
    http: SocketAddr,
    /// Where replicas are found: etcd://HOST:PORT,HOST:PORT[/PREFIX], or file:PATH, a JSON file
    /// {"replicas": [{"replica": NAME, "internal": HOST:PORT}]}.
    #[arg(long)]
    registry: String,
    /// How etcd is reached.
    #[command(flatten)]
    etcd: EtcdOptions,
    /// The model whose tokenizer encodes prompts and whose template renders chats, and the only one that is routed to; without it clients send token ids.
    #[arg(long)]
    model: Option<String>,
    #[command(flatten)]
    options: RouterOptions,
    /// File with the key that signs resume tokens, at least 32 bytes, the same at all routers; without it a resumable request
    /// can only go on at the router that began it.
    #[arg(long, value_name = "FILE")]
    resume_key_file: Option<PathBuf>,
    /// Threads that carry streams. One relays some 400,000 tokens a second; those that are not needed cost time, because they
    /// wake each other for every few tokens. Default: one for every sixteen processors.
    #[arg(long, value_parser = at_least_one())]
    threads: Option<usize>,
    /// Logs and traces.
    #[command(flatten)]
    pub(crate) telemetry: TelemetryOptions,
    /// TLS of both listeners, and towards replicas.
    #[command(flatten)]
    tls: ServerTlsOptions,
}

/// The key in a file, byte for byte.
fn resume_key(path: &Path) -> anyhow::Result<ResumeKey> {
    let told = |error: String| UsageError(format!("--resume-key-file: {}: {error}", path.display()));
    let secret = std::fs::read(path).map_err(|error| told(error.to_string()))?;
    Ok(ResumeKey::new(&secret).map_err(|error| told(error.to_string()))?)
}

pub(crate) fn run(args: RouterArgs) -> anyhow::Result<()> {
    let mut faults = args.etcd.faults();
    faults.extend(args.tls.faults(&[("--listen", args.listen), ("--http", args.http)]));
    without_faults(&faults)?;
    let resume_key = args.resume_key_file.as_deref().map(resume_key).transpose()?;
    let tls = args.tls.load()?;
    let registry = perigee_registry::open(&args.registry, &args.etcd).context("--registry")?;
    let (tokenizer, template, model_digest) = match &args.model {
        Some(model) => {
            let spec: perigee_model::ModelSpec = model.parse()?;
            let digest = perigee_model::model_digest(&spec)?;
            let (tokenizer, template) =
                (perigee_worker::load::tokenizer(&spec)?, perigee_worker::load::chat_template(&spec)?);
            warn_of_missing(model, tokenizer.is_some(), template.is_some());
            (tokenizer, template, Some(digest))
        }
        None => (None, None, None),
    };
    let config = args.options.config(model_digest);
    let runtime = runtime(args.threads.unwrap_or_else(|| one_for_every(PROCESSORS_PER_THREAD)))?;
    runtime.block_on(async {
        let bind = async |option: &str, address: SocketAddr| {
            TcpListener::bind(address).await.with_context(|| format!("{option}: listening at {address}"))
        };
        let listeners =
            RouterListeners { grpc: bind("--listen", args.listen).await?, http: bind("--http", args.http).await? };
        println!("perigee router: gRPC {}, HTTP {}", listeners.grpc.local_addr()?, listeners.http.local_addr()?);
        let parts =
            RouterParts::new(registry, tokenizer)?.with_template(template).with_tls(tls).with_resume_key(resume_key);
        perigee_router::serve(config, parts, listeners, async {
            if let Err(error) = interrupted().await {
                tracing::warn!(%error, "no handler for signals; ending");
            }
        })
        .await?;
        Ok(())
    })
}
