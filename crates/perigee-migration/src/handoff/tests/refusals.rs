//! What a target refuses by header, order, chunk and limit, and what an encoder refuses to send.

use perigee_backend::DType;

use super::super::chunk::{CHUNK_BYTES, CHUNK_LIMIT};
use super::super::error::ChunkError;
use super::super::part::{Head, MARK, mark};
use super::super::{Frozen, HandoffDecoder, HandoffEncoder, HandoffError, Header, Part, PartName};
use super::harness::{Session, decode, decode_raw, frame, place, stream};
use crate::codec::{Crc, Put, crc};
use crate::geometry::{Geometry, GeometryError};
use crate::segments::{Mode, Segment, SegmentError, SegmentTable};
use crate::testing::small_geometry;

fn session() -> Session {
    Session::new(small_geometry(), 2, Mode::Split, 70, 7)
}

/// What a target says of a session with another header.
fn header_refused(change: impl FnOnce(&mut Header)) -> HandoffError {
    let target = session();
    let mut parts = target.raw();
    let Head::Header(header) = &mut parts[0].0 else { panic!("no header") };
    change(header);
    decode_raw(&target, &parts).unwrap_err()
}

#[test]
fn another_model_is_refused() {
    let model = header_refused(|header| header.model.push('0'));
    let (expected, found) = ("0123456789abcdef".to_owned(), "0123456789abcdef0".to_owned());
    assert_eq!(model, HandoffError::Model { expected, found });
    let layers = header_refused(|header| header.geometry.kda_layers = 3);
    assert_eq!(layers, HandoffError::Geometry { what: "KDA layers", expected: 2, found: 3 });
    let layers = header_refused(|header| header.geometry.mla_layers = 1);
    assert_eq!(layers, HandoffError::Geometry { what: "MLA layers", expected: 2, found: 1 });
    let width = header_refused(|header| header.geometry.latent_width = u32::MAX);
    assert_eq!(width, HandoffError::Geometry { what: "latent width", expected: 3, found: u32::MAX.into() });
    let dtype = header_refused(|header| header.geometry.latent_dtype = DType::Fp32);
    assert_eq!(dtype, HandoffError::Dtype { what: "latents", expected: DType::Bf16, found: DType::Fp32 });
    let dtype = header_refused(|header| header.geometry.recurrent_dtype = DType::Bf16);
    assert_eq!(dtype, HandoffError::Dtype { what: "recurrent states", expected: DType::Fp32, found: DType::Bf16 });
    let ranks = header_refused(|header| header.source.ranks = 3);
    assert_eq!(ranks, HandoffError::Sizes(GeometryError::Ranks { heads: 4, ranks: 3 }));
}

#[test]
fn a_stale_epoch_is_refused() {
    let session = session();
    let (chunks, _) = session.encode(CHUNK_BYTES);
    let known = |epoch: u64| {
        let decoder = HandoffDecoder::new(session.expected(), move |name| if name == "session" { epoch } else { 0 });
        decode(decoder, &chunks).map(drop)
    };
    assert_eq!(known(0), Ok(()));
    assert_eq!(known(3), Ok(()), "the source's own epoch is known where its home is");
    let stale = |known| HandoffError::Epoch { session: "session".into(), epoch: 3, next: 4, known };
    assert_eq!(known(4), Err(stale(4)));
    assert_eq!(known(9), Err(stale(9)));
    let sinking = header_refused(|header| header.next_epoch = 3);
    assert_eq!(sinking, HandoffError::Epoch { session: "session".into(), epoch: 3, next: 3, known: 0 });
}

#[test]
fn another_version_or_another_thing_is_refused() {
    let target = session();
    let says = |bytes: Vec<u8>| decode(target.decoder(), &frame(&bytes, 100)).unwrap_err();
    let mut bytes = stream(&target.raw());
    bytes[4..6].copy_from_slice(&2_u16.to_le_bytes());
    assert_eq!(says(bytes.clone()), HandoffError::Version { expected: 1, found: 2 });
    bytes[..4].copy_from_slice(b"TAR!");
    let found = u32::from_le_bytes(*b"TAR!");
    assert_eq!(says(bytes), HandoffError::Mark { expected: MARK, found });
    // A kind of part that a later version may have.
    let mut unknown = mark();
    let mut part = vec![9, 0, 0];
    part.u64(0);
    part.u32(crc(&[&part]));
    unknown.extend(part);
    assert_eq!(says(unknown), HandoffError::Kind { found: 9 });
}

