//! Cases of whole steps: decode steps that a backend may record and run again, beside twins of theirs that run op by op, and
//! steps whose tokens are the draws of the step before. On a backend that records nothing both twins run alike.

use perigee_sampling::{Draw as TokenDraw, SamplingParams, Scratch, TokenCounts};

use crate::batch::{Row, Segment, StepBatch};
use crate::error::Result;
use crate::ops::{Backend, Partials, Precision, Recorded, Routing};
use crate::shapes::{CacheShape, KdaShape, MlaShape, MoeShape};
use crate::weights::DType;

use super::check::{Checks, Quantity};
use super::draw::{Draw, Origin, WeightDraw};
use super::experts::PLAIN;
use super::harness::{Harness, VOCAB, small_cache};
use super::reference::experts::{Bias, MoeLayer};
use super::reference::kda::{Gates, KdaLayer};
use super::reference::mla::MlaLayer;
use super::{Case, Factory};

/// Widths of the residual stream: few numbers, and those of the published model.
const NARROW: usize = 128;
const PUBLISHED: usize = 2304;
/// Rows of the head.
const WORDS: usize = 96;
const KDA: KdaShape = KdaShape { hidden: NARROW, heads: 2, head_dim: 128, conv: 4, eps: 1e-5 };
const MLA: MlaShape =
    MlaShape { hidden: NARROW, heads: 2, nope: 128, rope: 64, value: 128, latent: 512, query_rank: None, eps: 1e-6 };
const MOE: MoeShape = MoeShape { hidden: NARROW, width: 64, shared_width: 64, ..PLAIN };
/// Sequences, each with a twin.
const SEQUENCES: usize = 24;

pub(super) fn cases<F: Factory>() -> Vec<Case<F>> {
    vec![
        Case::new("step/recorded".into(), |factory: &mut F, checks| {
            // Checkers look at the narrow one: in wide products they report hazards of libraries' kernels.
            checks
                .sizes(&[NARROW, PUBLISHED], &[NARROW])
                .iter()
                .try_for_each(|&hidden| recorded(factory, checks, hidden))
        }),
        Case::new("step/recorded at a long context".into(), |factory: &mut F, checks| long_context(factory, checks)),
        Case::new("step/fed with draws".into(), |factory: &mut F, checks| fed(factory, checks)),
    ]
}

/// A model of one layer of each kind, with a mixture of experts after both.
struct Layers<B: Backend> {
    embedding: B::Embedding,
    norm: B::Norm,
    kda: B::Kda,
    mla: B::Mla,
    moe: B::Moe,
    head: B::Head,
}

fn load<B: Backend>(backend: &mut B, hidden: usize) -> Result<Layers<B>> {
    let (kda, mla, moe) = (KdaShape { hidden, ..KDA }, MlaShape { hidden, ..MLA }, MoeShape { hidden, ..MOE });
    let mut weights = WeightDraw::new(91, Origin::Bytes);
    let table = weights.normal("embed_tokens", &[VOCAB, hidden], 1.0);
    let norm = weights.uniform("norm", &[hidden], DType::Bf16, [0.5, 1.5]);
    let head = weights.normal("lm_head", &[WORDS, hidden], 0.1);
    Ok(Layers {
        embedding: backend.load_embedding(&table.slice(), 0)?,
        norm: backend.load_norm(&norm.slice(), 1e-5)?,
        kda: backend.load_kda(&kda, &KdaLayer::draw(kda, Gates::Mixed, 92, Origin::Bytes).weights())?,
        mla: backend.load_mla(&mla, &MlaLayer::draw(mla, 93, Origin::Bytes).weights())?,
        moe: backend.load_moe(&moe, &MoeLayer::draw(moe, Bias::Mixed, 94, Origin::Bytes).weights())?,
        head: backend.load_head(&head.slice(), &[WORDS])?,
    })
}

/// The model on a backend, and the activations that its steps work in.
struct Stage<B: Backend> {
    harness: Harness<B>,
    layers: Layers<B>,
    residual: B::Tensor,
    normed: B::Tensor,
    delta: B::Tensor,
    queries: B::Tensor,
    partials: Partials<B::Tensor>,
    logits: B::Tensor,
}

