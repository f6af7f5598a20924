//! A backend with one planted fault: every op goes to the backend inside, except where the fault bends its arguments or its
//! result. It exists to show that the conformance suite fails when it should.

use std::borrow::Cow;

use perigee_backend::weights::{KdaWeights, MlaWeights, MlpWeights, MoeWeights, TensorSource};
use perigee_backend::{
    Backend, CacheShape, DType, KdaShape, MlaShape, MlpShape, MoeShape, OtherPart, PagePart, PageWrite, Partials,
    Precision, Result, Routing, StateKind, StatePart, StepBatch, TensorSlice,
};

/// What is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    None,
    /// The gated output norm uses 1e-6.
    NormEpsilon,
    /// The first tap multiplies the current token.
    TapsReversed,
    /// The recurrent state is rounded to bfloat16 after every step.
    StateRounded,
    /// The state is read from the slot that it is written to.
    ReadsWriteSlot,
    /// The state is written to the slot that it is read from.
    WritesReadSlot,
    /// Every layer uses the caches of layer 0.
    FirstLayerOnly,
    /// Attention leaves out the first of several segments.
    ForgetsSegment,
    /// Softmax scale n^-1/2.
    ScaleWithoutRope,
    /// Log-sum-exps in base 2.
    BinaryLogarithm,
    /// Parts computed elsewhere are dropped.
    ForgetsMerge,
    /// Selection without the correction bias.
    ForgetsBias,
    /// One group of experts.
    ForgetsGroups,
    /// Weights are not divided by their sum.
    ForgetsRenormalisation,
    /// Weights are not scaled.
    ForgetsScale,
    /// Forced experts are reported as the layer's own.
    ReportsForcedExperts,
    /// A shard of the embedding is taken to begin at row 0.
    ShardFromZero,
    /// Logits of the first tokens instead of the chosen ones.
    FirstLogits,
    /// The residual stream is not updated by the fused norm.
    ForgetsResidual,
    /// Clearing slots does nothing.
    KeepsSlots,
    /// Poisoning clears.
    ZeroesForPoison,
    /// Copying slots and pages does nothing.
    KeepsCopies,
    /// Of pages that are exported together, the second one is the first.
    ExportsFirstPage,
    /// Of pages that are imported together, only the first is.
    ImportsFirstPage,
    /// A head range is imported to the first heads.
    ImportsFirstHeads,
    /// Sums over a slot number its heads as if they were the model's first.
    SumsOwnHeads,
}

/// The backend and its fault.
pub(crate) struct Faulty<B> {
    inner: B,
    fault: Fault,
    batch: StepBatch,
    forced: Option<Vec<u32>>,
}

impl<B: Backend> Faulty<B> {
    pub(crate) fn new(inner: B, fault: Fault) -> Self {
        Self { inner, fault, batch: StepBatch::default(), forced: None }
    }

    fn is(&self, fault: Fault) -> bool {
        self.fault == fault
    }

    fn index(&self, index: usize) -> usize {
        if self.is(Fault::FirstLayerOnly) { 0 } else { index }
    }

    fn round_states(&mut self, index: usize, heads: u32) -> Result<()> {
        let part = StatePart { layer: index as u32, kind: StateKind::Recurrent, first_head: 0, heads };
        for slot in self.batch.rows.iter().map(|row| row.write_slot).collect::<Vec<_>>() {
            let bytes = self.inner.export_state(slot, &part)?;
            // The upper half of a float32 is the bfloat16 next to it.
            let rounded: Vec<u8> = bytes.chunks_exact(4).flat_map(|b| [0, 0, b[2], b[3]]).collect();
            self.inner.import_state(slot, &part, &rounded)?;
        }
        Ok(())
    }
}

/// The slice with other elements.
fn with_values<'a>(slice: &TensorSlice<'_>, values: impl Iterator<Item = f32>) -> TensorSlice<'a> {
    let bytes = values.flat_map(f32::to_le_bytes).collect::<Vec<u8>>();
    let bytes = match slice.dtype {
        DType::Fp32 => bytes,
        DType::Bf16 => bytes.chunks_exact(4).flat_map(|b| [b[2], b[3]]).collect(),
    };
    TensorSlice {
        name: slice.name.clone(),
        shape: slice.shape.clone(),
        dtype: slice.dtype,
        source: TensorSource::Bytes(Cow::Owned(bytes)),
    }
}

