//! Attention over latent pages for other replicas, on streams of its own: it waits neither for the compute stream nor for
//! another question, so replicas that answer each other cannot wait in a circle. Who asks knows that the pages are sealed.

use std::sync::{Arc, Mutex, PoisonError};

use bytemuck::cast_slice;
use perigee_backend::{Asked, BackendError, CacheShape, LatentReader, PAGE_TOKENS, Result, Row, Segment, StepBatch};

use crate::buffer::{Buffer, Pinned};
use crate::cache::Cache;
use crate::device::Device;
use crate::kernels::{AttentionKernels, Kernels};
use crate::module::Modules;
use crate::needs::ITEM_ROWS;
use crate::ops::attention::{Dealt, Launch};
use crate::params::MlaAttendParams;
use crate::step::{Attention, Planning};
use crate::stream::Stream;

/// Parts of a lane's memory begin at multiples of this.
const ALIGNMENT: usize = 256;

/// The reader of one backend's pages. Fields are dropped in order: streams before the kernels that they run.
#[derive(Debug)]
pub(crate) struct Reader {
    /// Those that answer nothing at present.
    lanes: Mutex<Vec<Lane>>,
    device: Device,
    kernels: AttentionKernels,
    latents: Arc<Buffer>,
    shape: CacheShape,
    /// Bytes of one layer's pages.
    layer_bytes: usize,
    _modules: Arc<Modules>,
}

impl Reader {
    pub(crate) fn new(device: &Device, kernels: &Kernels, cache: &Cache) -> Self {
        let latents = Arc::clone(cache.pages());
        Self {
            lanes: Mutex::default(),
            device: device.clone(),
            kernels: kernels.mla_attention.clone(),
            layer_bytes: latents.bytes() / cache.shape().mla_layers.max(1),
            latents,
            shape: *cache.shape(),
            _modules: Arc::clone(kernels.modules()),
        }
    }

    fn check_place(&self, layer: usize, pages: &[u32]) -> Result<()> {
        let range = |what, index, limit| Err(BackendError::Range { what, index, limit: limit as u64 });
        if layer >= self.shape.mla_layers {
            return range("MLA layer", layer as u64, self.shape.mla_layers);
        }
        match pages.iter().find(|&&page| page as usize >= self.shape.pages) {
            Some(&page) => range("latent page", page.into(), self.shape.pages),
            None => Ok(()),
        }
    }

    fn check(&self, question: &Question<'_>) -> Result<()> {
        let (width, latent) = (self.shape.latent_width, question.latent);
        for one in question.asked {
            self.check_place(question.layer, one.pages)?;
            if question.heads == 0 || latent > width || !one.queries.len().is_multiple_of(question.heads * width) {
                let expected = [question.heads, width];
                return Err(BackendError::shape("queries for latent pages", &expected, &[one.queries.len(), latent]));
            }
        }
        Ok(())
    }

    /// Works on a lane that nobody else uses meanwhile. One that failed is not used again.
    fn on_a_lane<T>(&self, work: impl FnOnce(&mut Lane) -> Result<T>) -> Result<T> {
        // The lanes are whole whatever a panic elsewhere left behind: each is taken out before it is used.
        let idle = self.lanes.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut lane = idle.map_or_else(|| Lane::new(&self.device), Ok)?;
        let done = work(&mut lane)?;
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner).push(lane);
        Ok(done)
    }
}

impl LatentReader for Reader {
    fn attend(
        &self,
        layer: usize,
        pages: &[u32],
        heads: usize,
        scale: f32,
        latent: usize,
        queries: &[f32],
    ) -> Result<(Vec<f32>, Vec<f32>)> {
        let parts = self.attend_all(layer, heads, scale, latent, &[Asked { pages, queries }])?;
        parts.into_iter().next().ok_or_else(|| BackendError::Device("an answer is missing".into()))
    }

