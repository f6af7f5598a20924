//! `perigee bench serve`: a load test by a scenario file. Progress goes to standard error, the report to standard output and
//! to files; a missed threshold is a failure.

use std::fs::OpenOptions;
use std::io::{IsTerminal, Write};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use perigee_load::target::{Ask, GrpcTarget, OpenAiApi, OpenAiOptions, OpenAiTarget, Target};
use perigee_load::{Arrivals, Dialogue, Message, Pace, Plan, Progress, Scenario, Segment, Snapshot};

use crate::client::{ClientArgs, print_json};
use crate::commands::{at_least_one, without_faults};

/// Environment variable with the key of an OpenAI-compatible server.
const KEY: &str = "OPENAI_API_KEY";
/// Seconds between lines of progress where nobody sees them change.
const LINES_EVERY: u32 = 10;

/// Arguments of `bench serve`.
#[derive(clap::Args)]
pub(super) struct ServeArgs {
    /// The scenario: a TOML file such as those in tests/load.
    #[arg(long, value_name = "FILE")]
    scenario: PathBuf,
    /// Ask an OpenAI-compatible server at this address instead of a router over gRPC, such as http://127.0.0.1:8000. The
    /// environment variable OPENAI_API_KEY is sent as its key. Prompts are text there, about a word a token. It is asked for one
    /// token first, and nothing is measured where that fails.
    #[arg(long, value_name = "URL", requires = "model")]
    openai: Option<String>,
    /// Name of the model at that server.
    #[arg(long, requires = "openai")]
    model: Option<String>,
    /// Interface of that server.
    #[arg(long, value_enum, default_value_t = Api::Completions)]
    api: Api,
    /// gRPC connections to the router.
    #[arg(long, value_parser = at_least_one(), default_value_t = 4)]
    connections: usize,
    /// Conversations a second, instead of the scenario's.
    #[arg(long)]
    rate: Option<f64>,
    /// Clients of a closed loop, instead of the scenario's.
    #[arg(long, value_parser = at_least_one())]
    concurrency: Option<usize>,
    /// Conversations, instead of the scenario's.
    #[arg(long, value_parser = at_least_one())]
    conversations: Option<usize>,
    /// Seed, instead of the scenario's.
    #[arg(long)]
    seed: Option<u64>,
    /// Write the report as JSON.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Write the report as one page of HTML with plots.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    #[command(flatten)]
    client: ClientArgs,
}

/// Interfaces of OpenAI-compatible servers.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Api {
    /// /v1/completions
    Completions,
    /// /v1/chat/completions
    Chat,
}

pub(super) fn run(args: ServeArgs) -> anyhow::Result<()> {
    let scenario = args.scenario()?;
    let plan = Plan::new(&scenario)?;
    // Before the load, not after it.
    for (option, file) in [("--out", &args.out), ("--html", &args.html)] {
        if let Some(file) = file {
            let opened = OpenOptions::new().create(true).append(true).open(file);
            opened.with_context(|| format!("{option}: {}", file.display()))?;
        }
    }
    super::raise_file_limit();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let report = runtime.block_on(async {
        let target = args.target().await?;
        let described = target.describe();
        let progress = Arc::new(Progress::default());
        let shown = tokio::spawn(show(progress.clone()));
        let tally = perigee_load::run(&scenario, plan, target, progress, Pace::Thread).await;
        shown.abort();
        if std::io::stderr().is_terminal() {
            eprint!("\r\x1b[K");
        }
        anyhow::Ok(tally.report(described))
    })?;
    if let Some(file) = &args.out {
        std::fs::write(file, serde_json::to_vec_pretty(&report)?)
            .with_context(|| format!("--out: {}", file.display()))?;
    }
    if let Some(file) = &args.html {
        std::fs::write(file, report.page()).with_context(|| format!("--html: {}", file.display()))?;
    }
    if args.client.json {
        print_json(&report)?;
    } else {
        print!("{}", report.table());
    }
    if report.lost > 0 {
        bail!("{} of {} requests have no outcome", report.lost, report.sent);
    }
    match report.misses() {
        misses if misses.is_empty() => Ok(()),
        misses => bail!("thresholds missed:\n{}", misses.join("\n")),
    }
}

