//! The parts of a handoff as bytes. A part's head says everything about it but the contents, so a reader can refuse it
//! before its body arrives; whether a part is due is the ledger's business.

use perigee_backend::{DType, StatePart};

use super::error::{HandoffError, PartName};
use super::slice::{HeldState, PageSlice, StateSlice, state_name};
use super::{Frozen, HANDOFF_VERSION, Header, Part, Summary, Totals};
use crate::codec::{Crc, FieldError, Put, Reader, crc};
use crate::digest::{Digest, TensorDigests};
use crate::geometry::{Geometry, PAGE_POSITIONS};
use crate::segments::{Mode, Place, Segment, SegmentTable};

/// `PRGM`, little-endian.
pub(super) const MARK: u32 = u32::from_le_bytes(*b"PRGM");

/// Mark and version.
pub(super) const MARK_BYTES: usize = 6;

/// Kind, length of the head, length of the body.
pub(super) const PREFIX: usize = 11;

const HEADER: u8 = 1;
const TOKENS: u8 = 2;
const RECORD: u8 = 3;
const SEGMENTS: u8 = 4;
const STATE: u8 = 5;
const PAGE: u8 = 6;
const TRAILER: u8 = 7;
const HELD: u8 = 8;

/// The head of a part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Head {
    Header(Header),
    Tokens { first: u64, count: u32, crc: u32 },
    Record { context: u64, tokens: u64, crc: u32 },
    Segments { count: u32, crc: u32 },
    State { part: StatePart, dtype: DType, digest: Digest },
    Held { slot: u32, tensors: u32, crc: u32 },
    Page { layer: u32, first: u64, positions: u32, dtype: DType, digest: Digest },
    Trailer { parts: u32, totals: Totals, tensors: u32, crc: u32 },
}

/// A part before its contents are read: its head and how long its body is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Announced {
    pub(super) head: Head,
    pub(super) body: u64,
}

impl Head {
    pub(super) fn name(&self) -> PartName {
        match self {
            Self::Header(_) => PartName::Header,
            Self::Tokens { first, .. } => PartName::Tokens { first: *first },
            Self::Record { .. } => PartName::Record,
            Self::Segments { .. } => PartName::Segments,
            Self::State { part, .. } => state_name(part),
            Self::Held { .. } => PartName::Held,
            Self::Page { layer, first, .. } => PartName::Page { layer: *layer, first: *first },
            Self::Trailer { .. } => PartName::Trailer,
        }
    }

    fn kind(&self) -> u8 {
        match self {
            Self::Header(_) => HEADER,
            Self::Tokens { .. } => TOKENS,
            Self::Record { .. } => RECORD,
            Self::Segments { .. } => SEGMENTS,
            Self::State { .. } => STATE,
            Self::Held { .. } => HELD,
            Self::Page { .. } => PAGE,
            Self::Trailer { .. } => TRAILER,
        }
    }

    fn put(&self, out: &mut Vec<u8>) {
        match self {
            Self::Header(header) => put_header(out, header),
            Self::Tokens { first, count, crc } => {
                out.u64(*first);
                out.u32(*count);
                out.u32(*crc);
            }
            Self::Record { context, tokens, crc } => {
                out.u64(*context);
                out.u64(*tokens);
                out.u32(*crc);
            }
            Self::Segments { count, crc } => {
                out.u32(*count);
                out.u32(*crc);
            }
            Self::State { part, dtype, digest } => {
                out.u32(part.layer);
                out.kind(part.kind);
                out.u32(part.first_head);
                out.u32(part.heads);
                out.dtype(*dtype);
                out.u64(digest.0);
            }
            Self::Held { slot, tensors, crc } => {
                out.u32(*slot);
                out.u32(*tensors);
                out.u32(*crc);
            }
            Self::Page { layer, first, positions, dtype, digest } => {
                out.u32(*layer);
                out.u64(*first);
                out.u32(*positions);
                out.dtype(*dtype);
                out.u64(digest.0);
            }
            Self::Trailer { parts, totals, tensors, crc } => {
                out.u32(*parts);
                totals_in_order(totals).iter().for_each(|(_, total)| out.u64(*total));
                out.u32(*tensors);
                out.u32(*crc);
            }
        }
    }

