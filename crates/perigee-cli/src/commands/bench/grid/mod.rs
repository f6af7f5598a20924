//! `perigee bench grid`: times of a served replica, seen by a gRPC client of its router: a batch of prompts handed in at once,
//! for every cell of batch and context. Prompts are random tokens, decoding is greedy and goes on whatever is drawn.

mod room;

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, bail};
use perigee_backend::random::mix;
use perigee_proto::v1::inference_client::InferenceClient;
use perigee_proto::v1::{GenerateRequest, GetModelInfoRequest, SamplingParams};
use perigee_worker::bench::Cell;
use serde::Serialize;
use tonic::transport::Channel;

use self::room::Progress;
use crate::client::{ClientArgs, block_on, print_json};
use crate::commands::at_least_one;

/// Token ids of prompts, where the vocabulary has as many.
const TOKENS: std::ops::Range<u32> = 100..160_000;

/// Arguments of `bench grid`.
#[derive(clap::Args)]
pub(super) struct GridArgs {
    /// Cells BATCHxCONTEXT, in order.
    #[arg(long, value_delimiter = ',', default_value = "1x1024,8x1024", value_parser = super::engine::cell)]
    cells: Vec<Cell>,
    /// Decode steps of the whole batch in each cell, at least.
    #[arg(long, default_value_t = 64, value_parser = at_least_one())]
    steps: usize,
    #[command(flatten)]
    client: ClientArgs,
}

/// A cell's figures.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct GridCell {
    batch: usize,
    context: usize,
    /// Seconds from handing in the batch to the last session's first token.
    ttft_s: f64,
    prefill_tok_s: f64,
    /// Milliseconds of a token between the last first token and the first end, the mean.
    tpot_ms: f64,
    decode_tok_s: f64,
    /// Tokens of the slowest session in that time.
    steps: usize,
    /// Gaps between a session's tokens in that time.
    gaps: Option<Gaps>,
    /// The same before it: between tokens of sessions that draw already while prompts of others are computed.
    beside_prompts: Option<Gaps>,
}

/// Gaps between the tokens of sessions, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
struct Gaps {
    count: usize,
    p50_ms: f64,
    p99_ms: f64,
    max_ms: f64,
}

impl Gaps {
    /// Of consecutive tokens of one session that both came in a time; none where there are none.
    fn of(times: &[Times], within: impl Fn(f64) -> bool) -> Option<Self> {
        let pairs = times.iter().flat_map(|times| times.windows(2));
        let mut gaps: Vec<f64> =
            pairs.filter(|pair| pair.iter().all(|&at| within(at))).map(|pair| pair[1] - pair[0]).collect();
        gaps.sort_by(f64::total_cmp);
        let at = |share: f64| gaps[((gaps.len() - 1) as f64 * share).round() as usize] * 1e3;
        if gaps.is_empty() {
            return None;
        }
        Some(Self { count: gaps.len(), p50_ms: at(0.5), p99_ms: at(0.99), max_ms: at(1.0) })
    }
}

/// When each token of one session came, in seconds since the batch was handed in.
type Times = Vec<f64>;

pub(super) fn run(args: GridArgs) -> anyhow::Result<()> {
    block_on(async {
        let mut client = args.client.inference().await?;
        let cluster = args.client.cluster().await?;
        let info = client.get_model_info(GetModelInfoRequest {}).await.context("GetModelInfo")?.into_inner();
        let mut results = Vec::new();
        for (index, &cell) in args.cells.iter().enumerate() {
            let prompts = prompts(cell, index as u64, info.vocab_size);
            let named = || format!("{}x{}", cell.batch, cell.context);
            let progress = Arc::new(Progress::new(cell.batch));
            let times = tokio::select! {
                times = batch(&client, prompts, &progress, args.steps) => times.with_context(named)?,
                error = room::lacking(cluster.clone(), &progress) => return Err(error.context(named())),
            };
            let result = figures(cell, &times)
                .with_context(|| format!("{}: no steps in which the whole batch decodes", named()))?;
            if !args.client.json {
                println!("{}", line(&result));
            }
            results.push(result);
        }
        if args.client.json { print_json(&results) } else { Ok(()) }
    })
}

fn prompts(cell: Cell, number: u64, vocabulary: u32) -> Vec<Vec<u32>> {
    let tokens = if TOKENS.end <= vocabulary { TOKENS } else { 0..vocabulary };
    let width = u64::from(tokens.end - tokens.start).max(1);
    let token = |at: u64| tokens.start + (mix(mix(number + 1) ^ at) % width) as u32;
    let context = cell.context as u64;
    (0..cell.batch as u64).map(|session| (session * context..(session + 1) * context).map(token).collect()).collect()
}