impl ServeArgs {
    /// The scenario with what the command line changes in it.
    fn scenario(&self) -> anyhow::Result<Scenario> {
        let mut scenario = Scenario::open(&self.scenario).context("--scenario")?;
        scenario.seed = self.seed.unwrap_or(scenario.seed);
        scenario.conversations = self.conversations.or(scenario.conversations);
        let mut faults = Vec::new();
        match (&mut scenario.arrivals, self.rate) {
            (_, None) => {}
            (Arrivals::Poisson { rate } | Arrivals::Gamma { rate, .. }, Some(other)) => *rate = other,
            _ => faults.push("--rate: the scenario's arrivals have no constant rate".to_owned()),
        }
        match (&mut scenario.arrivals, self.concurrency) {
            (_, None) => {}
            (Arrivals::Closed { concurrency }, Some(other)) => *concurrency = other,
            _ => faults.push("--concurrency: the scenario is no closed loop".to_owned()),
        }
        faults.extend(scenario.faults().into_iter().map(|fault| format!("{}: {fault}", self.scenario.display())));
        without_faults(&faults)?;
        Ok(scenario)
    }

    async fn target(&self) -> anyhow::Result<Arc<dyn Target>> {
        let (Some(url), Some(model)) = (&self.openai, &self.model) else {
            let mut channels = Vec::new();
            for _ in 0..self.connections {
                channels.push(self.client.channel().await?);
            }
            return Ok(Arc::new(GrpcTarget::new(channels).await?));
        };
        let api = match self.api {
            Api::Completions => OpenAiApi::Completions,
            Api::Chat => OpenAiApi::Chat,
        };
        let tls = self.client.tls.load()?.https_client();
        let key = std::env::var(KEY).ok();
        let options = OpenAiOptions { url: url.clone(), model: model.clone(), api, key, tls };
        let target: Arc<dyn Target> = Arc::new(OpenAiTarget::new(options)?);
        answers(&*target).await.with_context(|| format!("--openai: {}", target.describe()))?;
        Ok(target)
    }
}

/// Asks for one token: a wrong address, model or key would be a load of failures.
async fn answers(target: &dyn Target) -> anyhow::Result<()> {
    let dialogue = Dialogue(vec![Message::User(vec![Segment { seed: 0, tokens: 4 }])]);
    let ask = Ask { name: "load-first", dialogue: &dialogue, max_tokens: 1, temperature: None, ignore_eos: false };
    match target.ask(ask, &mut |_| ControlFlow::Continue(())).await {
        Ok(_) => Ok(()),
        Err(failure) => bail!("it does not answer a first request: {}: {}", failure.code, failure.message),
    }
}

/// Shows progress: one line that changes on a terminal, a line every ten seconds elsewhere. It never ends by itself.
async fn show(progress: Arc<Progress>) {
    let started = Instant::now();
    let is_terminal = std::io::stderr().is_terminal();
    let mut ticks = tokio::time::interval(Duration::from_secs(1));
    let mut before = Snapshot::default();
    for tick in 0_u32.. {
        ticks.tick().await;
        let now = progress.snapshot();
        let line = line(started.elapsed(), now, now.tokens - before.tokens);
        before = now;
        // Nobody reads it where standard error is closed.
        let _ = if is_terminal {
            write!(std::io::stderr(), "\r\x1b[K{line}")
        } else if tick > 0 && tick.is_multiple_of(LINES_EVERY) {
            writeln!(std::io::stderr(), "{line}")
        } else {
            Ok(())
        };
    }
}

fn line(elapsed: Duration, now: Snapshot, tokens: u64) -> String {
    format!(
        "{:.0} s: {} sent, {} in flight, {} completed, {} cancelled, {} failed, {tokens} tokens in the last second",
        elapsed.as_secs_f64(),
        now.sent,
        now.in_flight(),
        now.completed,
        now.cancelled,
        now.failed
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_says_what_is_still_running() {
        let now = Snapshot { sent: 9, completed: 3, cancelled: 2, failed: 1, tokens: 70 };
        let expected = "5 s: 9 sent, 3 in flight, 3 completed, 2 cancelled, 1 failed, 40 tokens in the last second";
        assert_eq!(line(Duration::from_secs(5), now, 40), expected);
    }
}