    fn read(kind: u8, reader: &mut Reader<'_>) -> Result<Self, FieldError> {
        match kind {
            HEADER => read_header(reader).map(Self::Header),
            TOKENS => {
                let (first, count) = (reader.u64("first token")?, reader.u32("number of tokens")?);
                Ok(Self::Tokens { first, count, crc: reader.u32("checksum of tokens")? })
            }
            RECORD => {
                let (context, tokens) = (reader.u64("context")?, reader.u64("number of tokens")?);
                Ok(Self::Record { context, tokens, crc: reader.u32("checksum of the record")? })
            }
            SEGMENTS => {
                let count = reader.u32("number of segments")?;
                Ok(Self::Segments { count, crc: reader.u32("checksum of the segments")? })
            }
            STATE => {
                let (layer, kind) = (reader.u32("layer")?, reader.kind("kind of state tensor")?);
                let (first_head, heads) = (reader.u32("first head")?, reader.u32("number of heads")?);
                let part = StatePart { layer, kind, first_head, heads };
                let dtype = reader.dtype("element type")?;
                Ok(Self::State { part, dtype, digest: Digest(reader.u64("digest")?) })
            }
            HELD => {
                let (slot, tensors) = (reader.u32("slot")?, reader.u32("number of tensors")?);
                Ok(Self::Held { slot, tensors, crc: reader.u32("checksum of digests")? })
            }
            PAGE => {
                let (layer, first) = (reader.u32("layer")?, reader.u64("first position")?);
                let (positions, dtype) = (reader.u32("number of positions")?, reader.dtype("element type")?);
                Ok(Self::Page { layer, first, positions, dtype, digest: Digest(reader.u64("digest")?) })
            }
            _ => {
                let parts = reader.u32("number of parts")?;
                let mut total = || reader.u64("total");
                let totals = Totals {
                    recurrent: total()?,
                    tails: total()?,
                    partial_pages: total()?,
                    pages: total()?,
                    tokens: total()?,
                    record: total()?,
                };
                let tensors = reader.u32("number of tensors")?;
                Ok(Self::Trailer { parts, totals, tensors, crc: reader.u32("checksum of digests")? })
            }
        }
    }
}

impl Announced {
    /// Length of the head that a prefix announces, its checksum included.
    pub(super) fn head_length(prefix: &[u8; PREFIX]) -> usize {
        usize::from(u16::from_le_bytes([prefix[1], prefix[2]])) + 4
    }

    /// Reads prefix, head and checksum, and nothing else.
    pub(super) fn read(bytes: &[u8]) -> Result<Self, HandoffError> {
        let next = |error| HandoffError::Field { part: PartName::Next, error };
        let mut reader = Reader::new(bytes);
        let kind = reader.u8("kind of part").map_err(next)?;
        let length = reader.u16("length of the head").map_err(next)?;
        let body = reader.u64("length of the body").map_err(next)?;
        let fields = reader.take("head", length.into()).map_err(next)?;
        let expected = reader.u32("checksum of the head").map_err(next)?;
        let found = crc(&[&bytes[..PREFIX], fields]);
        if found != expected {
            let part = if kind == HEADER { PartName::Header } else { PartName::Next };
            return Err(HandoffError::Crc { part, expected: Crc(expected), found: Crc(found) });
        }
        if !(HEADER..=HELD).contains(&kind) {
            return Err(HandoffError::Kind { found: kind });
        }
        let mut reader = Reader::new(fields);
        let head = Head::read(kind, &mut reader).map_err(next)?;
        reader.end().map_err(|error| HandoffError::Field { part: head.name(), error })?;
        Ok(Self { head, body })
    }

