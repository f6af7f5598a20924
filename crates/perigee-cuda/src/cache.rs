//! State slots and latent pages on the device. A slot's recurrent states lie together, [layer][head][key][value] float32, and
//! so do its convolution tails, [layer][W - 1][3 P]; latents are [layer][page][64][R + r]. Parts leave and enter in the order
//! that the seam names, which for tails is another one.

use std::sync::Arc;

use perigee_backend::{
    BackendError, CacheShape, DType, PAGE_TOKENS, PagePart, PageWrite, Result, StateKind, StatePart,
};

use crate::buffer::{Buffer, Pinned};
use crate::device::Device;
use crate::ipc::{SHARED_BLOCK, Slots};
use crate::nccl::pair::{Parcel, Piece};
use crate::stream::Stream;

/// Two of these bytes are a bfloat16 not-a-number, four a float32 one.
const POISON: u16 = 0x7fff;
/// Pages of one layer that cross between host and device before anybody waits.
const STAGED_PAGES: usize = 32;

/// All slots and pages.
#[derive(Debug)]
pub(crate) struct Cache {
    shape: CacheShape,
    dtype: DType,
    /// Shared with pairs that send slots.
    state: Arc<Buffer>,
    tails: Arc<Buffer>,
    /// Shared with those who answer for other replicas.
    latents: Arc<Buffer>,
    /// Where pages lie on the host on their way in or out.
    staging: Pinned,
}

impl Cache {
    /// Allocates and poisons.
    pub(crate) fn new(stream: &Stream, shape: &CacheShape, dtype: DType) -> Result<Self> {
        let mut cache = Self {
            shape: *shape,
            dtype,
            state: Arc::new(Buffer::new(stream.device(), 0, "state slots")?),
            tails: Arc::new(Buffer::new(stream.device(), 0, "state slots")?),
            latents: Arc::new(Buffer::new(stream.device(), 0, "latent pages")?),
            staging: Pinned::new(stream.device(), 0)?,
        };
        cache.staging = Pinned::new(stream.device(), STAGED_PAGES * cache.page_bytes())?;
        let state = cache.slot_state_bytes() * shape.slots;
        let tails = cache.slot_tail_bytes() * shape.slots;
        let latents = cache.page_bytes() * shape.pages * shape.mla_layers;
        let shared = |bytes: usize| bytes.next_multiple_of(SHARED_BLOCK);
        let buffer = |bytes: usize, what: &str| Buffer::new(stream.device(), shared(bytes), what).map(Arc::new);
        cache.state = buffer(state, &format!("{} state slots", shape.slots))?;
        cache.tails = buffer(tails, &format!("tails of {} state slots", shape.slots))?;
        cache.latents = Arc::new(Buffer::new(stream.device(), latents, &format!("{} latent pages", shape.pages))?);
        stream.fill(&cache.state, 0, state, POISON)?;
        stream.fill(&cache.tails, 0, tails, POISON)?;
        stream.fill(&cache.latents, 0, latents, POISON)?;
        Ok(cache)
    }

    pub(crate) fn shape(&self) -> &CacheShape {
        &self.shape
    }

    /// Device address of the state slab.
    pub(crate) fn state(&self) -> u64 {
        self.state.address()
    }

    /// Device address of the tails.
    pub(crate) fn tails(&self) -> u64 {
        self.tails.address()
    }

    /// Device address of one MLA layer's pages.
    pub(crate) fn latents(&self, layer: usize) -> Result<u64> {
        self.latents.part(layer * self.shape.pages * self.page_bytes(), self.shape.pages * self.page_bytes())
    }

    /// All latent pages, [layer][page][64][R + r].
    pub(crate) fn pages(&self) -> &Arc<Buffer> {
        &self.latents
    }

