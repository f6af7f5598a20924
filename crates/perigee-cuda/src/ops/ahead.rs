//! What follows a mixture of experts: the projection of the next layer's mixer, which the sum of experts may ask for in the second-level
//! cache. It is learnt from the steps as they are run, since an op does not know the next.

use std::collections::HashMap;

use crate::tensor::Matrix;

/// The beginnings of a matrix's rows.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Ahead {
    pub(crate) address: u64,
    pub(crate) rows: u32,
    /// Bytes from row to row.
    pub(crate) pitch: u32,
}

/// Projections by the address of the weights of the mixture before them.
#[derive(Debug, Default)]
pub(crate) struct Followers {
    last: Option<u64>,
    known: HashMap<u64, Ahead>,
}

impl Followers {
    /// A step begins.
    pub(crate) fn begin(&mut self) {
        self.last = None;
    }

    /// A mixture with its weights at this address was run.
    pub(crate) fn note_mixture(&mut self, weights: u64) {
        self.last = Some(weights);
    }

    /// The projection of a mixer is run.
    pub(crate) fn note_projection(&mut self, projection: &Matrix) {
        let Some(last) = self.last.take() else { return };
        let ahead = Ahead {
            address: projection.address(),
            rows: projection.rows as u32,
            pitch: (projection.pitch * projection.dtype.bytes()) as u32,
        };
        self.known.insert(last, ahead);
    }

    /// What follows the mixture that was run last.
    pub(crate) fn ahead(&self) -> Option<Ahead> {
        self.last.and_then(|last| self.known.get(&last).copied())
    }
}
