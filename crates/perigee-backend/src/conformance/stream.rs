//! Cases of the ops on the residual stream: embedding, norms, logits, and the sum over a group of one.

use crate::error::Result;
use crate::ops::{Backend, Precision};
use crate::weights::DType;

use super::check::{Checks, Quantity};
use super::draw::{Draw, Origin, Weight, WeightDraw};
use super::harness::{Harness, VOCAB, small_cache};
use super::reference::rms_norm;
use super::{Case, Factory};

const EPS: f32 = 1e-5;

pub(super) fn cases<F: Factory>() -> Vec<Case<F>> {
    let mut cases = Vec::new();
    for width in [50, 64, 128, 2304, 4608] {
        cases.push(Case::new(format!("rms_norm/width {width}"), move |factory: &mut F, checks| {
            norm(factory, checks, width, Origin::Bytes)
        }));
    }
    cases.push(Case::new("rms_norm/random rule".into(), |factory: &mut F, checks| {
        norm(factory, checks, 128, Origin::Rules)
    }));
    for (name, origin, first, rows) in [
        ("whole", Origin::Bytes, 0, VOCAB),
        ("first shard", Origin::Bytes, 0, 259),
        ("last shard", Origin::Bytes, 259, VOCAB - 259),
        ("random rule", Origin::Rules, 100, 200),
    ] {
        cases.push(Case::new(format!("embed/{name}"), move |factory: &mut F, checks| {
            embed(factory, checks, origin, first, rows)
        }));
    }
    for (name, origin, vocab, width) in [
        ("odd vocabulary", Origin::Bytes, VOCAB, 128),
        ("five rows", Origin::Bytes, 5, 128),
        ("random rule", Origin::Rules, 96, 128),
        ("wide", Origin::Rules, 6416, 1088),
    ] {
        cases.push(Case::new(format!("logits/{name}"), move |factory: &mut F, checks| {
            logits(factory, checks, origin, vocab, width)
        }));
    }
    cases.push(Case::new("all_reduce/group of one".into(), |factory: &mut F, checks| all_reduce(factory, checks)));
    cases
}

/// Rows of three sizes: ordinary, large, and so small that epsilon is most of the mean.
fn rows_of_all_sizes(draw: &mut Draw, rows: usize, width: usize, dtype: DType) -> Vec<f64> {
    (0..rows).flat_map(|row| draw.normals(width, [1.0, 300.0, 1e-3][row % 3], dtype)).collect()
}

fn norm<F: Factory>(factory: &mut F, checks: &mut Checks, width: usize, origin: Origin) -> Result<()> {
    let weight = WeightDraw::new(1, origin).uniform("norm", &[width], DType::Bf16, [0.5, 1.5]);
    let (mut h, norm) =
        Harness::open(factory, small_cache(), |backend: &mut F::B| backend.load_norm(&weight.slice(), EPS))?;
    let (mut x, mut residual) = (h.activations(width)?, h.full(width)?);
    let mut out = h.activations(width)?;
    let mut draw = Draw::new(2);
    let normed = |x: &[f64]| -> Vec<f64> {
        x.chunks_exact(width).flat_map(|x| rms_norm(x, &weight.values, f64::from(EPS))).collect()
    };
    for &rows in checks.sizes(&[1, 3, 130], &[3]) {
        let values = rows_of_all_sizes(&mut draw, rows, width, h.activation);
        let stream = rows_of_all_sizes(&mut draw, rows, width, h.activation);
        h.begin_count(rows)?;
        h.upload(&mut residual, &values)?;
        h.backend.rms_norm(&residual, &norm, &mut out)?;
        let found = h.backend.read(&out, rows)?;
        checks.close(&format!("norm of {rows} rows"), Quantity::Norm, width, &found, &normed(&values));

        h.upload(&mut x, &values)?;
        h.upload(&mut residual, &stream)?;
        h.backend.add_rms_norm(&mut residual, &x, &norm, &mut out)?;
        let sum: Vec<f64> = stream.iter().zip(&values).map(|(a, b)| a + b).collect();
        let found = h.backend.read(&residual, rows)?;
        checks.close(&format!("stream of {rows} rows"), Quantity::Stream, width, &found, &sum);
        let found = h.backend.read(&out, rows)?;
        checks.close(&format!("norm of the stream of {rows} rows"), Quantity::Norm, width, &found, &normed(&sum));
    }
    Ok(())
}

