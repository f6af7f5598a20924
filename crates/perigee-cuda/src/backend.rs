//! The backend as the model sees it: the trait's ops, each a call into its launcher, and what they share (device, stream,
//! kernels, products, working memory, caches, the seat in the tensor-parallel group). All work is queued on one stream; only
//! reads, exports and exchanges with other ranks wait for it. A backend stays on the thread that opened it.

use std::ops::Range;
use std::sync::Arc;

use perigee_backend::batch::{Row, StepBatch};
use perigee_backend::ops::{
    Backend, LatentReader, OtherPart, PagePart, PageWrite, Partials, Precision, Recorded, Routing, StatePart,
};
use perigee_backend::pairs::{PairOrder, PairState, Pairs};
use perigee_backend::weights::{KdaWeights, MlaWeights, MlpWeights, MoeWeights};
use perigee_backend::{BackendError, CacheShape, DType, KdaShape, MlaShape, MlpShape, MoeShape, Result, TensorSlice};
use perigee_collectives::Collective;
use perigee_sampling::{Draw, Sampled, Scratch as HostScratch};

use crate::blas::Blas;
use crate::buffer::Buffer;
use crate::cache::Cache;
use crate::device::DeviceInfo;
use crate::exchange::Exchange;
use crate::expand::is_expanded;
use crate::formula::Formula;
use crate::ipc::{self, Neighbours};
use crate::kernels::Kernels;
use crate::loader::Loader;
use crate::module::Program;
use crate::nccl::pair::{NcclPairs, Parcel};
use crate::needs;
use crate::ops::embed::Embedding;
use crate::ops::few::ROUTE_COUNTS;
use crate::ops::kda::Kda;
use crate::ops::logits::Head;
use crate::ops::mla::Mla;
use crate::ops::mlp::Mlp;
use crate::ops::moe::{Moe, Selected};
use crate::ops::norm::Norm;
use crate::ops::sample::{Draws, MOST_TOKENS};
use crate::params::{MoeCombineParams, NormParams};
use crate::reader::Reader;
use crate::recorder::Recorder;
use crate::scratch::Scratch;
use crate::step::{Planning, Step};
use crate::stream::Stream;
use crate::tensor::Tensor;
use crate::transfer::Download;

/// How a backend is opened.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Number of the device among those the driver shows.
    pub device: usize,
    /// Type of activations, weights in products, latents and tails. With float32 every product is a float32 product, without
    /// TF32: slow, and exact enough to judge formulas by.
    pub precision: DType,
}

/// Kimi Linear's ops on one GPU. Fields are dropped in order: whatever queues work or holds memory goes before the device.
pub struct CudaBackend {
    pub(crate) recorder: Recorder,
    pub(crate) precision: DType,
    pub(crate) formula: Formula,
    pub(crate) exchange: Exchange,
    pub(crate) loader: Loader,
    pub(crate) scratch: Scratch,
    pub(crate) step: Step,
    pub(crate) selected: Option<Selected>,
    /// A sum of experts that the norm behind it computes; while a step is recorded only.
    pub(crate) deferred_sum: Option<MoeCombineParams>,
    /// A norm of the residual stream that the op behind it may compute; while a step is recorded only.
    pub(crate) deferred_norm: Option<NormParams>,
    /// Where the residual stream at the first address lies between two norms of a recording.
    pub(crate) moved_stream: Option<(u64, u64)>,
    /// Room for it: a row of float32.
    pub(crate) stream_copy: Option<Buffer>,
    /// Experts touched so far, one 64-bit number; behind it the counts of blocks that the routing of few tokens keeps.
    pub(crate) touched: Buffer,
    pub(crate) draws: Draws,
    /// Sums over a slot on their way to the host, once some were wanted.
    pub(crate) sums: Option<Download>,
    /// Slots of other processes. They go before the stream that copies out of them.
    neighbours: Neighbours,
    /// Pairs with other processes, once there was to be one, and room for what comes by them that nothing is written to.
    pub(crate) pairs: Option<Pairs<NcclPairs>>,
    pub(crate) rooms: Vec<Parcel>,
    /// The draws that the next step is fed with.
    pub(crate) feed: Vec<u32>,
    cache: Option<Cache>,
    /// Query heads of MLA layers, once one is loaded.
    pub(crate) mla_heads: Option<usize>,
    /// Whether all MLA layers have the expanded form, once one is loaded.
    pub(crate) mla_expands: Option<bool>,
    latent: usize,
    /// Rows of the largest tensor: the most tokens of a step.
    pub(crate) most_rows: usize,
    /// Most rows of the head on any rank.
    pub(crate) head_rows: usize,
    /// Rows of the head on all ranks.
    pub(crate) vocabulary: usize,
    /// Rows of the smallest: the most rows of a step in which every token wants its logits.
    least_rows: usize,
    pub(crate) blas: Blas,
    pub(crate) kernels: Kernels,
    pub(crate) stream: Stream,
}

