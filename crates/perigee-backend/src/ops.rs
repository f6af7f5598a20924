//! The ops of Kimi Linear, coarse enough that a backend can fuse as it likes and few enough that the model reads like its
//! description. A backend owns its device, its caches and its seat in the tensor-parallel group; the model owns layers and
//! activations and never learns what device they are on.

use std::ops::Range;
use std::sync::Arc;

use crate::batch::{Row, StepBatch};
use crate::error::{BackendError, Result};
use crate::pairs::{PairOrder, PairState};
use crate::shapes::{CacheShape, KdaShape, MlaShape, MlpShape, MoeShape, PAGE_TOKENS};
use crate::weights::{KdaWeights, MlaWeights, MlpWeights, MoeWeights, TensorSlice};
use perigee_sampling::{Draw, Sampled, Scratch};
use serde::{Deserialize, Serialize};

/// How an activation tensor is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// The backend's activation type: float32 or bfloat16, as it was opened.
    Activation,
    /// Always float32: the residual stream, logits, attention partials, absorbed queries.
    Full,
}

/// What a backend makes of a step that it was offered as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recorded {
    /// Nothing: the step is run op by op.
    No,
    /// Its ops are recorded as they are called, and run at the end of the recording.
    Recording,
    /// It runs already.
    Done,
}

/// Which experts a mixture-of-experts layer uses.
#[derive(Debug, Clone, Copy)]
pub enum Routing<'a> {
    /// The layer's own selection.
    Free,
    /// These, `top_k` for each token of the step; their weights are still computed from the layer's own scores.
    Forced(&'a [u32]),
}

/// Attention over a part of the keys: normalised outputs in latent space and the natural log of the sums of exponentials.
#[derive(Debug)]
pub struct Partials<T> {
    /// [tokens, heads * R], full precision. Rows whose part is empty are finite.
    pub output: T,
    /// [tokens, heads], full precision; -inf where the part is empty.
    pub lse: T,
}

/// A part of one token's attention that was computed elsewhere.
#[derive(Debug, Clone, Copy)]
pub struct OtherPart<'a> {
    /// Which token of the step.
    pub token: usize,
    /// [heads * R], normalised.
    pub output: &'a [f32],
    /// `[heads]`, natural log of the sum of exponentials.
    pub lse: &'a [f32],
}

/// The four tensors of a KDA layer's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum StateKind {
    /// Recurrent state, [heads, D, D] float32, key index first.
    Recurrent,
    /// Last W - 1 inputs of the q convolution, [heads, D, W - 1] in the activation type, oldest first.
    ConvQ,
    /// The same of the k convolution.
    ConvK,
    /// The same of the v convolution.
    ConvV,
}

/// A contiguous part of a slot: some heads of one tensor of one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatePart {
    /// Index among the KDA layers.
    pub layer: u32,
    /// Which tensor.
    pub kind: StateKind,
    /// First head, counted on this rank.
    pub first_head: u32,
    /// Number of heads.
    pub heads: u32,
}

/// The first positions of a page of one MLA layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PagePart {
    /// Number of the page.
    pub page: u32,
    /// Index among the MLA layers.
    pub layer: u32,
    /// Positions from the first one on, at most [`PAGE_TOKENS`].
    pub positions: u32,
}

impl PagePart {
    /// Its rows in a page.
    ///
    /// # Errors
    /// A page has not so many.
    pub fn rows(&self) -> Result<usize> {
        match self.positions as usize {
            rows if rows <= PAGE_TOKENS => Ok(rows),
            _ => {
                let (index, limit) = (self.positions.into(), PAGE_TOKENS as u64 + 1);
                Err(BackendError::Range { what: "number of a page's positions", index, limit })
            }
        }
    }
}

/// What the first positions of a page of one MLA layer are to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageWrite<'a> {
    /// Number of the page.
    pub page: u32,
    /// Index among the MLA layers.
    pub layer: u32,
    /// [positions, R + r], little-endian, in the storage type.
    pub bytes: &'a [u8],
}

/// Queries of one sequence of [`LatentReader::attend_all`], and its pages.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'a> {
    /// Full pages, all before the queries.
    pub pages: &'a [u32],
    /// [tokens, heads, R + r].
    pub queries: &'a [f32],
}