    fn attend_all(
        &self,
        layer: usize,
        heads: usize,
        scale: f32,
        latent: usize,
        asked: &[Asked<'_>],
    ) -> Result<Vec<(Vec<f32>, Vec<f32>)>> {
        self.check(&Question { layer, heads, scale, latent, asked })?;
        let width = self.shape.latent_width;
        let is_asked = |one: &&Asked<'_>| !one.pages.is_empty() && !one.queries.is_empty();
        let some: Vec<Asked<'_>> = asked.iter().filter(is_asked).copied().collect();
        let (mut output, mut lse) = (Vec::new(), Vec::new());
        if let [_] = some[..]
            && asked.len() == 1
        {
            let question = Question { layer, heads, scale, latent, asked: &some };
            return Ok(vec![self.on_a_lane(|lane| lane.answer(self, &question))?]);
        }
        if !some.is_empty() {
            let question = Question { layer, heads, scale, latent, asked: &some };
            (output, lse) = self.on_a_lane(|lane| lane.answer(self, &question))?;
        }
        // Every sequence's rows, in order; over no pages there is nothing.
        let (mut output, mut lse) = (output.into_iter(), lse.into_iter());
        let part = |one: &Asked<'_>| {
            let rows = one.queries.len() / width;
            match is_asked(&one) {
                true => (output.by_ref().take(rows * latent).collect(), lse.by_ref().take(rows).collect()),
                false => (vec![0.0; rows * latent], vec![f32::NEG_INFINITY; rows]),
            }
        };
        Ok(asked.iter().map(part).collect())
    }

    fn page(&self, layer: usize, page: u32) -> Result<Vec<u8>> {
        self.check_place(layer, &[page])?;
        let bytes = self.layer_bytes / self.shape.pages;
        let mut out = vec![0; bytes];
        self.on_a_lane(|lane| {
            lane.stream.read(&self.latents, layer * self.layer_bytes + page as usize * bytes, &mut out)
        })?;
        Ok(out)
    }
}

/// What is asked, as [`LatentReader::attend_all`] has it.
struct Question<'a> {
    layer: usize,
    heads: usize,
    scale: f32,
    latent: usize,
    asked: &'a [Asked<'a>],
}

impl Question<'_> {
    /// Who attends to what: all tokens of a sequence at the position behind its pages, so that they see every key.
    fn plan(&self, width: usize, device: &Device, blocks: usize) -> Result<Attention> {
        let mut rows = Vec::with_capacity(self.asked.len());
        for one in self.asked {
            let tokens = one.queries.len() / (self.heads * width);
            let end = (one.pages.len() * PAGE_TOKENS) as u64;
            if end + tokens as u64 > u64::from(u32::MAX) {
                return Err(BackendError::Range { what: "position", index: end, limit: u64::from(u32::MAX) });
            }
            rows.push(Row {
                tokens: tokens as u32,
                position: end,
                read_slot: 0,
                write_slot: 0,
                segments: vec![Segment { start: 0, end, pages: one.pages.to_vec() }],
            });
        }
        let batch = StepBatch { tokens: Vec::new(), rows, logits: Vec::new() };
        let processors = device.multiprocessors() as usize;
        let planning = Planning { heads: self.heads, items: 2 * processors, blocks, stretch: 0 };
        Ok(Attention::plan(&batch, planning))
    }
}

/// A stream with memory for one question at a time. Fields are dropped in order: copies end with the stream.
#[derive(Debug)]
struct Lane {
    stream: Stream,
    /// The last is in use. Smaller ones stay until the end: freeing memory waits for all work of the device, and an answer
    /// must not.
    memory: Vec<Buffer>,
    /// The same for what crosses: question and answer as they lie at the beginning of the memory.
    host: Vec<Pinned>,
}

impl Lane {
    fn new(device: &Device) -> Result<Self> {
        Ok(Self { stream: Stream::new(device)?, memory: Vec::new(), host: Vec::new() })
    }

