//! What a handoff has had so far and what is due: order, shapes, and that every head and every page comes exactly once.
//! Source and target keep the same ledger, so a source cannot send what no target would take.

use perigee_backend::{DType, StateKind};

use super::due::DuePages;
use super::error::{HandoffError, PartName};
use super::part::{Announced, Head, totals_in_order};
use super::slice::{check_page, check_state};
use super::{Header, Part, Summary, Totals};
use crate::digest::{Digest, TensorDigests};
use crate::geometry::{Geometry, PAGE_POSITIONS, STATE_KINDS, Tensor};
use crate::segments::{Mode, SegmentTable, sealed};

/// Most bytes of a segment table: thousands of moves.
const SEGMENT_TABLE_BYTES: u64 = 1 << 20;

/// Most bytes of one run of token ids.
const TOKEN_RUN_BYTES: u64 = 1 << 20;

/// How far a handoff is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Header,
    Tokens,
    Segments,
    Tensors,
    Ended,
}

/// Bounds on what the sender says of itself.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    pub(super) context: u64,
    pub(super) record: u64,
}

/// The account of one handoff.
#[derive(Debug, Clone)]
pub(super) struct Ledger {
    geometry: Geometry,
    bounds: Bounds,
    mode: Mode,
    stage: Stage,
    parts: u32,
    tokens: u64,
    context: u64,
    /// [KDA layers, 4, heads]: whether they came.
    heads: Vec<bool>,
    /// Those that come along, and which of them came.
    pages: DuePages,
    summary: Summary,
}

impl Ledger {
    pub(super) fn new(geometry: &Geometry, bounds: Bounds) -> Self {
        let tensors = geometry.kda_layers as usize * STATE_KINDS.len();
        Self {
            geometry: *geometry,
            bounds,
            mode: Mode::Split,
            stage: Stage::Header,
            parts: 0,
            tokens: 0,
            context: 0,
            heads: vec![false; tensors * geometry.kda_heads as usize],
            pages: DuePages::default(),
            summary: Summary { totals: Totals::default(), digests: TensorDigests::new(geometry) },
        }
    }

    pub(super) fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    pub(super) fn parts(&self) -> u32 {
        self.parts
    }

    pub(super) fn summary(&self) -> &Summary {
        &self.summary
    }

    pub(super) fn tokens(&self) -> u64 {
        self.tokens
    }

    pub(super) fn has_ended(&self) -> bool {
        self.stage == Stage::Ended
    }

    /// The part that is missing, if the stream ended now.
    pub(super) fn due(&self) -> PartName {
        match self.stage {
            Stage::Header => PartName::Header,
            Stage::Tokens => PartName::Record,
            Stage::Segments => PartName::Segments,
            Stage::Tensors | Stage::Ended => PartName::Trailer,
        }
    }

    /// Takes note of a part whose body is still to come.
    pub(super) fn admit(&mut self, announced: &Announced) -> Result<(), HandoffError> {
        let Announced { head, body } = announced;
        let stage = self.stage_after(head)?;
        match head {
            Head::Header(header) => self.admit_header(header, *body)?,
            Head::Tokens { first, count, .. } => self.admit_tokens(*first, *count, *body)?,
            Head::Record { context, tokens, .. } => self.admit_record(*context, *tokens, *body)?,
            Head::Segments { .. } => limit(PartName::Segments, "bytes", SEGMENT_TABLE_BYTES, *body)?,
            Head::State { part, dtype, .. } => {
                same_dtype(head.name(), self.geometry.dtype(part.kind), *dtype)?;
                check_state(&self.geometry, part, *body)?;
                self.admit_heads(Tensor::State { layer: part.layer, kind: part.kind }, part.first_head, part.heads)?;
                let totals = &mut self.summary.totals;
                let is_recurrent = part.kind == StateKind::Recurrent;
                *(if is_recurrent { &mut totals.recurrent } else { &mut totals.tails }) += body;
            }
            Head::Held { tensors, .. } => self.admit_held(*tensors, *body)?,
            Head::Page { layer, first, positions, dtype, .. } => {
                same_dtype(head.name(), self.geometry.latent_dtype, *dtype)?;
                check_page(&self.geometry, (*layer, *first, *positions), *body)?;
                self.admit_page(*layer, *first, *positions)?;
                let totals = &mut self.summary.totals;
                let is_full = u64::from(*positions) == PAGE_POSITIONS;
                *(if is_full { &mut totals.pages } else { &mut totals.partial_pages }) += body;
            }
            Head::Trailer { parts, totals, tensors, .. } => self.admit_trailer((*parts, totals, *tensors), *body)?,
        }
        self.stage = stage;
        self.parts = self.parts.saturating_add(1);
        Ok(())
    }