impl CudaBackend {
    /// Opens a device for one rank of a group; all its ranks open theirs.
    ///
    /// # Errors
    /// As [`crate::check`], or [`BackendError::Memory`] where the device has no room even for the workspace.
    pub fn open(options: Options, group: Box<dyn Collective>) -> Result<Self> {
        Self::with_program(&Program::load(options.device)?, options.precision, group)
    }

    /// The same with kernels that are loaded already, on their device.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn with_program(program: &Program, precision: DType, group: Box<dyn Collective>) -> Result<Self> {
        let formula = Formula::from_environment()?;
        let device = program.modules.device().clone();
        let stream = Stream::first(&device)?;
        let touched = Buffer::new(&device, 8 + ROUTE_COUNTS, "count of experts")?;
        stream.fill(&touched, 0, touched.bytes(), 0)?;
        Ok(Self {
            recorder: Recorder::default(),
            precision,
            formula,
            exchange: Exchange::open(&device, group)?,
            loader: Loader::default(),
            scratch: Scratch::default(),
            step: Step::default(),
            selected: None,
            deferred_sum: None,
            deferred_norm: None,
            moved_stream: None,
            stream_copy: None,
            touched,
            draws: Draws::default(),
            sums: None,
            neighbours: Neighbours::default(),
            pairs: None,
            rooms: Vec::new(),
            feed: Vec::new(),
            cache: None,
            mla_heads: None,
            mla_expands: None,
            latent: 0,
            most_rows: 0,
            head_rows: 0,
            vocabulary: 0,
            least_rows: usize::MAX,
            blas: Blas::new(&stream)?,
            kernels: Kernels::find(Arc::clone(&program.modules), precision, formula)?,
            stream,
        })
    }

    /// The device this backend runs on.
    ///
    /// # Errors
    /// [`BackendError::Device`] where the driver fails.
    pub fn device(&self) -> Result<DeviceInfo> {
        self.stream.device().info()
    }

    /// Free device memory in bytes, for sizing the caches after the weights are loaded.
    ///
    /// # Errors
    /// [`BackendError::Device`] where the driver fails.
    pub fn free_memory(&self) -> Result<u64> {
        Ok(self.stream.device().memory()?.0 as u64)
    }

    /// Waits until all queued work is done.
    ///
    /// # Errors
    /// [`BackendError::Device`] with the first fault of that work.
    pub fn wait(&self) -> Result<()> {
        self.stream.wait()?;
        self.exchange.check()
    }

    /// What the attention plan of any step depends on.
    pub(crate) fn planning(&self) -> Planning {
        let heads = self.mla_heads.unwrap_or(0);
        Planning {
            heads,
            items: 2 * self.stream.device().multiprocessors() as usize,
            blocks: self.kernels.mla_attention.decode_blocks(heads, self.latent, self.stream.device()),
            stretch: if self.mla_expands == Some(true) { needs::stretch_keys(self.most_rows) } else { 0 },
        }
    }

    /// Makes room for the current step of `tokens` tokens, and for any decode step of its size.
    pub(crate) fn reserve_scratch(&mut self, tokens: usize) -> Result<()> {
        let planning = self.planning();
        let most = needs::parts(2 * planning.items, planning.heads, self.latent);
        let parts = self.mla_part_bytes(self.latent).max(most);
        self.scratch.reserve(self.stream.device(), self.most_rows.max(tokens), parts)
    }

    /// Tokens of the current step.
    pub(crate) fn tokens(&self) -> usize {
        self.step.tokens.count
    }

    pub(crate) fn cache(&self) -> Result<&Cache> {
        self.cache.as_ref().ok_or_else(no_cache)
    }
}