    /// Makes room for `bytes` on the device, of which the first `crossing` are copied.
    fn grow(&mut self, bytes: usize, crossing: usize) -> Result<()> {
        if self.memory.last().is_none_or(|buffer| buffer.bytes() < bytes) {
            let bytes = bytes.next_power_of_two();
            self.memory.push(Buffer::new(self.stream.device(), bytes, "answers for other replicas")?);
        }
        if self.host.last().is_none_or(|host| host.as_slice().len() < crossing) {
            self.host.push(Pinned::new(self.stream.device(), crossing.next_power_of_two())?);
        }
        Ok(())
    }

    fn answer(&mut self, reader: &Reader, question: &Question<'_>) -> Result<(Vec<f32>, Vec<f32>)> {
        let width = reader.shape.latent_width;
        let latent = question.latent;
        let values: Vec<&[f32]> = question.asked.iter().map(|one| one.queries).collect();
        let values = values.concat();
        let rows = values.len() / width;
        let blocks = reader.kernels.decode_blocks(question.heads, latent, &reader.device);
        let plan = question.plan(width, &reader.device, blocks)?;
        let part_rows = question.heads.max(ITEM_ROWS);
        let parts = plan.parts as usize * part_rows;

        // What goes to the device lies first, in one piece.
        let mut sent = Vec::new();
        let queries = append(&mut sent, cast_slice(&values));
        let items = append(&mut sent, cast_slice(&plan.items));
        let ranges = append(&mut sent, cast_slice(&plan.ranges));
        let merges = append(&mut sent, cast_slice(&plan.merges));
        let first_items = append(&mut sent, cast_slice(&plan.first_items));
        let pages = append(&mut sent, cast_slice(&plan.pages));
        let output = sent.len();
        let lse = output + rows * latent * 4;
        let part_output = (lse + rows * 4).next_multiple_of(ALIGNMENT);
        let part_lse = (part_output + parts * latent * 4).next_multiple_of(ALIGNMENT);

        self.grow(part_lse + parts * 4, lse + rows * 4)?;
        let missing = || BackendError::Device("no memory for an answer".into());
        let memory = self.memory.last().ok_or_else(missing)?;
        let host = self.host.last_mut().ok_or_else(missing)?;
        host.as_mut_slice()[..sent.len()].copy_from_slice(&sent);
        self.stream.write_pinned(memory, 0, host, 0..sent.len())?;
        let at = |offset: usize| memory.address() + offset as u64;
        let params = MlaAttendParams {
            queries: at(queries),
            latents: reader.latents.part(question.layer * reader.layer_bytes, reader.layer_bytes)?,
            output: at(output),
            lse: at(lse),
            part_output: at(part_output),
            part_lse: at(part_lse),
            items: at(items),
            ranges: at(ranges),
            pages: at(pages),
            merges: at(merges),
            heads: question.heads as u32,
            latent: latent as u32,
            rope: (width - latent) as u32,
            part_rows: part_rows as u32,
            scale: question.scale,
            reserved: 0,
        };
        let dealt = Dealt { first_items: at(first_items), blocks: plan.blocks(), pages: reader.shape.pages };
        let launch = Launch {
            items: plan.items.len(),
            merges: plan.merges.len(),
            item_tokens: plan.item_tokens,
            dealt: Some(dealt).filter(|dealt| dealt.blocks > 0),
        };
        reader.kernels.launch(&self.stream, &params, &launch)?;
        let found = &mut host.as_mut_slice()[output..lse + rows * 4];
        self.stream.read(memory, output, found)?;
        let mut values: Vec<f32> = found.as_chunks().0.iter().map(|&bytes| f32::from_ne_bytes(bytes)).collect();
        let sums = values.split_off(rows * latent);
        Ok((values, sums))
    }
}

/// Appends a section that begins at a multiple of the alignment, and pads it to one; where it begins.
fn append(packed: &mut Vec<u8>, bytes: &[u8]) -> usize {
    let offset = packed.len();
    packed.extend_from_slice(bytes);
    packed.resize(packed.len().next_multiple_of(ALIGNMENT), 0);
    offset
}
