//! The backend itself: options, caches, the current batch and the seat in the tensor-parallel group, with every op of the
//! trait as a short call into `ops`.

use std::sync::Arc;

use perigee_backend::pairs::{Pairs, Patience};
use perigee_backend::weights::{KdaWeights, MlaWeights, MlpWeights, MoeWeights};
use perigee_backend::{
    Backend, BackendError, CacheShape, DType, KdaShape, LatentReader, MlaShape, MlpShape, MoeShape, OtherPart,
    PagePart, PageWrite, PairOrder, PairState, Partials, Precision, Result, Routing, StatePart, StepBatch, TensorSlice,
};
use perigee_collectives::Collective;
use perigee_sampling::{Draw, Sampled, Scratch};

use crate::ahead::Drawn;
use crate::formula::Formula;
use crate::latents::{LatentSlab, merge};
use crate::matrix::{Matrix, load_vector};
use crate::ops::embed::Embedding;
use crate::ops::kda::{Kda, KdaRow};
use crate::ops::mla::Mla;
use crate::ops::mlp::Mlp;
use crate::ops::moe::Moe;
use crate::ops::norm::rms_norm_row;
use crate::pair::Loopback;
use crate::states::Slots;
use crate::tensor::Tensor;
use crate::workers::Workers;

/// How a CPU backend is opened.
#[derive(Debug, Clone, Copy)]
pub struct CpuOptions {
    /// Type of activations and caches. Bfloat16 rounds where a bfloat16 engine rounds; sums stay float32.
    pub activation: DType,
    /// Threads of this rank.
    pub threads: usize,
}

/// Weight of an RMS norm.
#[derive(Debug)]
pub struct Norm {
    weight: Vec<f32>,
    eps: f32,
}

/// This rank's rows of the output head.
#[derive(Debug)]
pub struct Head {
    rows: Matrix,
    counts: Vec<usize>,
}

/// One rank on CPUs.
pub struct CpuBackend {
    options: CpuOptions,
    formula: Formula,
    workers: Workers,
    collective: Box<dyn Collective>,
    slots: Option<Slots>,
    latents: Option<Arc<LatentSlab>>,
    pairs: Pairs<Loopback>,
    batch: StepBatch,
    selected: Vec<u32>,
    experts_touched: u64,
    /// Where it runs ahead.
    ahead: Option<Drawn>,
    #[cfg(feature = "planted-faults")]
    router_gaps: Option<Vec<f32>>,
    weight_bytes: u64,
}

impl CpuBackend {
    /// A backend without weights or caches, at this seat of its group.
    pub fn new(options: CpuOptions, collective: Box<dyn Collective>) -> Self {
        Self {
            options,
            formula: Formula::default(),
            workers: Workers::new(options.threads),
            collective,
            slots: None,
            latents: None,
            pairs: Pairs::new(Loopback::default(), Patience::default()),
            batch: StepBatch::default(),
            selected: Vec::new(),
            experts_touched: 0,
            ahead: None,
            #[cfg(feature = "planted-faults")]
            router_gaps: None,
            weight_bytes: 0,
        }
    }

    /// The same, with draws that are read later and steps that are fed with them.
    pub fn running_ahead(mut self) -> Self {
        self.ahead = Some(Drawn::default());
        self
    }

    fn drawn(&mut self) -> Result<&mut Drawn> {
        self.ahead.as_mut().ok_or_else(|| BackendError::Unsupported("draws that are read later".into()))
    }

    /// Computes with one mistake from now on; layers that are loaded already keep their formulas.
    #[cfg(feature = "planted-faults")]
    pub fn plant(&mut self, fault: crate::Fault) {
        self.formula = Formula::with(fault);
    }

    /// How close the choice of experts was in every layer since the last call, layer after layer \[tokens\]: the last
    /// chosen score minus the first that was not, of groups too. The first call begins the watch.
    #[cfg(feature = "planted-faults")]
    pub fn router_gaps(&mut self) -> Vec<f32> {
        self.router_gaps.replace(Vec::new()).unwrap_or_default()
    }

    fn rounded(&self) -> bool {
        self.options.activation == DType::Bf16
    }

    fn tokens(&self) -> usize {
        self.batch.tokens.len()
    }

    fn slots(&mut self) -> Result<&mut Slots> {
        self.slots.as_mut().ok_or_else(no_cache)
    }

