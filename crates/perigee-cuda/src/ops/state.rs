//! Sums over a state slot, which a move compares at both ends.

use perigee_backend::{BackendError, Result};

use crate::backend::CudaBackend;
use crate::params::StateSumParams;
use crate::stream::Grid;
use crate::transfer::Download;

/// Tensors of a KDA layer's state.
const TENSORS: usize = 4;
/// Blocks for each tensor: enough for a state of 2 MB, and tails are small.
const BLOCKS: usize = 16;
const THREADS: u32 = 256;

impl CudaBackend {
    /// See [`perigee_backend::Backend::state_sums`].
    pub(crate) fn state_sums_run(&mut self, slot: u32, first_head: u32) -> Result<Vec<u64>> {
        let cache = self.cache()?;
        let (shape, (state, tails)) = (*cache.shape(), cache.slot_addresses(slot)?);
        let bytes = shape.kda_layers * TENSORS * size_of::<u64>();
        if self.sums.as_ref().is_none_or(|sums| sums.capacity() < bytes) {
            self.sums = Some(Download::new(self.stream.device(), bytes, "sums over a state slot")?);
        }
        let sums = self.sums.as_mut().ok_or_else(|| BackendError::Device("no room for sums".into()))?;
        sums.clear(&self.stream)?;
        let params = StateSumParams {
            state,
            tails,
            sums: sums.address(),
            heads: shape.kda_heads as u32,
            head_dim: shape.kda_head_dim as u32,
            tail: shape.conv.saturating_sub(1) as u32,
            first_head,
        };
        let grid = Grid::new(BLOCKS, shape.kda_layers, THREADS);
        let grid = Grid { blocks: (grid.blocks.0, grid.blocks.1, TENSORS as u32), ..grid };
        self.stream.launch(&self.kernels.state_sums, grid, &params)?;
        let number = sums.fetch(&self.stream, bytes)?;
        let found = sums.receive(number, bytes)?;
        Ok(found.as_chunks().0.iter().map(|&sum| u64::from_le_bytes(sum)).collect())
    }
}
