//! Cases of draws: the backend's against those of `perigee-sampling`, which defines them, on the same logits. Ids must be equal
//! unless the reference's own margin is beneath the rounding of sums and logarithms, and the logits must stay as they were.

use perigee_sampling::{Draw, Sampled, SamplingParams, Scratch, TokenCounts};

use crate::error::Result;
use crate::ops::{Backend, Precision};

use super::check::Checks;
use super::draw::Draw as Stream;
use super::harness::{Harness, small_cache};
use super::{Case, Factory};

/// Below this margin a draw may go either way: sums of probabilities in another order and precision, logarithms of another
/// library. Noise and scaled logits are float64 everywhere.
const ROUNDING: f32 = 2e-6;

/// The published vocabulary is the largest that a case uses.
const VOCABULARY: usize = 163_840;

/// Makes the parameters of a group of draws.
type Group = fn() -> Vec<SamplingParams>;

/// How the logits of a case are distributed.
#[derive(Debug, Clone, Copy)]
enum Shape {
    /// As random weights give them: nearly everything is possible.
    Flat,
    /// As trained ones do: a few tokens have nearly all the probability.
    Peaked,
    /// Multiples of a quarter, so that thousands are equal, zeros of both signs among them.
    Ties,
}

impl Shape {
    /// Sizes of vocabularies: large ones only where the shape makes them a case of their own, since the reference is slow.
    fn vocabularies(self) -> &'static [usize] {
        match self {
            Self::Flat => &[VOCABULARY, 260, 5],
            Self::Peaked => &[5003],
            Self::Ties => &[40_000, 4999],
        }
    }
}

pub(super) fn cases<F: Factory>() -> Vec<Case<F>> {
    let mut cases = Vec::new();
    for shape in [Shape::Flat, Shape::Peaked, Shape::Ties] {
        let groups: [(&str, Group); 4] = [
            ("greedy and temperature", plain),
            ("filters", filters),
            ("changed logits", changes),
            ("logprobs", logprobs),
        ];
        for (name, group) in groups {
            cases.push(Case::new(format!("sample/{name}/{shape:?}").to_lowercase(), move |factory: &mut F, checks| {
                shape.vocabularies().iter().try_for_each(|&vocab| draws(factory, checks, shape, vocab, &group()))
            }));
        }
    }
    cases.push(Case::new("sample/masks".into(), |factory: &mut F, checks| masks(factory, checks)));
    cases.push(Case::new("sample/nothing to draw".into(), |factory: &mut F, checks| refusals(factory, checks)));
    cases
}

fn plain() -> Vec<SamplingParams> {
    let temperatures = [0.0, 1.0, 0.7, 0.05, 3.0, f32::MAX, f32::MIN_POSITIVE];
    let with = |(seed, &temperature)| SamplingParams { temperature, seed, ..SamplingParams::default() };
    (0x1234_5678_9abc_def0..).zip(&temperatures).map(with).collect()
}

fn filters() -> Vec<SamplingParams> {
    let all = [
        (1, 1.0, 0.0),
        (50, 1.0, 0.0),
        (3000, 1.0, 0.0),
        (u32::MAX, 1.0, 0.0),
        (0, 0.9, 0.0),
        (0, 0.999, 0.0),
        (0, 1e-6, 0.0),
        (0, 1.0, 0.05),
        (0, 1.0, 1.0),
        (40, 0.8, 0.02),
        (4000, 0.95, 1e-4),
    ];
    let with = |(seed, &(top_k, top_p, min_p)): (u64, &(u32, f32, f32))| SamplingParams {
        temperature: if seed % 2 == 0 { 0.8 } else { 1.0 },
        top_k,
        top_p,
        min_p,
        seed,
        ..SamplingParams::default()
    };
    (7..).zip(&all).map(with).collect()
}

fn changes() -> Vec<SamplingParams> {
    let base = SamplingParams { seed: 3, ..SamplingParams::default() };
    let bias = vec![(4, 6.5), (0, -f32::MAX), (1, f32::MAX), (2, -0.25)];
    vec![
        SamplingParams { repetition_penalty: 1.3, ..base.clone() },
        SamplingParams { frequency_penalty: 0.4, presence_penalty: -0.7, ..base.clone() },
        SamplingParams { repetition_penalty: 0.6, frequency_penalty: -2.0, temperature: 0.0, ..base.clone() },
        SamplingParams { logit_bias: bias[..1].to_vec(), temperature: 0.0, ..base.clone() },
        SamplingParams { logit_bias: bias.clone(), top_k: 2, ..base.clone() },
        SamplingParams { logit_bias: bias[2..].to_vec(), repetition_penalty: 2.0, top_p: 0.9, ..base },
    ]
}

