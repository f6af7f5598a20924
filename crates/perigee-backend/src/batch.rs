//! One step's work as plain data: which tokens run, for which sessions, over which slots and pages. The leader makes it,
//! every rank executes the same one.

use serde::{Deserialize, Serialize};

use crate::error::{BackendError, Result};
use crate::shapes::PAGE_TOKENS;

/// A step: decode rows and prefill chunks together, their tokens laid end to end.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepBatch {
    /// Token ids of all rows, row after row.
    pub tokens: Vec<u32>,
    /// The rows, in the order of their tokens.
    pub rows: Vec<Row>,
    /// Indices into `tokens` whose logits are wanted, ascending.
    pub logits: Vec<u32>,
}

/// A session's part of a step: one token when it decodes, several in a prefill chunk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Row {
    /// Number of tokens of this row in the step, at least 1.
    pub tokens: u32,
    /// Absolute position of the first of them.
    pub position: u64,
    /// State slot read at the start.
    pub read_slot: u32,
    /// State slot written; another one than `read_slot` makes the step a transaction for this row.
    pub write_slot: u32,
    /// The local latents, ascending and disjoint. The last one ends at `position + tokens`: new latents are written to it.
    /// Gaps before it belong to remote homes.
    pub segments: Vec<Segment>,
}

/// A range of positions whose latents are in local pages.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// First position.
    pub start: u64,
    /// One past the last position.
    pub end: u64,
    /// Page numbers; the first covers positions from `start` rounded down to a multiple of [`PAGE_TOKENS`].
    pub pages: Vec<u32>,
}

impl Segment {
    /// The page and the offset within it of an absolute position inside the segment.
    pub fn locate(&self, position: u64) -> (u32, usize) {
        let page = position / PAGE_TOKENS as u64 - self.start / PAGE_TOKENS as u64;
        (self.pages[page as usize], (position % PAGE_TOKENS as u64) as usize)
    }

    /// Pages needed to cover a range of positions.
    pub fn pages_for(start: u64, end: u64) -> usize {
        if end <= start {
            return 0;
        }
        ((end - 1) / PAGE_TOKENS as u64 - start / PAGE_TOKENS as u64 + 1) as usize
    }
}

impl StepBatch {
    /// Checks everything that an op later relies on, so that ops need not: counts, order, slot, page and token ranges.
    pub fn validate(&self, limits: &BatchLimits) -> Result<()> {
        let total: u64 = self.rows.iter().map(|row| u64::from(row.tokens)).sum();
        if total != self.tokens.len() as u64 {
            return Err(BackendError::Batch(format!("rows hold {total} tokens, the batch {}", self.tokens.len())));
        }
        if self.tokens.len() > limits.tokens {
            return Err(BackendError::Range {
                what: "step token",
                index: self.tokens.len() as u64,
                limit: limits.tokens as u64,
            });
        }
        if let Some(&token) = self.tokens.iter().find(|&&token| token as usize >= limits.vocab) {
            return Err(BackendError::Range { what: "token id", index: token.into(), limit: limits.vocab as u64 });
        }
        if self.logits.windows(2).any(|pair| pair[0] >= pair[1])
            || self.logits.last().is_some_and(|&last| last as usize >= self.tokens.len())
        {
            return Err(BackendError::Batch("logits indices must ascend and lie within the step's tokens".into()));
        }
        let mut written: Vec<u32> = self.rows.iter().map(|row| row.write_slot).collect();
        written.sort_unstable();
        if written.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err(BackendError::Batch("two rows write the same state slot".into()));
        }
        self.rows.iter().try_for_each(|row| row.validate(limits))
    }
}

impl Row {
    fn validate(&self, limits: &BatchLimits) -> Result<()> {
        for slot in [self.read_slot, self.write_slot] {
            if slot as usize >= limits.slots {
                return Err(BackendError::Range { what: "state slot", index: slot.into(), limit: limits.slots as u64 });
            }
        }
        let end = self.position + u64::from(self.tokens);
        let last = self.segments.last();
        if self.tokens == 0 || last.is_none_or(|segment| segment.end != end) {
            return Err(BackendError::Batch(format!(
                "a row at position {} with {} tokens needs a last segment that ends at {end}",
                self.position, self.tokens
            )));
        }
        let mut previous = 0;
        for segment in &self.segments {
            if segment.start < previous || segment.end <= segment.start {
                return Err(BackendError::Batch(format!(
                    "segment {}..{} is empty or overlaps the one before it",
                    segment.start, segment.end
                )));
            }
            previous = segment.end;
            if segment.pages.len() != Segment::pages_for(segment.start, segment.end) {
                return Err(BackendError::Batch(format!(
                    "segment {}..{} has {} pages",
                    segment.start,
                    segment.end,
                    segment.pages.len()
                )));
            }
            if let Some(&page) = segment.pages.iter().find(|&&page| page as usize >= limits.pages) {
                return Err(BackendError::Range {
                    what: "latent page",
                    index: page.into(),
                    limit: limits.pages as u64,
                });
            }
        }
        let mut position = self.position;
        for segment in &self.segments {
            if segment.start <= position && position < segment.end {
                position = segment.end;
            }
        }
        if position != end {
            return Err(BackendError::Batch(format!("no segment has room for the latents of position {position}")));
        }
        Ok(())
    }
}

/// What a batch is checked against.
#[derive(Debug, Clone, Copy)]
pub struct BatchLimits {
    /// Most tokens of a step.
    pub tokens: usize,
    /// Vocabulary size.
    pub vocab: usize,
    /// State slots.
    pub slots: usize,
    /// Latent pages.
    pub pages: usize,
}