fn no_cache() -> BackendError {
    BackendError::Device("no cache is reserved".into())
}

impl Drop for CudaBackend {
    fn drop(&mut self) {
        // A communicator is not left while a recording holds its calls.
        self.abandon_recording();
        // A group is left by ranks whose work is done. An error here was somebody's before, or is nobody's any more.
        let _ = self.stream.wait();
    }
}

impl Backend for CudaBackend {
    type Tensor = Tensor;
    type Norm = Norm;
    type Embedding = Embedding;
    type Head = Head;
    type Kda = Kda;
    type Mla = Mla;
    type Mlp = Mlp;
    type Moe = Moe;

    fn load_norm(&mut self, weight: &TensorSlice<'_>, eps: f32) -> Result<Norm> {
        self.norm_load(weight, eps)
    }

    fn load_embedding(&mut self, rows: &TensorSlice<'_>, first: usize) -> Result<Embedding> {
        self.embed_load(rows, first)
    }

    fn load_head(&mut self, rows: &TensorSlice<'_>, counts: &[usize]) -> Result<Head> {
        self.head_load(rows, counts)
    }

    fn load_kda(&mut self, shape: &KdaShape, weights: &KdaWeights<'_>) -> Result<Kda> {
        self.kda_load(shape, weights)
    }

    fn load_mla(&mut self, shape: &MlaShape, weights: &MlaWeights<'_>) -> Result<Mla> {
        self.latent = self.latent.max(shape.latent);
        self.mla_load(shape, weights)
    }

    fn load_mlp(&mut self, shape: &MlpShape, weights: &MlpWeights<'_>) -> Result<Mlp> {
        self.mlp_load(shape, weights)
    }

    fn load_moe(&mut self, shape: &MoeShape, weights: &MoeWeights<'_>) -> Result<Moe> {
        self.moe_load(shape, weights)
    }

    fn weight_bytes(&self) -> u64 {
        self.loader.bytes()
    }

    fn reserve_cache(&mut self, shape: &CacheShape) -> Result<()> {
        self.loader.finish();
        self.cache = None;
        self.cache = Some(Cache::new(&self.stream, shape, self.precision)?);
        self.recorder.set_most(self.least_rows.min(shape.slots));
        Ok(())
    }

    fn tensor(&mut self, rows: usize, width: usize, precision: Precision) -> Result<Tensor> {
        let dtype = match precision {
            Precision::Activation => self.precision,
            Precision::Full => DType::Fp32,
        };
        let bytes = rows * width * dtype.bytes();
        let buffer = Buffer::new(self.stream.device(), bytes, &format!("activations [{rows}, {width}]"))?;
        self.stream.fill(&buffer, 0, bytes, 0x7fff)?;
        self.most_rows = self.most_rows.max(rows);
        self.least_rows = self.least_rows.min(rows);
        Ok(Tensor { buffer, rows, width, dtype })
    }

    fn begin_step(&mut self, batch: &StepBatch) -> Result<()> {
        self.stream.device().bind()?;
        self.exchange.check()?;
        self.abandon_recording();
        let feed = std::mem::take(&mut self.feed);
        self.step.begin(&self.stream, batch, &feed, self.planning(), self.formula)?;
        self.reserve_scratch(batch.tokens.len())?;
        self.feed_run(feed.len())?;
        self.recorder.note_run();
        Ok(())
    }