fn logprobs() -> Vec<SamplingParams> {
    let with = |(seed, count)| SamplingParams {
        logprobs: Some(count),
        top_k: if count == 5 { 3 } else { 0 },
        logit_bias: if count == 2 { vec![(3, 9.0)] } else { Vec::new() },
        seed,
        ..SamplingParams::default()
    };
    (11..).zip([0, 1, 2, 5, 20]).map(with).collect()
}

fn logits_of(shape: Shape, stream: &mut Stream, count: usize) -> Vec<f32> {
    let normal = |stream: &mut Stream| stream.normal() as f32;
    let one = |stream: &mut Stream| match shape {
        Shape::Flat => 1.3 * normal(stream),
        Shape::Peaked => 3.0 * normal(stream) + if stream.below(500) == 0 { 12.0 } else { 0.0 },
        Shape::Ties => (4.0 * normal(stream)).round() / 4.0,
    };
    (0..count).map(|_| one(stream)).collect()
}

/// Every set of parameters draws from a row of its own, all in one call, with room for more rows.
fn draws<F: Factory>(
    factory: &mut F,
    checks: &mut Checks,
    shape: Shape,
    vocab: usize,
    params: &[SamplingParams],
) -> Result<()> {
    let mut stream = Stream::new(vocab as u64);
    let rows = logits_of(shape, &mut stream, vocab * params.len());
    let mut counts = TokenCounts::from_prompt(&[1, 2, 3, vocab as u32 - 1, vocab as u32 + 9]);
    (0..200).for_each(|_| counts.record_output(stream.below(vocab.min(90)) as u32));
    let banned = [2, vocab as u32 + 5, 2, 7];
    let draws: Vec<Draw<'_>> = (0..)
        .zip(params)
        .map(|(row, params)| Draw {
            params,
            choice: row % 3,
            position: 5 + (u64::from(row) << 31),
            counts: &counts,
            banned: if row % 2 == 0 { &[] } else { &banned },
            allowed: None,
        })
        .collect();
    compare(factory, checks, &format!("{vocab} tokens"), &rows, &draws)
}

fn masks<F: Factory>(factory: &mut F, checks: &mut Checks) -> Result<()> {
    for vocab in [VOCABULARY, 5003, 260, 5] {
        let mut stream = Stream::new(31 + vocab as u64);
        let rows = logits_of(Shape::Flat, &mut stream, 3 * vocab);
        // One token in three, and always the last: its word is a partial one.
        let mut words = vec![0u64; vocab.div_ceil(64)];
        (0..vocab).filter(|token| token % 3 == 1 || token + 1 == vocab).for_each(|t| words[t / 64] |= 1 << (t % 64));
        let all = [
            SamplingParams::greedy(),
            SamplingParams { seed: 8, ..SamplingParams::default() },
            SamplingParams { seed: 9, top_k: 20, top_p: 0.7, ..SamplingParams::default() },
        ];
        let counts = TokenCounts::new();
        let draw =
            |params| Draw { params, choice: 0, position: 77, counts: &counts, banned: &[1], allowed: Some(&words) };
        let draws: Vec<Draw<'_>> = all.iter().map(draw).collect();
        compare(factory, checks, &format!("{vocab} tokens"), &rows, &draws)?;
    }
    Ok(())
}

