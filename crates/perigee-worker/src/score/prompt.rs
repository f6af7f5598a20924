//! The steps of a score job: a group of prompts side by side in chunks, then their continuations token by token. A prompt
//! has a slot and pages of its own; where both a greedy and a fed continuation are asked for, the greedy one runs on a
//! fork, so that neither disturbs the other.

use std::ops::Range;

use perigee_backend::{Backend, PAGE_TOKENS, Row, Segment, StepBatch};
use perigee_engine::executor::StepPlan;
use perigee_engine::protocol::ForcedExperts;
use perigee_engine::ranks::{Ranks, Trace};

use super::files::{Inputs, Outputs};
use super::job::ScoreJob;
use crate::error::{Result, WorkerError};
use crate::load::Opened;

/// One sequence: a prompt and its continuation, or a fork of it.
#[derive(Clone)]
struct Track {
    /// Index among the job's prompts.
    prompt: usize,
    slot: u32,
    pages: Range<u32>,
    /// Positions done.
    done: usize,
    /// Where the latent cache is cut, ascending, between 0 and the final length.
    cuts: Vec<u64>,
}

/// Tokens that one track runs in a step.
struct Piece<'a> {
    track: &'a Track,
    tokens: &'a [u32],
}

/// What kind of step, which decides the names of what it writes.
#[derive(Clone, Copy, PartialEq)]
enum Phase {
    /// The part of the prompts that is filled in: nothing is computed, so nothing is written.
    Filled,
    Prompt,
    /// The continuation whose traces are written.
    Continuation,
    /// A greedy run whose traces are not.
    Silent,
}

impl Phase {
    /// Of how many of a piece's tokens, the last ones, logits are wanted.
    fn logits(self, tokens: usize) -> usize {
        match self {
            Self::Filled => 0,
            Self::Prompt => tokens,
            Self::Continuation | Self::Silent => 1,
        }
    }
}

/// Runs a job's prompts.
pub(crate) struct Scorer<'a, B: Backend> {
    ranks: &'a mut Ranks<B>,
    opened: &'a Opened,
    job: &'a ScoreJob,
    inputs: &'a Inputs,
    /// First positions of every prompt that are filled in, not computed: logits, traces and forced experts begin behind them.
    filled: usize,
}

impl<'a, B: Backend> Scorer<'a, B> {
    pub(crate) fn new(
        ranks: &'a mut Ranks<B>,
        opened: &'a Opened,
        job: &'a ScoreJob,
        inputs: &'a Inputs,
    ) -> Result<Self> {
        let vocab = opened.limits.vocab;
        let fed =
            inputs.feed.iter().flatten().zip(&inputs.prompts).map(|(feed, (number, _))| ("greedy", *number, feed));
        let prompts = inputs.prompts.iter().map(|(number, tokens)| ("prompt", *number, tokens));
        for (kind, number, tokens) in prompts.chain(fed) {
            if let Some(token) = tokens.iter().find(|&&token| token as usize >= vocab) {
                let message = format!("{kind}_{number}: token {token} is outside of the vocabulary of {vocab}");
                return Err(WorkerError::Score(message));
            }
        }
        let filled = usize::try_from(opened.fill_prompts.unwrap_or(0)).unwrap_or(usize::MAX);
        if let Some((number, tokens)) = inputs.prompts.iter().find(|(_, tokens)| tokens.len() <= filled) {
            let message = format!("prompt_{number}: all of its {} tokens would be filled in", tokens.len());
            return Err(WorkerError::Score(format!("{message}; --fill-prompts=POSITIONS must leave some to score")));
        }
        Ok(Self { ranks, opened, job, inputs, filled })
    }

