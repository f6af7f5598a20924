//! Cases of attention for other replicas: a reader on another thread gives, over full pages, the reference's part for the
//! same queries, whether or not the backend steps meanwhile. On a backend without a reader they are not run.

use crate::error::{BackendError, Result};
use crate::ops::{Asked, Backend};
use crate::shapes::PAGE_TOKENS;

use super::Factory;
use super::check::{Checks, Quantity};
use super::draw::Draw;
use super::mla_bench::{LAYERS, MlaBench, MlaRow};
use super::reference::mla::MlaLayer;

/// Positions whose pages are asked about; the queries are those of the positions behind them.
const KEPT: usize = 3 * PAGE_TOKENS;

pub(super) fn answers<F: Factory>(factory: &mut F, checks: &mut Checks, model: &MlaLayer) -> Result<()> {
    let mut bench = MlaBench::open(factory, model)?;
    let missing = || BackendError::Unsupported("attention for others, without a latent reader".into());
    let reader = bench.harness.backend.latent_reader().ok_or_else(missing)?;
    let shape = &model.shape;
    let sequence = bench.sequence(&mut Draw::new(12), KEPT + 20);
    let segments = bench.place(&[0, KEPT + 20])?;
    bench.fill(&[MlaRow { sequence: &sequence, segments: &segments, tokens: 0..KEPT + 20 }])?;
    let other = bench.sequence(&mut Draw::new(13), 150);
    let elsewhere = bench.place(&[0, 150])?;

    for (kept, tokens) in [(&[0, 1, 2][..], 1), (&[0, 1, 2], 17), (&[1], 2), (&[0, 2], 3), (&[], 2)] {
        let pages: Vec<u32> = kept.iter().map(|&page| segments[0].pages[page]).collect();
        let asking = KEPT..KEPT + tokens;
        let queries = asking.clone().flat_map(|t| &sequence.absorbed[t]).map(|&query| query as f32);
        let queries: Vec<f32> = queries.collect();
        let (heads, latent, scale) = (shape.heads, shape.latent, shape.scale());
        let (found, stepped) = std::thread::scope(|scope| {
            let answer = scope.spawn(|| reader.attend(LAYERS - 1, &pages, heads, scale, latent, &queries));
            let stepped = bench.fill(&[MlaRow { sequence: &other, segments: &elsewhere, tokens: 0..150 }]);
            (answer.join(), stepped)
        });
        stepped?;
        let what = format!("{tokens} tokens over pages {kept:?}");
        let Ok(found) = found else {
            checks.holds(&what, false, || "the reader panicked".into());
            continue;
        };
        let (output, lse) = found?;
        let positions = || kept.iter().flat_map(|page| page * PAGE_TOKENS..(page + 1) * PAGE_TOKENS);
        let parts: Vec<_> = asking.map(|t| model.part(&sequence, t, positions())).collect();
        let expected: Vec<f64> = parts.iter().flat_map(|part| part.output.iter().copied()).collect();
        checks.close(&format!("answer, {what}"), Quantity::Attention, latent, &output, &expected);
        let expected: Vec<f64> = parts.iter().flat_map(|part| part.lse.iter().copied()).collect();
        checks.close_lse(&format!("its log-sum-exp, {what}"), Quantity::LogSumExp, &lse, &expected);
    }
    // Several sequences in one question, one of them without keys here.
    let queries = |tokens: std::ops::Range<usize>| -> Vec<f32> {
        tokens.flat_map(|t| &sequence.absorbed[t]).map(|&query| query as f32).collect()
    };
    let kept = [vec![0, 1, 2], vec![2], Vec::new(), vec![1, 0]];
    let asked: Vec<(Vec<u32>, Vec<f32>)> = kept
        .iter()
        .zip([1, 3, 2, 17])
        .map(|(kept, tokens)| {
            (kept.iter().map(|&page: &usize| segments[0].pages[page]).collect(), queries(KEPT..KEPT + tokens))
        })
        .collect();
    let together: Vec<Asked<'_>> = asked.iter().map(|(pages, queries)| Asked { pages, queries }).collect();
    let found = reader.attend_all(LAYERS - 1, shape.heads, shape.scale(), shape.latent, &together)?;
    checks.equal("answers to a question about four sequences", &[found.len()], &[asked.len()]);
    for (number, (one, (output, lse))) in together.iter().zip(&found).enumerate() {
        let alone = reader.attend(LAYERS - 1, one.pages, shape.heads, shape.scale(), shape.latent, one.queries)?;
        let wide = |values: &[f32]| values.iter().map(|&value| f64::from(value)).collect::<Vec<_>>();
        let what = format!("sequence {number} of four");
        checks.close(&what, Quantity::Attention, shape.latent, output, &wide(&alone.0));
        checks.close_lse(&format!("log-sum-exp of {what}"), Quantity::LogSumExp, lse, &wide(&alone.1));
    }

    let query = vec![0.0; shape.heads * shape.cache_width()];
    let attend = |layer, page| reader.attend(layer, &[page], shape.heads, 1.0, shape.latent, &query);
    checks.refused("a page that does not exist", attend(0, u32::MAX));
    checks.refused("a layer that does not exist", attend(LAYERS, segments[0].pages[0]));
    let short = reader.attend(0, &segments[0].pages[..1], shape.heads, 1.0, shape.latent, &query[1..]);
    checks.refused("queries of another width", short);
    // Pages that a session's owner takes over.
    for (layer, &page) in (0..LAYERS).flat_map(|layer| segments[0].pages[..3].iter().map(move |page| (layer, page))) {
        let same = reader.page(layer, page)? == bench.harness.backend.export_page(page, layer as u32)?;
        checks.holds(&format!("page {page} of layer {layer}"), same, || "other bytes than a step exports".into());
    }
    checks.refused("giving out a page that does not exist", reader.page(0, u32::MAX));
    checks.refused("giving out a page of a layer that does not exist", reader.page(LAYERS, segments[0].pages[0]));
    Ok(())
}
