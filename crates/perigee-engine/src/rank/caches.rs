//! A rank's slots and pages as bytes: parked in host memory, exported for a move, overwritten by one, and summed up in
//! digests. Heads are counted on this rank below the seam and over the whole model above it; the change is made here.

use perigee_backend::{
    Backend, BackendError, DType, PAGE_TOKENS, PagePart, PageWrite, PairOrder, StateKind, StatePart,
};
use perigee_migration::{Digest, Geometry, TensorDigests};
use perigee_model::ModelError;

use super::Rank;
use crate::executor::{PageSpan, StateSource};
use crate::protocol::{PageBytes, RankReply, SharedSlots, StateBytes};

/// A session's cache in host memory: parts of its slot, then its pages, all as bytes.
pub(super) struct Parked {
    state: Vec<StateBytes>,
    /// [pages][MLA layers].
    pages: Vec<Vec<Vec<u8>>>,
}

/// The type in which a backend keeps latents, seen from the size of a page; none without pages.
pub(super) fn storage_type<B: Backend>(
    backend: &mut B,
    cache: &perigee_backend::CacheShape,
) -> Result<Option<DType>, BackendError> {
    if cache.pages == 0 || cache.mla_layers == 0 {
        return Ok(None);
    }
    let bytes = backend.export_page(0, 0)?.len();
    let numbers = PAGE_TOKENS * cache.latent_width;
    Ok([DType::Fp32, DType::Bf16].into_iter().find(|dtype| numbers * dtype.bytes() == bytes))
}

impl<B: Backend> Rank<B> {
    /// All parts of a slot, heads counted on this rank.
    pub(super) fn state_parts(&self) -> Vec<StatePart> {
        let kinds = [StateKind::Recurrent, StateKind::ConvQ, StateKind::ConvK, StateKind::ConvV];
        let heads = self.cache.kda_heads as u32;
        (0..self.cache.kda_layers as u32)
            .flat_map(|layer| kinds.map(|kind| StatePart { layer, kind, first_head: 0, heads }))
            .collect()
    }

    fn slot_bytes(&mut self, slot: u32) -> Result<Vec<StateBytes>, ModelError> {
        let mut state = Vec::new();
        for part in self.state_parts() {
            state.push(StateBytes { part, bytes: self.backend.export_state(slot, &part)? });
        }
        Ok(state)
    }

    pub(super) fn park(&mut self, key: u64, slot: u32, pages: &[u32]) -> Result<RankReply, ModelError> {
        let state = self.slot_bytes(slot)?;
        let mut parked = Vec::with_capacity(pages.len());
        for &page in pages {
            parked.push(self.page_layers(page, PAGE_TOKENS as u32)?);
        }
        self.parked.insert(key, Parked { state, pages: parked });
        Ok(RankReply::Done)
    }

    pub(super) fn unpark(&mut self, key: u64, slot: u32, pages: &[u32]) -> Result<RankReply, ModelError> {
        let parked = self.parked.get(&key).ok_or_else(|| not_parked(key))?;
        if parked.pages.len() != pages.len() {
            return Err(BackendError::shape("pages of a parked session", &[parked.pages.len()], &[pages.len()]).into());
        }
        for StateBytes { part, bytes } in &parked.state {
            self.backend.import_state(slot, part, bytes)?;
        }
        for (&page, layers) in pages.iter().zip(&parked.pages) {
            let writes: Vec<PageWrite<'_>> =
                (0..).zip(layers).map(|(layer, bytes)| PageWrite { page, layer, bytes }).collect();
            self.backend.import_pages(&writes)?;
        }
        Ok(RankReply::Done)
    }

    /// Bytes of a part if its heads, counted over the model, are this rank's, else nothing.
    pub(super) fn export_part(&mut self, slot: u32, part: &StatePart) -> Result<RankReply, ModelError> {
        let mine = self.cache.kda_heads as u32;
        let first = self.first_head();
        if part.first_head < first || part.first_head + part.heads > first + mine {
            return Ok(RankReply::Done);
        }
        let local = StatePart { first_head: part.first_head - first, ..*part };
        Ok(RankReply::Bytes(self.backend.export_state(slot, &local)?))
    }

    /// This rank's part of a session's state.
    pub(super) fn export_slot(&mut self, from: StateSource) -> Result<RankReply, ModelError> {
        let state = match from {
            StateSource::Slot(slot) => self.slot_bytes(slot)?,
            StateSource::Parked(key) => self.parked.get(&key).ok_or_else(|| not_parked(key))?.state.clone(),
            StateSource::Empty => Vec::new(),
        };
        let geometry = self.known_geometry()?;
        let first = self.first_head();
        let of_model = |StateBytes { part, bytes }: StateBytes| {
            let part = StatePart { first_head: part.first_head + first, ..part };
            let digest = Digest::of_heads(&geometry, part.kind, part.first_head, &bytes);
            (StateBytes { part, bytes }, digest.0)
        };
        Ok(RankReply::State(state.into_iter().map(of_model).collect()))
    }

    pub(super) fn import_state(&mut self, slot: u32, parts: &[StateBytes]) -> Result<RankReply, ModelError> {
        for StateBytes { part, bytes } in parts {
            self.backend.import_state(slot, part, bytes)?;
        }
        Ok(RankReply::Done)
    }