    fn run_recorded(&mut self, batch: &StepBatch) -> Result<Recorded> {
        self.recorded_run(batch)
    }

    fn end_recording(&mut self) -> Result<()> {
        self.recording_end()
    }

    fn begin_pieces(&mut self, batch: &StepBatch) -> Result<bool> {
        self.pieces_begin(batch)
    }

    fn run_piece(&mut self, number: usize) -> Result<Recorded> {
        self.piece_run(number)
    }

    fn embed(&mut self, table: &Embedding, out: &mut Tensor) -> Result<()> {
        self.embed_run(table, out)
    }

    fn rms_norm(&mut self, x: &Tensor, norm: &Norm, out: &mut Tensor) -> Result<()> {
        self.norm_run(x, norm, out)
    }

    fn add_rms_norm(&mut self, residual: &mut Tensor, delta: &Tensor, norm: &Norm, out: &mut Tensor) -> Result<()> {
        self.norm_add_run(residual, delta, norm, out)
    }

    fn kda_mixer(&mut self, layer: &Kda, index: usize, x: &Tensor, out: &mut Tensor) -> Result<()> {
        self.kda_run(layer, index, x, out)
    }

    fn mla_project(&mut self, layer: &Mla, index: usize, x: &Tensor, queries: &mut Tensor) -> Result<()> {
        self.mla_project_run(layer, index, x, queries)
    }

    fn mla_attend(
        &mut self,
        layer: &Mla,
        index: usize,
        queries: &Tensor,
        partials: &mut Partials<Tensor>,
    ) -> Result<()> {
        self.mla_attend_run(layer, index, queries, partials)
    }

    fn shows_partials(&self, row: &Row) -> bool {
        self.planning().stretch == 0 || !is_expanded(row)
    }