fn compare<F: Factory>(
    factory: &mut F,
    checks: &mut Checks,
    what: &str,
    rows: &[f32],
    draws: &[Draw<'_>],
) -> Result<()> {
    let vocab = rows.len() / draws.len();
    let (mut h, ()) = Harness::open(factory, small_cache(), |_: &mut F::B| Ok(()))?;
    let mut logits = h.backend.tensor(draws.len() + 1, vocab, Precision::Full)?;
    h.backend.write(&mut logits, rows)?;
    let mut scratch = Scratch::new();
    let expected: Vec<_> = rows
        .chunks_exact(vocab)
        .zip(draws)
        .map(|(row, draw)| perigee_sampling::sample(row, draw, &mut scratch))
        .collect();
    // Twice: the second call finds what the first one left.
    for turn in ["first", "second"] {
        let found = h.backend.sample(&logits, draws, &mut scratch)?;
        checks.equal(&format!("{turn} draws of {what}"), &[found.len()], &[draws.len()]);
        for (row, (found, expected)) in found.iter().zip(&expected).enumerate() {
            match expected {
                Ok(expected) => same(checks, &format!("{turn} draw of {what}, row {row}"), found, expected),
                Err(error) => checks.holds(what, false, || format!("row {row} has no expected draw: {error}")),
            }
        }
        let kept = h.backend.read(&logits, draws.len())?;
        let changed = kept.iter().zip(rows).position(|(kept, row)| kept.to_bits() != row.to_bits());
        checks.equal(&format!("first logit of {what} that the {turn} draws changed"), &[changed], &[None]);
    }
    Ok(())
}

fn same(checks: &mut Checks, what: &str, found: &Sampled, expected: &Sampled) {
    let close = |found: f32, expected: f32, limit: f32| {
        found == expected || (found - expected).abs() <= limit * expected.abs().max(1.0)
    };
    if found.token != expected.token && expected.margin < ROUNDING {
        return;
    }
    checks.equal(&format!("token: {what}"), &[found.token], &[expected.token]);
    checks.holds(&format!("margin: {what}"), close(found.margin, expected.margin, 1e-5), || {
        format!("is {}, not {}", found.margin, expected.margin)
    });
    let ids = |sampled: &Sampled| sampled.top.iter().map(|&(token, _)| token).collect::<Vec<_>>();
    checks.equal(&format!("most likely tokens: {what}"), &ids(found), &ids(expected));
    let values = |sampled: &Sampled| {
        sampled.logprob.into_iter().chain(sampled.top.iter().map(|&(_, logprob)| logprob)).collect::<Vec<_>>()
    };
    let (found, expected) = (values(found), values(expected));
    let all_close = found.len() == expected.len() && found.iter().zip(&expected).all(|(&a, &b)| close(a, b, 1e-6));
    checks.holds(&format!("logprobs: {what}"), all_close, || format!("are {found:?}, not {expected:?}"));
}

fn refusals<F: Factory>(factory: &mut F, checks: &mut Checks) -> Result<()> {
    let vocab = 300;
    let (mut h, ()) = Harness::open(factory, small_cache(), |_: &mut F::B| Ok(()))?;
    let mut logits = h.backend.tensor(2, vocab, Precision::Full)?;
    let (counts, greedy) = (TokenCounts::new(), SamplingParams::greedy());
    let filtered = SamplingParams { top_p: 0.5, logit_bias: vec![(7, 1.0)], ..SamplingParams::default() };
    let mut scratch = Scratch::new();
    let everything: Vec<u32> = (0..vocab as u32).collect();
    let (none, short) = ([0u64; 5], [u64::MAX; 4]);
    for params in [&greedy, &filtered] {
        let draw = Draw { params, choice: 0, position: 1, counts: &counts, banned: &[], allowed: None };
        h.backend.write(&mut logits, &vec![0.5; 2 * vocab])?;
        let refused = [
            ("all tokens banned", Draw { banned: &everything, ..draw }),
            ("no token allowed", Draw { allowed: Some(&none), ..draw }),
            ("a mask of too few words", Draw { allowed: Some(&short), ..draw }),
        ];
        for (what, refused) in refused {
            checks.refused(what, h.backend.sample(&logits, &[draw, refused], &mut scratch));
        }
        let drawn = h.backend.sample(&logits, &[draw, draw], &mut scratch)?;
        checks.equal("equal rows draw the same", &drawn[..1], &drawn[1..]);
        for (what, token, value) in
            [("not a number", 7, f32::NAN), ("infinity", 299, f32::INFINITY), ("not a number", 0, f32::NAN)]
        {
            let mut rows = vec![0.5; 2 * vocab];
            rows[vocab + token] = value;
            h.backend.write(&mut logits, &rows)?;
            checks.refused(what, h.backend.sample(&logits, &[draw, draw], &mut scratch));
        }
        h.backend.write(&mut logits, &vec![f32::NEG_INFINITY; 2 * vocab])?;
        checks.refused("only impossible tokens", h.backend.sample(&logits, &[draw], &mut scratch));
    }
    checks.equal("no draws", &h.backend.sample(&logits, &[], &mut scratch)?, &[]);
    Ok(())
}
