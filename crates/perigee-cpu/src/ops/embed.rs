//! Embedding lookup in a vocabulary-sharded table: rows that another rank holds are zero, and a sum over ranks follows.

use crate::matrix::Matrix;

/// This rank's rows `first..first + rows` of the table.
#[derive(Debug)]
pub struct Embedding {
    pub(crate) rows: Matrix,
    pub(crate) first: usize,
}

impl Embedding {
    pub(crate) fn lookup(&self, tokens: &[u32], width: usize, out: &mut [f32]) {
        for (&token, out) in tokens.iter().zip(out.chunks_exact_mut(width)) {
            match (token as usize).checked_sub(self.first) {
                Some(row) if row < self.rows.rows() => self.rows.widen_row(row, out),
                _ => out.fill(0.0),
            }
        }
    }
}
