//! `perigee bench router`: the shipped router as a process of its own, between stub replicas and a load client that live in
//! this process. The stubs' steps take modelled time, so what is measured is the router alone: its processor time from
//! /proc, its choices of replicas by its own metric, and how much longer tokens are on their way from a stub's send to the
//! client's receipt than where a client attaches to the same stubs itself.

use std::sync::Arc;

use anyhow::{Context, bail};
use perigee_load::report::Summary;
use perigee_load::stub::{Clock, DirectTarget, Flow, Flowed, RelayedTarget, Steps};
use perigee_load::target::Target;
use perigee_tls::{Dialer, ServerTlsOptions};
use serde::Serialize;

use super::child::{Placement, RouterProcess};
use super::raise_file_limit;
use super::stubs::{Stubs, milliseconds};
use crate::client::{ClientArgs, print_json};
use crate::commands::{at_least_one, one_for_every, runtime, without_faults};

/// Calls at once that a router allows on one connection, with some room left.
const STREAMS_PER_CONNECTION: usize = 500;

/// Arguments of `bench router`.
#[derive(clap::Args)]
pub(super) struct RouterBenchArgs {
    /// Stub replicas; one run for each number.
    #[arg(long, value_delimiter = ',', default_value = "10,100,1000", value_parser = at_least_one())]
    replicas: Vec<usize>,
    /// Streams at once.
    #[arg(long, default_value_t = 1000, value_parser = at_least_one())]
    streams: usize,
    /// Requests to measure, after one of each stream to warm up and before another one of each.
    #[arg(long, default_value_t = 5000, value_parser = at_least_one())]
    requests: usize,
    /// Prompt tokens of a request.
    #[arg(long, default_value_t = 64)]
    prompt: u32,
    /// Tokens that a request generates.
    #[arg(long, default_value_t = 256)]
    output: u32,
    /// Milliseconds of a stub's step: 1,000 streams and 8 ms are 125,000 tokens/s.
    #[arg(long, default_value_t = 8.0)]
    step_ms: f64,
    /// By which share of that a step may be longer or shorter, evenly drawn: replicas do not step at one beat.
    #[arg(long, default_value_t = 0.1)]
    jitter: f64,
    /// Microseconds more for each session in a step.
    #[arg(long, default_value_t = 0.0)]
    session_us: f64,
    /// Microseconds more for each prompt token in a step.
    #[arg(long, default_value_t = 5.0)]
    prompt_token_us: f64,
    /// Threads of the router; its own default otherwise.
    #[arg(long, value_parser = at_least_one())]
    router_threads: Option<usize>,
    /// Processors that the router alone should have, as taskset names them: start this command under `taskset` with the others.
    /// Default: it shares all processors with stubs and client.
    #[arg(long, value_name = "LIST")]
    router_cpus: Option<String>,
    /// Print one JSON array: [{replicas, streams, tls, requests, failed, seconds, tokens_s, router_cpu_s, tokens_per_core_s,
    /// cpu_ms_per_request, placement_us: {p50, p99}, direct_ms, transit_ms: {count, mean, p50, p90, p99, max},
    /// added_p50_ms, added_p99_ms}].
    #[arg(long)]
    json: bool,
    /// Certificates for a second run of each number with TLS on both sides of the router.
    #[command(flatten)]
    tls: ServerTlsOptions,
}

/// One run.
#[derive(Debug, Serialize)]
struct Row {
    replicas: usize,
    streams: usize,
    tls: bool,
    requests: usize,
    failed: usize,
    seconds: f64,
    tokens_s: f64,
    /// Processor time of the router process.
    router_cpu_s: f64,
    /// Tokens for each second of that.
    tokens_per_core_s: f64,
    cpu_ms_per_request: f64,
    /// How long choices of replicas take; only without TLS, which they do not depend on.
    placement_us: Option<Placement>,
    /// From a stub's send to the client's receipt without a router, in milliseconds.
    direct_ms: Summary,
    /// The same through the router.
    transit_ms: Summary,
    /// What the router adds to the median, and to the 99th percentile.
    added_p50_ms: f64,
    added_p99_ms: f64,
}

pub(super) fn run(args: RouterBenchArgs) -> anyhow::Result<()> {
    let mut faults = args.tls.faults(&[]);
    if milliseconds(args.step_ms).is_none() {
        faults.push("--step-ms: expected a time above 0".to_owned());
    }
    if !(0.0..1.0).contains(&args.jitter) {
        faults.push("--jitter: expected a share from 0 to below 1".to_owned());
    }
    if args.prompt == 0 || args.output == 0 {
        faults.push("--prompt and --output: expected at least 1".to_owned());
    }
    without_faults(&faults)?;
    raise_file_limit();
    // Half of the processors: where all share them, neither this nor the router is in the other's way.
    let runtime = runtime(one_for_every(2))?;
    let mut rows = Vec::new();
    for &replicas in &args.replicas {
        rows.push(runtime.block_on(measure(&args, replicas, &ServerTlsOptions::default()))?);
        if args.tls.tls_cert.is_some() {
            rows.push(runtime.block_on(measure(&args, replicas, &args.tls))?);
        }
    }
    if args.json {
        return print_json(&rows);
    }
    println!("{HEADER}");
    rows.iter().for_each(|row| println!("{}", line(row)));
    Ok(())
}

