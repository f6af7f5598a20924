//! Pieces of tensors in a handoff: some heads of a state tensor, some positions of a layer's latents. A slice says which
//! heads of the whole model it has, so it can be cut for ranks of another number than it came from.

use std::ops::Range;

use perigee_backend::StatePart;

use super::error::{HandoffError, PartName};
use crate::digest::{Digest, TensorDigests};
use crate::geometry::{Geometry, GeometryError, PAGE_POSITIONS, Tensor};

/// Some heads of one state tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateSlice {
    /// Which; heads are counted over the whole model.
    pub part: StatePart,
    /// Digest that its holder took over the slot.
    pub digest: Digest,
    /// [heads, D, D] or [heads, D, W - 1], little-endian.
    pub bytes: Vec<u8>,
}

/// A session's whole state, in its slot at the source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeldState {
    /// Number of the slot, the same on every rank.
    pub slot: u32,
    /// Digests over it; those of latents are zero.
    pub digests: TensorDigests,
}

/// A slice as a rank's backend takes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RankSlice {
    /// Which; heads are counted on that rank.
    pub part: StatePart,
    /// [heads, D, D] or [heads, D, W - 1], little-endian.
    pub bytes: Vec<u8>,
}

/// Some positions of one MLA layer's latents, all within a page and from its beginning.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageSlice {
    /// Index among the MLA layers.
    pub layer: u32,
    /// First position, a multiple of [`PAGE_POSITIONS`].
    pub first: u64,
    /// Number of positions; fewer than a page has only in the session's last page.
    pub positions: u32,
    /// Digest that its holder took over the page.
    pub digest: Digest,
    /// [positions, R + r], little-endian.
    pub bytes: Vec<u8>,
}

impl StateSlice {
    /// A slice whose digest is taken here, over `bytes`. Where a device has taken it over the slot, set that instead.
    ///
    /// # Errors
    /// The bytes are not those of so many heads, or there are no such heads or layer.
    pub fn new(geometry: &Geometry, part: StatePart, bytes: Vec<u8>) -> Result<Self, HandoffError> {
        let digest = Digest::of_heads(geometry, part.kind, part.first_head, &bytes);
        let slice = Self { part, digest, bytes };
        check_state(geometry, &slice.part, slice.bytes.len() as u64)?;
        Ok(slice)
    }

    /// The tensor that it is a part of.
    pub fn tensor(&self) -> Tensor {
        Tensor::State { layer: self.part.layer, kind: self.part.kind }
    }

    /// Its heads, counted over the whole model.
    pub fn heads(&self) -> Range<u32> {
        self.part.first_head..self.part.first_head.saturating_add(self.part.heads)
    }

    /// The part of it that lies within `heads`, with a digest of its own; none where that is nothing.
    pub fn cut(&self, geometry: &Geometry, heads: Range<u32>) -> Option<Self> {
        let mine = self.heads();
        let both = mine.start.max(heads.start)..mine.end.min(heads.end);
        if both.start >= both.end {
            return None;
        }
        let head_bytes = geometry.head_bytes(self.part.kind) as usize;
        let from = (both.start - mine.start) as usize * head_bytes;
        let to = (both.end - mine.start) as usize * head_bytes;
        let bytes = self.bytes.get(from..to)?.to_vec();
        let part = StatePart { first_head: both.start, heads: both.end - both.start, ..self.part };
        let digest = Digest::of_heads(geometry, part.kind, part.first_head, &bytes);
        Some(Self { part, digest, bytes })
    }

    /// The part of it that rank `rank` of `ranks` holds, heads counted on that rank; none where that is nothing.
    ///
    /// # Errors
    /// The model's heads do not divide among so many ranks.
    pub fn for_rank(&self, geometry: &Geometry, rank: u32, ranks: u32) -> Result<Option<RankSlice>, GeometryError> {
        let heads = geometry.rank_heads(rank, ranks)?;
        let first = heads.start;
        Ok(self.cut(geometry, heads).map(|slice| RankSlice {
            part: StatePart { first_head: slice.part.first_head - first, ..slice.part },
            bytes: slice.bytes,
        }))
    }
}

impl PageSlice {
    /// A slice whose digest is taken here, over `bytes`. Where a device has taken it over the page, set that instead.
    ///
    /// # Errors
    /// The bytes are no whole number of positions from 1 to a page, or there is no such layer or page.
    pub fn new(geometry: &Geometry, layer: u32, first: u64, bytes: Vec<u8>) -> Result<Self, HandoffError> {
        let positions = bytes.len() as u64 / geometry.position_bytes();
        let positions = u32::try_from(positions).unwrap_or(u32::MAX);
        let digest = Digest::of_positions(geometry, first, &bytes);
        check_page(geometry, (layer, first, positions), bytes.len() as u64)?;
        Ok(Self { layer, first, positions, digest, bytes })
    }

    /// The tensor that it is a part of.
    pub fn tensor(&self) -> Tensor {
        Tensor::Latents { layer: self.layer }
    }
}

pub(super) fn state_name(part: &StatePart) -> PartName {
    PartName::State { layer: part.layer, kind: part.kind, first_head: part.first_head }
}

/// Checks layer, heads and size of a state slice.
pub(super) fn check_state(geometry: &Geometry, part: &StatePart, bytes: u64) -> Result<(), HandoffError> {
    let name = state_name(part);
    let wrong = |what, expected: u64, found: u64| HandoffError::Shape { part: name, what, expected, found };
    if part.layer >= geometry.kda_layers {
        return Err(wrong("KDA layer, at most", geometry.kda_layers.saturating_sub(1).into(), part.layer.into()));
    }
    let end = u64::from(part.first_head) + u64::from(part.heads);
    if part.heads == 0 || end > geometry.kda_heads.into() {
        return Err(wrong("heads up to", geometry.kda_heads.into(), end));
    }
    let expected = u64::from(part.heads) * geometry.head_bytes(part.kind);
    if bytes == expected { Ok(()) } else { Err(wrong("bytes", expected, bytes)) }
}

/// Checks layer, place and size of a page of (layer, first position, positions).
pub(super) fn check_page(geometry: &Geometry, page: (u32, u64, u32), bytes: u64) -> Result<(), HandoffError> {
    let (layer, first, positions) = page;
    let name = PartName::Page { layer, first };
    let wrong = |what, expected: u64, found: u64| HandoffError::Shape { part: name, what, expected, found };
    if layer >= geometry.mla_layers {
        return Err(wrong("MLA layer, at most", geometry.mla_layers.saturating_sub(1).into(), layer.into()));
    }
    if !first.is_multiple_of(PAGE_POSITIONS) {
        return Err(wrong("first position", first - first % PAGE_POSITIONS, first));
    }
    if positions == 0 || u64::from(positions) > PAGE_POSITIONS {
        return Err(wrong("positions", PAGE_POSITIONS, positions.into()));
    }
    let expected = u64::from(positions) * geometry.position_bytes();
    if bytes == expected { Ok(()) } else { Err(wrong("bytes", expected, bytes)) }
}