fn reversed<'a>(taps: &TensorSlice<'_>) -> Result<TensorSlice<'a>> {
    let values = taps.to_f32()?;
    let width = taps.shape[1];
    Ok(with_values(taps, values.chunks(width).flat_map(|row| row.iter().rev().copied())))
}

/// A loaded KDA layer, with the number of heads that a fault needs.
pub(crate) struct FaultyKda<B: Backend> {
    inner: B::Kda,
    heads: u32,
}

/// A loaded MLA layer, with what a wrong scale would multiply its scores by.
pub(crate) struct FaultyMla<B: Backend> {
    inner: B::Mla,
    query_width: usize,
    stretch: f32,
}

impl<B: Backend> Backend for Faulty<B> {
    type Tensor = B::Tensor;
    type Norm = B::Norm;
    type Embedding = B::Embedding;
    type Head = B::Head;
    type Kda = FaultyKda<B>;
    type Mla = FaultyMla<B>;
    type Mlp = B::Mlp;
    type Moe = B::Moe;

    fn load_norm(&mut self, weight: &TensorSlice<'_>, eps: f32) -> Result<B::Norm> {
        self.inner.load_norm(weight, eps)
    }

    fn load_embedding(&mut self, rows: &TensorSlice<'_>, first: usize) -> Result<B::Embedding> {
        self.inner.load_embedding(rows, if self.is(Fault::ShardFromZero) { 0 } else { first })
    }

    fn load_head(&mut self, rows: &TensorSlice<'_>, counts: &[usize]) -> Result<B::Head> {
        self.inner.load_head(rows, counts)
    }