async fn measure(args: &RouterBenchArgs, replicas: usize, tls: &ServerTlsOptions) -> anyhow::Result<Row> {
    let clock = Clock::start();
    let stubs = Stubs::start(args.modelled(replicas), replicas, clock, tls.load()?).await?;
    let direct = DirectTarget::attach(stubs.channels(&dialer(tls)?).await?).await?;
    // Its times alone are wanted, for which fewer tokens do.
    let requests = args.requests.min(args.streams);
    let direct = args.ask(Arc::new(direct), clock, requests, || ()).await?;

    let mut arguments = tls.to_arguments();
    arguments.extend(args.router_threads.map(|threads| format!("--threads={threads}")));
    let router = Arc::new(RouterProcess::start(&stubs.registry(), &arguments, args.router_cpus.as_deref()).await?);
    let client = ClientArgs { router: router.grpc.clone(), json: false, tls: tls.as_client() };
    stubs.wait_until_attached(&client).await?;
    let mut channels = Vec::new();
    for _ in 0..args.streams.div_ceil(STREAMS_PER_CONNECTION) {
        channels.push(client.channel().await?);
    }
    let measured = router.clone();
    let target = Arc::new(RelayedTarget::new(channels));
    let routed = args.ask(target, clock, args.requests, move || measured.cpu()).await?;
    let (before, after) = routed.meter;
    let router_cpu_s = (after? - before?).as_secs_f64();
    let tokens_per_core_s = routed.tokens as f64 / router_cpu_s;
    let has_tls = tls.tls_cert.is_some();
    Ok(Row {
        replicas,
        streams: args.streams,
        tls: has_tls,
        requests: routed.completed + routed.failed,
        failed: routed.failed,
        seconds: routed.seconds,
        tokens_s: routed.tokens as f64 / routed.seconds,
        router_cpu_s,
        tokens_per_core_s,
        cpu_ms_per_request: f64::from(args.output) * 1e3 / tokens_per_core_s,
        placement_us: if has_tls { None } else { Some(router.placement().await?) },
        added_p50_ms: routed.transit.p50 - direct.transit.p50,
        added_p99_ms: routed.transit.p99 - direct.transit.p99,
        direct_ms: direct.transit,
        transit_ms: routed.transit,
    })
}

/// Reaches stubs as the router would.
fn dialer(tls: &ServerTlsOptions) -> anyhow::Result<Dialer> {
    Ok(if tls.tls_cert.is_some() { Dialer::new(Some(tls.as_client().load()?)) } else { Dialer::plain() })
}

impl RouterBenchArgs {
    /// How the stubs behave.
    fn modelled(&self, replicas: usize) -> super::stubs::Modelled {
        let microseconds = |time: f64| milliseconds(time / 1e3).unwrap_or_default();
        super::stubs::Modelled {
            steps: Steps {
                base: milliseconds(self.step_ms).unwrap_or_default(),
                per_session: microseconds(self.session_us),
                per_prompt_token: microseconds(self.prompt_token_us),
                jitter: self.jitter,
            },
            // Twice what falls to each, so that none has to wait where placement is uneven.
            slots: (2 * self.streams.div_ceil(replicas)).max(8) as u32,
        }
    }

    /// Asks for as many requests as are to be measured, and reads a meter before and after.
    async fn ask<T: Send + 'static>(
        &self,
        target: Arc<dyn Target>,
        clock: Clock,
        requests: usize,
        meter: impl Fn() -> T + Send + Sync + 'static,
    ) -> anyhow::Result<Flowed<T>> {
        let rise = milliseconds(self.step_ms * f64::from(self.output)).unwrap_or_default();
        let flow = Flow { clients: self.streams, requests, prompt: self.prompt, output: self.output, rise, clock };
        let flowed = flow.run(target, meter).await.context("a client stopped: nothing was measured")?;
        if flowed.completed == 0 {
            bail!("no request completed: {:?}", flowed.why);
        }
        Ok(flowed)
    }
}

const HEADER: &str = "replicas  streams  tls  requests  failed   tokens/s  tokens/s/core  CPU ms/request  placed in us  \
                      added ms p50      p99";

fn line(row: &Row) -> String {
    format!(
        "{:>8}  {:>7}  {:>3}  {:>8}  {:>6}  {:>9.0}  {:>13.0}  {:>14.2}  {:>12}  {:>12.2}  {:>7.2}",
        row.replicas,
        row.streams,
        if row.tls { "on" } else { "off" },
        row.requests,
        row.failed,
        row.tokens_s,
        row.tokens_per_core_s,
        row.cpu_ms_per_request,
        row.placement_us.map_or("-".to_owned(), |times| format!("{:.0}", times.p99)),
        row.added_p50_ms,
        row.added_p99_ms
    )
}
