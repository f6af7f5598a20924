//! Launches of attention over paged latents, for the step's own queries and for those of other replicas.

use perigee_backend::Result;

use crate::kernels::{AttentionKernels, MlaTensor};
use crate::params::MlaAttendParams;
use crate::stream::{Grid, Stream};

/// Warps of a block of the general kernel, one query row each.
const WARPS: usize = 4;

/// How many blocks an attention plan takes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Launch {
    /// Items: tiles of queries against some keys.
    pub(crate) items: usize,
    /// Tiles whose keys are split over several items.
    pub(crate) merges: usize,
    /// Most tokens of an item.
    pub(crate) item_tokens: usize,
}

impl AttentionKernels {
    /// Queues attention and the merge of its splits.
    pub(crate) fn launch(&self, stream: &Stream, params: &MlaAttendParams, plan: &Launch) -> Result<()> {
        let rows = plan.item_tokens * params.heads as usize;
        match self.tensor_for(params, rows) {
            Some(tensor) => {
                let grid = Grid::new(plan.items, rows.div_ceil(tensor.rows), 256).shared(tensor.shared);
                stream.launch(&tensor.attend, grid, params)?;
            }
            None => {
                let grid = Grid::new(plan.items, rows.div_ceil(WARPS), 32 * WARPS as u32);
                stream.launch(&self.general, grid, params)?;
            }
        }
        stream.launch(&self.merge_splits, Grid::new(plan.merges, rows, 512), params)
    }

    /// The smallest block on tensor cores that holds an item's rows, else the largest; none for other shapes.
    fn tensor_for(&self, params: &MlaAttendParams, rows: usize) -> Option<&MlaTensor> {
        let shape = (params.latent as usize, params.rope as usize);
        let mut fitting = self.tensor.iter().filter(|tensor| (tensor.latent, tensor.rope) == shape);
        fitting.clone().find(|tensor| tensor.rows >= rows).or_else(|| fitting.next_back())
    }
}