    fn load_kda(&mut self, shape: &KdaShape, weights: &KdaWeights<'_>) -> Result<FaultyKda<B>> {
        let eps = if self.is(Fault::NormEpsilon) { 1e-6 } else { shape.eps };
        let [q, k, v] = &weights.qkv_conv;
        let taps = |taps: &TensorSlice<'_>| {
            if self.is(Fault::TapsReversed) {
                reversed(taps)
            } else {
                Ok(with_values(taps, taps.to_f32()?.into_iter()))
            }
        };
        let qkv_conv = [taps(q)?, taps(k)?, taps(v)?];
        let weights = KdaWeights {
            qkv_proj: weights.qkv_proj.clone(),
            qkv_conv,
            f_a_proj: weights.f_a_proj.clone(),
            f_b_proj: weights.f_b_proj.clone(),
            dt_bias: weights.dt_bias.clone(),
            a_log: weights.a_log.clone(),
            b_proj: weights.b_proj.clone(),
            g_a_proj: weights.g_a_proj.clone(),
            g_b_proj: weights.g_b_proj.clone(),
            o_norm: weights.o_norm.clone(),
            o_proj: weights.o_proj.clone(),
        };
        let inner = self.inner.load_kda(&KdaShape { eps, ..*shape }, &weights)?;
        Ok(FaultyKda { inner, heads: shape.heads as u32 })
    }

    fn load_mla(&mut self, shape: &MlaShape, weights: &MlaWeights<'_>) -> Result<FaultyMla<B>> {
        let inner = self.inner.load_mla(shape, weights)?;
        let stretch = ((shape.nope + shape.rope) as f32 / shape.nope as f32).sqrt();
        Ok(FaultyMla { inner, query_width: shape.heads * shape.cache_width(), stretch })
    }

    fn load_mlp(&mut self, shape: &MlpShape, weights: &MlpWeights<'_>) -> Result<B::Mlp> {
        self.inner.load_mlp(shape, weights)
    }

    fn load_moe(&mut self, shape: &MoeShape, weights: &MoeWeights<'_>) -> Result<B::Moe> {
        let mut shape = *shape;
        match self.fault {
            Fault::ForgetsGroups => (shape.groups, shape.top_groups) = (1, 1),
            Fault::ForgetsRenormalisation => shape.renormalize = false,
            Fault::ForgetsScale => shape.scale = 1.0,
            _ => {}
        }
        if !self.is(Fault::ForgetsBias) {
            return self.inner.load_moe(&shape, weights);
        }
        let experts = weights.experts.iter().chain(&weights.shared).map(|expert| MlpWeights {
            gate: expert.gate.clone(),
            up: expert.up.clone(),
            down: expert.down.clone(),
        });
        let mut experts: Vec<MlpWeights<'_>> = experts.collect();
        let shared = if weights.shared.is_some() { experts.pop() } else { None };
        let bias = with_values(&weights.bias, std::iter::repeat_n(0.0, weights.bias.elements()));
        self.inner.load_moe(&shape, &MoeWeights { router: weights.router.clone(), bias, experts, shared })
    }

    fn weight_bytes(&self) -> u64 {
        self.inner.weight_bytes()
    }

    fn reserve_cache(&mut self, shape: &CacheShape) -> Result<()> {
        self.inner.reserve_cache(shape)
    }

    fn tensor(&mut self, rows: usize, width: usize, precision: Precision) -> Result<B::Tensor> {
        self.inner.tensor(rows, width, precision)
    }

    fn begin_step(&mut self, batch: &StepBatch) -> Result<()> {
        let mut batch = batch.clone();
        for row in &mut batch.rows {
            match self.fault {
                Fault::ReadsWriteSlot => row.read_slot = row.write_slot,
                Fault::WritesReadSlot => row.write_slot = row.read_slot,
                Fault::ForgetsSegment if row.segments.len() > 1 && row.segments[0].end <= row.position => {
                    row.segments.remove(0);
                }
                _ => {}
            }
        }
        if self.is(Fault::FirstLogits) {
            batch.logits = (0..batch.logits.len() as u32).collect();
        }
        self.batch = batch;
        self.inner.begin_step(&self.batch)
    }

    fn embed(&mut self, table: &B::Embedding, out: &mut B::Tensor) -> Result<()> {
        self.inner.embed(table, out)
    }

    fn rms_norm(&mut self, x: &B::Tensor, norm: &B::Norm, out: &mut B::Tensor) -> Result<()> {
        self.inner.rms_norm(x, norm, out)
    }

    fn add_rms_norm(
        &mut self,
        residual: &mut B::Tensor,
        delta: &B::Tensor,
        norm: &B::Norm,
        out: &mut B::Tensor,
    ) -> Result<()> {
        let before = self.inner.read(residual, self.batch.tokens.len())?;
        self.inner.add_rms_norm(residual, delta, norm, out)?;
        if self.is(Fault::ForgetsResidual) {
            self.inner.write(residual, &before)?;
        }
        Ok(())
    }

    fn kda_mixer(&mut self, layer: &FaultyKda<B>, index: usize, x: &B::Tensor, out: &mut B::Tensor) -> Result<()> {
        let index = self.index(index);
        self.inner.kda_mixer(&layer.inner, index, x, out)?;
        if self.is(Fault::StateRounded) { self.round_states(index, layer.heads) } else { Ok(()) }
    }

    fn mla_project(
        &mut self,
        layer: &FaultyMla<B>,
        index: usize,
        x: &B::Tensor,
        queries: &mut B::Tensor,
    ) -> Result<()> {
        self.inner.mla_project(&layer.inner, self.index(index), x, queries)
    }

    fn mla_attend(
        &mut self,
        layer: &FaultyMla<B>,
        index: usize,
        queries: &B::Tensor,
        partials: &mut Partials<B::Tensor>,
    ) -> Result<()> {
        let (index, tokens) = (self.index(index), self.batch.tokens.len());
        if self.is(Fault::ScaleWithoutRope) {
            let values = self.inner.read(queries, tokens)?;
            let mut stretched = self.inner.tensor(tokens, layer.query_width, Precision::Full)?;
            let values: Vec<f32> = values.into_iter().map(|value| value * layer.stretch).collect();
            self.inner.write(&mut stretched, &values)?;
            return self.inner.mla_attend(&layer.inner, index, &stretched, partials);
        }
        self.inner.mla_attend(&layer.inner, index, queries, partials)?;
        if self.is(Fault::BinaryLogarithm) {
            let lse = self.inner.read(&partials.lse, tokens)?;
            let lse: Vec<f32> = lse.into_iter().map(|lse| lse * std::f32::consts::LOG2_E).collect();
            self.inner.write(&mut partials.lse, &lse)?;
        }
        Ok(())
    }

    fn mla_merge(
        &mut self,
        layer: &FaultyMla<B>,
        partials: &mut Partials<B::Tensor>,
        parts: &[OtherPart<'_>],
    ) -> Result<()> {
        if self.is(Fault::ForgetsMerge) {
            return Ok(());
        }
        self.inner.mla_merge(&layer.inner, partials, parts)
    }

    fn mla_output(&mut self, layer: &FaultyMla<B>, partials: &Partials<B::Tensor>, out: &mut B::Tensor) -> Result<()> {
        self.inner.mla_output(&layer.inner, partials, out)
    }

    fn mlp(&mut self, layer: &B::Mlp, x: &B::Tensor, out: &mut B::Tensor) -> Result<()> {
        self.inner.mlp(layer, x, out)
    }

    fn moe(&mut self, layer: &B::Moe, x: &B::Tensor, routing: Routing<'_>, out: &mut B::Tensor) -> Result<()> {
        self.forced = match routing {
            Routing::Forced(experts) => Some(experts.to_vec()),
            Routing::Free => None,
        };
        self.inner.moe(layer, x, routing, out)
    }

    fn experts_touched(&mut self) -> Result<u64> {
        self.inner.experts_touched()
    }

    fn selected_experts(&mut self) -> Result<Vec<u32>> {
        match &self.forced {
            Some(experts) if self.is(Fault::ReportsForcedExperts) => Ok(experts.clone()),
            _ => self.inner.selected_experts(),
        }
    }

    fn all_reduce(&mut self, x: &mut B::Tensor) -> Result<()> {
        self.inner.all_reduce(x)
    }

    fn logits(&mut self, head: &B::Head, x: &B::Tensor, out: &mut B::Tensor) -> Result<()> {
        self.inner.logits(head, x, out)
    }

    fn read(&mut self, tensor: &B::Tensor, rows: usize) -> Result<Vec<f32>> {
        self.inner.read(tensor, rows)
    }

    fn write(&mut self, tensor: &mut B::Tensor, values: &[f32]) -> Result<()> {
        self.inner.write(tensor, values)
    }

    fn clear_slots(&mut self, slots: &[u32]) -> Result<()> {
        if self.is(Fault::KeepsSlots) { Ok(()) } else { self.inner.clear_slots(slots) }
    }

    fn poison_slots(&mut self, slots: &[u32]) -> Result<()> {
        if self.is(Fault::ZeroesForPoison) { self.inner.clear_slots(slots) } else { self.inner.poison_slots(slots) }
    }

    fn copy_slot(&mut self, from: u32, to: u32) -> Result<()> {
        if self.is(Fault::KeepsCopies) { Ok(()) } else { self.inner.copy_slot(from, to) }
    }

    fn export_state(&mut self, slot: u32, part: &StatePart) -> Result<Vec<u8>> {
        self.inner.export_state(slot, part)
    }

    fn import_state(&mut self, slot: u32, part: &StatePart, bytes: &[u8]) -> Result<()> {
        let first_head = if self.is(Fault::ImportsFirstHeads) { 0 } else { part.first_head };
        self.inner.import_state(slot, &StatePart { first_head, ..*part }, bytes)
    }

    fn state_sums(&mut self, slot: u32, first_head: u32) -> Result<Vec<u64>> {
        let first_head = if self.is(Fault::SumsOwnHeads) { 0 } else { first_head };
        self.inner.state_sums(slot, first_head)
    }

    fn copy_page(&mut self, from: u32, to: u32) -> Result<()> {
        if self.is(Fault::KeepsCopies) { Ok(()) } else { self.inner.copy_page(from, to) }
    }

    fn export_pages(&mut self, parts: &[PagePart]) -> Result<Vec<Vec<u8>>> {
        let mut pages = self.inner.export_pages(parts)?;
        if let [first, second, ..] = &mut pages[..]
            && self.is(Fault::ExportsFirstPage)
        {
            second.clone_from(first);
        }
        Ok(pages)
    }

    fn import_pages(&mut self, pages: &[PageWrite<'_>]) -> Result<()> {
        let taken = if self.is(Fault::ImportsFirstPage) { pages.len().min(1) } else { pages.len() };
        self.inner.import_pages(&pages[..taken])
    }

    fn poison_pages(&mut self, pages: &[u32]) -> Result<()> {
        self.inner.poison_pages(pages)
    }
}
