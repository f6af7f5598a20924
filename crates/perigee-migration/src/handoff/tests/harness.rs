//! A session made of noise, its handoff by the real encoder, and handoffs of any parts whatever: their checksums are
//! right, so only the target's other checks can find what is wrong with them.

use std::ops::Range;

use perigee_backend::StatePart;

use super::super::chunk::ChunkWriter;
use super::super::part::{Head, head_bytes, mark, of_segments, of_trailer};
use super::super::{
    Expected, Frozen, HandoffDecoder, HandoffEncoder, HandoffError, Header, PageSlice, Part, StateSlice, Summary,
    Totals,
};
use crate::codec::crc;
use crate::digest::TensorDigests;
use crate::geometry::{Geometry, Layout, PAGE_POSITIONS, STATE_KINDS};
use crate::segments::{Mode, Place, SegmentTable, sealed};
use crate::testing::noise;

/// A session as its source has it.
pub(super) struct Session {
    pub(super) header: Header,
    pub(super) tokens: Vec<u32>,
    pub(super) frozen: Frozen,
    /// Where its latents are that the source has not got.
    pub(super) table: SegmentTable,
    seed: u64,
}

pub(super) fn place(replica: &str, ranks: u32) -> Place {
    Place { replica: replica.into(), incarnation: "1".into(), ranks, layout: Layout::Replicated }
}

impl Session {
    pub(super) fn new(geometry: Geometry, ranks: u32, mode: Mode, context: u64, seed: u64) -> Self {
        Self {
            header: Header {
                session: "session".into(),
                epoch: 3,
                next_epoch: 4,
                model: "0123456789abcdef".into(),
                geometry,
                source: place("a", ranks),
                mode,
            },
            // One token more than positions: the last one was drawn and not yet computed.
            tokens: (0..=context as u32).map(|index| index.wrapping_mul(2_654_435_761)).collect(),
            frozen: Frozen { context, tokens: context + 1, record: noise(seed, 37) },
            table: SegmentTable::new(),
            seed,
        }
    }

    pub(super) fn geometry(&self) -> &Geometry {
        &self.header.geometry
    }

    /// Some heads of a state tensor.
    pub(super) fn heads(&self, layer: u32, kind: usize, heads: Range<u32>) -> StateSlice {
        let geometry = self.geometry();
        let size = geometry.head_bytes(STATE_KINDS[kind]) as usize;
        let tensor = noise(self.seed ^ (u64::from(layer) << 8 | kind as u64) << 20, size * geometry.kda_heads as usize);
        let part =
            StatePart { layer, kind: STATE_KINDS[kind], first_head: heads.start, heads: heads.end - heads.start };
        let bytes = tensor[heads.start as usize * size..heads.end as usize * size].to_vec();
        StateSlice::new(geometry, part, bytes).unwrap()
    }

    /// A page of a layer, as far as it is filled.
    pub(super) fn page(&self, layer: u32, page: u64) -> PageSlice {
        let positions = (self.frozen.context - page * PAGE_POSITIONS).min(PAGE_POSITIONS);
        let length = positions * self.geometry().position_bytes();
        let bytes = noise(self.seed ^ (u64::from(layer) << 32 | page) << 4, length as usize);
        PageSlice::new(self.geometry(), layer, page * PAGE_POSITIONS, bytes).unwrap()
    }

    /// Everything that moves, rank by rank.
    pub(super) fn slices(&self) -> Vec<StateSlice> {
        let geometry = self.geometry();
        let ranks = self.header.source.ranks;
        let ranges = (0..ranks).map(|rank| geometry.rank_heads(rank, ranks).unwrap());
        ranges
            .flat_map(|heads| {
                let layers = (0..geometry.kda_layers).flat_map(|layer| (0..4).map(move |kind| (layer, kind)));
                layers.map(move |(layer, kind)| self.heads(layer, kind, heads.clone()))
            })
            .collect()
    }

    /// The table that travels.
    pub(super) fn segments(&self) -> SegmentTable {
        self.table.hand_over(&self.header.source, self.frozen.context, self.header.mode)
    }

    /// Pages that travel.
    pub(super) fn pages(&self) -> Vec<PageSlice> {
        let gaps = self.segments().gaps(self.frozen.context);
        let pages = gaps.into_iter().flat_map(|gap| gap.start / PAGE_POSITIONS..gap.end.div_ceil(PAGE_POSITIONS));
        pages.flat_map(|page| (0..self.geometry().mla_layers).map(move |layer| self.page(layer, page))).collect()
    }