    fn latents(&self) -> Result<&LatentSlab> {
        self.latents.as_deref().ok_or_else(no_cache)
    }

    fn count<'a>(&mut self, slices: impl IntoIterator<Item = &'a TensorSlice<'a>>) {
        self.weight_bytes += slices.into_iter().map(TensorSlice::bytes).sum::<u64>();
    }
}

fn no_cache() -> BackendError {
    BackendError::Batch("no caches: reserve_cache comes before the first step".into())
}

impl Backend for CpuBackend {
    type Tensor = Tensor;
    type Norm = Norm;
    type Embedding = Embedding;
    type Head = Head;
    type Kda = Kda;
    type Mla = Mla;
    type Mlp = Mlp;
    type Moe = Moe;

    fn load_norm(&mut self, weight: &TensorSlice<'_>, eps: f32) -> Result<Norm> {
        self.count([weight]);
        Ok(Norm { weight: load_vector(weight, weight.elements())?, eps })
    }

    fn load_embedding(&mut self, rows: &TensorSlice<'_>, first: usize) -> Result<Embedding> {
        let (count, width) = matrix_shape(rows)?;
        self.count([rows]);
        Ok(Embedding { rows: Matrix::load(rows, count, width)?, first })
    }

    fn load_head(&mut self, rows: &TensorSlice<'_>, counts: &[usize]) -> Result<Head> {
        let (count, width) = matrix_shape(rows)?;
        let rank = self.collective.rank();
        if counts.len() != self.collective.size() || counts[rank] != count {
            return Err(BackendError::shape("lm_head rows of the ranks", &[self.collective.size()], counts));
        }
        self.count([rows]);
        Ok(Head { rows: Matrix::load(rows, count, width)?, counts: counts.to_vec() })
    }

    fn load_kda(&mut self, shape: &KdaShape, weights: &KdaWeights<'_>) -> Result<Kda> {
        let KdaWeights { qkv_proj, qkv_conv, f_a_proj, f_b_proj, dt_bias, a_log, b_proj, .. } = weights;
        self.count(qkv_proj.iter().chain(qkv_conv).chain([f_a_proj, f_b_proj, dt_bias, a_log, b_proj]));
        self.count([&weights.g_a_proj, &weights.g_b_proj, &weights.o_norm, &weights.o_proj]);
        Kda::load(shape, weights, self.formula)
    }

    fn load_mla(&mut self, shape: &MlaShape, weights: &MlaWeights<'_>) -> Result<Mla> {
        match &weights.query {
            perigee_backend::weights::QueryWeights::Full(proj) => self.count([proj]),
            perigee_backend::weights::QueryWeights::LowRank { down, norm, up } => self.count([down, norm, up]),
        }
        self.count([&weights.kv_a_proj, &weights.kv_a_norm, &weights.kv_b_proj, &weights.o_proj]);
        Mla::load(shape, weights, self.formula)
    }

    fn load_mlp(&mut self, shape: &MlpShape, weights: &MlpWeights<'_>) -> Result<Mlp> {
        self.count([&weights.gate, &weights.up, &weights.down]);
        Mlp::load(shape, weights)
    }

    fn load_moe(&mut self, shape: &MoeShape, weights: &MoeWeights<'_>) -> Result<Moe> {
        self.count([&weights.router, &weights.bias]);
        for expert in weights.experts.iter().chain(&weights.shared) {
            self.count([&expert.gate, &expert.up, &expert.down]);
        }
        Moe::load(shape, weights, self.formula)
    }

    fn weight_bytes(&self) -> u64 {
        self.weight_bytes
    }

    fn reserve_cache(&mut self, shape: &CacheShape) -> Result<()> {
        self.slots = Some(Slots::new(*shape, self.options.activation));
        self.latents = Some(Arc::new(LatentSlab::new(shape, self.options.activation)));
        Ok(())
    }

    fn tensor(&mut self, rows: usize, width: usize, precision: Precision) -> Result<Tensor> {
        Ok(Tensor::new(rows, width, precision, self.options.activation))
    }

    fn begin_step(&mut self, batch: &StepBatch) -> Result<()> {
        self.batch.clone_from(batch);
        if let Some(fed) = self.ahead.as_mut().and_then(Drawn::take_fed) {
            self.batch.tokens = fed;
        }
        Ok(())
    }

