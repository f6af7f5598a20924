//! Cases of the gated MLP and of the mixture of experts: outputs, and the router's choice, which must be the reference's
//! own because no choice here hangs on a near tie.

use std::collections::BTreeSet;

use crate::error::Result;
use crate::ops::{Backend, Routing};
use crate::shapes::{MlpShape, MoeShape};

use super::check::{Checks, Quantity};
use super::draw::{Draw, Origin};
use super::harness::{Harness, small_cache};
use super::reference::experts::{Bias, MlpLayer, MoeLayer};
use super::{Case, Factory};

pub(super) const PLAIN: MoeShape = MoeShape {
    hidden: 64,
    experts: 8,
    top_k: 2,
    groups: 1,
    top_groups: 1,
    renormalize: true,
    scale: 2.446,
    width: 32,
    shared_width: 32,
};

/// Tokens of the steps of most cases.
const COUNTS: [usize; 5] = [1, 2, 33, 128, 301];

pub(super) fn cases<F: Factory>() -> Vec<Case<F>> {
    let mut cases = Vec::new();
    for (name, hidden, width, origin) in
        [("narrow", 64, 32, Origin::Bytes), ("wide", 128, 384, Origin::Bytes), ("random rule", 64, 96, Origin::Rules)]
    {
        cases.push(Case::new(format!("mlp/{name}"), move |factory: &mut F, checks| {
            mlp(factory, checks, MlpShape { hidden, width }, origin, &[1, 2, 17, 65, 200])
        }));
    }
    // Deep and wide enough for what a backend has for few tokens only, and for some dozen.
    cases.push(Case::new("mlp/few tokens".into(), |factory: &mut F, checks| {
        mlp(factory, checks, MlpShape { hidden: 1088, width: 3264 }, Origin::Bytes, &[1, 3, 8, 9, 40])
    }));
    // So many rows of weights that few blocks share the depth.
    cases.push(Case::new("mlp/some tokens".into(), |factory: &mut F, checks| {
        mlp(factory, checks, MlpShape { hidden: 1088, width: 4400 }, Origin::Bytes, &[40, 100])
    }));
    let grouped = MoeShape { experts: 16, top_k: 4, groups: 4, top_groups: 2, ..PLAIN };
    let variants = [
        ("one group", PLAIN, Bias::Mixed),
        ("no renormalisation", MoeShape { renormalize: false, ..PLAIN }, Bias::Mixed),
        ("no shared experts", MoeShape { shared_width: 0, ..PLAIN }, Bias::Mixed),
        ("two shared experts", MoeShape { shared_width: 64, ..PLAIN }, Bias::Mixed),
        ("all experts chosen", MoeShape { experts: 4, top_k: 4, ..PLAIN }, Bias::Mixed),
        ("one expert chosen", MoeShape { top_k: 1, ..PLAIN }, Bias::Mixed),
        ("experts without a token", PLAIN, Bias::Lopsided),
        ("negative bias", PLAIN, Bias::Negative),
        ("four groups", grouped, Bias::Mixed),
        ("four groups, negative bias", grouped, Bias::Negative),
        ("four groups, no renormalisation", MoeShape { renormalize: false, ..grouped }, Bias::Negative),
        ("many experts", MoeShape { hidden: 128, experts: 64, top_k: 8, width: 64, ..PLAIN }, Bias::Mixed),
        ("depths of 72 and 200", MoeShape { hidden: 72, width: 200, shared_width: 0, ..PLAIN }, Bias::Mixed),
        ("depths of 60 and 20", MoeShape { hidden: 60, width: 20, shared_width: 20, ..PLAIN }, Bias::Mixed),
    ];
    for (name, shape, bias) in variants {
        // All forms that depend on the number of tokens, in one case.
        let few: &[usize] = if name == "one group" { &COUNTS } else { &COUNTS[..3] };
        cases.push(Case::new(format!("moe/{name}"), move |factory: &mut F, checks| {
            moe(factory, checks, (shape, bias), Origin::Bytes, [&COUNTS, few])
        }));
    }
    // More steps of the depth than a backend has under way, more tiles than a device has room for at once, and of one token more rows of
    // weights than all blocks have under way.
    let deep = MoeShape { hidden: 640, experts: 2, top_k: 1, width: 576, shared_width: 0, ..PLAIN };
    let many = MoeShape { hidden: 448, experts: 56, top_k: 8, width: 128, shared_width: 0, ..PLAIN };
    let wide = MoeShape { hidden: 1152, experts: 16, top_k: 8, width: 128, shared_width: 0, ..PLAIN };
    // Few rows an expert of many tokens.
    let few = MoeShape { hidden: 448, experts: 128, top_k: 8, width: 64, shared_width: 0, ..PLAIN };
    let large: [(_, _, &'static [usize]); 4] = [
        ("deep", deep, &[3, 70, 100]),
        ("many tiles", many, &[40, 100, 200, 301]),
        ("many experts of few rows", few, &[130, 256]),
        ("wide", wide, &[1, 2, 5]),
    ];
    for (name, shape, counts) in large {
        cases.push(Case::new(format!("moe/{name}"), move |factory: &mut F, checks| {
            moe(factory, checks, (shape, Bias::Mixed), Origin::Bytes, [counts, counts])
        }));
    }
    // As many experts and as long tokens as kernels for some dozen tokens take.
    let most = MoeShape { hidden: 2304, experts: 256, top_k: 8, width: 16, shared_width: 16, ..PLAIN };
    cases.push(Case::new("moe/most experts".into(), move |factory: &mut F, checks| {
        moe(factory, checks, (most, Bias::Mixed), Origin::Bytes, [&[17, 64, 200, 256], &[64, 256]])
    }));
    cases.push(Case::new("moe/random rule".into(), move |factory: &mut F, checks| {
        moe(factory, checks, (PLAIN, Bias::Mixed), Origin::Rules, [&COUNTS, &COUNTS])
    }));
    cases
}

fn mlp<F: Factory>(
    factory: &mut F,
    checks: &mut Checks,
    shape: MlpShape,
    origin: Origin,
    counts: &[usize],
) -> Result<()> {
    let model = MlpLayer::draw(shape, 21, origin);
    let (mut h, layer) =
        Harness::open(factory, small_cache(), |backend: &mut F::B| backend.load_mlp(&shape, &model.weights()))?;
    let (mut x, mut out) = (h.activations(shape.hidden)?, h.activations(shape.hidden)?);
    let mut draw = Draw::new(22);
    for &count in checks.sizes(counts, &[1, counts[counts.len() / 2]]) {
        let values = draw.normals(count * shape.hidden, 1.0, h.activation);
        h.begin_count(count)?;
        h.upload(&mut x, &values)?;
        h.backend.mlp(&layer, &x, &mut out)?;
        let found = h.backend.read(&out, count)?;
        let expected: Vec<f64> = values.chunks_exact(shape.hidden).flat_map(|x| model.run(x)).collect();
        checks.close(&format!("{count} tokens"), Quantity::Product, shape.hidden, &found, &expected);
    }
    Ok(())
}

fn moe<F: Factory>(
    factory: &mut F,
    checks: &mut Checks,
    (shape, bias): (MoeShape, Bias),
    origin: Origin,
    [counts, few]: [&[usize]; 2],
) -> Result<()> {
    let width = shape.hidden;
    let model = MoeLayer::draw(shape, bias, 23, origin);
    let (mut h, layer) =
        Harness::open(factory, small_cache(), |backend: &mut F::B| backend.load_moe(&shape, &model.weights()))?;
    let (mut x, mut out) = (h.activations(width)?, h.activations(width)?);
    let mut draw = Draw::new(24);
    let mut moved = 0;
    for &count in checks.sizes(counts, few) {
        let values = model.inputs(&mut draw, count, h.activation);
        let tokens: Vec<&[f64]> = values.chunks_exact(width).collect();
        let own: Vec<Vec<u32>> = tokens.iter().map(|x| model.choose(x).experts).collect();
        moved += tokens.iter().zip(&own).filter(|(x, own)| model.choose_unbiased(x).experts != **own).count();
        // Any experts, in any order within a token.
        let forced: Vec<Vec<u32>> = tokens
            .iter()
            .map(|_| draw.permutation(shape.experts)[..shape.top_k].iter().map(|&e| e as u32).collect())
            .collect();
        h.begin_count(count)?;
        h.upload(&mut x, &values)?;
        let flat = forced.concat();
        for (how, routing, chosen) in [("free", Routing::Free, &own), ("forced", Routing::Forced(&flat), &forced)] {
            let before = h.backend.experts_touched()?;
            h.backend.moe(&layer, &x, routing, &mut out)?;
            let touched = h.backend.experts_touched()? - before;
            let distinct = chosen.iter().flatten().collect::<BTreeSet<_>>().len() as u64;
            checks.holds(&format!("experts touched by {count} tokens, {how}"), touched == distinct, || {
                format!("found {touched}, expected {distinct}")
            });
            let found = h.backend.read(&out, count)?;
            let expected: Vec<f64> = tokens.iter().zip(chosen).flat_map(|(x, chosen)| model.run(x, chosen)).collect();
            checks.close(&format!("{count} tokens, {how}"), Quantity::Experts, width, &found, &expected);
            let selected = h.backend.selected_experts()?;
            checks.equal(&format!("own choice of {count} tokens, {how}"), &selected, &own.concat());
        }
    }
    if shape.top_k < shape.experts {
        checks.holds("the case's own bias", moved > 0, || "changes no choice".into());
    }
    Ok(())
}