/// Attention over latent pages for others, beside the step loop. Its user sees to it that the steps that wrote the pages are
/// done and that nobody writes them meanwhile, or throws away what came of it; it shares no lock with the step loop but,
/// where there are any, those of single pages, and waits for none of the step loop's work.
pub trait LatentReader: Send + Sync {
    /// Attention of queries [tokens, heads, R + r], full precision and not yet scaled, over all positions of full pages of
    /// one MLA layer: normalised outputs [tokens, heads, R] and natural logs of the sums of exponentials [tokens, heads].
    /// The pages lie before every query, so no mask is needed; over no pages the outputs are zero and the logs -inf.
    ///
    /// # Errors
    /// There is no such layer or page, the widths do not fit, or the device failed.
    fn attend(
        &self,
        layer: usize,
        pages: &[u32],
        heads: usize,
        scale: f32,
        latent: usize,
        queries: &[f32],
    ) -> Result<(Vec<f32>, Vec<f32>)>;

    /// The same for queries of several sequences, each over pages of its own, in their order. As provided one after the other.
    ///
    /// # Errors
    /// As for one; which of them was wrong is not told.
    fn attend_all(
        &self,
        layer: usize,
        heads: usize,
        scale: f32,
        latent: usize,
        asked: &[Asked<'_>],
    ) -> Result<Vec<(Vec<f32>, Vec<f32>)>> {
        asked.iter().map(|one| self.attend(layer, one.pages, heads, scale, latent, one.queries)).collect()
    }

    /// A full page of one MLA layer as [`Backend::export_page`] gives it, for a replica that takes it over.
    ///
    /// # Errors
    /// There is no such layer or page, the device failed, or it gives pages out in its steps only.
    fn page(&self, _layer: usize, _page: u32) -> Result<Vec<u8>> {
        Err(BackendError::Unsupported("pages beside the steps".into()))
    }
}

/// A device that runs Kimi Linear. Activations are [tokens of the step, width]; `index` counts layers of one kind from 0.
pub trait Backend: Send {
    /// An activation matrix with room for a fixed number of rows.
    type Tensor: Send;
    /// Weight of an RMS norm.
    type Norm: Send;
    /// This rank's rows of the embedding table.
    type Embedding: Send;
    /// This rank's rows of the output head.
    type Head: Send;
    /// A KDA layer's mixer.
    type Kda: Send;
    /// An MLA layer's mixer.
    type Mla: Send;
    /// A dense MLP.
    type Mlp: Send;
    /// A mixture of experts.
    type Moe: Send;

    // Loading. Sizes are checked against the shape; bytes loaded are counted.