    /// The part with its body, whose length is right; checksums and digests are checked here.
    pub(super) fn complete(self, geometry: &Geometry, body: Vec<u8>) -> Result<Part, HandoffError> {
        let name = self.head.name();
        let field = |error| HandoffError::Field { part: name, error };
        let check = |expected: u32| match crc(&[&body]) {
            found if found == expected => Ok(()),
            found => Err(HandoffError::Crc { part: name, expected: Crc(expected), found: Crc(found) }),
        };
        let same = |expected: Digest, found: Digest| {
            if expected == found { Ok(()) } else { Err(HandoffError::PartDigest { part: name, expected, found }) }
        };
        match self.head {
            Head::Header(header) => Ok(Part::Header(header)),
            Head::Tokens { crc, .. } => {
                check(crc)?;
                Ok(Part::Tokens(body.as_chunks().0.iter().map(|&token| u32::from_le_bytes(token)).collect()))
            }
            Head::Record { context, tokens, crc } => {
                check(crc)?;
                Ok(Part::Frozen(Frozen { context, tokens, record: body }))
            }
            Head::Segments { count, crc } => {
                check(crc)?;
                let mut reader = Reader::new(&body);
                // Not allocated ahead: the count is the sender's word.
                let mut segments = Vec::new();
                for _ in 0..count {
                    segments.push(read_segment(&mut reader).map_err(field)?);
                }
                reader.end().map_err(field)?;
                Ok(Part::Segments(SegmentTable::from_segments(segments)?))
            }
            Head::State { part, digest, .. } => {
                same(digest, Digest::of_heads(geometry, part.kind, part.first_head, &body))?;
                Ok(Part::State(StateSlice { part, digest, bytes: body }))
            }
            Head::Held { slot, crc, .. } => {
                check(crc)?;
                Ok(Part::Held(HeldState { slot, digests: TensorDigests::from_numbers(geometry, &numbers(&body))? }))
            }
            Head::Page { layer, first, positions, digest, .. } => {
                same(digest, Digest::of_positions(geometry, first, &body))?;
                Ok(Part::Page(PageSlice { layer, first, positions, digest, bytes: body }))
            }
            Head::Trailer { totals, crc, .. } => {
                check(crc)?;
                Ok(Part::End(Summary { totals, digests: TensorDigests::from_numbers(geometry, &numbers(&body))? }))
            }
        }
    }
}

/// Mark and version, with which a stream begins.
pub(super) fn mark() -> Vec<u8> {
    let mut out = Vec::with_capacity(MARK_BYTES);
    out.u32(MARK);
    out.u16(HANDOFF_VERSION);
    out
}

/// Refuses another mark and another version.
pub(super) fn check_mark(bytes: &[u8; MARK_BYTES]) -> Result<(), HandoffError> {
    let [a, b, c, d, low, high] = *bytes;
    let (mark, version) = (u32::from_le_bytes([a, b, c, d]), u16::from_le_bytes([low, high]));
    if mark != MARK {
        return Err(HandoffError::Mark { expected: MARK, found: mark });
    }
    if version != HANDOFF_VERSION {
        return Err(HandoffError::Version { expected: HANDOFF_VERSION, found: version });
    }
    Ok(())
}

/// Prefix, head and checksum of a part with a body of `body` bytes.
pub(super) fn head_bytes(head: &Head, body: u64) -> Result<Vec<u8>, HandoffError> {
    let mut fields = Vec::new();
    head.put(&mut fields);
    let limit = u64::from(u16::MAX);
    let found = fields.len() as u64;
    let length = u16::try_from(fields.len()).map_err(|_| HandoffError::Limit {
        part: head.name(),
        what: "bytes of names",
        limit,
        found,
    })?;
    let mut out = Vec::with_capacity(PREFIX + fields.len() + 4);
    out.u8(head.kind());
    out.u16(length);
    out.u64(body);
    out.put(&fields);
    let checksum = crc(&[&out]);
    out.u32(checksum);
    Ok(out)
}

/// The head of a segment table, and its body.
pub(super) fn of_segments(table: &SegmentTable) -> (Head, Vec<u8>) {
    let mut body = Vec::new();
    for segment in table.segments() {
        put_place(&mut body, &segment.home);
        body.u64(segment.first / PAGE_POSITIONS);
        body.u64(segment.tokens / PAGE_POSITIONS);
    }
    (Head::Segments { count: table.segments().len() as u32, crc: crc(&[&body]) }, body)
}