    /// Scores a group of prompts and their continuations.
    pub(crate) fn score(&mut self, group: Range<usize>, outputs: &mut Outputs) -> Result<()> {
        let mut tracks: Vec<Track> = group.clone().map(|prompt| self.track(prompt, prompt - group.start)).collect();
        self.clear(&tracks)?;
        self.run_prompts(&mut tracks, outputs)?;
        for track in &tracks {
            self.write_states(track, outputs)?;
        }
        let feed = self.inputs.feed.as_ref();
        if let Some(count) = self.job.greedy {
            let mut runners = tracks.clone();
            let phase = if feed.is_some() { Phase::Silent } else { Phase::Continuation };
            if feed.is_some() {
                self.fork(&mut runners, group.len() as u32)?;
            }
            self.run_greedy(&mut runners, count, phase, outputs)?;
        }
        if let Some(feed) = feed {
            self.run_fed(&mut tracks, feed, outputs)?;
        }
        Ok(())
    }

    fn tokens(&self, prompt: usize) -> &'a [u32] {
        &self.inputs.prompts[prompt].1
    }

    fn number(&self, prompt: usize) -> usize {
        self.inputs.prompts[prompt].0
    }

    /// Tokens that follow a prompt, however they are chosen.
    fn continuation(&self, prompt: usize) -> usize {
        let fed = self.inputs.feed.as_ref().map_or(0, |feed| feed[prompt].len());
        fed.max(self.job.greedy.unwrap_or(0))
    }

    fn track(&self, prompt: usize, place: usize) -> Track {
        let total = (self.tokens(prompt).len() + self.continuation(prompt)) as u64;
        let parts = self.job.segments as u64;
        // Odd positions, so that cuts fall inside pages and inside chunks.
        let mut cuts: Vec<u64> = (1..parts).map(|part| (part * total / parts) | 1).filter(|&cut| cut < total).collect();
        cuts.dedup();
        let per_track = (self.opened.limits.pages / self.opened.limits.slots) as u32;
        let first = place as u32 * per_track;
        Track { prompt, slot: place as u32, pages: first..first + per_track, done: 0, cuts }
    }

    fn clear(&mut self, tracks: &[Track]) -> Result<()> {
        let clear_slots = tracks.iter().map(|track| track.slot).collect();
        self.ranks.forward(&StepPlan { clear_slots, ..StepPlan::default() }, &ForcedExperts::new(), None)?;
        Ok(())
    }

    /// Gives every track a slot and pages of its own, `offset` places further.
    fn fork(&mut self, tracks: &mut [Track], offset: u32) -> Result<()> {
        let mut plan = StepPlan::default();
        for track in tracks {
            let per_track = track.pages.len() as u32;
            let pages = track.pages.start + offset * per_track..track.pages.end + offset * per_track;
            let used = track.done.div_ceil(PAGE_TOKENS);
            plan.copy_slots.push((track.slot, track.slot + offset));
            plan.copy_pages.extend(track.pages.clone().zip(pages.clone()).take(used));
            track.slot += offset;
            track.pages = pages;
        }
        self.ranks.forward(&plan, &ForcedExperts::new(), None)?;
        Ok(())
    }

    fn run_prompts(&mut self, tracks: &mut [Track], outputs: &mut Outputs) -> Result<()> {
        loop {
            // All tracks come to the end of what is filled in with the same step.
            let left = tracks.first().map_or(0, |track| self.filled.saturating_sub(track.done));
            let (phase, most) = if left > 0 { (Phase::Filled, left) } else { (Phase::Prompt, usize::MAX) };
            let mut advances = Vec::new();
            let mut pieces = Vec::new();
            for track in tracks.iter() {
                let rest = &self.tokens(track.prompt)[track.done..];
                if !rest.is_empty() {
                    let tokens = &rest[..self.job.chunk.min(rest.len()).min(most)];
                    advances.push((track.prompt, tokens.len()));
                    pieces.push(Piece { track, tokens });
                }
            }
            if pieces.is_empty() {
                return Ok(());
            }
            self.step(&pieces, phase, outputs)?;
            for track in tracks.iter_mut() {
                track.done += advances.iter().find(|(prompt, _)| *prompt == track.prompt).map_or(0, |(_, n)| *n);
            }
        }
    }

    fn run_greedy(&mut self, tracks: &mut [Track], count: usize, phase: Phase, outputs: &mut Outputs) -> Result<()> {
        let mut chosen: Vec<Vec<u32>> = Vec::new();
        for track in tracks.iter() {
            let last = outputs.last_row(&format!("logits_{}", self.number(track.prompt)));
            chosen.push(vec![argmax(&last)]);
        }
        for step in 0..count {
            // The last token is fed only for its traces.
            if step + 1 == count && !(phase == Phase::Continuation && self.job.trace) {
                break;
            }
            let tokens: Vec<[u32; 1]> = chosen.iter().map(|chosen| [chosen[step]]).collect();
            let pieces: Vec<Piece<'_>> =
                tracks.iter().zip(&tokens).map(|(track, tokens)| Piece { track, tokens }).collect();
            let logits = self.step(&pieces, phase, outputs)?;
            for ((track, chosen), row) in tracks.iter_mut().zip(&mut chosen).zip(logits) {
                track.done += 1;
                if chosen.len() < count {
                    chosen.push(argmax(&row));
                }
            }
        }
        for (track, chosen) in tracks.iter().zip(&chosen) {
            outputs.put_tokens(format!("greedy_{}", self.number(track.prompt)), &chosen[..count.min(chosen.len())]);
        }
        Ok(())
    }

    fn run_fed(&mut self, tracks: &mut [Track], feed: &[Vec<u32>], outputs: &mut Outputs) -> Result<()> {
        let longest = tracks.iter().map(|track| feed[track.prompt].len()).max().unwrap_or(0);
        for step in 0..longest {
            let pieces: Vec<Piece<'_>> = tracks
                .iter()
                .filter_map(|track| {
                    let tokens = feed[track.prompt].get(step..=step)?;
                    Some(Piece { track, tokens })
                })
                .collect();
            let logits = self.step(&pieces, Phase::Continuation, outputs)?;
            let fed: Vec<usize> = pieces.iter().map(|piece| piece.track.prompt).collect();
            for (&prompt, row) in fed.iter().zip(&logits) {
                outputs.append(format!("greedy_logits_{}", self.number(prompt)), self.opened.limits.vocab, row);
            }
            for track in tracks.iter_mut().filter(|track| fed.contains(&track.prompt)) {
                track.done += 1;
            }
        }
        Ok(())
    }

    /// Runs one step over the pieces, writes prompt logits and traces, and gives each piece's last row of logits.
    fn step(&mut self, pieces: &[Piece<'_>], phase: Phase, outputs: &mut Outputs) -> Result<Vec<Vec<f32>>> {
        let mut batch = StepBatch::default();
        for piece in pieces {
            batch.tokens.extend_from_slice(piece.tokens);
            batch.rows.push(piece.row());
            let (end, wanted) = (batch.tokens.len() as u32, phase.logits(piece.tokens.len()) as u32);
            batch.logits.extend(end - wanted..end);
        }
        let forced = self.forced(pieces, phase)?;
        let traced = self.job.trace && matches!(phase, Phase::Prompt | Phase::Continuation);
        let mut trace = traced.then(Trace::default);
        let plan = StepPlan { batch, ..StepPlan::default() };
        let logits = self.ranks.forward(&plan, &forced, trace.as_mut())?;
        let vocab = self.opened.limits.vocab;
        let mut rows = logits.chunks_exact(vocab);
        let mut last = Vec::with_capacity(pieces.len());
        for piece in pieces {
            let mine: Vec<&[f32]> = rows.by_ref().take(phase.logits(piece.tokens.len())).collect();
            if phase == Phase::Prompt {
                let name = format!("logits_{}", self.number(piece.track.prompt));
                mine.iter().for_each(|row| outputs.append(name.clone(), vocab, row));
            }
            last.push(mine.last().map(|row| row.to_vec()).unwrap_or_default());
        }
        if let Some(trace) = trace {
            self.write_trace(pieces, phase, &trace, outputs);
        }
        Ok(last)
    }

    /// Experts for this step from the job's file, layer by layer in the order of the batch.
    fn forced(&self, pieces: &[Piece<'_>], phase: Phase) -> Result<ForcedExperts> {
        let Some(table) = self.inputs.experts.as_ref().filter(|_| phase != Phase::Filled) else {
            return Ok(ForcedExperts::new());
        };
        let config = self.opened.source.config();
        let top_k = config.moe.top_k;
        let mut forced = ForcedExperts::new();
        for (layer, _) in config.layers.iter().enumerate().filter(|(_, layer)| !layer.dense) {
            let mut rows = Vec::new();
            for piece in pieces {
                let number = self.number(piece.track.prompt);
                let (name, first) = match phase {
                    Phase::Prompt => (format!("experts_{number}_{layer}"), piece.track.done - self.filled),
                    _ => {
                        let prompt = self.tokens(piece.track.prompt).len();
                        (format!("greedy_experts_{number}_{layer}"), piece.track.done - prompt)
                    }
                };
                let wanted = first * top_k..(first + piece.tokens.len()) * top_k;
                let found = table.get(&name).and_then(|all| all.get(wanted));
                rows.extend_from_slice(found.ok_or_else(|| {
                    WorkerError::Score(format!(
                        "{name}: expected rows {first}..{} of {top_k} experts",
                        first + piece.tokens.len()
                    ))
                })?);
            }
            forced.push((layer as u32, rows));
        }
        Ok(forced)
    }

    fn write_trace(&self, pieces: &[Piece<'_>], phase: Phase, trace: &Trace, outputs: &mut Outputs) {
        let config = self.opened.source.config();
        let mut first = 0;
        for piece in pieces {
            let number = self.number(piece.track.prompt);
            let span = |width: usize| first * width..(first + piece.tokens.len()) * width;
            if phase == Phase::Prompt {
                for (layer, values) in &trace.hidden {
                    let width = config.hidden;
                    outputs.append(format!("hidden_{number}_{layer}"), width, &values[span(width)]);
                }
            }
            let prefix = if phase == Phase::Prompt { "experts" } else { "greedy_experts" };
            for (layer, selected) in &trace.experts {
                let width = config.moe.top_k;
                outputs.append_integers(format!("{prefix}_{number}_{layer}"), width, &selected[span(width)]);
            }
            first += piece.tokens.len();
        }
    }

    fn write_states(&mut self, track: &Track, outputs: &mut Outputs) -> Result<()> {
        let kda = self.opened.source.config().kda;
        for (index, layer) in self.ranks.kda_layers().into_iter().enumerate() {
            let bytes = self.ranks.recurrent_state(track.slot, index as u32)?;
            let name = format!("kda_state_{}_{layer}", self.number(track.prompt));
            outputs.put(name, vec![kda.heads, kda.head_dim, kda.head_dim], bytes);
        }
        Ok(())
    }
}

impl Piece<'_> {
    fn row(&self) -> Row {
        let end = (self.track.done + self.tokens.len()) as u64;
        let mut bounds = vec![0];
        bounds.extend(self.track.cuts.iter().copied().filter(|&cut| cut < end));
        bounds.push(end);
        let page = |position: u64| self.track.pages.start + (position / PAGE_TOKENS as u64) as u32;
        let segments = bounds
            .windows(2)
            .map(|pair| Segment { start: pair[0], end: pair[1], pages: (page(pair[0])..=page(pair[1] - 1)).collect() })
            .collect();
        Row {
            tokens: self.tokens.len() as u32,
            position: self.track.done as u64,
            read_slot: self.track.slot,
            write_slot: self.track.slot,
            segments,
        }
    }
}

/// The largest value's index, the lowest of equals.
fn argmax(row: &[f32]) -> u32 {
    let mut best = 0;
    for (index, value) in row.iter().enumerate() {
        if *value > row[best] {
            best = index;
        }
    }
    best as u32
}