    /// A norm over `weight.len()` channels.
    fn load_norm(&mut self, weight: &TensorSlice<'_>, eps: f32) -> Result<Self::Norm>;
    /// Rows `first..first + rows` of the [V, d] table.
    fn load_embedding(&mut self, rows: &TensorSlice<'_>, first: usize) -> Result<Self::Embedding>;
    /// This rank's rows of the [V, d] head; `counts` are the rows of every rank, in rank order.
    fn load_head(&mut self, rows: &TensorSlice<'_>, counts: &[usize]) -> Result<Self::Head>;
    /// A KDA mixer.
    fn load_kda(&mut self, shape: &KdaShape, weights: &KdaWeights<'_>) -> Result<Self::Kda>;
    /// An MLA mixer.
    fn load_mla(&mut self, shape: &MlaShape, weights: &MlaWeights<'_>) -> Result<Self::Mla>;
    /// A dense MLP.
    fn load_mlp(&mut self, shape: &MlpShape, weights: &MlpWeights<'_>) -> Result<Self::Mlp>;
    /// A mixture of experts.
    fn load_moe(&mut self, shape: &MoeShape, weights: &MoeWeights<'_>) -> Result<Self::Moe>;
    /// Bytes of weights held by this rank.
    fn weight_bytes(&self) -> u64;

    // Memory, before the first step.

    /// Allocates state slots and latent pages, all poisoned (not-a-number) until cleared or written.
    fn reserve_cache(&mut self, shape: &CacheShape) -> Result<()>;
    /// A tensor of `rows` by `width`, poisoned.
    fn tensor(&mut self, rows: usize, width: usize, precision: Precision) -> Result<Self::Tensor>;

    // A step: `run_recorded`, `begin_pieces` or `begin_step`, then ops in the model's order. The current batch is implicit in all of them.

    /// Offers a step to run as a whole, `batch` already validated, instead of op by op: where the answer is not
    /// [`Recorded::No`], `begin_step` is left out. Only steps whose ops nobody changes or looks into are offered, always of the
    /// same model with the same tensors. As provided, nothing is recorded.
    fn run_recorded(&mut self, _batch: &StepBatch) -> Result<Recorded> {
        Ok(Recorded::No)
    }
    /// Ends what [`Recorded::Recording`] began, and runs it.
    fn end_recording(&mut self) -> Result<()> {
        Ok(())
    }
    /// The same for a step that others take part in at its MLA layers. Its pieces are the ops up to the first `mla_project`,
    /// those from an `mla_output` to the next `mla_project`, and the rest; `mla_attend` and what comes of others stays between
    /// them. Where the answer is yes, `begin_step` is left out and every piece is offered to `run_piece`. As provided, no.
    fn begin_pieces(&mut self, _batch: &StepBatch) -> Result<bool> {
        Ok(false)
    }
    /// Offers the next piece of the step, counted from 0, as `run_recorded` offers a whole one.
    fn run_piece(&mut self, _number: usize) -> Result<Recorded> {
        Ok(Recorded::No)
    }
    /// Makes `batch`, already validated, the current one.
    fn begin_step(&mut self, batch: &StepBatch) -> Result<()>;
    /// Embedding rows of the step's tokens, full precision: the residual stream begins. Zero where another rank holds the row.
    fn embed(&mut self, table: &Self::Embedding, out: &mut Self::Tensor) -> Result<()>;
    /// out = w . x / sqrt(mean(x^2) + eps) of the residual stream x, full precision.
    fn rms_norm(&mut self, x: &Self::Tensor, norm: &Self::Norm, out: &mut Self::Tensor) -> Result<()>;
    /// residual += delta; out = rms_norm(residual). The residual stream is full precision, delta and out are activations.
    fn add_rms_norm(
        &mut self,
        residual: &mut Self::Tensor,
        delta: &Self::Tensor,
        norm: &Self::Norm,
        out: &mut Self::Tensor,
    ) -> Result<()>;
    /// The KDA mixer on normed input x [tokens, d]: reads `read_slot`, writes `write_slot` of every row, and leaves this
    /// rank's partial sum of the output projection in `out` [tokens, d].
    fn kda_mixer(&mut self, layer: &Self::Kda, index: usize, x: &Self::Tensor, out: &mut Self::Tensor) -> Result<()>;
    /// First third of the MLA mixer: writes the step's latents to their pages and leaves the absorbed queries,
    /// [tokens, heads * (R + r)] in full precision and not yet scaled by (n + r)^-1/2, in `queries`.
    fn mla_project(
        &mut self,
        layer: &Self::Mla,
        index: usize,
        x: &Self::Tensor,
        queries: &mut Self::Tensor,
    ) -> Result<()>;
    /// Second third: scaled causal attention of the queries over every local segment of their row, each by itself, then
    /// merged by log-sum-exp.
    fn mla_attend(
        &mut self,
        layer: &Self::Mla,
        index: usize,
        queries: &Self::Tensor,
        partials: &mut Partials<Self::Tensor>,
    ) -> Result<()>;
    /// Whether `mla_project` and `mla_attend` leave this row's absorbed queries and partials for others to see. A backend may
    /// compute a row with all its keys here in another form; then what they leave is for its own next op only.
    fn shows_partials(&self, row: &Row) -> bool {
        let _ = row;
        true
    }
    /// Merges parts computed elsewhere into `partials`, one after the other; those of their tokens' rows are shown.
    fn mla_merge(
        &mut self,
        layer: &Self::Mla,
        partials: &mut Partials<Self::Tensor>,
        parts: &[OtherPart<'_>],
    ) -> Result<()>;
    /// Last third: values from latent space, then this rank's partial sum of the output projection.
    fn mla_output(
        &mut self,
        layer: &Self::Mla,
        partials: &Partials<Self::Tensor>,
        out: &mut Self::Tensor,
    ) -> Result<()>;
    /// (silu(x g^T) . (x u^T)) d^T, this rank's partial sum.
    fn mlp(&mut self, layer: &Self::Mlp, x: &Self::Tensor, out: &mut Self::Tensor) -> Result<()>;
    /// Routed plus shared experts, this rank's partial sum of both.
    fn moe(&mut self, layer: &Self::Moe, x: &Self::Tensor, routing: Routing<'_>, out: &mut Self::Tensor) -> Result<()>;
    /// The layer's own selection in the last `moe`, `top_k` for each token, ascending; also under forced routing.
    fn selected_experts(&mut self) -> Result<Vec<u32>>;
    /// Distinct experts that `moe` computed with, summed over all its calls since the backend was opened; on every rank the
    /// same. Waits for the device.
    fn experts_touched(&mut self) -> Result<u64>;
    /// Sums `x` over the ranks of the group, the same bits on every rank.
    fn all_reduce(&mut self, x: &mut Self::Tensor) -> Result<()>;
    /// Logits [batch.logits.len(), V], full precision, gathered from all ranks; `x` is the finally normed stream.
    fn logits(&mut self, head: &Self::Head, x: &Self::Tensor, out: &mut Self::Tensor) -> Result<()>;

    /// One token for every entry of `draws`, entry `i` from row `i` of `logits` [rows, V]; there may be more rows than
    /// draws. The outcome is that of [`perigee_sampling::sample()`], margin included up to the rounding of sums and
    /// logarithms. `scratch` is for draws made on the host.
    ///
    /// As provided it reads the rows and draws on the host. A device does better: what has to cross is the draws' parameters
    /// one way, and ids with what a request asked for the other.
    ///
    /// # Errors
    /// [`BackendError::Sampling`] for logits that only a failed forward pass has, and where nothing can be drawn.
    fn sample(&mut self, logits: &Self::Tensor, draws: &[Draw<'_>], scratch: &mut Scratch) -> Result<Vec<Sampled>> {
        if draws.is_empty() {
            return Ok(Vec::new());
        }
        let values = self.read(logits, draws.len())?;
        let rows = values.chunks_exact((values.len() / draws.len()).max(1));
        rows.zip(draws)
            .map(|(row, draw)| perigee_sampling::sample(row, draw, scratch))
            .collect::<std::result::Result<_, _>>()
            .map_err(|error| BackendError::Sampling(error.to_string()))
    }

    // Steps ahead: a step is queued before what the one before it drew is read.

    /// Whether draws can be queued and fed to the next step. If not, as provided, the three calls below fail.
    fn runs_ahead(&self) -> bool {
        false
    }
    /// Queues draws as [`Self::sample`] makes them. Only the first rank of a group draws.
    fn queue_draws(&mut self, _logits: &Self::Tensor, _draws: &[Draw<'_>]) -> Result<()> {
        Err(BackendError::Unsupported("draws that are read later".into()))
    }
    /// What the oldest queued draws that were not collected gave, entry by entry; waits for it. None for one that cannot be
    /// made without the logits, which may be gone: it is to be made again.
    fn collect_draws(&mut self) -> Result<Vec<Option<Sampled>>> {
        Err(BackendError::Unsupported("draws that are read later".into()))
    }
    /// Token `i` of the next step is what draw `from[i]` of the draws queued last gave, whatever its batch says. The other
    /// ranks of a group have the tokens from the first.
    fn feed_drawn(&mut self, _from: &[u32]) -> Result<()> {
        Err(BackendError::Unsupported("steps that are fed with draws".into()))
    }

    /// Waits until the work of this step is done and reports what went wrong in it, a rank lost in the exchange too. Nothing to
    /// do for a backend whose ops return when they are done.
    fn finish(&mut self) -> Result<()> {
        Ok(())
    }

    // Host access, outside the hot path.

    /// The first `rows` rows as float32.
    fn read(&mut self, tensor: &Self::Tensor, rows: usize) -> Result<Vec<f32>>;
    /// The same for some rows.
    fn read_some(&mut self, tensor: &Self::Tensor, rows: Range<usize>) -> Result<Vec<f32>> {
        let mut values = self.read(tensor, rows.end)?;
        let width = values.len() / rows.end.max(1);
        values.drain(..(rows.start * width).min(values.len()));
        Ok(values)
    }
    /// Overwrites the first rows; `values.len()` is a multiple of the width.
    fn write(&mut self, tensor: &mut Self::Tensor, values: &[f32]) -> Result<()>;

    // Caches.

    /// A way to attend over pages while this backend steps, on other threads; none where it has no such way, or no caches
    /// yet.
    fn latent_reader(&self) -> Option<Arc<dyn LatentReader>> {
        None
    }
    /// Zeroes slots: the state of an empty sequence.
    fn clear_slots(&mut self, slots: &[u32]) -> Result<()>;
    /// Fills slots with not-a-number, so that a stale read shows.
    fn poison_slots(&mut self, slots: &[u32]) -> Result<()>;
    /// Copies a slot, for forks and shadow commits.
    fn copy_slot(&mut self, from: u32, to: u32) -> Result<()>;
    /// A part of a slot as little-endian bytes in its storage type.
    fn export_state(&mut self, slot: u32, part: &StatePart) -> Result<Vec<u8>>;
    /// Overwrites a part of a slot.
    fn import_state(&mut self, slot: u32, part: &StatePart, bytes: &[u8]) -> Result<()>;
    /// Sums over a slot as it is now: of every KDA layer the recurrent state and the tails of q, k and v. Element number i of a
    /// tensor of the whole model, of which this rank has the heads from `first_head` on, contributes (i + 1) times its bits,
    /// read as an unsigned 32-bit word (bf16 extended by zeros), modulo 2^64.
    fn state_sums(&mut self, slot: u32, first_head: u32) -> Result<Vec<u64>>;
    /// How another process on this machine reaches the slots, for its `open_slots`; none where it cannot.
    fn share_slots(&mut self) -> Result<Option<Vec<u8>>> {
        Ok(None)
    }
    /// Opens the slots of another process. They stay open until they are closed as often as they were opened.
    ///
    /// # Errors
    /// [`BackendError::Unsupported`] where they cannot be reached from here or have another form.
    fn open_slots(&mut self, _shared: &[u8]) -> Result<()> {
        Err(BackendError::Unsupported("slots of other processes".into()))
    }
    /// Copies a slot out of another process, which leaves it as it is meanwhile.
    fn take_slot(&mut self, _shared: &[u8], _from: u32, _to: u32) -> Result<()> {
        Err(BackendError::Unsupported("slots of other processes".into()))
    }
    /// See [`Self::open_slots`]; what is not open stays so.
    fn close_slots(&mut self, _shared: &[u8]) {}
    /// An invitation to a pair (see [`crate::pairs`]), for another process's [`Self::pair`]; none where there are no pairs.
    fn invite_pair(&mut self) -> Result<Option<Vec<u8>>> {
        Ok(None)
    }
    /// Carries out an order about the pair of this invitation, and says how far it is then.
    ///
    /// # Errors
    /// [`BackendError::Unsupported`] where there are no pairs or nothing came that could be taken, [`BackendError::Range`] for a
    /// slot that is not there. A pair that broke is no error.
    fn pair(&mut self, _invitation: &[u8], _order: PairOrder) -> Result<PairState> {
        Err(BackendError::Unsupported("pairs with other processes".into()))
    }
    /// Copies a page in every layer, for forks of a partial page.
    fn copy_page(&mut self, from: u32, to: u32) -> Result<()>;
    /// Parts of pages, each [positions, R + r] as little-endian bytes in its storage type. A device waits for many of them no
    /// longer than for one.
    fn export_pages(&mut self, parts: &[PagePart]) -> Result<Vec<Vec<u8>>>;
    /// Overwrites the first positions of pages, in order.
    fn import_pages(&mut self, pages: &[PageWrite<'_>]) -> Result<()>;
    /// A whole page of one MLA layer.
    fn export_page(&mut self, page: u32, layer: u32) -> Result<Vec<u8>> {
        let exported = self.export_pages(&[PagePart { page, layer, positions: PAGE_TOKENS as u32 }])?;
        Ok(exported.into_iter().next().unwrap_or_default())
    }
    /// Overwrites the first positions of one page.
    fn import_page(&mut self, page: u32, layer: u32, bytes: &[u8]) -> Result<()> {
        self.import_pages(&[PageWrite { page, layer, bytes }])
    }
    /// Fills pages with not-a-number.
    fn poison_pages(&mut self, pages: &[u32]) -> Result<()>;
}
