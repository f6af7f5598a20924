//! `perigee bench router`: the shipped router as a process of its own, between stub replicas and a load client that live in
//! this process. The stubs' steps take modelled time, so what is measured is the router alone: its processor time from
//! /proc, and how long tokens are on their way from a stub's send to the client's receipt.

use std::sync::Arc;
use std::time::Duration;

use anyhow::bail;
use perigee_load::stub::{Clock, Probe, Steps, StubReplica};
use perigee_load::target::GrpcTarget;
use perigee_load::{Arrivals, Length, Pace, Plan, Progress, Scenario};
use perigee_proto::v1::ListReplicasRequest;
use perigee_tls::ServerTlsOptions;
use serde::Serialize;
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use super::child::{RouterProcess, raise_file_limit};
use crate::client::{ClientArgs, print_json};
use crate::commands::{at_least_one, without_faults};

/// How long a router may take to attach to all replicas.
const ATTACHING: Duration = Duration::from_secs(60);
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
    /// Requests to measure, after one of each stream to warm up.
    #[arg(long, default_value_t = 5000, value_parser = at_least_one())]
    requests: usize,
    /// Prompt tokens of a request.
    #[arg(long, default_value_t = 64)]
    prompt: u32,
    /// Tokens that a request generates.
    #[arg(long, default_value_t = 256)]
    output: u32,
    /// Milliseconds of a stub's step.
    #[arg(long, default_value_t = 20.0)]
    step_ms: f64,
    /// Microseconds more for each session in a step.
    #[arg(long, default_value_t = 0.0)]
    session_us: f64,
    /// Microseconds more for each prompt token in a step.
    #[arg(long, default_value_t = 5.0)]
    prompt_token_us: f64,
    /// Worker threads of the router; as many as there are processors by default.
    #[arg(long, value_parser = at_least_one())]
    router_threads: Option<usize>,
    /// Print one JSON array: [{replicas, streams, tls, requests, failed, seconds, tokens_s, router_cpu_s, tokens_per_core_s,
    /// cpu_ms_per_request, transit_ms: {count, mean, p50, p90, p99, max}}].
    #[arg(long)]
    json: bool,
    /// TLS on both sides of the router.
    #[command(flatten)]
    tls: ServerTlsOptions,
}

/// One run.
#[derive(Debug, Serialize)]
struct Row {
    replicas: usize,
    streams: usize,
    tls: bool,
    requests: u64,
    failed: u64,
    seconds: f64,
    tokens_s: f64,
    /// Processor time of the router process.
    router_cpu_s: f64,
    /// Tokens for each second of that.
    tokens_per_core_s: f64,
    cpu_ms_per_request: f64,
    /// From a stub's send to the client's receipt, in milliseconds.
    transit_ms: perigee_load::report::Summary,
}

pub(super) fn run(args: RouterBenchArgs) -> anyhow::Result<()> {
    let milliseconds = |time: f64| Duration::try_from_secs_f64(time / 1e3).ok().filter(|time| !time.is_zero());
    let mut faults = args.tls.faults(&[]);
    if milliseconds(args.step_ms).is_none() {
        faults.push("--step-ms: expected a time above 0".to_owned());
    }
    if args.prompt == 0 || args.output == 0 {
        faults.push("--prompt and --output: expected at least 1".to_owned());
    }
    without_faults(&faults)?;
    raise_file_limit();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let mut rows = Vec::new();
    for &replicas in &args.replicas {
        rows.push(runtime.block_on(measure(&args, replicas))?);
    }
    if args.json {
        return print_json(&rows);
    }
    println!("{HEADER}");
    rows.iter().for_each(|row| println!("{}", line(row)));
    Ok(())
}