    pub(super) fn digest_slot(&mut self, slot: u32) -> Result<RankReply, ModelError> {
        let geometry = self.known_geometry()?;
        // Of every KDA layer the four tensors, in the order of digests; a slot has no latents.
        let mut sums = self.backend.state_sums(slot, self.first_head())?;
        sums.resize(TensorDigests::new(&geometry).len(), 0);
        Ok(RankReply::Digests(sums))
    }

    pub(super) fn share_slots(&mut self) -> Result<RankReply, ModelError> {
        Ok(RankReply::Bytes(self.backend.share_slots()?.unwrap_or_default()))
    }

    pub(super) fn open_slots(&mut self, shared: &[SharedSlots]) -> Result<RankReply, ModelError> {
        self.backend.open_slots(self.peer(shared)?)?;
        Ok(RankReply::Done)
    }

    pub(super) fn take_slot(&mut self, shared: &[SharedSlots], from: u32, to: u32) -> Result<RankReply, ModelError> {
        self.backend.take_slot(self.peer(shared)?, from, to)?;
        Ok(RankReply::Done)
    }

    pub(super) fn close_slots(&mut self, shared: &[SharedSlots]) -> Result<RankReply, ModelError> {
        self.backend.close_slots(self.peer(shared)?);
        Ok(RankReply::Done)
    }

    pub(super) fn invite_pair(&mut self) -> Result<RankReply, ModelError> {
        Ok(RankReply::Bytes(self.backend.invite_pair()?.unwrap_or_default()))
    }

    pub(super) fn pair(&mut self, invitations: &[SharedSlots], order: PairOrder) -> Result<RankReply, ModelError> {
        Ok(RankReply::Pair(self.backend.pair(self.peer(invitations)?, order)?))
    }

    /// What was told of the rank that has the same heads.
    fn peer<'a>(&self, shared: &'a [SharedSlots]) -> Result<&'a [u8], BackendError> {
        let peer = shared.get(self.rank).map(|slots| slots.0.as_slice());
        peer.ok_or(BackendError::Range { what: "rank", index: self.rank as u64, limit: shared.len() as u64 })
    }

    /// The filled positions of a page in every MLA layer.
    pub(crate) fn export_page(&mut self, span: &PageSpan) -> Result<Vec<Vec<u8>>, ModelError> {
        let is_page = (1..=PAGE_TOKENS as u32).contains(&span.positions);
        if !is_page || !span.first.is_multiple_of(PAGE_TOKENS as u64) {
            return Err(BackendError::Batch(format!(
                "positions {} to {} are no beginning of a page",
                span.first,
                span.first.saturating_add(span.positions.into())
            ))
            .into());
        }
        self.page_layers(span.page, span.positions)
    }

    /// The first positions of a page in every MLA layer.
    fn page_layers(&mut self, page: u32, positions: u32) -> Result<Vec<Vec<u8>>, ModelError> {
        let layers = 0..self.cache.mla_layers as u32;
        let parts: Vec<PagePart> = layers.map(|layer| PagePart { page, layer, positions }).collect();
        Ok(self.backend.export_pages(&parts)?)
    }

    pub(super) fn import_pages(&mut self, pages: &[PageBytes]) -> Result<RankReply, ModelError> {
        let writes: Vec<PageWrite<'_>> =
            pages.iter().map(|page| PageWrite { page: page.page, layer: page.layer, bytes: &page.bytes }).collect();
        self.backend.import_pages(&writes)?;
        Ok(RankReply::Done)
    }

    pub(super) fn digest_pages(&mut self, pages: &[PageSpan]) -> Result<RankReply, ModelError> {
        let geometry = self.known_geometry()?;
        let mut digests = vec![Digest::default(); self.cache.mla_layers];
        for span in pages {
            for (digest, bytes) in digests.iter_mut().zip(self.export_page(span)?) {
                *digest += Digest::of_positions(&geometry, span.first, &bytes);
            }
        }
        Ok(RankReply::Digests(digests.into_iter().map(|digest| digest.0).collect()))
    }

    pub(super) fn poison(&mut self, slots: &[u32], pages: &[u32]) -> Result<RankReply, ModelError> {
        self.backend.poison_slots(slots)?;
        self.backend.poison_pages(pages)?;
        Ok(RankReply::Done)
    }

    /// Shapes and types of a session's tensors over all ranks; none where there are no pages to see the type from.
    pub(crate) fn geometry(&self) -> Option<Geometry> {
        let whole = self.model.config().cache_shape(1, self.cache.slots, self.cache.pages);
        Geometry::of_replica(&whole, 1, self.dtype?).ok()
    }

    fn known_geometry(&self) -> Result<Geometry, BackendError> {
        let unknown = || BackendError::Unsupported("moving sessions without latent pages".into());
        self.geometry().ok_or_else(unknown)
    }

    /// This rank's first KDA head.
    fn first_head(&self) -> u32 {
        (self.rank * self.cache.kda_heads) as u32
    }
}

fn not_parked(key: u64) -> BackendError {
    BackendError::Batch(format!("no parked session {key}"))
}
