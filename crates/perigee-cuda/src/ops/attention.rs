//! Launches of attention over paged latents, for the step's own queries and for those of other replicas.

use perigee_backend::{PAGE_TOKENS, Result};

use crate::device::Device;
use crate::kernels::{AttentionKernels, MlaTensor};
use crate::params::{MlaAttendParams, MlaDecodeParams};
use crate::stream::{Grid, Stream};
use crate::tensor_map::{Rows, TensorMap};
use crate::tuning::tuning;

/// Warps of a block of the general kernel, one query row each.
const WARPS: usize = 4;
/// Threads of a block that decodes.
const DECODE_THREADS: u32 = 384;
/// Warps of a block that merges, and channels that one of them merges.
const MERGE_WARPS: usize = 8;
const MERGE_CHANNELS: usize = 256;
/// Channels of a block that merges the many parts of one token.
const WIDE_CHANNELS: usize = 128;
/// Merges up to which all warps of a block work at one, since many parts are then likely.
const FEW_MERGES: usize = 8;

/// How many blocks an attention plan takes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Launch {
    /// Items: tiles of queries against some keys.
    pub(crate) items: usize,
    /// Tiles whose keys are split over several items.
    pub(crate) merges: usize,
    /// Most tokens of an item.
    pub(crate) item_tokens: usize,
    /// Where the items are those of single tokens and were dealt out to blocks.
    pub(crate) dealt: Option<Dealt>,
}

/// Items by the block that works at them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Dealt {
    /// Device address of each block's first item, and one past the last.
    pub(crate) first_items: u64,
    pub(crate) blocks: usize,
    /// Latent pages that there are.
    pub(crate) pages: usize,
}

impl AttentionKernels {
    /// Queues attention and the merge of its splits.
    pub(crate) fn launch(&self, stream: &Stream, params: &MlaAttendParams, plan: &Launch) -> Result<()> {
        let rows = plan.item_tokens * params.heads as usize;
        if !self.launch_decode(stream, params, plan)? {
            self.launch_items(stream, params, plan, rows)?;
        }
        let units = rows * (params.latent as usize).div_ceil(MERGE_CHANNELS);
        let threads = 32 * MERGE_WARPS as u32;
        let latent = params.latent as usize;
        if plan.merges <= tuning().merge && latent.is_multiple_of(WIDE_CHANNELS) {
            let grid = Grid::new(plan.merges, rows * (latent / WIDE_CHANNELS), threads);
            return stream.launch(&self.merge_wide, grid, params);
        }
        if plan.merges <= FEW_MERGES {
            return stream.launch(&self.merge_many, Grid::new(plan.merges, units, threads), params);
        }
        stream.launch(&self.merge_splits, Grid::new(plan.merges, units.div_ceil(MERGE_WARPS), threads), params)
    }

    /// Queues attention of single tokens by persistent blocks; false where the shape or the plan is another.
    fn launch_decode(&self, stream: &Stream, params: &MlaAttendParams, plan: &Launch) -> Result<bool> {
        let Some((decode, dealt)) = self.decode.as_ref().zip(plan.dealt) else { return Ok(false) };
        let (latent, rope) = (params.latent as usize, params.rope as usize);
        if (latent, rope) != (decode.latent, decode.rope) || params.heads as usize > decode.heads {
            return Ok(false);
        }
        if plan.items == 0 {
            return Ok(true);
        }
        let width = latent + rope;
        let rows = dealt.pages * PAGE_TOKENS;
        let page = PAGE_TOKENS as u32;
        let params = MlaDecodeParams {
            latents: TensorMap::new(Rows {
                address: params.latents,
                columns: width,
                rows,
                pitch: width,
                box_rows: page,
            })?,
            attend: *params,
            first_items: dealt.first_items,
            reserved: [0; 4],
        };
        stream.launch(&decode.attend, Grid::new(dealt.blocks, 1, DECODE_THREADS).shared(decode.shared), &params)?;
        Ok(true)
    }

    /// Queues attention with a block, or several, for each item.
    fn launch_items(&self, stream: &Stream, params: &MlaAttendParams, plan: &Launch, rows: usize) -> Result<()> {
        match self.tensor_for(params, rows) {
            Some(tensor) => {
                let grid = Grid::new(plan.items, rows.div_ceil(tensor.rows), 256).shared(tensor.shared);
                stream.launch(&tensor.attend, grid, params)
            }
            None => {
                let grid = Grid::new(plan.items, rows.div_ceil(WARPS), 32 * WARPS as u32);
                stream.launch(&self.general, grid, params)
            }
        }
    }

    /// Blocks that items of single tokens are dealt out to, 0 where no kernel takes them so.
    pub(crate) fn decode_blocks(&self, heads: usize, latent: usize, device: &Device) -> usize {
        let fits = self.decode.as_ref().is_some_and(|decode| heads <= decode.heads && latent == decode.latent);
        if fits { device.multiprocessors() as usize } else { 0 }
    }

    /// The smallest block on tensor cores that holds an item's rows, else the largest; none for other shapes.
    fn tensor_for(&self, params: &MlaAttendParams, rows: usize) -> Option<&MlaTensor> {
        let shape = (params.latent as usize, params.rope as usize);
        let mut fitting = self.tensor.iter().filter(|tensor| (tensor.latent, tensor.rope) == shape);
        fitting.clone().find(|tensor| tensor.rows >= rows).or_else(|| fitting.next_back())
    }
}