    /// The handoff as its source sends it.
    pub(super) fn encode(&self, chunk_bytes: usize) -> (Vec<Vec<u8>>, Summary) {
        let mut encoder = HandoffEncoder::new(self.header.clone(), chunk_bytes).unwrap();
        let (early, late) = self.tokens.split_at(self.tokens.len() / 2);
        encoder.tokens(early).unwrap();
        encoder.flush();
        encoder.tokens(late).unwrap();
        encoder.freeze(&self.frozen, &self.segments()).unwrap();
        self.slices().iter().for_each(|slice| encoder.state(slice).unwrap());
        self.pages().iter().for_each(|slice| encoder.page(slice).unwrap());
        let summary = encoder.finish().unwrap();
        (encoder.chunks().collect(), summary)
    }

    /// What a target of the same model takes.
    pub(super) fn expected(&self) -> Expected {
        Expected { model: self.header.model.clone(), geometry: *self.geometry(), context: 4096, record: 1024 }
    }

    pub(super) fn decoder(&self) -> HandoffDecoder {
        HandoffDecoder::new(self.expected(), |_| 0)
    }

    /// The parts without checksums of their own, to be changed.
    pub(super) fn raw(&self) -> Vec<(Head, Vec<u8>)> {
        let mut parts = vec![(Head::Header(self.header.clone()), Vec::new())];
        let body: Vec<u8> = self.tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
        parts.push((Head::Tokens { first: 0, count: self.tokens.len() as u32, crc: crc(&[&body]) }, body));
        let Frozen { context, tokens, record } = self.frozen.clone();
        parts.push((Head::Record { context, tokens, crc: crc(&[&record]) }, record));
        parts.push(of_segments(&self.segments()));
        parts.extend(self.slices().into_iter().map(raw_state));
        parts.extend(self.pages().into_iter().map(raw_page));
        parts.push(of_trailer(parts.len() as u32, &self.summary()));
        parts
    }

    fn summary(&self) -> Summary {
        let geometry = self.geometry();
        let mut summary = Summary {
            totals: Totals {
                recurrent: geometry.recurrent_bytes(),
                tails: geometry.tail_bytes(),
                tokens: self.tokens.len() as u64 * 4,
                record: self.frozen.record.len() as u64,
                ..Totals::default()
            },
            digests: TensorDigests::new(geometry),
        };
        for slice in self.slices() {
            summary.digests.add(slice.tensor(), slice.digest);
        }
        for page in self.pages() {
            summary.digests.add(page.tensor(), page.digest);
            let is_partial = page.first >= sealed(self.frozen.context);
            let totals = &mut summary.totals;
            *(if is_partial { &mut totals.partial_pages } else { &mut totals.pages }) += page.bytes.len() as u64;
        }
        summary
    }
}

pub(super) fn raw_state(slice: StateSlice) -> (Head, Vec<u8>) {
    let dtype =
        if slice.part.kind == STATE_KINDS[0] { perigee_backend::DType::Fp32 } else { perigee_backend::DType::Bf16 };
    (Head::State { part: slice.part, dtype, digest: slice.digest }, slice.bytes)
}

pub(super) fn raw_page(slice: PageSlice) -> (Head, Vec<u8>) {
    let PageSlice { layer, first, positions, digest, bytes } = slice;
    (Head::Page { layer, first, positions, dtype: perigee_backend::DType::Bf16, digest }, bytes)
}

/// A stream of parts whose checksums are right.
pub(super) fn stream(parts: &[(Head, Vec<u8>)]) -> Vec<u8> {
    let mut bytes = mark();
    for (head, body) in parts {
        bytes.extend(head_bytes(head, body.len() as u64).unwrap());
        bytes.extend(body);
    }
    bytes
}

/// A stream in chunks whose checksums are right.
pub(super) fn frame(stream: &[u8], chunk_bytes: usize) -> Vec<Vec<u8>> {
    let mut writer = ChunkWriter::new(chunk_bytes);
    writer.write(stream);
    writer.flush();
    std::iter::from_fn(|| writer.pop()).collect()
}

/// Everything that a decoder says of a stream.
pub(super) fn decode(mut decoder: HandoffDecoder, chunks: &[Vec<u8>]) -> Result<(Vec<Part>, Summary), HandoffError> {
    let mut parts = Vec::new();
    for chunk in chunks {
        parts.extend(decoder.push(chunk)?);
    }
    decoder.finish().map(|summary| (parts, summary))
}

/// What a decoder says of raw parts.
pub(super) fn decode_raw(session: &Session, parts: &[(Head, Vec<u8>)]) -> Result<(Vec<Part>, Summary), HandoffError> {
    decode(session.decoder(), &frame(&stream(parts), 256))
}