async fn measure(args: &RouterBenchArgs, replicas: usize) -> anyhow::Result<Row> {
    let clock = Clock::start();
    // Dropped at the end, and the stubs with it.
    let mut stubs = JoinSet::new();
    let records = start_stubs(args, replicas, clock, &mut stubs).await?;
    let registry = serde_json::json!({ "replicas": records }).to_string();
    let router = RouterProcess::start(&registry, &args.tls.to_arguments(), args.router_threads).await?;
    let client = ClientArgs { router: router.grpc.clone(), json: false, tls: args.tls.as_client() };
    wait_until_attached(&client, replicas).await?;

    let mut channels = Vec::new();
    for _ in 0..args.streams.div_ceil(STREAMS_PER_CONNECTION) {
        channels.push(client.channel().await?);
    }
    let probe = Arc::new(Probe::new(Arc::new(GrpcTarget::new(channels).await?), clock));
    let transit = probe.transit();
    ask(args, args.streams, probe.clone()).await?;
    transit.clear();
    let before = router.cpu()?;
    let report = ask(args, args.requests, probe).await?;
    let router_cpu_s = (router.cpu()? - before).as_secs_f64();
    let counted = &report.counted;
    Ok(Row {
        replicas,
        streams: args.streams,
        tls: args.tls.tls_cert.is_some(),
        requests: counted.requests,
        failed: counted.failed,
        seconds: report.seconds,
        tokens_s: report.output_tok_s,
        router_cpu_s,
        tokens_per_core_s: counted.output_tokens as f64 / router_cpu_s,
        cpu_ms_per_request: router_cpu_s * 1e3 / counted.requests.max(1) as f64,
        transit_ms: transit.summary(),
    })
}

/// Starts the stubs; returns their records.
async fn start_stubs(
    args: &RouterBenchArgs,
    replicas: usize,
    clock: Clock,
    stubs: &mut JoinSet<()>,
) -> anyhow::Result<Vec<serde_json::Value>> {
    let tls = args.tls.load()?;
    let microseconds = |time: f64| Duration::from_secs_f64(time.max(0.0) / 1e6);
    let steps = Steps {
        base: microseconds(args.step_ms * 1e3),
        per_session: microseconds(args.session_us),
        per_prompt_token: microseconds(args.prompt_token_us),
    };
    // Twice what falls to each, so that none has to wait where placement is uneven.
    let slots = (2 * args.streams.div_ceil(replicas)).max(8) as u32;
    let mut records = Vec::new();
    for number in 0..replicas {
        let name = format!("stub-{number}");
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        records.push(serde_json::json!({"replica": name, "internal": listener.local_addr()?.to_string()}));
        let stub = StubReplica { name, slots, steps, clock };
        let tls = tls.clone();
        stubs.spawn(async move {
            if let Err(error) = stub.serve(listener, tls).await {
                tracing::warn!(%error, "a stub replica ended");
            }
        });
    }
    Ok(records)
}

async fn wait_until_attached(client: &ClientArgs, replicas: usize) -> anyhow::Result<()> {
    let mut cluster = client.cluster().await?;
    let attached = async {
        loop {
            let listed = cluster.list_replicas(ListReplicasRequest {}).await?.into_inner().replicas;
            if listed.iter().filter(|replica| replica.status == "ready").count() == replicas {
                return Ok::<(), tonic::Status>(());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    match tokio::time::timeout(ATTACHING, attached).await {
        Ok(result) => Ok(result?),
        Err(_) => bail!("the router did not attach to all {replicas} stub replicas within {ATTACHING:?}"),
    }
}

/// As many requests, from clients that each wait for their answer.
async fn ask(args: &RouterBenchArgs, requests: usize, target: Arc<Probe>) -> anyhow::Result<perigee_load::Report> {
    let scenario = Scenario {
        name: "router".to_owned(),
        seed: 1,
        arrivals: Arrivals::Closed { concurrency: args.streams },
        conversations: Some(requests),
        duration_s: None,
        warmup_s: 0.0,
        prompt: Length::Fixed { tokens: args.prompt },
        output: Length::Fixed { tokens: args.output },
        prefixes: None,
        turns: None,
        cancel: None,
        timeout_s: None,
        temperature: Some(0.0),
        ignore_eos: true,
        slo: Default::default(),
        thresholds: Default::default(),
    };
    let plan = Plan::new(&scenario)?;
    let tally = perigee_load::run(&scenario, plan, target, Arc::new(Progress::default()), Pace::Thread).await;
    let report = tally.report("stub replicas".to_owned());
    if report.counted.completed == 0 {
        bail!("no request completed: {:?}", report.messages);
    }
    Ok(report)
}

const HEADER: &str =
    "replicas  streams  tls  requests  failed   tokens/s  tokens/s/core  CPU ms/request  transit ms p50      p99";

fn line(row: &Row) -> String {
    format!(
        "{:>8}  {:>7}  {:>3}  {:>8}  {:>6}  {:>9.0}  {:>13.0}  {:>14.2}  {:>14.2}  {:>7.2}",
        row.replicas,
        row.streams,
        if row.tls { "on" } else { "off" },
        row.requests,
        row.failed,
        row.tokens_s,
        row.tokens_per_core_s,
        row.cpu_ms_per_request,
        row.transit_ms.p50,
        row.transit_ms.p99
    )
}