    /// The slots as they are shared with other processes.
    pub(crate) fn slots(&self) -> Slots<'_> {
        Slots {
            state: &self.state,
            tails: &self.tails,
            slot_state: self.slot_state_bytes(),
            slot_tails: self.slot_tail_bytes(),
            slots: self.shape.slots,
        }
    }

    /// Device addresses of a slot's recurrent states and tails.
    pub(crate) fn slot_addresses(&self, slot: u32) -> Result<(u64, u64)> {
        let slot = self.slot(slot)?;
        let state = self.state.part(slot * self.slot_state_bytes(), self.slot_state_bytes())?;
        Ok((state, self.tails.part(slot * self.slot_tail_bytes(), self.slot_tail_bytes())?))
    }

    /// A slot as pairs carry it: states, then tails.
    pub(crate) fn pieces(&self, slot: u32) -> Result<Parcel> {
        let slot = self.slot(slot)?;
        let piece =
            |buffer: &Arc<Buffer>, bytes: usize| Piece { buffer: Arc::clone(buffer), offset: slot * bytes, bytes };
        Ok(vec![piece(&self.state, self.slot_state_bytes()), piece(&self.tails, self.slot_tail_bytes())])
    }

    /// Room for one beside the slots.
    pub(crate) fn room(&self, device: &Device) -> Result<Parcel> {
        let room = |bytes: usize, what| {
            Buffer::new(device, bytes, what).map(|buffer| Piece { buffer: Arc::new(buffer), offset: 0, bytes })
        };
        Ok(vec![
            room(self.slot_state_bytes(), "a state on its way")?,
            room(self.slot_tail_bytes(), "tails on their way")?,
        ])
    }

    /// Writes what came to a slot.
    pub(crate) fn take(&self, stream: &Stream, parcel: &Parcel, slot: u32) -> Result<()> {
        for (from, to) in parcel.iter().zip(self.pieces(slot)?) {
            stream.copy(&from.buffer, from.offset, &to.buffer, to.offset, to.bytes)?;
        }
        Ok(())
    }

    fn head_state_bytes(&self) -> usize {
        self.shape.kda_head_dim * self.shape.kda_head_dim * 4
    }

    fn slot_state_bytes(&self) -> usize {
        self.shape.kda_layers * self.shape.kda_heads * self.head_state_bytes()
    }

    fn layer_tail_bytes(&self) -> usize {
        self.shape.conv.saturating_sub(1) * 3 * self.shape.kda_heads * self.shape.kda_head_dim * self.dtype.bytes()
    }

    fn slot_tail_bytes(&self) -> usize {
        self.shape.kda_layers * self.layer_tail_bytes()
    }

    fn row_bytes(&self) -> usize {
        self.shape.latent_width * self.dtype.bytes()
    }

    fn page_bytes(&self) -> usize {
        PAGE_TOKENS * self.row_bytes()
    }

    fn check(what: &'static str, index: u32, limit: usize) -> Result<usize> {
        if (index as usize) < limit {
            return Ok(index as usize);
        }
        Err(BackendError::Range { what, index: index.into(), limit: limit as u64 })
    }

    pub(crate) fn slot(&self, slot: u32) -> Result<usize> {
        Self::check("state slot", slot, self.shape.slots)
    }

    fn page(&self, page: u32) -> Result<usize> {
        Self::check("latent page", page, self.shape.pages)
    }

    fn fill_slots(&self, stream: &Stream, slots: &[u32], pattern: u16) -> Result<()> {
        for &slot in slots {
            let slot = self.slot(slot)?;
            stream.fill(&self.state, slot * self.slot_state_bytes(), self.slot_state_bytes(), pattern)?;
            stream.fill(&self.tails, slot * self.slot_tail_bytes(), self.slot_tail_bytes(), pattern)?;
        }
        Ok(())
    }

    pub(crate) fn clear_slots(&self, stream: &Stream, slots: &[u32]) -> Result<()> {
        self.fill_slots(stream, slots, 0)
    }

    pub(crate) fn poison_slots(&self, stream: &Stream, slots: &[u32]) -> Result<()> {
        self.fill_slots(stream, slots, POISON)
    }

    pub(crate) fn copy_slot(&self, stream: &Stream, from: u32, to: u32) -> Result<()> {
        let (from, to) = (self.slot(from)?, self.slot(to)?);
        for (buffer, bytes) in [(&self.state, self.slot_state_bytes()), (&self.tails, self.slot_tail_bytes())] {
            stream.copy(buffer, from * bytes, buffer, to * bytes, bytes)?;
        }
        Ok(())
    }

    fn check_part(&self, part: &StatePart) -> Result<()> {
        Self::check("KDA layer", part.layer, self.shape.kda_layers)?;
        let end = u64::from(part.first_head) + u64::from(part.heads);
        if end > self.shape.kda_heads as u64 {
            return Err(BackendError::Range { what: "KDA head", index: end, limit: self.shape.kda_heads as u64 });
        }
        Ok(())
    }

    fn state_range(&self, slot: usize, part: &StatePart) -> (usize, usize) {
        let layer =
            slot * self.slot_state_bytes() + part.layer as usize * self.shape.kda_heads * self.head_state_bytes();
        let offset = layer + part.first_head as usize * self.head_state_bytes();
        (offset, part.heads as usize * self.head_state_bytes())
    }

    pub(crate) fn export_state(&self, stream: &Stream, slot: u32, part: &StatePart) -> Result<Vec<u8>> {
        let slot = self.slot(slot)?;
        self.check_part(part)?;
        let Some(which) = convolution(part.kind) else {
            let (offset, bytes) = self.state_range(slot, part);
            let mut out = vec![0; bytes];
            stream.read(&self.state, offset, &mut out)?;
            return Ok(out);
        };
        let mut layer = vec![0; self.layer_tail_bytes()];
        stream.read(&self.tails, self.tail_offset(slot, part), &mut layer)?;
        let size = self.dtype.bytes();
        let mut out = Vec::with_capacity(self.part_channels(part) * (self.shape.conv - 1) * size);
        for_each_tail(self, part, which, |at| out.extend_from_slice(&layer[at..at + size]));
        Ok(out)
    }

    pub(crate) fn import_state(&self, stream: &Stream, slot: u32, part: &StatePart, bytes: &[u8]) -> Result<()> {
        let slot = self.slot(slot)?;
        self.check_part(part)?;
        let Some(which) = convolution(part.kind) else {
            let (offset, expected) = self.state_range(slot, part);
            check_length(part, expected, bytes)?;
            return stream.write(&self.state, offset, bytes);
        };
        let size = self.dtype.bytes();
        check_length(part, self.part_channels(part) * (self.shape.conv - 1) * size, bytes)?;
        let mut layer = vec![0; self.layer_tail_bytes()];
        stream.read(&self.tails, self.tail_offset(slot, part), &mut layer)?;
        let mut values = bytes.chunks_exact(size);
        for_each_tail(self, part, which, |at| {
            if let Some(value) = values.next() {
                layer[at..at + size].copy_from_slice(value);
            }
        });
        stream.write(&self.tails, self.tail_offset(slot, part), &layer)
    }

    fn part_channels(&self, part: &StatePart) -> usize {
        part.heads as usize * self.shape.kda_head_dim
    }

    fn tail_offset(&self, slot: usize, part: &StatePart) -> usize {
        slot * self.slot_tail_bytes() + part.layer as usize * self.layer_tail_bytes()
    }

    fn page_offset(&self, page: usize, layer: usize) -> usize {
        (layer * self.shape.pages + page) * self.page_bytes()
    }

    pub(crate) fn copy_page(&self, stream: &Stream, from: u32, to: u32) -> Result<()> {
        let (from, to) = (self.page(from)?, self.page(to)?);
        (0..self.shape.mla_layers).try_for_each(|layer| {
            let (source, target) = (self.page_offset(from, layer), self.page_offset(to, layer));
            stream.copy(&self.latents, source, &self.latents, target, self.page_bytes())
        })
    }

    pub(crate) fn export_pages(&mut self, stream: &Stream, parts: &[PagePart]) -> Result<Vec<Vec<u8>>> {
        let mut pages = Vec::with_capacity(parts.len());
        for parts in parts.chunks(STAGED_PAGES) {
            let places = parts.iter().map(|part| self.place(part)).collect::<Result<Vec<_>>>()?;
            let mut staged = 0;
            let queued = places.iter().try_for_each(|&(offset, bytes)| {
                stream.read_pinned(&self.latents, offset, &mut self.staging, staged..staged + bytes)?;
                staged += bytes;
                Ok(())
            });
            // Also those that were queued before one failed.
            stream.wait().and(queued)?;
            let mut rest = self.staging.as_slice();
            for &(_, bytes) in &places {
                let (page, later) = rest.split_at(bytes);
                pages.push(page.to_vec());
                rest = later;
            }
        }
        Ok(pages)
    }

    /// Where a part of a page begins, and its bytes.
    fn place(&self, part: &PagePart) -> Result<(usize, usize)> {
        let (page, layer) = (self.page(part.page)?, Self::check("MLA layer", part.layer, self.shape.mla_layers)?);
        Ok((self.page_offset(page, layer), part.rows()? * self.row_bytes()))
    }

    pub(crate) fn import_pages(&mut self, stream: &Stream, pages: &[PageWrite<'_>]) -> Result<()> {
        for pages in pages.chunks(STAGED_PAGES) {
            let offsets = pages.iter().map(|page| self.room_for(page)).collect::<Result<Vec<_>>>()?;
            let mut staged = 0;
            let queued = pages.iter().zip(offsets).try_for_each(|(page, offset)| {
                let range = staged..staged + page.bytes.len();
                self.staging.as_mut_slice()[range.clone()].copy_from_slice(page.bytes);
                staged = range.end;
                stream.write_pinned(&self.latents, offset, &self.staging, range)
            });
            // As above.
            stream.wait().and(queued)?;
        }
        Ok(())
    }

    /// Where bytes of a page go.
    fn room_for(&self, page: &PageWrite<'_>) -> Result<usize> {
        let (number, layer) = (self.page(page.page)?, Self::check("MLA layer", page.layer, self.shape.mla_layers)?);
        let (row, bytes) = (self.row_bytes(), page.bytes.len());
        if bytes > self.page_bytes() || !bytes.is_multiple_of(row.max(1)) {
            return Err(BackendError::shape(
                format!("bytes of latent page {number} (whole rows of {row})"),
                &[self.page_bytes()],
                &[bytes],
            ));
        }
        Ok(self.page_offset(number, layer))
    }

    pub(crate) fn poison_pages(&self, stream: &Stream, pages: &[u32]) -> Result<()> {
        for &page in pages {
            let page = self.page(page)?;
            for layer in 0..self.shape.mla_layers {
                stream.fill(&self.latents, self.page_offset(page, layer), self.page_bytes(), POISON)?;
            }
        }
        Ok(())
    }
}

/// Which of the three convolutions a part belongs to.
fn convolution(kind: StateKind) -> Option<usize> {
    match kind {
        StateKind::Recurrent => None,
        StateKind::ConvQ => Some(0),
        StateKind::ConvK => Some(1),
        StateKind::ConvV => Some(2),
    }
}

fn check_length(part: &StatePart, expected: usize, bytes: &[u8]) -> Result<()> {
    if bytes.len() == expected {
        return Ok(());
    }
    Err(BackendError::shape(format!("bytes of state part {part:?}"), &[expected], &[bytes.len()]))
}

/// Calls `visit` with the byte offset within a layer's tails of each element of a part, in the order of the seam: channel by
/// channel, oldest first.
fn for_each_tail(cache: &Cache, part: &StatePart, which: usize, mut visit: impl FnMut(usize)) {
    let width = cache.shape.kda_heads * cache.shape.kda_head_dim;
    let first = which * width + part.first_head as usize * cache.shape.kda_head_dim;
    for channel in first..first + cache.part_channels(part) {
        for tail in 0..cache.shape.conv - 1 {
            visit((tail * 3 * width + channel) * cache.dtype.bytes());
        }
    }
}
