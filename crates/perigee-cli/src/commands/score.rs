//! `perigee score`: starts the same worker processes as serving, gives the leader a job, and waits.

use std::path::PathBuf;

use perigee_worker::EngineOptions;
use perigee_worker::events::WorkerEvent;
use perigee_worker::score::{ScoreJob, ScoreRequest};

use crate::commands::at_least_one;
use crate::launch::{ReplicaLaunch, ReplicaProcesses};

/// Arguments of `score`.
#[derive(clap::Args)]
pub(crate) struct ScoreArgs {
    /// Safetensors file with int64 `prompt_<i>`.
    #[arg(long, value_name = "IN")]
    tokens: PathBuf,
    /// Safetensors file to write: `logits_<i>` and `kda_state_<i>_<l>`, and what the other options add.
    #[arg(long)]
    out: PathBuf,
    /// Ranks: the tensor-parallel degree.
    #[arg(long, value_parser = at_least_one(), default_value_t = 1)]
    tp: usize,
    /// Most tokens of a prompt in one step; whole prompts (up to 8,192 tokens a step) by default.
    #[arg(long, value_parser = at_least_one())]
    chunk: Option<usize>,
    /// Cut the latent cache into that many parts at odd positions, and merge.
    #[arg(long, value_parser = at_least_one(), default_value_t = 1)]
    segments: usize,
    /// Continue greedily by that many tokens: `greedy_<i>`.
    #[arg(long, value_name = "N")]
    greedy: Option<usize>,
    /// Feed `greedy_<i>` of this file token by token: `greedy_logits_<i>`.
    #[arg(long, value_name = "FILE")]
    feed: Option<PathBuf>,
    /// Use `experts_<i>_<l>` and `greedy_experts_<i>_<l>` of this file; weights are still computed.
    #[arg(long, value_name = "FILE")]
    experts: Option<PathBuf>,
    /// Also write `hidden_<i>_<l>`, `experts_<i>_<l>`, `greedy_experts_<i>_<l>`.
    #[arg(long)]
    trace: bool,
    /// Print one JSON object when done: weight_bytes by rank, seconds.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    engine: EngineOptions,
}

pub(crate) fn run(mut args: ScoreArgs) -> anyhow::Result<()> {
    let request = ScoreRequest {
        tokens: &args.tokens,
        out: &args.out,
        chunk: args.chunk,
        segments: args.segments,
        greedy: args.greedy,
        feed: args.feed.as_deref(),
        experts: args.experts.as_deref(),
        trace: args.trace,
    };
    let job = ScoreJob::plan(&request, &mut args.engine)?;
    let launch = ReplicaLaunch {
        replica: "score".into(),
        tp: args.tp,
        engine: args.engine,
        arguments: Vec::new(),
        leader_arguments: vec![format!("--score-job={}", serde_json::to_string(&job)?)],
    };
    let mut processes = ReplicaProcesses::start(&launch)?;
    let (weight_bytes, seconds) = loop {
        match processes.next_event()? {
            WorkerEvent::Scored { weight_bytes, seconds } => break (weight_bytes, seconds),
            other => tracing::debug!(?other, "worker"),
        }
    };
    processes.wait()?;
    if args.json {
        println!("{}", serde_json::json!({"weight_bytes": weight_bytes, "seconds": seconds}));
    } else {
        println!("wrote {} in {seconds:.2} s", args.out.display());
    }
    Ok(())
}