    /// Takes note of a part that was admitted and is complete.
    pub(super) fn complete(&mut self, part: &Part) -> Result<(), HandoffError> {
        match part {
            Part::State(slice) => self.add_digest(slice.tensor(), slice.digest),
            Part::Held(held) => self.summary.digests.add_all(&held.digests)?,
            Part::Page(slice) => self.add_digest(slice.tensor(), slice.digest),
            Part::Segments(table) => self.settle_pages(table)?,
            Part::End(summary) => summary.digests.compare(&self.summary.digests)?,
            Part::Header(_) | Part::Tokens(_) | Part::Frozen(_) => {}
        }
        Ok(())
    }

    /// Adds a part's digest to its tensor's.
    pub(super) fn add_digest(&mut self, tensor: Tensor, digest: Digest) {
        self.summary.digests.add(tensor, digest);
    }

    /// Checks that nothing but the trailer is missing.
    pub(super) fn check_complete(&self) -> Result<(), HandoffError> {
        let heads = self.geometry.kda_heads as usize;
        if let Some(index) = self.heads.iter().position(|came| !came) {
            let (tensor, head) = (index / heads, (index % heads) as u32);
            let kind = STATE_KINDS[tensor % STATE_KINDS.len()];
            let layer = (tensor / STATE_KINDS.len()) as u32;
            return Err(HandoffError::MissingHead { tensor: Tensor::State { layer, kind }, head });
        }
        match self.pages.missing() {
            Some((layer, first)) => Err(HandoffError::MissingPage { layer, first }),
            None => Ok(()),
        }
    }

    fn stage_after(&self, head: &Head) -> Result<Stage, HandoffError> {
        let due = match (self.stage, head) {
            (Stage::Header, Head::Header(_)) | (Stage::Tokens, Head::Tokens { .. }) => return Ok(Stage::Tokens),
            (Stage::Tokens, Head::Record { .. }) => return Ok(Stage::Segments),
            (Stage::Segments, Head::Segments { .. }) => return Ok(Stage::Tensors),
            (Stage::Tensors, Head::State { .. } | Head::Held { .. } | Head::Page { .. }) => return Ok(Stage::Tensors),
            (Stage::Tensors, Head::Trailer { .. }) => return Ok(Stage::Ended),
            (Stage::Header, _) => "its header",
            (Stage::Tokens, _) => "token ids or the session record",
            (Stage::Segments, _) => "the segment table",
            (Stage::Tensors, _) => "state, pages or the trailer",
            (Stage::Ended, _) => "nothing",
        };
        Err(HandoffError::Order { due, found: head.name() })
    }

    fn admit_header(&mut self, header: &Header, body: u64) -> Result<(), HandoffError> {
        self.mode = header.mode;
        exact(PartName::Header, "bytes of body", 0, body)
    }

    fn admit_tokens(&mut self, first: u64, count: u32, body: u64) -> Result<(), HandoffError> {
        let name = PartName::Tokens { first };
        exact(name, "first token", self.tokens, first)?;
        exact(name, "bytes", u64::from(count) * 4, body)?;
        limit(name, "bytes at once", TOKEN_RUN_BYTES, body)?;
        self.tokens += u64::from(count);
        limit(name, "tokens", self.bounds.context, self.tokens)?;
        self.summary.totals.tokens += body;
        Ok(())
    }

    fn admit_record(&mut self, context: u64, tokens: u64, body: u64) -> Result<(), HandoffError> {
        limit(PartName::Record, "bytes", self.bounds.record, body)?;
        limit(PartName::Record, "positions", self.bounds.context, context)?;
        exact(PartName::Record, "tokens", self.tokens, tokens)?;
        if context > tokens {
            let part = PartName::Record;
            return Err(HandoffError::Shape { part, what: "positions, at most", expected: tokens, found: context });
        }
        self.context = context;
        self.summary.totals.record += body;
        Ok(())
    }

