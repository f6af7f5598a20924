//! KDA for rows of several tokens, by chunks of 64: convolution, all of a chunk that needs no state, the state through a row's
//! chunks, and the gated norm.

use perigee_backend::Result;

use crate::backend::CudaBackend;
use crate::needs::{self, CHUNK_TOKENS, MORE_CHUNKS};
use crate::params::KdaParams;
use crate::stream::Grid;

/// Tokens that a thread of the convolution walks through.
const CONV_TOKENS: usize = 16;
/// Pairs of token and head that a warp of the gated norm works through.
const GATE_PAIRS: usize = 4;
/// Value channels of one block of the scan.
const SCAN_COLUMNS: usize = 32;

impl CudaBackend {
    /// Rows of several tokens. With `only_chunks`, convolution and gated norm are left out: working memory holds what the
    /// convolution left when the same step ran before.
    pub(crate) fn kda_prefill(&mut self, fast: usize, params: &KdaParams, only_chunks: bool) -> Result<()> {
        let (rows, chunks) = (self.step.prefill_rows, self.step.chunks);
        if rows.count == 0 {
            return Ok(());
        }
        let most = self.scratch.tokens() / CHUNK_TOKENS + MORE_CHUNKS;
        let params = self.kda_workspace(params, most)?;
        let heads = params.heads as usize;
        let blocks = (3 * heads * params.head_dim as usize).div_ceil(256);
        if !only_chunks {
            let mut grid = Grid::new(chunks.count, blocks.div_ceil(4), 256);
            grid.blocks.2 = CHUNK_TOKENS.div_ceil(CONV_TOKENS) as u32;
            self.stream.launch(&self.kernels.kda_conv, grid, &params)?;
            self.stream.launch(&self.kernels.kda_tails, Grid::new(rows.count, blocks, 256), &params)?;
        }
        for group in groups(&self.step.chunk_bounds, most) {
            self.kda_group(fast, &params, &group)?;
        }
        if only_chunks {
            return Ok(());
        }
        let warps = (CHUNK_TOKENS * heads).div_ceil(8 * GATE_PAIRS);
        self.stream.launch(&self.kernels.kda_gate, Grid::new(chunks.count, warps, 256), &params)
    }

    /// The parameters with working memory for up to `most` chunks at once.
    fn kda_workspace(&mut self, params: &KdaParams, most: usize) -> Result<KdaParams> {
        let (heads, dim) = (params.heads as usize, params.head_dim as usize);
        let (channels, element) = (heads * dim, self.precision.bytes());
        let [numbers, update, attention] = needs::kda_chunk_numbers(dim);
        let most_heads = most.min(self.step.chunks.count) * heads;
        Ok(KdaParams {
            rows: self.step.prefill_rows.address,
            convolved: self.scratch.take(self.tokens() * 3 * channels * element)?,
            query: self.scratch.take(most_heads * numbers * element)?,
            key: self.scratch.take(most_heads * numbers * element)?,
            erase: self.scratch.take(most_heads * numbers * element)?,
            update: self.scratch.take(most_heads * update * 4)?,
            attention: self.scratch.take(most_heads * attention * element)?,
            decay: self.scratch.take(most_heads * dim * 4)?,
            ..*params
        })
    }

    /// The chunks of some rows, then their states.
    fn kda_group(&self, fast: usize, params: &KdaParams, group: &Group) -> Result<()> {
        let (heads, dim) = (params.heads as usize, params.head_dim as usize);
        let params = KdaParams { first_row: group.first_row as u32, first_chunk: group.first_chunk as u32, ..*params };
        let fast = &self.kernels.kda_fast[fast];
        let grid = Grid::new(group.chunks, heads, 256).shared(fast.chunk_shared);
        self.stream.launch(&fast.chunk, grid, &params)?;
        let mut grid = Grid::new(group.rows, heads, fast.scan_threads).shared(fast.scan_shared);
        grid.blocks.2 = (dim / SCAN_COLUMNS) as u32;
        self.stream.launch(&fast.scan, grid, &params)
    }
}

/// Consecutive rows whose chunks are worked on together.
#[derive(Debug, PartialEq, Eq)]
struct Group {
    first_row: usize,
    rows: usize,
    first_chunk: usize,
    chunks: usize,
}

/// Cuts rows, given by the bounds of their chunks, into groups of at most `most` chunks; a row stays whole.
fn groups(bounds: &[u32], most: usize) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    for (row, pair) in bounds.windows(2).enumerate() {
        let (first, chunks) = (pair[0] as usize, (pair[1] - pair[0]) as usize);
        match groups.last_mut() {
            Some(group) if group.chunks + chunks <= most => {
                group.rows += 1;
                group.chunks += chunks;
            }
            _ => groups.push(Group { first_row: row, rows: 1, first_chunk: first, chunks }),
        }
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_keep_rows_whole_and_within_the_limit() {
        let group = |first_row, rows, first_chunk, chunks| Group { first_row, rows, first_chunk, chunks };
        assert_eq!(groups(&[0, 3, 4, 9], 5), [group(0, 2, 0, 4), group(2, 1, 4, 5)]);
        assert_eq!(groups(&[0], 5), []);
    }
}