    fn runs_ahead(&self) -> bool {
        self.ahead.is_some()
    }

    fn queue_draws(&mut self, logits: &Tensor, draws: &[Draw<'_>]) -> Result<()> {
        let sampled = self.sample(logits, draws, &mut Scratch::new())?;
        self.drawn()?.queue(sampled);
        Ok(())
    }

    fn collect_draws(&mut self) -> Result<Vec<Option<Sampled>>> {
        self.drawn()?.collect()
    }

    fn feed_drawn(&mut self, from: &[u32]) -> Result<()> {
        match &mut self.ahead {
            Some(drawn) => drawn.feed(from, self.collective.as_mut()),
            None => Err(BackendError::Unsupported("steps that are fed with draws".into())),
        }
    }

    fn embed(&mut self, table: &Embedding, out: &mut Tensor) -> Result<()> {
        let (tokens, width) = (self.tokens(), out.width());
        table.lookup(&self.batch.tokens, width, out.head_mut(tokens)?);
        out.settle(tokens);
        Ok(())
    }

    fn rms_norm(&mut self, x: &Tensor, norm: &Norm, out: &mut Tensor) -> Result<()> {
        let (tokens, width) = (self.tokens(), norm.weight.len());
        x.expect_width("rms_norm input", width)?;
        out.expect_width("rms_norm output", width)?;
        let x = x.head(tokens)?;
        for (x, out) in x.chunks_exact(width).zip(out.head_mut(tokens)?.chunks_exact_mut(width)) {
            rms_norm_row(x, &norm.weight, norm.eps, out);
        }
        out.settle(tokens);
        Ok(())
    }

    fn add_rms_norm(&mut self, residual: &mut Tensor, delta: &Tensor, norm: &Norm, out: &mut Tensor) -> Result<()> {
        let tokens = self.tokens();
        residual.expect_width("residual", delta.width())?;
        for (residual, delta) in residual.head_mut(tokens)?.iter_mut().zip(delta.head(tokens)?) {
            *residual += delta;
        }
        residual.settle(tokens);
        self.rms_norm(residual, norm, out)
    }

    fn kda_mixer(&mut self, layer: &Kda, index: usize, x: &Tensor, out: &mut Tensor) -> Result<()> {
        let (tokens, rounded) = (self.tokens(), self.rounded());
        x.expect_width("kda_mixer input", layer.shape.hidden)?;
        out.expect_width("kda_mixer output", layer.shape.hidden)?;
        let pairs: Vec<(u32, u32)> = self.batch.rows.iter().map(|row| (row.read_slot, row.write_slot)).collect();
        let slots = self.slots.as_mut().ok_or_else(no_cache)?;
        let states = slots.layer(index, &pairs)?;
        let rows = self.batch.rows.iter().zip(states);
        let rows = rows.map(|(row, state)| KdaRow { tokens: row.tokens as usize, state }).collect();
        layer.forward(&self.workers, rows, x.head(tokens)?, rounded, out.head_mut(tokens)?);
        out.settle(tokens);
        Ok(())
    }

    fn mla_project(&mut self, layer: &Mla, index: usize, x: &Tensor, queries: &mut Tensor) -> Result<()> {
        let (tokens, rounded) = (self.tokens(), self.rounded());
        let width = layer.shape.cache_width();
        x.expect_width("mla_project input", layer.shape.hidden)?;
        queries.expect_width("mla queries", layer.shape.heads * width)?;
        let x = x.head(tokens)?;
        let mut latents = layer.latents(&self.workers, x, rounded);
        let rotated = (width, layer.shape.rope);
        self.formula.rotate(&self.batch.rows, rotated, &mut latents);
        let slab = self.latents()?;
        let mut latents = latents.chunks_exact(width);
        for row in &self.batch.rows {
            for (position, latents) in (row.position..).zip(latents.by_ref().take(row.tokens as usize)) {
                let place = row.segments.iter().find(|s| s.start <= position && position < s.end);
                let (page, offset) = place
                    .ok_or_else(|| BackendError::Batch(format!("no segment holds position {position}")))?
                    .locate(position);
                slab.write(index, page, offset, latents)?;
            }
        }
        let absorbed = queries.head_mut(tokens)?;
        layer.queries(&self.workers, x, rounded, absorbed);
        self.formula.rotate(&self.batch.rows, rotated, absorbed);
        queries.settle(tokens);
        Ok(())
    }

    fn mla_attend(
        &mut self,
        layer: &Mla,
        index: usize,
        queries: &Tensor,
        partials: &mut Partials<Tensor>,
    ) -> Result<()> {
        let tokens = self.tokens();
        partials.output.expect_width("mla partial outputs", layer.shape.heads * layer.shape.latent)?;
        partials.lse.expect_width("mla partial lse", layer.shape.heads)?;
        layer.attend(
            &self.workers,
            (self.latents()?, index),
            &self.batch.rows,
            queries.head(tokens)?,
            (partials.output.head_mut(tokens)?, partials.lse.head_mut(tokens)?),
        )
    }

    fn mla_merge(&mut self, layer: &Mla, partials: &mut Partials<Tensor>, parts: &[OtherPart<'_>]) -> Result<()> {
        let (heads, width) = (layer.shape.heads, layer.shape.heads * layer.shape.latent);
        for &OtherPart { token, output, lse } in parts {
            if output.len() != width || lse.len() != heads {
                return Err(BackendError::shape("merged part", &[width, heads], &[output.len(), lse.len()]));
            }
            let mine = &mut partials.output.head_mut(token + 1)?[token * width..];
            let mine_lse = &mut partials.lse.head_mut(token + 1)?[token * heads..];
            merge(mine, mine_lse, output, lse);
        }
        Ok(())
    }

    fn mla_output(&mut self, layer: &Mla, partials: &Partials<Tensor>, out: &mut Tensor) -> Result<()> {
        let (tokens, rounded) = (self.tokens(), self.rounded());
        out.expect_width("mla_output output", layer.shape.hidden)?;
        layer.output(&self.workers, partials.output.head(tokens)?, rounded, out.head_mut(tokens)?);
        out.settle(tokens);
        Ok(())
    }

    fn mlp(&mut self, layer: &Mlp, x: &Tensor, out: &mut Tensor) -> Result<()> {
        let (tokens, rounded) = (self.tokens(), self.rounded());
        layer.forward(&self.workers, x.head(tokens)?, rounded, out.head_mut(tokens)?);
        out.settle(tokens);
        Ok(())
    }

    fn moe(&mut self, layer: &Moe, x: &Tensor, routing: Routing<'_>, out: &mut Tensor) -> Result<()> {
        let (tokens, rounded) = (self.tokens(), self.rounded());
        let x = x.head(tokens)?;
        #[cfg(feature = "planted-faults")]
        if let Some(gaps) = &mut self.router_gaps {
            gaps.extend(layer.gaps(&self.workers, x));
        }
        let selection = layer.route(&self.workers, x, routing)?;
        layer.forward(&self.workers, x, &selection, rounded, out.head_mut(tokens)?);
        out.settle(tokens);
        self.experts_touched += selection.touched();
        self.selected = selection.own;
        Ok(())
    }

    fn selected_experts(&mut self) -> Result<Vec<u32>> {
        Ok(self.selected.clone())
    }

    fn experts_touched(&mut self) -> Result<u64> {
        Ok(self.experts_touched)
    }

    fn all_reduce(&mut self, x: &mut Tensor) -> Result<()> {
        let tokens = self.tokens();
        let values = x.head_mut(tokens)?;
        self.collective.all_reduce(values).map_err(collective)?;
        x.settle(tokens);
        Ok(())
    }

    fn logits(&mut self, head: &Head, x: &Tensor, out: &mut Tensor) -> Result<()> {
        let (tokens, width) = (self.tokens(), x.width());
        let wanted = self.batch.logits.len();
        let vocab: usize = head.counts.iter().sum();
        out.expect_width("logits", vocab)?;
        let x = x.head(tokens)?;
        let mut rows = Vec::with_capacity(wanted * width);
        for &token in &self.batch.logits {
            rows.extend_from_slice(&x[token as usize * width..(token as usize + 1) * width]);
        }
        let mut mine = vec![0f32; wanted * head.rows.rows()];
        if head.rows.rows() > 0 {
            head.rows.product(&self.workers, &rows, &mut mine);
        }
        if head.counts.len() == 1 {
            out.head_mut(wanted)?.copy_from_slice(&mine);
            return Ok(());
        }
        let counts: Vec<usize> = head.counts.iter().map(|count| count * wanted).collect();
        let mut all = vec![0f32; vocab * wanted];
        self.collective.all_gather(&mine, &counts, &mut all).map_err(collective)?;
        let out = out.head_mut(wanted)?;
        let (mut start, mut column) = (0, 0);
        for &count in head.counts.iter().filter(|&&count| count > 0) {
            for (row, part) in all[start..start + count * wanted].chunks_exact(count).enumerate() {
                out[row * vocab + column..row * vocab + column + count].copy_from_slice(part);
            }
            start += count * wanted;
            column += count;
        }
        Ok(())
    }

    fn read(&mut self, tensor: &Tensor, rows: usize) -> Result<Vec<f32>> {
        Ok(tensor.head(rows)?.to_vec())
    }

    fn write(&mut self, tensor: &mut Tensor, values: &[f32]) -> Result<()> {
        let rows = values.len() / tensor.width();
        if rows * tensor.width() != values.len() {
            return Err(BackendError::shape("written rows", &[rows, tensor.width()], &[values.len()]));
        }
        tensor.head_mut(rows)?.copy_from_slice(values);
        tensor.settle(rows);
        Ok(())
    }

    fn latent_reader(&self) -> Option<Arc<dyn LatentReader>> {
        let slab = self.latents.clone()?;
        Some(slab)
    }

    fn clear_slots(&mut self, slots: &[u32]) -> Result<()> {
        self.slots()?.fill(slots, 0.0)
    }

    fn poison_slots(&mut self, slots: &[u32]) -> Result<()> {
        self.slots()?.fill(slots, f32::NAN)
    }

    fn copy_slot(&mut self, from: u32, to: u32) -> Result<()> {
        self.slots()?.copy(from, to)
    }

    fn export_state(&mut self, slot: u32, part: &StatePart) -> Result<Vec<u8>> {
        self.slots()?.export(slot, part)
    }

    fn import_state(&mut self, slot: u32, part: &StatePart, bytes: &[u8]) -> Result<()> {
        self.slots()?.import(slot, part, bytes)
    }

    fn state_sums(&mut self, slot: u32, first_head: u32) -> Result<Vec<u64>> {
        self.slots()?.sums(slot, first_head)
    }

    fn invite_pair(&mut self) -> Result<Option<Vec<u8>>> {
        self.pairs.invite().map(Some).map_err(BackendError::Unsupported)
    }

    fn pair(&mut self, invitation: &[u8], order: PairOrder) -> Result<PairState> {
        Ok(match order {
            PairOrder::Meet { end, patience } => self.pairs.meet(invitation, end, patience),
            PairOrder::Look => self.pairs.state(invitation),
            PairOrder::Send { slot } => {
                let parcel = self.slots()?.whole(slot)?;
                self.pairs.send(invitation, parcel)
            }
            PairOrder::Expect => {
                let room = vec![0; self.slots()?.bytes()];
                self.pairs.expect(invitation, room)
            }
            PairOrder::Take { slot } => {
                let parcel = self.pairs.take(invitation).map_err(BackendError::Unsupported)?;
                self.slots()?.overwrite(slot, &parcel)?;
                PairState::Ready
            }
            PairOrder::Close => {
                self.pairs.close(invitation);
                PairState::Broken("it was closed".into())
            }
        })
    }

    fn copy_page(&mut self, from: u32, to: u32) -> Result<()> {
        self.latents()?.copy(from, to)
    }

    fn export_pages(&mut self, parts: &[PagePart]) -> Result<Vec<Vec<u8>>> {
        let latents = self.latents()?;
        parts.iter().map(|part| latents.export(part)).collect()
    }

    fn import_pages(&mut self, pages: &[PageWrite<'_>]) -> Result<()> {
        let latents = self.latents()?;
        pages.iter().try_for_each(|page| latents.import(page.page, page.layer, page.bytes))
    }

    fn poison_pages(&mut self, pages: &[u32]) -> Result<()> {
        self.latents()?.poison(pages)
    }
}

fn collective(error: impl std::fmt::Display) -> BackendError {
    BackendError::Collective(error.to_string())
}

fn matrix_shape(slice: &TensorSlice<'_>) -> Result<(usize, usize)> {
    match slice.shape[..] {
        [rows, columns] => Ok((rows, columns)),
        _ => Err(BackendError::shape(&slice.name, &[0, 0], &slice.shape)),
    }
}