    /// Which pages come along: those of positions that no segment has.
    fn settle_pages(&mut self, table: &SegmentTable) -> Result<(), HandoffError> {
        table.check(self.context)?;
        if self.mode == Mode::Split
            && let Some(gap) = table.gaps(sealed(self.context)).first()
        {
            return Err(HandoffError::Homeless { first: gap.start });
        }
        self.pages = DuePages::of(&table.gaps(self.context), self.geometry.mla_layers);
        Ok(())
    }

    fn admit_heads(&mut self, tensor: Tensor, first: u32, count: u32) -> Result<(), HandoffError> {
        let Tensor::State { layer, kind } = tensor else { return Ok(()) };
        let kind = STATE_KINDS.iter().position(|&other| other == kind).unwrap_or_default();
        let start = (layer as usize * STATE_KINDS.len() + kind) * self.geometry.kda_heads as usize;
        let came = &mut self.heads[start + first as usize..][..count as usize];
        if let Some(index) = came.iter().position(|&came| came) {
            return Err(HandoffError::DuplicateHead { tensor, head: first + index as u32 });
        }
        came.fill(true);
        Ok(())
    }

    /// All heads of all state tensors at once; their bytes are counted, whichever way they go.
    fn admit_held(&mut self, tensors: u32, body: u64) -> Result<(), HandoffError> {
        exact(PartName::Held, "tensors", self.summary.digests.len() as u64, tensors.into())?;
        exact(PartName::Held, "bytes", u64::from(tensors) * 8, body)?;
        let (layers, heads) = (self.geometry.kda_layers, self.geometry.kda_heads);
        for (layer, kind) in (0..layers).flat_map(|layer| STATE_KINDS.map(|kind| (layer, kind))) {
            self.admit_heads(Tensor::State { layer, kind }, 0, heads)?;
            let bytes = u64::from(heads) * self.geometry.head_bytes(kind);
            let totals = &mut self.summary.totals;
            *(if kind == StateKind::Recurrent { &mut totals.recurrent } else { &mut totals.tails }) += bytes;
        }
        Ok(())
    }

    fn admit_page(&mut self, layer: u32, first: u64, positions: u32) -> Result<(), HandoffError> {
        let Some(came) = self.pages.mark(layer, first) else {
            return Err(HandoffError::UnduePage { layer, first });
        };
        let expected = PAGE_POSITIONS.min(self.context.saturating_sub(first));
        exact(PartName::Page { layer, first }, "positions", expected, positions.into())?;
        if *came {
            return Err(HandoffError::DuplicatePage { layer, first });
        }
        *came = true;
        Ok(())
    }

    fn admit_trailer(&self, (parts, totals, tensors): (u32, &Totals, u32), body: u64) -> Result<(), HandoffError> {
        exact(PartName::Trailer, "tensors", self.summary.digests.len() as u64, tensors.into())?;
        exact(PartName::Trailer, "bytes", u64::from(tensors) * 8, body)?;
        self.check_complete()?;
        if parts != self.parts {
            return Err(HandoffError::Totals { what: "parts", expected: parts.into(), found: self.parts.into() });
        }
        let counted = totals_in_order(totals).into_iter().zip(totals_in_order(&self.summary.totals));
        for ((what, expected), (_, found)) in counted {
            if expected != found {
                return Err(HandoffError::Totals { what, expected, found });
            }
        }
        Ok(())
    }
}

fn exact(part: PartName, what: &'static str, expected: u64, found: u64) -> Result<(), HandoffError> {
    if expected == found { Ok(()) } else { Err(HandoffError::Shape { part, what, expected, found }) }
}

fn limit(part: PartName, what: &'static str, limit: u64, found: u64) -> Result<(), HandoffError> {
    if found <= limit { Ok(()) } else { Err(HandoffError::Limit { part, what, limit, found }) }
}

fn same_dtype(part: PartName, expected: DType, found: DType) -> Result<(), HandoffError> {
    let what = if matches!(part, PartName::Page { .. }) { "latents" } else { "state" };
    if expected == found { Ok(()) } else { Err(HandoffError::Dtype { what, expected, found }) }
}
