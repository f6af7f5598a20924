//! Cases of the MLA mixer against plain attention: lengths around page edges, chunked prefill and decoding, segments cut
//! anywhere, parts that live elsewhere and are merged in, and scores far from zero. Pages are poison until written.

use crate::error::Result;
use crate::ops::{Backend, OtherPart};
use crate::shapes::MlaShape;
use crate::weights::DType;

use super::check::{Checks, Quantity};
use super::draw::{Draw, Origin};
use super::mla_bench::{MlaBench, MlaRow};
use super::mla_others::answers;
use super::reference::mla::{MlaLayer, Sequence};
use super::{Case, Factory};

const LENGTHS: [usize; 8] = [1, 63, 64, 65, 127, 128, 130, 200];

const SMALL: MlaShape =
    MlaShape { hidden: 64, heads: 4, nope: 32, rope: 16, value: 32, latent: 64, query_rank: None, eps: 1e-6 };

const PUBLISHED: MlaShape =
    MlaShape { hidden: 128, heads: 2, nope: 128, rope: 64, value: 128, latent: 512, query_rank: None, eps: 1e-6 };

pub(super) fn cases<F: Factory>() -> Vec<Case<F>> {
    let variants = [
        ("latent 64", SMALL),
        ("nope 48, value 32, 3 heads", MlaShape { heads: 3, nope: 48, ..SMALL }),
        ("value 64, 1 head", MlaShape { heads: 1, value: 64, ..SMALL }),
        ("query rank 48", MlaShape { heads: 2, query_rank: Some(48), ..SMALL }),
        ("latent 512", PUBLISHED),
        ("latent 512, query rank 64", MlaShape { heads: 1, query_rank: Some(64), ..PUBLISHED }),
    ];
    let mut cases = Vec::new();
    for (number, (variant, shape)) in variants.into_iter().enumerate() {
        for (what, body) in [
            ("lengths", lengths::<F> as fn(&mut F, &mut Checks, &MlaLayer) -> Result<()>),
            ("chunks", chunks::<F>),
            ("segments", segments::<F>),
            ("batch", batch::<F>),
            ("remote parts", remote_parts::<F>),
            ("answers for others", answers::<F>),
        ] {
            cases.push(Case::new(format!("mla/{what}/{variant}"), move |factory: &mut F, checks| {
                body(factory, checks, &MlaLayer::draw(shape, 41 + number as u64, Origin::Bytes))
            }));
        }
    }
    cases.push(Case::new("mla/long rows/latent 512".into(), |factory: &mut F, checks| {
        long_rows(factory, checks, &MlaLayer::draw(PUBLISHED, 52, Origin::Bytes))
    }));
    for shape in [SMALL, PUBLISHED] {
        cases.push(Case::new(format!("mla/long contexts/latent {}", shape.latent), move |factory: &mut F, checks| {
            long_contexts(factory, checks, &MlaLayer::draw(shape, 53, Origin::Bytes))
        }));
    }
    cases.push(Case::new("mla/random rule".into(), |factory: &mut F, checks| {
        chunks(factory, checks, &MlaLayer::draw(PUBLISHED, 51, Origin::Rules))
    }));
    for offset in [120.0, -120.0] {
        cases.push(Case::new(format!("mla/scores around {offset}"), move |factory: &mut F, checks| {
            offset_scores(factory, checks, offset)
        }));
    }
    cases.push(Case::new("mla/merging empty parts".into(), |factory: &mut F, checks| empty_parts(factory, checks)));
    cases
}

/// Each length in one step.
fn lengths<F: Factory>(factory: &mut F, checks: &mut Checks, model: &MlaLayer) -> Result<()> {
    let mut bench = MlaBench::open(factory, model)?;
    let sequence = bench.sequence(&mut Draw::new(1), 200);
    for length in LENGTHS {
        let segments = bench.place(&[0, length])?;
        let row = MlaRow { sequence: &sequence, segments: &segments, tokens: 0..length };
        bench.step(checks, &format!("{length} tokens"), &[row])?;
        bench.check_pages(checks, &sequence, &segments, length)?;
        bench.release(segments);
    }
    Ok(())
}

