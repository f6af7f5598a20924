//! `perigee bench migrate`: what it costs a stream to change replicas, by context: split moves beside whole copies and a
//! replay in the same run, and what distance costs afterwards. Real processes, started by `perigee up` anew for each context.

mod cluster;
mod course;
mod numbers;
mod plot;
mod stream;

use std::path::PathBuf;

use anyhow::Context;
use perigee_worker::EngineOptions;
use serde::Serialize;

use crate::client::{block_on, print_json};
use crate::commands::at_least_one;

/// Arguments of `bench migrate`.
#[derive(clap::Args)]
pub(super) struct MigrateArgs {
    /// Tokens of the prompt; one cluster for each.
    #[arg(long, value_delimiter = ',', default_value = "1024,4096,16384,65536", value_parser = at_least_one())]
    context: Vec<usize>,
    /// The same with latents and state that are filled in rather than computed, which takes seconds; without a replay, because
    /// nothing would be computed there either. `--filled` alone: none.
    #[arg(long, value_delimiter = ',', num_args = 0.., default_value = "262144", value_parser = at_least_one())]
    filled: Vec<usize>,
    /// Split moves of the session.
    #[arg(long, default_value_t = 20, value_parser = at_least_one())]
    moves: usize,
    /// Moves with all pages, there and back; none: nor is a home's time taken while the session runs elsewhere with all its pages.
    #[arg(long, default_value_t = 4)]
    whole: usize,
    /// Tokens in a row from which a time of a token is taken.
    #[arg(long, default_value_t = 32, value_parser = at_least_one())]
    window: usize,
    /// Ranks of each of the two replicas.
    #[arg(long, default_value_t = 1, value_parser = at_least_one())]
    tp: usize,
    /// Also write a plot of the stalls, SVG.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Print one JSON array: [{context, mode, state_bytes, page_bytes, token_bytes, stall_ms, stall_steps, tpot_local_ms,
    /// tpot_remote_ms, filled, moves, stalls_ms, phases, remote, beside, home}], one entry for each context and mode split, whole and
    /// replay.
    #[arg(long)]
    json: bool,
    /// Sizes follow from the contexts; --state-slots, --latent-pages, --max-model-len and --max-batch are not used.
    #[command(flatten)]
    engine: EngineOptions,
}

/// The prompt of a course.
#[derive(Debug, Clone, Copy)]
struct Prompt {
    tokens: usize,
    /// Whether what it leaves is filled in rather than computed.
    is_filled: bool,
}

/// Moves of one kind at one context.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct Row {
    /// Tokens of the prompt.
    context: usize,
    /// split, whole or replay.
    mode: &'static str,
    /// Bytes of a move, the most of all.
    state_bytes: u64,
    page_bytes: u64,
    token_bytes: u64,
    /// Gap in the client's stream beyond the median gap of the tokens behind it, the median over the moves. Of a replay: beyond
    /// the median gap before any move.
    stall_ms: f64,
    /// The same in median gaps before any move.
    stall_steps: f64,
    /// Median gap of the client's tokens while all latents are local.
    tpot_local_ms: f64,
    /// The same while all that the prompt left are remote; split moves only.
    tpot_remote_ms: Option<f64>,
    /// Whether the prompt's latents and state were filled in rather than computed.
    filled: bool,
    moves: usize,
    /// Of each move, in order.
    stalls_ms: Vec<f64>,
    /// The router's times of a handoff, medians over the moves.
    phases: Option<Phases>,
    /// Where the time of a token goes then; split moves only.
    remote: Option<Remote>,
    /// Another session's times in the same steps; split moves only.
    beside: Option<Beside>,
    /// A home's own times; split moves only.
    home: Option<Home>,
}

/// Phases of a handoff in milliseconds, as `Cluster.Migrate` tells them: from the order until the target has verified everything; of
/// these, since the freeze; of these, taking the state off the device; from the commit until the target runs it; until it is released.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
struct Phases {
    prepare_ms: f64,
    frozen_ms: f64,
    export_ms: f64,
    start_ms: f64,
    release_ms: f64,
}