    fn mla_merge(&mut self, layer: &Mla, partials: &mut Partials<Tensor>, parts: &[OtherPart<'_>]) -> Result<()> {
        self.mla_merge_run(layer, partials, parts)
    }

    fn mla_output(&mut self, layer: &Mla, partials: &Partials<Tensor>, out: &mut Tensor) -> Result<()> {
        self.mla_output_run(layer, partials, out)
    }

    fn mlp(&mut self, layer: &Mlp, x: &Tensor, out: &mut Tensor) -> Result<()> {
        self.mlp_run(layer, x, out)
    }

    fn moe(&mut self, layer: &Moe, x: &Tensor, routing: Routing<'_>, out: &mut Tensor) -> Result<()> {
        self.moe_run(layer, x, routing, out)
    }

    fn selected_experts(&mut self) -> Result<Vec<u32>> {
        self.moe_read_selected()
    }

    fn experts_touched(&mut self) -> Result<u64> {
        let count = self.moe_read_touched()?;
        self.exchange.check()?;
        Ok(count)
    }

    fn all_reduce(&mut self, x: &mut Tensor) -> Result<()> {
        self.all_reduce_run(x)
    }

    fn logits(&mut self, head: &Head, x: &Tensor, out: &mut Tensor) -> Result<()> {
        self.logits_run(head, x, out)
    }

    fn sample(&mut self, logits: &Tensor, draws: &[Draw<'_>], scratch: &mut HostScratch) -> Result<Vec<Sampled>> {
        let sampled = self.sample_run(logits, draws, scratch);
        // What kernels leave when the group breaks is no result, and no fault of theirs.
        self.exchange.check()?;
        sampled
    }

    fn runs_ahead(&self) -> bool {
        !matches!(self.exchange, Exchange::Host(_)) && self.vocabulary <= MOST_TOKENS
    }

    fn queue_draws(&mut self, logits: &Tensor, draws: &[Draw<'_>]) -> Result<()> {
        self.draws_queue(logits, draws)
    }

    fn collect_draws(&mut self) -> Result<Vec<Option<Sampled>>> {
        let sampled = self.draws_collect();
        // As above.
        self.exchange.check()?;
        sampled
    }

    fn feed_drawn(&mut self, from: &[u32]) -> Result<()> {
        self.feed.clear();
        self.feed.extend_from_slice(from);
        Ok(())
    }

    fn finish(&mut self) -> Result<()> {
        self.wait()
    }

    fn read(&mut self, tensor: &Tensor, rows: usize) -> Result<Vec<f32>> {
        self.read_some(tensor, 0..rows)
    }

    fn read_some(&mut self, tensor: &Tensor, rows: Range<usize>) -> Result<Vec<f32>> {
        if rows.end > tensor.rows {
            return Err(BackendError::shape("rows read", &[tensor.rows], &[rows.end]));
        }
        let values = self.read_rows(tensor, rows)?;
        self.exchange.check()?;
        Ok(values)
    }

    fn write(&mut self, tensor: &mut Tensor, values: &[f32]) -> Result<()> {
        self.write_rows(tensor, values)
    }

    fn latent_reader(&self) -> Option<Arc<dyn LatentReader>> {
        let cache = self.cache.as_ref()?;
        Some(Arc::new(Reader::new(self.stream.device(), &self.kernels, cache)))
    }

    fn clear_slots(&mut self, slots: &[u32]) -> Result<()> {
        self.cache()?.clear_slots(&self.stream, slots)
    }

    fn poison_slots(&mut self, slots: &[u32]) -> Result<()> {
        self.cache()?.poison_slots(&self.stream, slots)
    }

    fn copy_slot(&mut self, from: u32, to: u32) -> Result<()> {
        self.cache()?.copy_slot(&self.stream, from, to)
    }

    fn export_state(&mut self, slot: u32, part: &StatePart) -> Result<Vec<u8>> {
        self.cache()?.export_state(&self.stream, slot, part)
    }

    fn import_state(&mut self, slot: u32, part: &StatePart, bytes: &[u8]) -> Result<()> {
        self.cache()?.import_state(&self.stream, slot, part, bytes)
    }

    fn state_sums(&mut self, slot: u32, first_head: u32) -> Result<Vec<u64>> {
        self.state_sums_run(slot, first_head)
    }

    fn share_slots(&mut self) -> Result<Option<Vec<u8>>> {
        ipc::share(self.stream.device(), &self.cache()?.slots())
    }

    fn open_slots(&mut self, shared: &[u8]) -> Result<()> {
        let cache = self.cache.as_ref().ok_or_else(no_cache)?;
        self.neighbours.open(self.stream.device(), shared, &cache.slots())
    }

    fn take_slot(&mut self, shared: &[u8], from: u32, to: u32) -> Result<()> {
        let cache = self.cache()?;
        self.neighbours.take(&self.stream, shared, from, (&cache.slots(), cache.slot(to)?))?;
        // Whoever told of the slots may change them once it hears that the state is here.
        self.stream.wait()
    }

    fn close_slots(&mut self, shared: &[u8]) {
        self.neighbours.close(shared);
    }

    fn invite_pair(&mut self) -> Result<Option<Vec<u8>>> {
        self.pair_invite()
    }

    fn pair(&mut self, invitation: &[u8], order: PairOrder) -> Result<PairState> {
        self.pair_order(invitation, order)
    }

    fn copy_page(&mut self, from: u32, to: u32) -> Result<()> {
        self.cache()?.copy_page(&self.stream, from, to)
    }

    fn export_pages(&mut self, parts: &[PagePart]) -> Result<Vec<Vec<u8>>> {
        self.cache.as_mut().ok_or_else(no_cache)?.export_pages(&self.stream, parts)
    }

    fn import_pages(&mut self, pages: &[PageWrite<'_>]) -> Result<()> {
        self.cache.as_mut().ok_or_else(no_cache)?.import_pages(&self.stream, pages)
    }

    fn poison_pages(&mut self, pages: &[u32]) -> Result<()> {
        self.cache()?.poison_pages(&self.stream, pages)
    }
}