/// The head of a trailer, and its body.
pub(super) fn of_trailer(parts: u32, summary: &Summary) -> (Head, Vec<u8>) {
    let body = digest_bytes(&summary.digests);
    let tensors = summary.digests.len() as u32;
    (Head::Trailer { parts, totals: summary.totals, tensors, crc: crc(&[&body]) }, body)
}

/// The head of a state in its slot, and its body.
pub(super) fn of_held(held: &HeldState) -> (Head, Vec<u8>) {
    let body = digest_bytes(&held.digests);
    (Head::Held { slot: held.slot, tensors: held.digests.len() as u32, crc: crc(&[&body]) }, body)
}

fn digest_bytes(digests: &TensorDigests) -> Vec<u8> {
    digests.numbers().iter().flat_map(|number| number.to_le_bytes()).collect()
}

fn numbers(body: &[u8]) -> Vec<u64> {
    body.as_chunks().0.iter().map(|&number| u64::from_le_bytes(number)).collect()
}

/// Totals with their names, in the trailer's order.
pub(super) fn totals_in_order(totals: &Totals) -> [(&'static str, u64); 6] {
    [
        ("bytes of recurrent states", totals.recurrent),
        ("bytes of convolution tails", totals.tails),
        ("bytes of unfilled pages", totals.partial_pages),
        ("bytes of full pages", totals.pages),
        ("bytes of token ids", totals.tokens),
        ("bytes of the record", totals.record),
    ]
}

fn put_header(out: &mut Vec<u8>, header: &Header) {
    out.text(&header.session);
    out.u64(header.epoch);
    out.u64(header.next_epoch);
    out.text(&header.model);
    header.geometry.sizes().iter().for_each(|(_, size)| out.u32(*size));
    out.dtype(header.geometry.recurrent_dtype);
    out.dtype(header.geometry.tail_dtype);
    out.dtype(header.geometry.latent_dtype);
    put_place(out, &header.source);
    out.u8(match header.mode {
        Mode::Split => 1,
        Mode::Whole => 2,
    });
}

fn read_header(reader: &mut Reader<'_>) -> Result<Header, FieldError> {
    let session = reader.text("session")?;
    let (epoch, next_epoch) = (reader.u64("epoch")?, reader.u64("next epoch")?);
    let model = reader.text("model digest")?;
    let geometry = Geometry {
        kda_layers: reader.u32("KDA layers")?,
        kda_heads: reader.u32("KDA heads")?,
        kda_head_dim: reader.u32("channels of a KDA head")?,
        conv: reader.u32("convolution taps")?,
        mla_layers: reader.u32("MLA layers")?,
        latent_width: reader.u32("latent width")?,
        recurrent_dtype: reader.dtype("type of recurrent states")?,
        tail_dtype: reader.dtype("type of convolution tails")?,
        latent_dtype: reader.dtype("type of latents")?,
    };
    let source = read_place(reader)?;
    let mode = match reader.u8("mode")? {
        1 => Mode::Split,
        2 => Mode::Whole,
        found => return Err(FieldError::Value { field: "mode", found: found.into() }),
    };
    Ok(Header { session, epoch, next_epoch, model, geometry, source, mode })
}

fn put_place(out: &mut Vec<u8>, place: &Place) {
    out.text(&place.replica);
    out.text(&place.incarnation);
    out.u32(place.ranks);
    out.layout(place.layout);
}

fn read_place(reader: &mut Reader<'_>) -> Result<Place, FieldError> {
    Ok(Place {
        replica: reader.text("replica")?,
        incarnation: reader.text("incarnation")?,
        ranks: reader.u32("ranks")?,
        layout: reader.layout("latent layout")?,
    })
}

/// Places are pages in the format, so that no boundary can fall within one.
fn read_segment(reader: &mut Reader<'_>) -> Result<Segment, FieldError> {
    let home = read_place(reader)?;
    let mut positions = |field| {
        let pages = reader.u64(field)?;
        pages.checked_mul(PAGE_POSITIONS).ok_or(FieldError::Value { field, found: pages })
    };
    Ok(Segment { home, first: positions("first page")?, tokens: positions("number of pages")? })
}