/// Parts of a token's time while its old latents are remote, in milliseconds; each is a mean over the same tokens.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
struct Remote {
    /// The step waits for answers.
    waiting_ms: f64,
    /// The step's own work.
    own_ms: f64,
    /// Between two steps: sampling's way to the client, scheduling, commands.
    between_ms: f64,
}

/// A short session's median gap in steps that it shares with the long one, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
struct Beside {
    /// Whose latents are local.
    local_ms: f64,
    /// Whose latents are remote.
    remote_ms: f64,
}

/// A short session's median gap at one replica while the long one runs at the other, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
struct Home {
    /// Before the long one begins: both replicas are idle otherwise.
    alone_ms: f64,
    /// With all its latents: nobody is asked. Replicas that share a device share its time. Where there are whole moves.
    undisturbed_ms: Option<f64>,
    /// Without them: the short session's replica answers.
    answering_ms: f64,
}

pub(super) fn run(args: MigrateArgs) -> anyhow::Result<()> {
    block_on(async move {
        let mut rows = Vec::new();
        if !args.json {
            println!("{HEADER}");
        }
        let computed = args.context.iter().map(|&tokens| Prompt { tokens, is_filled: false });
        for prompt in computed.chain(args.filled.iter().map(|&tokens| Prompt { tokens, is_filled: true })) {
            let measured = course::run(&args, prompt).await.with_context(|| format!("context {}", prompt.tokens))?;
            if !args.json {
                measured.iter().for_each(|row| println!("{}", line(row)));
            }
            rows.extend(measured);
        }
        if let Some(file) = &args.svg {
            std::fs::write(file, plot::svg(&rows)).with_context(|| format!("writing {}", file.display()))?;
        }
        if args.json {
            return print_json(&rows);
        }
        rows.iter().filter_map(distance).for_each(|text| println!("{text}"));
        Ok(())
    })
}

const HEADER: &str = "context  latents   mode    moves  state bytes  page bytes  token bytes   stall ms  in steps  tpot local  tpot remote";

fn line(row: &Row) -> String {
    let remote = row.tpot_remote_ms.map_or_else(|| "-".to_owned(), |time| format!("{time:.2}"));
    format!(
        "{:>7}  {:<8}  {:<6}  {:>5}  {:>11}  {:>10}  {:>11}  {:>9.1}  {:>8.1}  {:>10.2}  {remote:>11}",
        row.context,
        if row.filled { "filled" } else { "computed" },
        row.mode,
        row.moves,
        row.state_bytes,
        row.page_bytes,
        row.token_bytes,
        row.stall_ms,
        row.stall_steps,
        row.tpot_local_ms
    )
}

/// What distance costs at a context, in words.
fn distance(row: &Row) -> Option<String> {
    let (remote, beside, home) = (row.remote?, row.beside?, row.home?);
    let all = remote.waiting_ms + remote.own_ms + remote.between_ms;
    let share = |time: f64| 100.0 * time / all.max(f64::MIN_POSITIVE);
    Some(format!(
        "{:>7}  remote token: waiting {:.2} ms ({:.0} %), own work {:.2} ms ({:.0} %), between steps {:.2} ms ({:.0} %); a short \
         session beside it: {:.2} ms while it is local, {:.2} ms while it is remote; the home's own token: {:.2} ms alone, \
         {} while nobody asks, {:.2} ms while it answers",
        row.context,
        remote.waiting_ms,
        share(remote.waiting_ms),
        remote.own_ms,
        share(remote.own_ms),
        remote.between_ms,
        share(remote.between_ms),
        beside.local_ms,
        beside.remote_ms,
        home.alone_ms,
        home.undisturbed_ms.map_or_else(|| "-".to_owned(), |time| format!("{time:.2} ms")),
        home.answering_ms
    ))
}
