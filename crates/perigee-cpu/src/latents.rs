//! The latent pool and attention over it. Pages have a lock each, so that a reader of sealed pages (an answer to another
//! replica) never waits for the step loop, which writes only unsealed ones. Attention works on a range of positions at a
//! time and returns normalised outputs with the log-sum-exp of the scores; ranges are then merged exactly.

use parking_lot::RwLock;
use perigee_backend::{BackendError, CacheShape, DType, LatentReader, PAGE_TOKENS, PagePart, Result, Segment};

use crate::matrix::{View, matmul};
use crate::simd;
use crate::states::{from_bytes, to_bytes};
use crate::tensor::round_bf16;

/// Positions attended at a time before a merge, so that results do not depend on how work is spread over threads.
const BLOCK_POSITIONS: u64 = 4096;

/// Pages of latents: every page covers [`PAGE_TOKENS`] positions in every MLA layer.
#[derive(Debug)]
pub struct LatentSlab {
    layers: usize,
    width: usize,
    pages: usize,
    dtype: DType,
    /// [layers, pages], each [PAGE_TOKENS, R + r].
    slab: Vec<RwLock<Box<[f32]>>>,
}

impl LatentSlab {
    /// A poisoned slab.
    pub fn new(shape: &CacheShape, dtype: DType) -> Self {
        let page = vec![f32::NAN; PAGE_TOKENS * shape.latent_width].into_boxed_slice();
        let slab = (0..shape.mla_layers * shape.pages).map(|_| RwLock::new(page.clone())).collect();
        Self { layers: shape.mla_layers, width: shape.latent_width, pages: shape.pages, dtype, slab }
    }

    /// Number of pages.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// Numbers of a token in one layer, R + r.
    pub fn width(&self) -> usize {
        self.width
    }

    fn page(&self, layer: usize, page: u32) -> Result<&RwLock<Box<[f32]>>> {
        if page as usize >= self.pages {
            return Err(BackendError::Range { what: "latent page", index: page.into(), limit: self.pages as u64 });
        }
        if layer >= self.layers {
            return Err(BackendError::Range { what: "MLA layer", index: layer as u64, limit: self.layers as u64 });
        }
        Ok(&self.slab[layer * self.pages + page as usize])
    }

    /// Writes the latents of one position, rounded to the storage type.
    pub(crate) fn write(&self, layer: usize, page: u32, offset: usize, latents: &[f32]) -> Result<()> {
        let mut page = self.page(layer, page)?.write();
        let place = &mut page[offset * self.width..(offset + 1) * self.width];
        place.copy_from_slice(latents);
        if self.dtype == DType::Bf16 {
            round_bf16(place);
        }
        Ok(())
    }

    pub(crate) fn poison(&self, pages: &[u32]) -> Result<()> {
        for layer in 0..self.layers {
            for &page in pages {
                self.page(layer, page)?.write().fill(f32::NAN);
            }
        }
        Ok(())
    }

    pub(crate) fn copy(&self, from: u32, to: u32) -> Result<()> {
        for layer in 0..self.layers {
            let copy = self.page(layer, from)?.read().clone();
            *self.page(layer, to)?.write() = copy;
        }
        Ok(())
    }

    /// The first positions of a page of one layer as little-endian bytes in the storage type.
    pub fn export(&self, part: &PagePart) -> Result<Vec<u8>> {
        let page = self.page(part.layer as usize, part.page)?.read();
        Ok(to_bytes(&page[..part.rows()? * self.width], self.dtype))
    }

    /// Overwrites the first positions of a page of one layer.
    pub fn import(&self, page: u32, layer: u32, bytes: &[u8]) -> Result<()> {
        let row = self.width * self.dtype.bytes();
        if bytes.is_empty() || !bytes.len().is_multiple_of(row) || bytes.len() > PAGE_TOKENS * row {
            return Err(BackendError::shape("latent page (bytes)", &[PAGE_TOKENS, row], &[bytes.len()]));
        }
        let mut page = self.page(layer as usize, page)?.write();
        let positions = bytes.len() / row;
        from_bytes("latent page", &mut page[..positions * self.width], self.dtype, bytes)
    }
}

impl LatentReader for LatentSlab {
    fn attend(
        &self,
        layer: usize,
        pages: &[u32],
        heads: usize,
        scale: f32,
        latent: usize,
        queries: &[f32],
    ) -> Result<(Vec<f32>, Vec<f32>)> {
        if heads == 0 || latent > self.width || !queries.len().is_multiple_of(heads * self.width) {
            let found = [queries.len(), heads, latent];
            return Err(BackendError::shape("queries of others", &[heads * self.width, heads, self.width], &found));
        }
        let end = (pages.len() * PAGE_TOKENS) as u64;
        let segment = Segment { start: 0, end, pages: pages.to_vec() };
        // Behind all keys, so that every query sees all of them.
        let part =
            attend_segment(self, layer, &segment, &Queries { values: queries, heads, position: end, scale, latent })?;
        Ok((part.output, part.lse))
    }

    fn page(&self, layer: usize, page: u32) -> Result<Vec<u8>> {
        Ok(to_bytes(&self.page(layer, page)?.read(), self.dtype))
    }
}

/// A group of queries of one session and what attention over part of its keys gives.
#[derive(Debug)]
pub struct Attention {
    /// [queries, R], normalised; zero where the part is empty.
    pub output: Vec<f32>,
    /// `[queries]`, natural log of the sum of exponentials; -inf where the part is empty.
    pub lse: Vec<f32>,
}

