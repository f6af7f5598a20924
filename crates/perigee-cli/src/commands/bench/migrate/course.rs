//! The course of a benchmark at one context: a long session alone, moved with all its pages and back, then split, with a
//! short session beside it at both places, then moved on and on, and in the end its replica dies.

use std::time::Duration;

use anyhow::{Context, bail};
use perigee_proto::v1::{GetModelInfoRequest, MigrateMode, MigratePhases, MigrateResponse};

use super::cluster::Cluster;
use super::numbers::{Change, change, gaps, median, milliseconds};
use super::stream::Stream;
use super::{Beside, Home, MigrateArgs, Phases, Prompt, Remote, Row};

/// Positions of a latent page.
const PAGE_TOKENS: usize = 64;
/// Tokens that a session has to itself after a move before the next one; what they take is what its stall is held against.
const REST: usize = 16;
/// Tokens of the prompt of a short session.
const SHORT: usize = 32;
/// Tokens that the long session may draw: the course is over long before.
const TOKENS: usize = 32_768;
/// Longest wait for anything, a prompt of the longest context on a slow machine among it.
const PATIENCE: Duration = Duration::from_secs(1800);

/// Moves of one kind.
#[derive(Default)]
struct Moves {
    stalls_ms: Vec<f64>,
    state_bytes: u64,
    page_bytes: u64,
    token_bytes: u64,
    phases: Vec<MigratePhases>,
}

impl Moves {
    fn add(&mut self, stall_ms: f64, moved: &MigrateResponse) {
        self.stalls_ms.push(stall_ms);
        self.phases.extend(moved.phases);
        self.state_bytes = self.state_bytes.max(moved.state_bytes);
        self.page_bytes = self.page_bytes.max(moved.page_bytes);
        self.token_bytes = self.token_bytes.max(moved.token_bytes);
    }

    /// The medians of the phases; none where nothing was handed over.
    fn phases(&self) -> Option<Phases> {
        let median_of = |of: fn(&MigratePhases) -> f64| median(&self.phases.iter().map(of).collect::<Vec<_>>());
        (!self.phases.is_empty()).then(|| Phases {
            prepare_ms: median_of(|phases| phases.prepare_ms),
            frozen_ms: median_of(|phases| phases.frozen_ms),
            export_ms: median_of(|phases| phases.export_ms),
            start_ms: median_of(|phases| phases.start_ms),
            release_ms: median_of(|phases| phases.release_ms),
        })
    }

    fn row(self, prompt: Prompt, mode: &'static str, tpot_local_ms: f64) -> Row {
        let stall_ms = median(&self.stalls_ms);
        Row {
            context: prompt.tokens,
            mode,
            state_bytes: self.state_bytes,
            page_bytes: self.page_bytes,
            token_bytes: self.token_bytes,
            stall_ms,
            stall_steps: stall_ms / tpot_local_ms.max(f64::MIN_POSITIVE),
            tpot_local_ms,
            tpot_remote_ms: None,
            filled: prompt.is_filled,
            moves: self.stalls_ms.len(),
            phases: self.phases(),
            stalls_ms: self.stalls_ms,
            remote: None,
            beside: None,
            home: None,
        }
    }
}

/// Measures one context: split, whole, and a replay of what was computed.
pub(super) async fn run(args: &MigrateArgs, prompt: Prompt) -> anyhow::Result<Vec<Row>> {
    let cluster = Cluster::start(&arguments(args, prompt)).await?;
    let mut inference = cluster.client.inference().await?;
    let info = inference.get_model_info(GetModelInfoRequest {}).await.map_err(crate::client::refused)?.into_inner();
    let text = |length: usize, seed: usize| -> Vec<u32> {
        (0..length)
            .map(|index| ((index * 7919 + seed * 104_729 + index / 251) % info.vocab_size as usize) as u32)
            .collect()
    };
    let mut short = Stream::open(inference.clone(), text(SHORT, 3), TOKENS).await?;
    let owner = short.owner();
    let alone_ms = beside(&cluster, &mut short, &owner, args.window).await?;
    drop(short);
    let mut long = Stream::open(inference.clone(), text(prompt.tokens, 0), TOKENS).await?;
    long.next(REST, PATIENCE).await?;
    let local_ms = median(&gaps(&long.next(args.window + 1, PATIENCE).await?));
    let home = long.owner();
    let away = cluster.other(&home)?;

    let mut whole = Moves::default();
    let mut undisturbed_ms = None;
    for round in 0..args.whole + args.whole % 2 {
        let to = if round % 2 == 0 { &away } else { &home };
        let (stall_ms, moved) = migrate(&cluster, &mut long, to, MigrateMode::Whole).await?;
        whole.add(stall_ms, &moved);
        if round == 0 {
            let mut short = Stream::open(inference.clone(), text(SHORT, 2), TOKENS).await?;
            undisturbed_ms = Some(beside(&cluster, &mut short, &home, args.window).await?);
        }
    }

    let mut short = Stream::open(inference.clone(), text(SHORT, 1), TOKENS).await?;
    let beside_local_ms = beside(&cluster, &mut short, &home, args.window).await?;
    let mut split = Moves::default();
    let (stall_ms, moved) = migrate(&cluster, &mut long, &away, MigrateMode::Split).await?;
    split.add(stall_ms, &moved);
    let beside_remote_ms = beside(&cluster, &mut short, &away, args.window).await?;
    let answering_ms = beside(&cluster, &mut short, &home, args.window).await?;
    drop(short);
    long.next(REST, PATIENCE).await?;
    let (tpot_remote_ms, remote) = distance(&cluster, &mut long, &away, args.window).await?;
    for round in 1..args.moves {
        let to = if round % 2 == 0 { &away } else { &home };
        let (stall_ms, moved) = migrate(&cluster, &mut long, to, MigrateMode::Split).await?;
        split.add(stall_ms, &moved);
    }

    let beside = Some(Beside { local_ms: beside_local_ms, remote_ms: beside_remote_ms });
    let stays = Some(Home { alone_ms, undisturbed_ms, answering_ms });
    let (remote, tpot_remote_ms) = (Some(remote), Some(tpot_remote_ms));
    let split = Row { tpot_remote_ms, remote, beside, home: stays, ..split.row(prompt, "split", local_ms) };
    let mut rows = vec![split];
    if args.whole > 0 {
        rows.push(whole.row(prompt, "whole", local_ms));
    }
    if !prompt.is_filled {
        rows.push(replay(&cluster, &mut long, prompt.tokens, local_ms).await?.row(prompt, "replay", local_ms));
    }
    Ok(rows)
}

