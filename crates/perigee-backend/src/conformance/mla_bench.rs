//! An MLA layer on a backend beside the same layer in the reference: places sequences in pages, runs the three thirds of the
//! mixer, and checks what crosses the seam after each. Positions that a row's segments leave out are merged in by hand.

use std::ops::Range;

use crate::batch::{Row, Segment};
use crate::error::Result;
use crate::ops::{Backend, OtherPart, Partials};
use crate::shapes::{CacheShape, MlaShape, PAGE_TOKENS};
use crate::weights::DType;

use super::Factory;
use super::check::{Checks, Quantity};
use super::draw::{Draw, decode};
use super::harness::{Harness, small_cache};
use super::reference::mla::{MlaLayer, Sequence};

/// Layers of the cache; cases run the last, and the first must keep its poison.
pub(super) const LAYERS: usize = 2;

/// Latent pages of every MLA case.
pub(super) const PAGES: usize = 96;

/// A row of a step: the next tokens of a sequence.
pub(super) struct MlaRow<'a> {
    pub(super) sequence: &'a Sequence,
    /// Local segments of the whole sequence; cut to the row's end here.
    pub(super) segments: &'a [Segment],
    /// Positions of the tokens.
    pub(super) tokens: Range<usize>,
}

impl MlaRow<'_> {
    fn local(&self) -> Vec<Segment> {
        let end = self.tokens.end as u64;
        let cut = |segment: &Segment| {
            let end = segment.end.min(end);
            let pages = segment.pages[..Segment::pages_for(segment.start, end)].to_vec();
            Segment { start: segment.start, end, pages }
        };
        self.segments.iter().filter(|segment| segment.start < end).map(cut).collect()
    }

    /// Positions before the row's end that no segment holds.
    fn remote(&self) -> Vec<usize> {
        let held = |position: &usize| {
            self.segments.iter().any(|segment| (segment.start..segment.end).contains(&(*position as u64)))
        };
        (0..self.tokens.end).filter(|position| !held(position)).collect()
    }
}

/// The row of a batch, in slots of its own.
fn batch_row((slot, row): (usize, &MlaRow<'_>)) -> Row {
    Row {
        tokens: row.tokens.len() as u32,
        position: row.tokens.start as u64,
        read_slot: slot as u32,
        write_slot: slot as u32,
        segments: row.local(),
    }
}

/// The layer under test.
pub(super) struct MlaBench<'m, B: Backend> {
    pub(super) harness: Harness<B>,
    pub(super) model: &'m MlaLayer,
    pub(super) layer: B::Mla,
    pub(super) partials: Partials<B::Tensor>,
    x: B::Tensor,
    queries: B::Tensor,
    pub(super) out: B::Tensor,
    free: Vec<u32>,
}

/// The cache that an MLA case needs.
pub(super) fn mla_cache(shape: &MlaShape) -> CacheShape {
    CacheShape { mla_layers: LAYERS, latent_width: shape.cache_width(), pages: PAGES, slots: 16, ..small_cache() }
}

impl<'m, B: Backend> MlaBench<'m, B> {
    pub(super) fn open<F: Factory<B = B>>(factory: &mut F, model: &'m MlaLayer) -> Result<Self> {
        let shape = &model.shape;
        let (mut harness, layer) =
            Harness::open(factory, mla_cache(shape), |backend: &mut B| backend.load_mla(shape, &model.weights()))?;
        let (x, out) = (harness.activations(shape.hidden)?, harness.activations(shape.hidden)?);
        let queries = harness.full(shape.heads * shape.cache_width())?;
        let partials = Partials { output: harness.full(shape.heads * shape.latent)?, lse: harness.full(shape.heads)? };
        let free = Draw::new(70).permutation(PAGES).into_iter().map(|page| page as u32).collect();
        Ok(Self { harness, model, layer, partials, x, queries, out, free })
    }

    /// A sequence of `length` drawn tokens.
    pub(super) fn sequence(&self, draw: &mut Draw, length: usize) -> Sequence {
        self.model.sequence(draw.normals(length * self.model.shape.hidden, 1.0, self.harness.activation))
    }