/// Prefill in random chunks, then decoding token by token, over a page edge.
fn chunks<F: Factory>(factory: &mut F, checks: &mut Checks, model: &MlaLayer) -> Result<()> {
    let mut bench = MlaBench::open(factory, model)?;
    for (seed, prompt) in [(1, 61), (2, 126), (3, 190)] {
        let mut draw = Draw::new(seed);
        let sequence = bench.sequence(&mut draw, prompt + 6);
        let segments = bench.place(&[0, prompt + 6])?;
        let mut position = 0;
        let prefill = draw.chunks(prompt);
        for &size in prefill.iter().chain(&[1; 6]) {
            let row = MlaRow { sequence: &sequence, segments: &segments, tokens: position..position + size };
            let what = format!("positions {position}..{} of {prompt} as {prefill:?}", position + size);
            bench.step(checks, &what, &[row])?;
            position += size;
        }
        bench.check_pages(checks, &sequence, &segments, position)?;
        bench.release(segments);
    }
    Ok(())
}

/// Many segments, cut at odd places and at page edges, each in pages of its own. In one step, early queries find the later
/// segments empty; in chunks, a step's latents may go to two segments.
fn segments<F: Factory>(factory: &mut F, checks: &mut Checks, model: &MlaLayer) -> Result<()> {
    let mut bench = MlaBench::open(factory, model)?;
    let mut draw = Draw::new(5);
    let cuts: [&[usize]; 4] =
        [&[0, 1, 3, 7, 150], &[0, 63, 64, 65, 150], &[0, 50, 100, 150], &[0, 1, 2, 64, 128, 131, 149, 150]];
    for bounds in cuts {
        let sequence = bench.sequence(&mut draw, 150);
        for sizes in [vec![150], vec![70, 60, 1, 18, 1], vec![5, 143, 1, 1]] {
            let segments = bench.place(bounds)?;
            let mut position = 0;
            for &size in &sizes {
                let row = MlaRow { sequence: &sequence, segments: &segments, tokens: position..position + size };
                let what = format!("positions {position}..{} in segments {bounds:?}", position + size);
                bench.step(checks, &what, &[row])?;
                position += size;
            }
            bench.check_pages(checks, &sequence, &segments, 150)?;
            bench.release(segments);
        }
    }
    Ok(())
}

/// Several sequences in one step, decoding or in prefill, some cut in segments.
fn batch<F: Factory>(factory: &mut F, checks: &mut Checks, model: &MlaLayer) -> Result<()> {
    let mut bench = MlaBench::open(factory, model)?;
    let mut draw = Draw::new(6);
    let bounds: [&[usize]; 6] = [&[0, 140], &[0, 70], &[0, 33, 66, 99], &[0, 131], &[0, 70], &[0, 1, 150]];
    let history = [129, 63, 64, 0, 2, 148];
    let sequences: Vec<Sequence> = bounds.iter().map(|b| bench.sequence(&mut draw, b[b.len() - 1])).collect();
    let mut placed = Vec::new();
    for (bounds, (sequence, history)) in bounds.iter().zip(sequences.iter().zip(history)) {
        placed.push(bench.place(bounds)?);
        if let (Some(segments), 1..) = (placed.last(), history) {
            bench.fill(&[MlaRow { sequence, segments, tokens: 0..history }])?;
        }
    }
    let mut positions = history;
    for sizes in [[1, 2, 33, 130, 1, 1], [1, 1, 1, 1, 67, 1]] {
        let order = draw.permutation(sizes.len());
        let rows: Vec<MlaRow<'_>> = order
            .iter()
            .map(|&row| MlaRow {
                sequence: &sequences[row],
                segments: &placed[row],
                tokens: positions[row]..positions[row] + sizes[row],
            })
            .collect();
        bench.step(checks, &format!("rows of {sizes:?} tokens in the order {order:?}"), &rows)?;
        positions.iter_mut().zip(sizes).for_each(|(position, size)| *position += size);
    }
    for (sequence, (segments, end)) in sequences.iter().zip(placed.iter().zip(positions)) {
        bench.check_pages(checks, sequence, segments, end)?;
    }
    Ok(())
}