impl<B: Backend> Stage<B> {
    fn open<F: Factory<B = B>>(factory: &mut F, hidden: usize) -> Result<Self> {
        let slots = 2 * SEQUENCES;
        let cache = CacheShape { kda_heads: KDA.heads, slots, pages: slots, ..small_cache() };
        let (mut harness, layers) = Harness::open(factory, cache, |backend: &mut B| load(backend, hidden))?;
        Ok(Self {
            residual: harness.full(hidden)?,
            normed: harness.activations(hidden)?,
            delta: harness.activations(hidden)?,
            queries: harness.full(MLA.heads * MLA.cache_width())?,
            partials: Partials { output: harness.full(MLA.heads * MLA.latent)?, lse: harness.full(MLA.heads)? },
            logits: harness.backend.tensor(slots, WORDS, Precision::Full)?,
            harness,
            layers,
        })
    }

    /// Runs a step, offered as a whole or not; what became of the offer, and the logits.
    fn run(&mut self, batch: &StepBatch, is_offered: bool) -> Result<(Recorded, Vec<f32>)> {
        self.harness.validate(batch)?;
        let recorded = if is_offered { self.harness.backend.run_recorded(batch)? } else { Recorded::No };
        if recorded == Recorded::No {
            self.harness.backend.begin_step(batch)?;
        }
        if recorded != Recorded::Done {
            self.run_ops()?;
        }
        if recorded == Recorded::Recording {
            self.harness.backend.end_recording()?;
        }
        Ok((recorded, self.harness.backend.read(&self.logits, batch.logits.len())?))
    }

    fn run_ops(&mut self) -> Result<()> {
        let Self { harness, layers, residual, normed, delta, queries, partials, logits } = self;
        let backend = &mut harness.backend;
        backend.embed(&layers.embedding, residual)?;
        backend.rms_norm(residual, &layers.norm, normed)?;
        backend.kda_mixer(&layers.kda, 0, normed, delta)?;
        backend.add_rms_norm(residual, delta, &layers.norm, normed)?;
        backend.moe(&layers.moe, normed, Routing::Free, delta)?;
        backend.add_rms_norm(residual, delta, &layers.norm, normed)?;
        backend.mla_project(&layers.mla, 0, normed, queries)?;
        backend.mla_attend(&layers.mla, 0, queries, partials)?;
        backend.mla_output(&layers.mla, partials, delta)?;
        backend.add_rms_norm(residual, delta, &layers.norm, normed)?;
        backend.moe(&layers.moe, normed, Routing::Free, delta)?;
        backend.add_rms_norm(residual, delta, &layers.norm, normed)?;
        backend.logits(&layers.head, normed, logits)
    }
}

/// The next token of each of the sequences from slot `first` on, whose positions are given; each has a slot and a page.
fn batch(first: usize, positions: &[usize], tokens: &[u32]) -> StepBatch {
    let row = |(number, &position): (usize, &usize)| {
        let slot = (first + number) as u32;
        let segments = vec![Segment { start: 0, end: position as u64 + 1, pages: vec![slot] }];
        Row { tokens: 1, position: position as u64, read_slot: slot, write_slot: slot, segments }
    };
    let rows: Vec<Row> = positions.iter().enumerate().map(row).collect();
    StepBatch { tokens: tokens.to_vec(), logits: (0..rows.len() as u32).collect(), rows }
}

/// Steps of sizes that are recorded as they are and of some that are padded, each size again after another one.
fn recorded<F: Factory>(factory: &mut F, checks: &mut Checks, hidden: usize) -> Result<()> {
    let mut stage = Stage::open(factory, hidden)?;
    let mut draw = Draw::new(95);
    let mut words = |count: usize| -> Vec<u32> { (0..count).map(|_| draw.below(VOCAB) as u32).collect() };
    stage.harness.backend.clear_slots(&(0..2 * SEQUENCES as u32).collect::<Vec<_>>())?;
    let mut positions = [0; SEQUENCES];
    let mut seen = Vec::new();
    for &count in checks.sizes(&[5, SEQUENCES, 3, 5, SEQUENCES, 1, 3, 1], &[5, SEQUENCES, 1]) {
        let tokens = words(count);
        let (_, expected) = stage.run(&batch(0, &positions[..count], &tokens), false)?;
        let (outcome, found) = stage.run(&batch(SEQUENCES, &positions[..count], &tokens), true)?;
        positions[..count].iter_mut().for_each(|position| *position += 1);
        let expected: Vec<f64> = expected.into_iter().map(f64::from).collect();
        let again = if seen.contains(&count) { ", again" } else { "" };
        checks.close(&format!("{count} rows of {hidden}{again}"), Quantity::MlaOutput, WORDS, &found, &expected);
        let awaited = if seen.contains(&count) { Recorded::Done } else { Recorded::Recording };
        checks.holds(&format!("{count} rows of {hidden}{again}"), [awaited, Recorded::No].contains(&outcome), || {
            format!("are {outcome:?}")
        });
        seen.push(count);
    }
    Ok(())
}

