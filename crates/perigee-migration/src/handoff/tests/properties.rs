//! Round trips over random geometries, modes and cuts, ranks of other numbers on the other side, and damage anywhere.

use proptest::prelude::*;

use super::super::chunk::CHUNK_LIMIT;
use super::super::{Part, RankSlice, StateSlice};
use super::harness::{Session, decode, frame, place};
use crate::digest::TensorDigests;
use crate::geometry::{Geometry, PAGE_POSITIONS, STATE_KINDS};
use crate::segments::{Mode, Segment, SegmentTable, sealed};
use crate::testing::{config, small_geometry};
use perigee_backend::DType;

fn geometry() -> impl Strategy<Value = Geometry> {
    let dtype = || prop_oneof![Just(DType::Bf16), Just(DType::Fp32)];
    (1_u32..4, 1_u32..3, 1_u32..4, 1_u32..5, 1_u32..3, 1_u32..6, dtype(), dtype()).prop_map(
        |(kda_layers, quarter_heads, kda_head_dim, conv, mla_layers, latent_width, tail_dtype, latent_dtype)| {
            Geometry {
                kda_layers,
                kda_heads: quarter_heads * 4,
                kda_head_dim,
                conv,
                mla_layers,
                latent_width,
                recurrent_dtype: DType::Fp32,
                tail_dtype,
                latent_dtype,
            }
        },
    )
}

fn ranks() -> impl Strategy<Value = u32> {
    prop_oneof![Just(1_u32), Just(2), Just(4)]
}

/// Writes slices into the ranks of a target and gathers the whole tensor [heads, ...] again.
fn regather(geometry: &Geometry, slices: &[StateSlice], layer: u32, kind: usize, ranks: u32) -> Vec<u8> {
    let size = geometry.head_bytes(STATE_KINDS[kind]) as usize;
    let mine = (geometry.kda_heads / ranks) as usize;
    let mut slots = vec![vec![0xee; mine * size]; ranks as usize];
    for slice in slices.iter().filter(|slice| slice.part.layer == layer && slice.part.kind == STATE_KINDS[kind]) {
        for (rank, slot) in (0..ranks).zip(&mut slots) {
            let Some(RankSlice { part, bytes }) = slice.for_rank(geometry, rank, ranks).unwrap() else { continue };
            let start = part.first_head as usize * size;
            assert_eq!(bytes.len(), part.heads as usize * size);
            slot[start..start + bytes.len()].copy_from_slice(&bytes);
        }
    }
    slots.concat()
}