/// The session's replica dies.
async fn replay(cluster: &Cluster, long: &mut Stream, context: usize, local_ms: f64) -> anyhow::Result<Moves> {
    let before = long.len();
    cluster.kill(&long.owner())?;
    // Tokens that were on their way may still come from the replica that is gone.
    while change(&long.pieces(), before.saturating_sub(1), REST).is_none() {
        long.next(1, PATIENCE).await.context("the session was not replayed")?;
    }
    let Change { gap: gap_ms, .. } =
        change(&long.pieces(), before.saturating_sub(1), REST).context("it was replayed")?;
    let mut replay = Moves::default();
    let token_bytes = 4 * (context + long.len()) as u64;
    replay.add(gap_ms - local_ms, &MigrateResponse { token_bytes, ..MigrateResponse::default() });
    Ok(replay)
}

/// Options of `up` for a context.
fn arguments(args: &MigrateArgs, prompt: Prompt) -> Vec<String> {
    let mut engine = args.engine.clone();
    engine.fill_prompts = prompt.is_filled.then_some(u64::MAX);
    let longest = prompt.tokens.max(SHORT) + TOKENS;
    engine.max_model_len = Some(longest);
    // Room for the long session twice over: where it runs, and where it is to be copied or replayed.
    engine.latent_pages = Some(2 * longest.div_ceil(PAGE_TOKENS) + 64);
    engine.state_slots = 8;
    engine.max_batch = Some(8);
    engine.step_timeout = engine.step_timeout.max(120);
    let mut arguments = engine.to_arguments();
    arguments.extend([
        format!("--tp={}", args.tp),
        // What stays stays: what distance costs is to be measured.
        "--pages-follow=never".to_owned(),
        "--attend-deadline-ms=10000".to_owned(),
        // A machine that is busy with a long prompt may be silent for longer than one that serves.
        "--lease-ms=60000".to_owned(),
        "--prepare-ms=600000".to_owned(),
        "--replay-ms=600000".to_owned(),
        // Moves of a session that a step of a long prompt holds up take as long as that.
        "--move-silence-ms=60000".to_owned(),
    ]);
    arguments
}

/// Moves the session, and waits until it has had some tokens there; the client's stall, and what moved.
async fn migrate(
    cluster: &Cluster,
    stream: &mut Stream,
    to: &str,
    mode: MigrateMode,
) -> anyhow::Result<(f64, MigrateResponse)> {
    let before = stream.len().saturating_sub(1);
    let moved = cluster.migrate(&stream.session, to, mode).await?;
    if moved.mode() != mode {
        bail!("the session moved as {:?}, not {mode:?}", moved.mode());
    }
    stream.next(REST, PATIENCE).await?;
    let change = change(&stream.pieces(), before, REST).context("the stream shows no change of replicas")?;
    Ok((change.stall, moved))
}

/// The median gap of a short session beside the long one at a replica.
async fn beside(cluster: &Cluster, short: &mut Stream, at: &str, window: usize) -> anyhow::Result<f64> {
    if short.owner() != at {
        cluster.migrate(&short.session, at, MigrateMode::Whole).await?;
    }
    short.next(REST, PATIENCE).await?;
    Ok(median(&gaps(&short.next(window + 1, PATIENCE).await?)))
}

/// The median gap of a session whose old latents are elsewhere, and where the time goes.
async fn distance(cluster: &Cluster, stream: &mut Stream, at: &str, window: usize) -> anyhow::Result<(f64, Remote)> {
    let before = cluster.counters(at).await?;
    let from = stream.len();
    let pieces = stream.next(window + 1, PATIENCE).await?;
    let after = cluster.counters(at).await?;
    // The counters saw a few tokens more on either side; means for each step do not mind.
    let all = stream.pieces();
    let span = all.get(from..).unwrap_or_default();
    let mean = |(time, count): (f64, f64), (time_then, count_then): (f64, f64)| {
        1e3 * (time_then - time) / (count_then - count).max(1.0)
    };
    let waiting_ms = mean(before.waits, after.waits);
    let step_ms = mean(before.steps, after.steps);
    let token_ms = match (span.first(), span.last()) {
        (Some(first), Some(last)) => milliseconds(last.at - first.at) / (span.len() - 1).max(1) as f64,
        _ => 0.0,
    };
    let remote =
        Remote { waiting_ms, own_ms: (step_ms - waiting_ms).max(0.0), between_ms: (token_ms - step_ms).max(0.0) };
    Ok((median(&gaps(&pieces)), remote))
}