/// Rows of many tokens, which a backend may compute in another form: odd lengths, beside rows of one token and of a few, with
/// contexts before them that are longer than any step, in segments, and with a key that only another replica holds.
fn long_rows<F: Factory>(factory: &mut F, checks: &mut Checks, model: &MlaLayer) -> Result<()> {
    let mut bench = MlaBench::open(factory, model)?;
    let mut draw = Draw::new(10);
    let sequence = bench.sequence(&mut draw, 620);
    let other = bench.sequence(&mut draw, 64);
    let beside = bench.place(&[0, 64])?;
    bench.fill(&[MlaRow { sequence: &other, segments: &beside, tokens: 0..30 }])?;
    for bounds in checks.sizes(&[vec![0, 620], vec![0, 1, 65, 311, 500, 620]], &[vec![0, 1, 65, 311, 500, 620]]) {
        let segments = bench.place(bounds)?;
        let row = |tokens| MlaRow { sequence: &sequence, segments: &segments, tokens };
        bench.step(checks, &format!("311 tokens in segments {bounds:?}"), &[row(0..311)])?;
        let few = MlaRow { sequence: &other, segments: &beside, tokens: 30..32 };
        let one = MlaRow { sequence: &other, segments: &beside, tokens: 30..31 };
        bench.step(checks, &format!("1 token, then 257 after 311 in segments {bounds:?}"), &[one, row(311..568)])?;
        bench.step(checks, &format!("256 tokens after 364, then 2, in segments {bounds:?}"), &[row(364..620), few])?;
        bench.check_pages(checks, &sequence, &segments, 620)?;
        if bounds.len() > 2 {
            let local = &segments[1..];
            let row = MlaRow { sequence: &sequence, segments: local, tokens: 300..560 };
            bench.step(checks, "260 tokens after 300 of which the first is elsewhere", &[row])?;
        }
        bench.release(segments);
    }
    Ok(())
}

/// Rows of few tokens behind contexts long enough that a backend may share one row's keys out among several blocks.
fn long_contexts<F: Factory>(factory: &mut F, checks: &mut Checks, model: &MlaLayer) -> Result<()> {
    let mut bench = MlaBench::open(factory, model)?;
    let sequence = bench.sequence(&mut Draw::new(11), 900);
    let before = checks.sizes(&[860], &[560])[0];
    for bounds in checks.sizes(&[vec![0, 900], vec![0, 300, 301, 900]], &[vec![0, 300, 301, 900]]) {
        let segments = bench.place(bounds)?;
        let row = |tokens| MlaRow { sequence: &sequence, segments: &segments, tokens };
        for start in (0..before).step_by(300) {
            bench.fill(&[row(start..before.min(start + 300))])?;
        }
        let mut position = before;
        for size in [1, 2, 19] {
            let what = format!("{size} tokens at {position} in segments {bounds:?}");
            bench.step(checks, &what, &[row(position..position + size)])?;
            position += size;
        }
        bench.check_pages(checks, &sequence, &segments, position)?;
        bench.release(segments);
    }
    Ok(())
}

/// Segments left out of a row, as if at remote homes; the reference's parts over them are merged, and the whole must be
/// attention over everything. Decode rows and chunks; one gap or two; nothing local before the row itself.
fn remote_parts<F: Factory>(factory: &mut F, checks: &mut Checks, model: &MlaLayer) -> Result<()> {
    let mut bench = MlaBench::open(factory, model)?;
    let mut draw = Draw::new(7);
    let bounds = [0, 37, 64, 100, 170];
    let sequence = bench.sequence(&mut draw, 170);
    let segments = bench.place(&bounds)?;
    bench.fill(&[MlaRow { sequence: &sequence, segments: &segments, tokens: 0..130 }])?;
    let mut position = 130;
    for (kept, size) in [([0, 2, 3], 1), ([1, 2, 3], 5), ([0, 2, 3], 17)] {
        let local: Vec<_> = kept.iter().map(|&number| segments[number].clone()).collect();
        let row = MlaRow { sequence: &sequence, segments: &local, tokens: position..position + size };
        bench.step(checks, &format!("{size} tokens at {position} with segments {kept:?} of {bounds:?}"), &[row])?;
        position += size;
    }
    let only = &segments[3..];
    let row = MlaRow { sequence: &sequence, segments: only, tokens: position..position + 2 };
    bench.step(checks, "2 tokens with the last segment only", &[row])?;
    let alternate = [segments[1].clone(), segments[3].clone()];
    let row = MlaRow { sequence: &sequence, segments: &alternate, tokens: position + 2..position + 3 };
    bench.step(checks, "1 token with two gaps", &[row])?;

    let moved = bench.place(&[155, 170])?;
    let row = MlaRow { sequence: &sequence, segments: &moved, tokens: 155..158 };
    bench.step(checks, "3 tokens with nothing local before them", &[row])
}