proptest! {
    #![proptest_config(config(120))]

    #[test]
    fn what_was_sent_arrives_on_any_number_of_ranks(
        geometry in geometry(),
        (source, target) in (ranks(), ranks()),
        (whole, remote) in (any::<bool>(), 0_u64..3),
        context in 0_u64..300,
        (chunk, cut) in (1_usize..700, 1_usize..900),
        seed in any::<u64>(),
    ) {
        let mode = if whole { Mode::Whole } else { Mode::Split };
        let mut session = Session::new(geometry, source, mode, context, seed);
        // The first pages may be on a third replica already.
        let tokens = (remote * PAGE_POSITIONS).min(sealed(context));
        let remote = (tokens > 0).then(|| Segment { home: place("c", 2), first: 0, tokens });
        session.table = SegmentTable::from_segments(remote).unwrap();

        let (chunks, sent) = session.encode(chunk);
        prop_assert!(chunks.iter().all(|chunk_| chunk_.len() <= chunk + 12));
        // The transport may cut the stream elsewhere.
        let bytes = chunks.concat();
        let pieces: Vec<Vec<u8>> = bytes.chunks(cut).map(<[u8]>::to_vec).collect();
        let (parts, summary) = decode(session.decoder(), &pieces).unwrap();
        prop_assert_eq!(&summary, &sent);

        let (mut tokens, mut slices, mut pages, mut segments) = (Vec::new(), Vec::new(), Vec::new(), None);
        for part in parts {
            match part {
                Part::Header(header) => prop_assert_eq!(&header, &session.header),
                Part::Tokens(more) => tokens.extend(more),
                Part::Frozen(frozen) => prop_assert_eq!(&frozen, &session.frozen),
                Part::Segments(table) => segments = Some(table),
                Part::State(slice) => slices.push(slice),
                Part::Held(_) => prop_assert!(false, "nobody held a state back"),
                Part::Page(page) => pages.push(page),
                Part::End(end) => prop_assert_eq!(&end, &sent),
            }
        }
        prop_assert_eq!(tokens, session.tokens.clone());
        prop_assert_eq!(segments, Some(session.segments()));
        prop_assert_eq!(pages, session.pages());

        // What the target's ranks hold, and the digests that they would take over their slots.
        let mut written = TensorDigests::new(&geometry);
        for layer in 0..geometry.kda_layers {
            for kind in 0..4 {
                let whole = session.heads(layer, kind, 0..geometry.kda_heads);
                prop_assert_eq!(&regather(&geometry, &slices, layer, kind, target), &whole.bytes);
                for rank in 0..target {
                    let share = session.heads(layer, kind, geometry.rank_heads(rank, target).unwrap());
                    written.add(share.tensor(), share.digest);
                }
            }
        }
        session.pages().iter().for_each(|page| written.add(page.tensor(), page.digest));
        prop_assert_eq!(sent.digests.compare(&written), Ok(()));

        // Sizes: state does not depend on the context, and split mode moves no page.
        let totals = sent.totals;
        prop_assert_eq!((totals.recurrent, totals.tails), (geometry.recurrent_bytes(), geometry.tail_bytes()));
        prop_assert_eq!(totals.partial_pages, context % PAGE_POSITIONS * geometry.token_bytes());
        prop_assert_eq!(totals.state(), totals.recurrent + totals.tails + totals.partial_pages);
        let local = sealed(context) - session.table.tokens();
        prop_assert_eq!(totals.pages, if whole { local * geometry.token_bytes() } else { 0 });
        prop_assert_eq!((totals.tokens, totals.record), (4 * (context + 1), 37));
    }

    #[test]
    fn noise_is_refused_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..400), chunk in 1_usize..100) {
        let session = Session::new(small_geometry(), 1, Mode::Split, 5, 1);
        prop_assert!(decode(session.decoder(), std::slice::from_ref(&bytes)).is_err());
        // Noise behind good mark and checksums of chunks.
        let mut stream = super::super::part::mark();
        stream.extend(&bytes);
        prop_assert!(decode(session.decoder(), &frame(&stream, chunk)).is_err());
    }
}

/// The smallest session that has every kind of part.
fn tiny() -> Session {
    let geometry = Geometry { kda_layers: 1, kda_heads: 2, mla_layers: 1, latent_width: 1, ..small_geometry() };
    let mut session = Session::new(geometry, 2, Mode::Whole, 130, 11);
    let remote = Segment { home: place("c", 2), first: 0, tokens: PAGE_POSITIONS };
    session.table = SegmentTable::from_segments([remote]).unwrap();
    session
}

#[test]
fn every_flipped_bit_of_the_chunks_is_an_error() {
    let session = tiny();
    let (chunks, _) = session.encode(200);
    let bytes = chunks.concat();
    assert!(decode(session.decoder(), std::slice::from_ref(&bytes)).is_ok());
    for bit in 0..bytes.len() * 8 {
        let mut damaged = bytes.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        assert!(decode(session.decoder(), &[damaged]).is_err(), "bit {bit} of {}", bytes.len() * 8);
    }
}

/// Damage that no chunk's checksum can see: it was done before chunks were cut.
#[test]
fn every_flipped_bit_of_the_stream_is_an_error() {
    let session = tiny();
    let stream = super::harness::stream(&session.raw());
    assert!(decode(session.decoder(), &frame(&stream, CHUNK_LIMIT)).is_ok());
    for bit in 0..stream.len() * 8 {
        let mut damaged = stream.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        let result = decode(session.decoder(), &frame(&damaged, CHUNK_LIMIT));
        assert!(result.is_err(), "bit {bit} of {}: {result:?}", stream.len() * 8);
    }
}

#[test]
fn every_truncation_is_an_error() {
    let session = tiny();
    let (chunks, _) = session.encode(200);
    let bytes = chunks.concat();
    for length in 0..bytes.len() {
        let error = decode(session.decoder(), &[bytes[..length].to_vec()]).unwrap_err();
        assert!(matches!(error, super::super::HandoffError::Truncated { .. }), "{length}: {error}");
    }
    // Cut before chunks were made: the last chunk is whole, the stream is not.
    let stream = super::harness::stream(&session.raw());
    for length in 0..stream.len() {
        let error = decode(session.decoder(), &frame(&stream[..length], CHUNK_LIMIT)).unwrap_err();
        assert!(matches!(error, super::super::HandoffError::Truncated { .. }), "{length}: {error}");
    }
}