/// Hands in all prompts at once; when the tokens of each came. Sessions whose prompt is done decode while the others' are computed,
/// for as long as that takes; once all have drawn, each is left after so many steps more.
async fn batch(
    client: &InferenceClient<Channel>,
    prompts: Vec<Vec<u32>>,
    progress: &Arc<Progress>,
    steps: usize,
) -> anyhow::Result<Vec<Times>> {
    let begun = Instant::now();
    let asked = prompts.into_iter().map(|token_ids| {
        let request = GenerateRequest {
            token_ids,
            sampling: Some(SamplingParams { temperature: Some(0.0), ignore_eos: true, ..SamplingParams::default() }),
            ..GenerateRequest::default()
        };
        tokio::spawn(stream(client.clone(), request, begun, progress.clone(), steps))
    });
    let asked: Vec<_> = asked.collect();
    let mut times = Vec::with_capacity(asked.len());
    for session in asked {
        times.push(session.await??);
    }
    Ok(times)
}

async fn stream(
    mut client: InferenceClient<Channel>,
    request: GenerateRequest,
    begun: Instant,
    progress: Arc<Progress>,
    steps: usize,
) -> anyhow::Result<Times> {
    let mut responses = client.generate(request).await?.into_inner();
    let mut times = Times::new();
    // Sessions see that all have drawn a step earlier or later than others.
    let mut left = steps + 2;
    while let Some(response) = responses.message().await? {
        if response.token_id.is_none() {
            continue;
        }
        times.push(begun.elapsed().as_secs_f64());
        // The one behind which all have drawn is the last of the first tokens, and no step of the whole batch.
        let waited = progress.drew(times.len() == 1);
        if times.len() > 1 && waited == 0 {
            left -= 1;
        }
        if left == 0 {
            return Ok(times);
        }
    }
    bail!(
        "a session ended after {} tokens, before all had drawn {steps} together: the replica needs a greater --max-model-len, or room for \
         more at once (--max-batch, --state-slots, --latent-pages)",
        times.len()
    )
}

/// None where no session draws between the last first token and the first end.
fn figures(cell: Cell, times: &[Times]) -> Option<GridCell> {
    let first = times.iter().filter_map(|times| times.first().copied()).reduce(f64::max)?;
    let last = times.iter().filter_map(|times| times.last().copied()).reduce(f64::min)?;
    let within = |times: &Times| times.iter().filter(|&&at| at > first && at <= last).count();
    let steps = times.iter().map(within).min().filter(|&steps| steps > 0)?;
    let tpot = (last - first) / steps as f64;
    Some(GridCell {
        batch: cell.batch,
        context: cell.context,
        ttft_s: first,
        prefill_tok_s: (cell.batch * cell.context) as f64 / first,
        tpot_ms: tpot * 1e3,
        decode_tok_s: cell.batch as f64 / tpot,
        steps,
        gaps: Gaps::of(times, |at| at >= first && at <= last),
        beside_prompts: Gaps::of(times, |at| at <= first),
    })
}

fn line(cell: &GridCell) -> String {
    let beside = cell.beside_prompts.map_or_else(String::new, |gaps| {
        format!("; beside others' prompts a token in {:.1} ms (median), {:.1} (p99)", gaps.p50_ms, gaps.p99_ms)
    });
    format!(
        "{:>4} x {:>7}: ttft {:.3} s, {:.0} prompt tokens a second, tpot {:.3} ms, {:.0} tokens a second, {} steps{beside}",
        cell.batch, cell.context, cell.ttft_s, cell.prefill_tok_s, cell.tpot_ms, cell.decode_tok_s, cell.steps
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_time_in_which_all_decode_counts() {
        let cell = Cell { batch: 2, context: 100 };
        let times = [vec![1.0, 2.0, 3.0, 4.0, 5.0], vec![2.0, 3.0, 4.0, 5.0, 6.0]];
        let result = figures(cell, &times).unwrap();
        assert_eq!((result.ttft_s, result.tpot_ms, result.steps), (2.0, 1000.0, 3));
        assert_eq!((result.prefill_tok_s, result.decode_tok_s), (100.0, 2.0));
        let gaps = |count| Some(Gaps { count, p50_ms: 1000.0, p99_ms: 1000.0, max_ms: 1000.0 });
        assert_eq!((result.gaps, result.beside_prompts), (gaps(6), gaps(1)));
        assert_eq!(figures(cell, &[vec![1.0], vec![2.0]]), None);
    }

    #[test]
    fn prompts_differ_and_lie_in_the_vocabulary() {
        let prompts = prompts(Cell { batch: 3, context: 50 }, 0, 300);
        assert!(prompts.iter().flatten().all(|&token| token < 300));
        assert!(prompts[0] != prompts[1] && prompts[1] != prompts[2]);
        assert_eq!(prompts.iter().map(Vec::len).collect::<Vec<_>>(), [50; 3]);
    }
}