/// All scores moved by the same constant: softmax must not overflow, vanish or lose the log-sum-exp.
fn offset_scores<F: Factory>(factory: &mut F, checks: &mut Checks, offset: f64) -> Result<()> {
    let mut model = MlaLayer::draw(SMALL, 61, Origin::Bytes);
    model.offset_scores(offset);
    let mut bench = MlaBench::open(factory, &model)?;
    if bench.harness.activation == DType::Fp32 {
        // float32 numbers around 120 are 8e-6 apart; a score's absolute error is its weight's relative one.
        checks.relax(4.0);
    }
    let mut x = Draw::new(8).normals(140 * SMALL.hidden, 1.0, bench.harness.activation);
    x.chunks_exact_mut(SMALL.hidden).for_each(|row| row[0] = 1.0);
    let sequence = model.sequence(x);
    let segments = bench.place(&[0, 30, 140])?;
    for tokens in [0..139, 139..140] {
        let what = format!("positions {tokens:?}");
        bench.step(checks, &what, &[MlaRow { sequence: &sequence, segments: &segments, tokens }])?;
    }
    Ok(())
}

/// Partials written by hand: an empty part on either side changes nothing, two empty parts stay empty and finite, and equal
/// parts average; other tokens are not touched.
fn empty_parts<F: Factory>(factory: &mut F, checks: &mut Checks) -> Result<()> {
    let model = MlaLayer::draw(SMALL, 62, Origin::Bytes);
    let mut bench = MlaBench::open(factory, &model)?;
    let (heads, width) = (SMALL.heads, SMALL.heads * SMALL.latent);
    let mut draw = Draw::new(9);
    let sequence = bench.sequence(&mut draw, 4);
    let segments = bench.place(&[0, 4])?;
    bench.fill(&[MlaRow { sequence: &sequence, segments: &segments, tokens: 0..4 }])?;

    let empty = vec![f64::NEG_INFINITY; heads];
    // Tokens: local part empty; remote part empty; both empty; both full, the remote one e^200 times as heavy in head 0.
    let local: Vec<f64> = [
        vec![0.0; width],
        draw.normals(width, 1.0, DType::Fp32),
        vec![0.0; width],
        draw.normals(width, 1.0, DType::Fp32),
    ]
    .concat();
    let local_lse: Vec<f64> = [empty.clone(), vec![-150.0; heads], empty.clone(), vec![1.5; heads]].concat();
    let remote = [
        draw.normals(width, 1.0, DType::Fp32),
        vec![0.0; width],
        vec![0.0; width],
        draw.normals(width, 1.0, DType::Fp32),
    ];
    let mut heavy = vec![1.5; heads];
    heavy[0] = 201.5;
    let remote_lse = [vec![150.0; heads], empty.clone(), empty.clone(), heavy.clone()];

    bench.harness.upload(&mut bench.partials.output, &local)?;
    bench.harness.upload(&mut bench.partials.lse, &local_lse)?;
    let narrow = |values: &[f64]| values.iter().map(|&value| value as f32).collect::<Vec<f32>>();
    let parts: Vec<_> = remote.iter().zip(&remote_lse).map(|(output, lse)| (narrow(output), narrow(lse))).collect();
    let part = |(token, (output, lse))| OtherPart { token, output, lse };
    let parts: Vec<_> = (0..).zip(parts.iter().map(|(output, lse)| (&output[..], &lse[..]))).map(part).collect();
    bench.harness.backend.mla_merge(&bench.layer, &mut bench.partials, &parts)?;
    let average = |channel: usize| {
        let (local, remote) = (local[3 * width + channel], remote[3][channel]);
        if channel < SMALL.latent { remote } else { 0.5 * (local + remote) }
    };
    let expected: Vec<f64> =
        [remote[0].clone(), local[width..2 * width].to_vec(), vec![0.0; width], (0..width).map(average).collect()]
            .concat();
    let mut both = vec![1.5 + 2.0_f64.ln(); heads];
    both[0] = 201.5;
    let expected_lse = [vec![150.0; heads], vec![-150.0; heads], empty, both].concat();
    let found = bench.harness.backend.read(&bench.partials.output, 4)?;
    checks.close("merged outputs", Quantity::Merge, width, &found, &expected);
    let found = bench.harness.backend.read(&bench.partials.lse, 4)?;
    checks.close_lse("merged log-sum-exps", Quantity::Merge, &found, &expected_lse);

    bench.harness.backend.mla_output(&bench.layer, &bench.partials, &mut bench.out)?;
    let found = bench.harness.backend.read(&bench.out, 4)?;
    checks.holds("the output of an empty part", found.iter().all(|value| value.is_finite()), || "is not finite".into());
    Ok(())
}