/// Queries of consecutive positions: [positions * heads, R + r], head inside position, not yet scaled.
#[derive(Debug, Clone, Copy)]
pub struct Queries<'a> {
    /// The numbers.
    pub values: &'a [f32],
    /// Heads of a position.
    pub heads: usize,
    /// Absolute position of the first query.
    pub position: u64,
    /// Softmax scale.
    pub scale: f32,
    /// Width of the latent, R: the values are the first R numbers of a key.
    pub latent: usize,
}

/// Causal attention of the queries over one segment of their session, with -inf as the log-sum-exp of empty rows.
pub fn attend_segment(slab: &LatentSlab, layer: usize, segment: &Segment, queries: &Queries<'_>) -> Result<Attention> {
    let count = queries.values.len() / slab.width;
    let mut merged = Attention { output: vec![0.0; count * queries.latent], lse: vec![f32::NEG_INFINITY; count] };
    let last = queries.position + (count / queries.heads).saturating_sub(1) as u64;
    let end = segment.end.min(last + 1);
    let mut start = segment.start;
    while start < end {
        let stop = ((start / BLOCK_POSITIONS + 1) * BLOCK_POSITIONS).min(end);
        let part = attend_range(slab, layer, segment, start..stop, queries)?;
        merge(&mut merged.output, &mut merged.lse, &part.output, &part.lse);
        start = stop;
    }
    Ok(merged)
}

/// Online softmax (Milakov and Gimelshein 2018) over the pages of a range of positions.
fn attend_range(
    slab: &LatentSlab,
    layer: usize,
    segment: &Segment,
    range: std::ops::Range<u64>,
    queries: &Queries<'_>,
) -> Result<Attention> {
    let (width, latent) = (slab.width, queries.latent);
    let count = queries.values.len() / width;
    let mut output = vec![0f32; count * latent];
    let mut maxima = vec![f32::NEG_INFINITY; count];
    let mut sums = vec![0f32; count];
    let mut scores = vec![0f32; count * PAGE_TOKENS];
    let mut position = range.start;
    while position < range.end {
        let (page, offset) = segment.locate(position);
        let keys = (PAGE_TOKENS - offset).min((range.end - position) as usize);
        let guard = slab.page(layer, page)?.read();
        // Only written positions are touched: the rest of a page may hold anything.
        let block = &guard[offset * width..(offset + keys) * width];
        let scores = &mut scores[..count * keys];
        let key_view = View { data: block, rows: keys, columns: width, stride: width, transposed: true };
        matmul(View::new(queries.values, count, width), key_view, 0.0, scores, keys);
        for (query, row) in scores.chunks_exact_mut(keys).enumerate() {
            let at = queries.position + (query / queries.heads) as u64;
            let seen = (at + 1).saturating_sub(position).min(keys as u64) as usize;
            for score in &mut row[..seen] {
                *score *= queries.scale;
            }
            let top = row[..seen].iter().copied().fold(maxima[query], f32::max);
            if top == f32::NEG_INFINITY {
                row.fill(0.0);
                continue;
            }
            let keep = (maxima[query] - top).exp();
            maxima[query] = top;
            if keep != 1.0 {
                output[query * latent..(query + 1) * latent].iter_mut().for_each(|value| *value *= keep);
            }
            for score in &mut row[..seen] {
                *score -= top;
            }
            simd::exp_all(&mut row[..seen]);
            row[seen..].fill(0.0);
            sums[query] = sums[query] * keep + row[..seen].iter().sum::<f32>();
        }
        let values = View { data: block, rows: keys, columns: latent, stride: width, transposed: false };
        matmul(View::new(scores, count, keys), values, 1.0, &mut output, latent);
        position += keys as u64;
    }
    let lse = maxima.iter().zip(&sums).map(|(&top, &sum)| if sum > 0.0 { top + sum.ln() } else { f32::NEG_INFINITY });
    let lse: Vec<f32> = lse.collect();
    for (row, &sum) in output.chunks_exact_mut(latent).zip(&sums) {
        if sum > 0.0 {
            row.iter_mut().for_each(|value| *value /= sum);
        }
    }
    Ok(Attention { output, lse })
}

/// Merges attention over another, disjoint part of the keys into `output` [n, width] and `lse` [n]: exact, associative and
/// commutative up to rounding. An empty part has lse -inf and weight 0.
pub(crate) fn merge(output: &mut [f32], lse: &mut [f32], other_output: &[f32], other_lse: &[f32]) {
    let width = output.len() / lse.len().max(1);
    for (row, (mine, &theirs)) in lse.iter_mut().zip(other_lse).enumerate() {
        let top = mine.max(theirs);
        if top == f32::NEG_INFINITY {
            continue;
        }
        let (a, b) = ((*mine - top).exp(), (theirs - top).exp());
        let total = a + b;
        let (a, b) = (a / total, b / total);
        let range = row * width..(row + 1) * width;
        for (value, other) in output[range.clone()].iter_mut().zip(&other_output[range]) {
            // A weight of 0 drops its side whatever it holds.
            *value = if b == 0.0 {
                *value
            } else if a == 0.0 {
                *other
            } else {
                a * *value + b * other
            };
        }
        *mine = top + total.ln();
    }
}