/// One sequence whose keys lie in many pages, as a recorded step has it alone, beside its twin.
fn long_context<F: Factory>(factory: &mut F, checks: &mut Checks) -> Result<()> {
    const MOST: usize = 900;
    const CHUNK: usize = 300;
    let mut stage = Stage::open(factory, NARROW)?;
    let mut draw = Draw::new(97);
    let tokens: Vec<u32> = (0..MOST).map(|_| draw.below(VOCAB) as u32).collect();
    stage.harness.backend.clear_slots(&[0, 1])?;
    let pages = Segment::pages_for(0, MOST as u64) as u32;
    let batch = |slot: u32, from: usize, to: usize| {
        let pages = (slot * pages..).take(Segment::pages_for(0, to as u64)).collect();
        let segments = vec![Segment { start: 0, end: to as u64, pages }];
        let count = (to - from) as u32;
        let row = Row { tokens: count, position: from as u64, read_slot: slot, write_slot: slot, segments };
        StepBatch { tokens: tokens[from..to].to_vec(), logits: vec![count - 1], rows: vec![row] }
    };
    let mut position = checks.sizes(&[860], &[560])[0];
    for start in (0..position).step_by(CHUNK) {
        for slot in 0..2 {
            stage.run(&batch(slot, start, position.min(start + CHUNK)), false)?;
        }
    }
    for _ in 0..3 {
        let (_, expected) = stage.run(&batch(0, position, position + 1), false)?;
        let (_, found) = stage.run(&batch(1, position, position + 1), true)?;
        let expected: Vec<f64> = expected.into_iter().map(f64::from).collect();
        checks.close(&format!("a token at {position}"), Quantity::MlaOutput, WORDS, &found, &expected);
        position += 1;
    }
    Ok(())
}

/// Draws are queued, the next step takes them as its tokens in another order, and then they are read.
fn fed<F: Factory>(factory: &mut F, checks: &mut Checks) -> Result<()> {
    const LIKELIEST: [u32; 4] = [7, 300, VOCAB as u32 - 1, 7];
    let table = WeightDraw::new(96, Origin::Bytes).normal("embed_tokens", &[VOCAB, NARROW], 1.0);
    let (mut h, embedding) =
        Harness::open(factory, small_cache(), |backend: &mut F::B| backend.load_embedding(&table.slice(), 0))?;
    let mut logits = h.backend.tensor(LIKELIEST.len(), VOCAB, Precision::Full)?;
    let mut values = vec![0.0; LIKELIEST.len() * VOCAB];
    LIKELIEST.iter().enumerate().for_each(|(row, &token)| values[row * VOCAB + token as usize] = 3.0);
    h.backend.write(&mut logits, &values)?;
    let (params, counts) = (SamplingParams::greedy(), TokenCounts::new());
    let draw =
        |position| TokenDraw { params: &params, choice: 0, position, counts: &counts, banned: &[], allowed: None };
    let draws: Vec<TokenDraw<'_>> = (0..LIKELIEST.len() as u64).map(draw).collect();
    if !h.backend.runs_ahead() {
        let refused = h.backend.queue_draws(&logits, &draws).is_err() && h.backend.feed_drawn(&[0]).is_err();
        checks.holds("queued draws", refused, || "are taken by a backend that says it cannot".into());
        let drawn = h.backend.sample(&logits, &draws, &mut Scratch::new())?;
        checks.equal("draws", &drawn.iter().map(|drawn| drawn.token).collect::<Vec<_>>(), &LIKELIEST);
        return Ok(());
    }
    let order = [2, 0, 1, 3];
    h.backend.queue_draws(&logits, &draws)?;
    h.backend.feed_drawn(&order)?;
    h.begin_plain(vec![0; LIKELIEST.len()], Vec::new())?;
    let mut out = h.full(NARROW)?;
    h.backend.embed(&embedding, &mut out)?;
    let found = h.backend.read(&out, LIKELIEST.len())?;
    let expected: Vec<f32> = order
        .iter()
        .flat_map(|&from| &table.values[LIKELIEST[from as usize] as usize * NARROW..][..NARROW])
        .map(|&value| value as f32)
        .collect();
    checks.equal("embeddings of the draws that a step is fed with", &found, &expected);
    let tokens: Vec<Option<u32>> =
        h.backend.collect_draws()?.into_iter().map(|drawn| drawn.map(|drawn| drawn.token)).collect();
    checks.equal("draws collected", &tokens, &LIKELIEST.map(Some));
    Ok(())
}