#[test]
fn parts_out_of_order_are_refused() {
    let target = session();
    let swapped = |a: usize, b: usize| {
        let mut parts = target.raw();
        parts.swap(a, b);
        decode_raw(&target, &parts).unwrap_err()
    };
    assert_eq!(swapped(0, 1), HandoffError::Order { due: "its header", found: PartName::Tokens { first: 0 } });
    let tokens = PartName::Record;
    assert!(matches!(swapped(1, 2), HandoffError::Shape { part, what: "tokens", .. } if part == tokens));
    assert_eq!(
        swapped(2, 3),
        HandoffError::Order { due: "token ids or the session record", found: PartName::Segments }
    );
    let HandoffError::Order { due, .. } = swapped(3, 4) else { panic!() };
    assert_eq!(due, "the segment table");
    let mut twice = target.raw();
    twice.insert(1, twice[0].clone());
    let error = decode_raw(&target, &twice).unwrap_err();
    assert_eq!(error, HandoffError::Order { due: "token ids or the session record", found: PartName::Header });
    let mut late = target.raw();
    let end = late.len();
    late.push(late[4].clone());
    assert!(matches!(decode_raw(&target, &late), Err(HandoffError::Trailing { .. })), "after part {end}");
}

#[test]
fn chunks_lost_doubled_or_reordered_are_refused() {
    let target = session();
    let (chunks, _) = target.encode(100);
    assert!(chunks.len() > 5);
    let refused = |order: Vec<usize>| {
        let chunks: Vec<Vec<u8>> = order.iter().map(|&index| chunks[index].clone()).collect();
        match decode(target.decoder(), &chunks).unwrap_err() {
            HandoffError::Chunk { error: ChunkError::Sequence { expected, found }, .. } => (expected, found),
            other => panic!("{other}"),
        }
    };
    let all = 0..chunks.len();
    assert_eq!(refused(all.clone().filter(|&index| index != 2).collect()), (2, 3));
    assert_eq!(refused([0, 1, 1, 2].into()), (2, 1));
    assert_eq!(refused([1, 0].into()), (0, 1));
    let last_twice: Vec<usize> = all.clone().chain([chunks.len() - 1]).collect();
    let doubled: Vec<Vec<u8>> = last_twice.iter().map(|&index| chunks[index].clone()).collect();
    assert!(matches!(decode(target.decoder(), &doubled), Err(HandoffError::Trailing { .. })));
    let error = decode(target.decoder(), &chunks[..4]).unwrap_err();
    assert!(matches!(error, HandoffError::Truncated { .. }), "{error}");
}

#[test]
fn a_chunk_that_lies_about_its_length_is_refused_at_once() {
    let target = session();
    for length in [0, CHUNK_LIMIT as u32 + 1, u32::MAX] {
        let mut chunk = Vec::new();
        chunk.u32(0);
        chunk.u32(length);
        chunk.u32(0);
        let error = target.decoder().push(&chunk).unwrap_err();
        let wrong = ChunkError::Length { limit: CHUNK_LIMIT as u32, found: length };
        assert_eq!(error, HandoffError::Chunk { due: 0, part: PartName::Mark, error: wrong });
    }
    let mut chunk = frame(b"PRGM", 100).remove(0);
    chunk[15] ^= 1;
    let (expected, found) = (Crc(crc(&[&[0, 0, 0, 0, 4, 0, 0, 0], b"PRGM"])), Crc(crc(&[&chunk[..8], b"PRGL"])));
    let error = target.decoder().push(&chunk).unwrap_err();
    assert_eq!(error, HandoffError::Chunk { due: 0, part: PartName::Mark, error: ChunkError::Crc { expected, found } });
}

/// Lengths and counts that a sender names, far beyond what follows.
#[test]
fn lies_about_sizes_are_refused_before_anything_is_kept() {
    let target = session();
    let announce = |index: usize, change: fn(&mut Head), body: u64| {
        let mut parts = target.raw();
        parts.truncate(index + 1);
        let (mut head, _) = parts.pop().unwrap();
        change(&mut head);
        let mut bytes = stream(&parts);
        bytes.extend(super::super::part::head_bytes(&head, body).unwrap());
        let mut decoder = target.decoder();
        let error = frame(&bytes, 100).iter().find_map(|chunk| decoder.push(chunk).err());
        assert_eq!(decoder.push(&[0]), Err(HandoffError::Failed), "it stays failed");
        error.unwrap()
    };
    let huge = u64::MAX;
    assert!(matches!(announce(0, |_| {}, huge), HandoffError::Shape { part: PartName::Header, .. }));
    let many = |head: &mut Head| {
        if let Head::Tokens { count, .. } = head {
            *count = u32::MAX;
        }
    };
    let tokens = announce(1, many, u64::from(u32::MAX) * 4);
    assert!(matches!(tokens, HandoffError::Limit { what: "bytes at once", .. }), "{tokens}");
    let record = announce(2, |_| {}, huge);
    assert_eq!(record, HandoffError::Limit { part: PartName::Record, what: "bytes", limit: 1024, found: huge });
    let long = |head: &mut Head| {
        if let Head::Record { context, .. } = head {
            *context = u64::MAX;
        }
    };
    let context = announce(2, long, 37);
    assert_eq!(
        context,
        HandoffError::Limit { part: PartName::Record, what: "positions", limit: 4096, found: u64::MAX }
    );
    assert!(matches!(announce(3, |_| {}, huge), HandoffError::Limit { part: PartName::Segments, .. }));
    assert!(matches!(announce(4, |_| {}, huge), HandoffError::Shape { what: "bytes", .. }));
}