    /// Segments from one bound to the next, in scattered pages of their own, all poisoned.
    pub(super) fn place(&mut self, bounds: &[usize]) -> Result<Vec<Segment>> {
        let mut segments = Vec::new();
        for pair in bounds.windows(2) {
            let (start, end) = (pair[0] as u64, pair[1] as u64);
            let rest = self.free.len() - Segment::pages_for(start, end);
            let pages = self.free.split_off(rest);
            self.harness.backend.poison_pages(&pages)?;
            segments.push(Segment { start, end, pages });
        }
        Ok(segments)
    }

    /// Takes the pages back.
    pub(super) fn release(&mut self, segments: Vec<Segment>) {
        self.free.extend(segments.into_iter().flat_map(|segment| segment.pages));
    }

    /// Runs the first two thirds; latents are in their pages and partials over the local segments in `partials`.
    fn attend(&mut self, rows: &[MlaRow<'_>]) -> Result<Vec<f32>> {
        let width = self.model.shape.hidden;
        let x: Vec<f64> = rows
            .iter()
            .flat_map(|row| &row.sequence.x[row.tokens.start * width..row.tokens.end * width])
            .copied()
            .collect();
        self.harness.begin(rows.iter().enumerate().map(batch_row).collect())?;
        self.harness.upload(&mut self.x, &x)?;
        let backend = &mut self.harness.backend;
        backend.mla_project(&self.layer, LAYERS - 1, &self.x, &mut self.queries)?;
        backend.mla_attend(&self.layer, LAYERS - 1, &self.queries, &mut self.partials)?;
        backend.read(&self.queries, x.len() / width)
    }

    /// Runs the layer without looking at it: the step that fills a cache.
    pub(super) fn fill(&mut self, rows: &[MlaRow<'_>]) -> Result<()> {
        self.attend(rows).map(drop)
    }

    /// Runs the layer on a step and checks queries, partials and output.
    pub(super) fn step(&mut self, checks: &mut Checks, what: &str, rows: &[MlaRow<'_>]) -> Result<()> {
        let shape = self.model.shape;
        let tokens: Vec<(&MlaRow<'_>, usize)> =
            rows.iter().flat_map(|row| row.tokens.clone().map(move |t| (row, t))).collect();
        let gather = |of: &dyn Fn(&MlaRow<'_>, usize) -> Vec<f64>| -> Vec<f64> {
            tokens.iter().flat_map(|(row, t)| of(row, *t)).collect()
        };

        let queries = self.attend(rows)?;
        // What a backend keeps to itself is judged by the output alone.
        let shown: Vec<bool> = rows
            .iter()
            .enumerate()
            .flat_map(|row| {
                std::iter::repeat_n(self.harness.backend.shows_partials(&batch_row(row)), row.1.tokens.len())
            })
            .collect();
        let keep = |values: Vec<f32>, width: usize| -> Vec<f32> {
            let rows = values.chunks_exact(width).zip(&shown);
            rows.filter(|(_, shown)| **shown).flat_map(|(row, _)| row.iter().copied()).collect()
        };
        let gather_shown = |of: &dyn Fn(&MlaRow<'_>, usize) -> Vec<f64>| -> Vec<f64> {
            let shown = tokens.iter().zip(&shown).filter(|(_, shown)| **shown);
            shown.flat_map(|((row, t), _)| of(row, *t)).collect()
        };
        let expected = gather_shown(&|row, t| row.sequence.absorbed[t].clone());
        let width = shape.heads * shape.cache_width();
        checks.close(&format!("queries, {what}"), Quantity::Query, width, &keep(queries, width), &expected);

        let output = keep(self.harness.backend.read(&self.partials.output, tokens.len())?, shape.heads * shape.latent);
        let lse = keep(self.harness.backend.read(&self.partials.lse, tokens.len())?, shape.heads);
        let parts: Vec<_> = tokens
            .iter()
            .zip(&shown)
            .filter(|(_, shown)| **shown)
            .map(|((row, t), _)| {
                let held = row.segments.iter().flat_map(|segment| segment.start as usize..segment.end as usize);
                self.model.part(row.sequence, *t, held)
            })
            .collect();
        let expected: Vec<f64> = parts.iter().flat_map(|part| part.output.iter().copied()).collect();
        let width = shape.latent;
        checks.close(&format!("local attention, {what}"), Quantity::Attention, width, &output, &expected);
        let expected: Vec<f64> = parts.iter().flat_map(|part| part.lse.iter().copied()).collect();
        checks.close_lse(&format!("local log-sum-exp, {what}"), Quantity::LogSumExp, &lse, &expected);

        for (token, (row, t)) in tokens.iter().enumerate() {
            let remote = row.remote();
            // Two parts where there is room for two: merges must chain.
            for half in remote.chunks(remote.len().div_ceil(2).max(1)) {
                self.merge_remote(row.sequence, token, *t, half)?;
            }
        }
        self.harness.backend.mla_output(&self.layer, &self.partials, &mut self.out)?;
        let found = self.harness.backend.read(&self.out, tokens.len())?;
        let expected = gather(&|row, t| row.sequence.mixed[t].clone());
        checks.close(&format!("output, {what}"), Quantity::MlaOutput, shape.hidden, &found, &expected);
        Ok(())
    }

    /// Merges the reference's part over some positions into the partials of a token.
    fn merge_remote(&mut self, sequence: &Sequence, token: usize, t: usize, positions: &[usize]) -> Result<()> {
        let part = self.model.part(sequence, t, positions.iter().copied());
        let narrow = |values: &[f64]| values.iter().map(|&value| value as f32).collect::<Vec<f32>>();
        let (output, lse) = (narrow(&part.output), narrow(&part.lse));
        let part = OtherPart { token, output: &output, lse: &lse };
        self.harness.backend.mla_merge(&self.layer, &mut self.partials, &[part])
    }

    /// The pages hold the latents of `0..end` and poison elsewhere, in the last layer; the first layer is all poison.
    pub(super) fn check_pages(
        &mut self,
        checks: &mut Checks,
        sequence: &Sequence,
        segments: &[Segment],
        end: usize,
    ) -> Result<()> {
        for segment in segments {
            let first = segment.start as usize / PAGE_TOKENS;
            for (number, &page) in segment.pages.iter().enumerate() {
                let start = (first + number) * PAGE_TOKENS;
                let used = start.max(segment.start as usize)..(start + PAGE_TOKENS).min(segment.end as usize).min(end);
                let found = self.page(page, LAYERS - 1)?;
                let what = format!("page of positions {start}.. with {used:?} in use");
                self.check_page(checks, &what, &found, start, used, sequence);
                let other = self.page(page, 0)?;
                checks.poisoned(&format!("{what}, layer 0"), &other);
            }
        }
        Ok(())
    }

    /// `page` holds the latents of the positions in use and poison elsewhere; its first row is position `start`.
    pub(super) fn check_page(
        &self,
        checks: &mut Checks,
        what: &str,
        page: &[f32],
        start: usize,
        used: Range<usize>,
        sequence: &Sequence,
    ) {
        let width = self.model.shape.cache_width();
        let (mut found, mut expected, mut rest) = (Vec::new(), Vec::new(), Vec::new());
        for (row, values) in page.chunks(width).enumerate() {
            let position = start + row;
            if used.contains(&position) {
                found.extend_from_slice(values);
                expected.extend_from_slice(&sequence.latents[position]);
            } else {
                rest.extend_from_slice(values);
            }
        }
        checks.close(what, Quantity::Latent, width, &found, &expected);
        if !rest.is_empty() {
            checks.poisoned(&format!("rest of {what}"), &rest);
        }
    }

    /// A page of a layer as numbers.
    pub(super) fn page(&mut self, page: u32, layer: usize) -> Result<Vec<f32>> {
        let bytes = self.harness.backend.export_page(page, layer as u32)?;
        Ok(decode(&bytes, self.page_dtype(&bytes)))
    }

    /// The storage type of pages, from the size of one.
    pub(super) fn page_dtype(&self, page: &[u8]) -> DType {
        let elements = PAGE_TOKENS * self.model.shape.cache_width();
        if page.len() == elements * DType::Fp32.bytes() { DType::Fp32 } else { DType::Bf16 }
    }
}
