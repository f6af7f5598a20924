//! Prompts that are not computed, for measuring what sessions with long contexts cost where computing the contexts would take
//! hours. Of a chunk of a prompt only the last token runs; what the others would have left is filled in. Moves, attention and
//! times of tokens are those of a real session of that length, its answer means nothing.

use perigee_backend::{Backend, DType, PAGE_TOKENS, Row, StateKind, StepBatch};
use perigee_model::ModelError;

use super::Rank;

impl<B: Backend> Rank<B> {
    /// Has prompts filled in from now on. On all ranks of a replica, or none.
    pub fn fill_prompts(&mut self) {
        self.fills_prompts = true;
    }

    /// Fills in all but the last token of every row, unless more of its logits are wanted; what is left to run.
    pub(super) fn fill(&mut self, batch: &StepBatch) -> Result<StepBatch, ModelError> {
        let mut rest = StepBatch::default();
        let (mut begin, mut skipped) = (0, 0);
        for row in &batch.rows {
            let end = begin + row.tokens;
            let wanted = || batch.logits.iter().filter(|&&index| begin <= index && index < end);
            let filled = if wanted().all(|&index| index + 1 == end) { row.tokens - 1 } else { 0 };
            if filled > 0 {
                self.fill_row(row, filled)?;
                skipped += filled;
            }
            rest.logits.extend(wanted().map(|index| index - skipped));
            rest.tokens.extend_from_slice(&batch.tokens[(begin + filled) as usize..end as usize]);
            let (tokens, position) = (row.tokens - filled, row.position + u64::from(filled));
            rest.rows.push(Row { tokens, position, ..row.clone() });
            begin = end;
        }
        Ok(rest)
    }

    /// Fills in the latents of a row's first positions, and its state where it has none yet.
    fn fill_row(&mut self, row: &Row, positions: u32) -> Result<(), ModelError> {
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
                    let bytes = noise(number << 8 | u64::from(layer), 1.0, count, self.dtype.unwrap_or(DType::Fp32));
                    self.backend.import_page(page, layer, &bytes)?;
                }
            }
        }
        if row.position > 0 {
            return Ok(());
        }
        for part in self.state_parts() {
            let dtype = if part.kind == StateKind::Recurrent { DType::Fp32 } else { self.dtype.unwrap_or(DType::Fp32) };
            let count = self.backend.export_state(row.read_slot, &part)?.len() / dtype.bytes();
            let bytes = noise(u64::from(part.layer) << 8 | part.kind as u64, 0.1, count, dtype);
            self.backend.import_state(row.read_slot, &part, &bytes)?;
        }
        Ok(())
    }
}

/// Numbers between -`most` and `most` as little-endian bytes of a type, always the same for a seed.
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
        let number = next().to_le_bytes();
        // The upper half of a float32 is a bfloat16.
        bytes.extend_from_slice(&number[number.len() - dtype.bytes()..]);
    }
    bytes
}