#[test]
fn more_tokens_than_the_target_takes_are_refused() {
    let target = session();
    let long = Session::new(small_geometry(), 1, Mode::Split, 5000, 7);
    let error = decode(target.decoder(), &long.encode(CHUNK_BYTES).0).unwrap_err();
    assert!(matches!(error, HandoffError::Limit { what: "tokens", limit: 4096, .. }), "{error}");
}

#[test]
fn a_table_must_fit_context_and_mode() {
    let target = session();
    let with_table = |table: &SegmentTable| {
        let mut parts = target.raw();
        parts[3] = super::super::part::of_segments(table);
        decode_raw(&target, &parts).unwrap_err()
    };
    assert_eq!(with_table(&SegmentTable::new()), HandoffError::Homeless { first: 0 });
    let long = SegmentTable::from_segments([Segment { home: place("a", 2), first: 0, tokens: 128 }]).unwrap();
    let unsealed = SegmentError::Unsealed { end: 128, sealed: 64 };
    assert_eq!(with_table(&long), HandoffError::Segments(unsealed));
    let mut parts = target.raw();
    if let (Head::Segments { count, .. }, _) = &mut parts[3] {
        *count = 2;
    }
    assert!(matches!(decode_raw(&target, &parts), Err(HandoffError::Field { part: PartName::Segments, .. })));
}

#[test]
fn an_encoder_sends_nothing_that_a_target_would_refuse() {
    let session = session();
    let begin = || HandoffEncoder::new(session.header.clone(), CHUNK_BYTES).unwrap();
    let stale = Header { next_epoch: 3, ..session.header.clone() };
    assert!(matches!(HandoffEncoder::new(stale, CHUNK_BYTES), Err(HandoffError::Epoch { .. })));
    let empty = Header { geometry: Geometry { conv: 0, ..small_geometry() }, ..session.header.clone() };
    assert!(matches!(HandoffEncoder::new(empty, CHUNK_BYTES), Err(HandoffError::Sizes(_))));
    let long = Header { session: "s".repeat(70_000), ..session.header.clone() };
    assert!(matches!(HandoffEncoder::new(long, CHUNK_BYTES), Err(HandoffError::Limit { .. })));

    let mut early = begin();
    let error = early.state(&session.heads(0, 0, 0..1)).unwrap_err();
    assert!(matches!(error, HandoffError::Order { due: "token ids or the session record", .. }));
    let mut untold = begin();
    let error = untold.freeze(&session.frozen, &session.segments()).unwrap_err();
    assert_eq!(error, HandoffError::Shape { part: PartName::Record, what: "tokens", expected: 0, found: 71 });

    let mut encoder = begin();
    encoder.tokens(&session.tokens).unwrap();
    let ahead = Frozen { context: 72, ..session.frozen.clone() };
    assert!(matches!(encoder.freeze(&ahead, &session.segments()), Err(HandoffError::Shape { found: 72, .. })));
    encoder.freeze(&session.frozen, &session.segments()).unwrap();
    assert!(matches!(encoder.finish(), Err(HandoffError::MissingHead { head: 0, .. })));
    session.slices().iter().for_each(|slice| encoder.state(slice).unwrap());
    assert!(matches!(encoder.state(&session.heads(1, 3, 3..4)), Err(HandoffError::DuplicateHead { head: 3, .. })));
    assert_eq!(encoder.finish().unwrap_err(), HandoffError::MissingPage { layer: 0, first: 64 });
    session.pages().iter().for_each(|page| encoder.page(page).unwrap());
    let summary = encoder.finish().unwrap();
    let chunks: Vec<Vec<u8>> = encoder.chunks().collect();
    let (parts, received) = decode(session.decoder(), &chunks).unwrap();
    assert_eq!(received, summary, "an error before did not harm what followed");
    assert_eq!(parts.last(), Some(&Part::End(summary)));
}

#[test]
fn history_leaves_before_the_freeze() {
    let session = session();
    let mut encoder = HandoffEncoder::new(session.header.clone(), CHUNK_BYTES).unwrap();
    encoder.tokens(&session.tokens[..50]).unwrap();
    assert_eq!(encoder.next_chunk(), None, "chunks are filled");
    encoder.flush();
    let early = encoder.next_chunk().unwrap();
    let mut decoder = session.decoder();
    let parts = decoder.push(&early).unwrap();
    assert_eq!(parts, [Part::Header(session.header.clone()), Part::Tokens(session.tokens[..50].to_vec())]);
    assert_eq!(decoder.finish().unwrap_err(), HandoffError::Truncated { part: PartName::Record });
}