fn embed<F: Factory>(factory: &mut F, checks: &mut Checks, origin: Origin, first: usize, rows: usize) -> Result<()> {
    let width = 64;
    let table = WeightDraw::new(3, origin).normal("embed_tokens", &[rows, width], 1.0);
    let (mut h, embedding) =
        Harness::open(factory, small_cache(), |backend: &mut F::B| backend.load_embedding(&table.slice(), first))?;
    let mut out = h.full(width)?;
    let edges = [0, first, first + rows - 1, (first + rows) % VOCAB, VOCAB - 1, first.saturating_sub(1)];
    let mut draw = Draw::new(4);
    let mut tokens: Vec<u32> = edges.into_iter().map(|token| token as u32).collect();
    tokens.extend((0..123).map(|_| draw.below(VOCAB) as u32));
    for count in [1, tokens.len()] {
        h.begin_plain(tokens[..count].to_vec(), Vec::new())?;
        h.backend.embed(&embedding, &mut out)?;
        let found = h.backend.read(&out, count)?;
        let mut expected = Vec::with_capacity(count * width);
        for &token in &tokens[..count] {
            match (token as usize).checked_sub(first).filter(|&row| row < rows) {
                Some(row) => expected.extend(table.values[row * width..][..width].iter().map(|&value| value as f32)),
                None => expected.extend(std::iter::repeat_n(0.0, width)),
            }
        }
        // Stored in bfloat16, so exact in both activation types.
        checks.equal(&format!("rows of {count} tokens"), &found, &expected);
    }
    Ok(())
}

fn logits<F: Factory>(factory: &mut F, checks: &mut Checks, origin: Origin, vocab: usize, width: usize) -> Result<()> {
    let weight: Weight = WeightDraw::new(5, origin).normal("lm_head", &[vocab, width], 0.1);
    let (mut h, head) =
        Harness::open(factory, small_cache(), |backend: &mut F::B| backend.load_head(&weight.slice(), &[vocab]))?;
    let mut x = h.activations(width)?;
    let mut out = h.backend.tensor(128, vocab, Precision::Full)?;
    let mut draw = Draw::new(6);
    let choices: [(usize, Vec<u32>); 5] =
        [(1, vec![0]), (70, vec![0, 3, 69]), (70, vec![69]), (65, (0..65).collect()), (9, vec![])];
    // A large head with many rows is slow to check.
    for (count, chosen) in choices.into_iter().filter(|(_, chosen)| vocab < 1000 || chosen.len() < 4) {
        let values = draw.normals(count * width, 1.0, h.activation);
        h.begin_plain(vec![1; count], chosen.clone())?;
        h.upload(&mut x, &values)?;
        h.backend.logits(&head, &x, &mut out)?;
        let found = h.backend.read(&out, chosen.len())?;
        let expected: Vec<f64> =
            chosen.iter().flat_map(|&row| weight.apply(&values[row as usize * width..][..width])).collect();
        checks.close(&format!("{} rows of {count} tokens", chosen.len()), Quantity::Logits, vocab, &found, &expected);
    }
    Ok(())
}

fn all_reduce<F: Factory>(factory: &mut F, checks: &mut Checks) -> Result<()> {
    let (mut h, ()) = Harness::open(factory, small_cache(), |_: &mut F::B| Ok(()))?;
    let mut x = h.activations(64)?;
    let values = Draw::new(7).normals(33 * 64, 1.0, h.activation);
    h.begin_count(33)?;
    h.upload(&mut x, &values)?;
    h.backend.all_reduce(&mut x)?;
    let found: Vec<f64> = h.backend.read(&x, 33)?.into_iter().map(f64::from).collect();
    checks.equal("a sum of one addend", &found, &values);
    Ok(())
}
