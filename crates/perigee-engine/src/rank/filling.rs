//! Prompts that are not computed, or only from some position on, for measuring what sessions with long contexts cost where
//! computing the contexts would take minutes or hours. Of what is filled in only a last token that draws runs; what the others would
//! have left is made up. Moves, attention and times of tokens, and of chunks that are computed, are those of a real session of that
//! length, its answer means nothing; but it is the same in every type and however the prompt is cut.

use perigee_backend::random::mix;
use perigee_backend::{Backend, DType, PAGE_TOKENS, Row, StateKind, StepBatch};
use perigee_model::ModelError;

use super::Rank;

/// Numbers beyond those of a page from which latents are taken: where a page's begin depends on its number and layer.
const BEGINNINGS: usize = 4096;
/// Latents lie between this and its negative: so far that a hundred or so of a million keys count, here and there.
const MOST_LATENT: f32 = 8.0;
const MOST_STATE: f32 = 0.1;

/// What latents are filled in with.
pub(super) struct Filling {
    /// Positions below are filled in.
    until: u64,
    /// Numbers of a page in one layer and [`BEGINNINGS`] more, as they are stored.
    noise: Vec<u8>,
    dtype: DType,
}

impl Filling {
    /// Numbers for the latents of a page in a layer, always the same.
    fn latents(&self, page: u64, layer: u32, count: usize) -> &[u8] {
        let begin = (mix(page << 8 | u64::from(layer)) as usize % BEGINNINGS) * self.dtype.bytes();
        &self.noise[begin..begin + count * self.dtype.bytes()]
    }
}

impl<B: Backend> Rank<B> {
    /// Has prompts filled in up to a position from now on, and computed beyond it and where tokens are drawn. On all ranks of a replica,
    /// or none.
    pub fn fill_prompts(&mut self, until: u64) {
        let dtype = self.dtype.unwrap_or(DType::Fp32);
        let noise = noise(0, MOST_LATENT, PAGE_TOKENS * self.cache.latent_width + BEGINNINGS, dtype);
        self.filling = Some(Filling { until, noise, dtype });
    }

    /// Fills in what is to be of every row, unless its logits are wanted; what is left to run.
    pub(super) fn fill(&mut self, filling: &Filling, batch: &StepBatch) -> Result<StepBatch, ModelError> {
        let mut rest = StepBatch::default();
        let (mut begin, mut skipped) = (0, 0);
        for row in &batch.rows {
            let end = begin + row.tokens;
            let wanted = || batch.logits.iter().filter(|&&index| begin <= index && index < end);
            let below = u32::try_from(filling.until.saturating_sub(row.position)).unwrap_or(u32::MAX);
            let first_wanted = wanted().next().map_or(row.tokens, |&index| index - begin);
            let filled = below.min(first_wanted);
            if filled > 0 {
                self.fill_row(filling, row, filled)?;
                skipped += filled;
            }
            rest.logits.extend(wanted().map(|index| index - skipped));
            rest.tokens.extend_from_slice(&batch.tokens[(begin + filled) as usize..end as usize]);
            let (tokens, position) = (row.tokens - filled, row.position + u64::from(filled));
            if tokens > 0 {
                rest.rows.push(Row { tokens, position, ..row.clone() });
            }
            begin = end;
        }
        Ok(rest)
    }

    /// Fills in the latents of a row's first positions, and its state where it has none yet.
    fn fill_row(&mut self, filling: &Filling, row: &Row, positions: u32) -> Result<(), ModelError> {
        let page_tokens = PAGE_TOKENS as u64;
        let (from, to) = (row.position, row.position + u64::from(positions));
        for segment in &row.segments {
            let (from, to) = (from.max(segment.start), to.min(segment.end));
            let numbers = if from < to { from / page_tokens..to.div_ceil(page_tokens) } else { 0..0 };
            for number in numbers {
                let (page, _) = segment.locate((number * page_tokens).max(segment.start));
                // Positions from the page's first on; those before this row's are filled in as they were.
                let count = (to - number * page_tokens).min(page_tokens) as usize * self.cache.latent_width;
                for layer in 0..self.cache.mla_layers as u32 {
                    self.backend.import_page(page, layer, filling.latents(number, layer, count))?;
                }
            }
        }
        if row.position > 0 {
            return Ok(());
        }
        for part in self.state_parts() {
            let dtype = if part.kind == StateKind::Recurrent { DType::Fp32 } else { filling.dtype };
            let count = self.backend.export_state(row.read_slot, &part)?.len() / dtype.bytes();
            let bytes = noise(u64::from(part.layer) << 8 | part.kind as u64, MOST_STATE, count, dtype);
            self.backend.import_state(row.read_slot, &part, &bytes)?;
        }
        Ok(())
    }
}

/// Numbers between -`most` and `most` as little-endian bytes of a type, always the same for a seed: all of them are bfloat16 numbers.
fn noise(seed: u64, most: f32, count: usize, dtype: DType) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        // Marsaglia's xorshift.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        most * ((state >> 40) as f32 / (1 << 23) as f32 - 1.0)
    };
    let mut bytes = Vec::with_capacity(count * dtype.bytes());
    for _ in 0..count {
        // The upper half of a float32 is a bfloat16.
        let number = (next().to_bits() & 0xffff_0000).to_le_bytes();
        bytes.extend_from_slice(&number[number.len() - dtype.bytes()..]);
    }
    bytes
}
