//! A state that stays in its slot for the target to take.

use super::super::part::of_held;
use super::super::{CHUNK_BYTES, HandoffEncoder, HandoffError, HeldState, Part, PartName, StateSlice};
use super::harness::{Session, decode, decode_raw};
use crate::digest::TensorDigests;
use crate::geometry::PAGE_POSITIONS;
use crate::segments::Mode;
use crate::testing::{published_geometry, small_geometry};

fn session() -> Session {
    Session::new(small_geometry(), 2, Mode::Whole, 70, 5)
}

/// The state of a session as its source has summed it up.
fn held(session: &Session) -> HeldState {
    let mut digests = TensorDigests::new(session.geometry());
    session.slices().iter().for_each(|slice| digests.add(slice.tensor(), slice.digest));
    HeldState { slot: 9, digests }
}

fn frozen(session: &Session) -> HandoffEncoder {
    let mut encoder = HandoffEncoder::new(session.header.clone(), CHUNK_BYTES).unwrap();
    encoder.tokens(&session.tokens).unwrap();
    encoder.freeze(&session.frozen, &session.segments()).unwrap();
    encoder
}

#[test]
fn it_stands_for_all_slices() {
    let session = session();
    let (sent, whole) = session.encode(CHUNK_BYTES);
    let mut encoder = frozen(&session);
    encoder.held(&held(&session)).unwrap();
    session.pages().iter().for_each(|page| encoder.page(page).unwrap());
    let summary = encoder.finish().unwrap();
    assert_eq!(summary, whole, "totals and digests are those of a state that was sent");
    let chunks: Vec<Vec<u8>> = encoder.chunks().collect();
    let (parts, received) = decode(session.decoder(), &chunks).unwrap();
    assert_eq!(received, summary);
    assert!(parts.contains(&Part::Held(held(&session))));
    let bytes = |chunks: &[Vec<u8>]| chunks.iter().map(Vec::len).sum::<usize>() as u64;
    let state = summary.totals.recurrent + summary.totals.tails;
    assert!(bytes(&chunks) + state < bytes(&sent), "the state itself is not in it");
}

#[test]
fn what_a_target_waits_for_at_the_published_shape_is_one_chunk() {
    // All of the last page but a position.
    let session = Session::new(published_geometry(), 1, Mode::Split, 2 * PAGE_POSITIONS - 1, 6);
    let mut encoder = HandoffEncoder::new(session.header.clone(), CHUNK_BYTES).unwrap();
    encoder.tokens(&session.tokens).unwrap();
    encoder.flush();
    assert_eq!(encoder.chunks().count(), 1, "while it still steps");
    encoder.freeze(&session.frozen, &session.segments()).unwrap();
    let digests = TensorDigests::new(session.geometry());
    encoder.held(&HeldState { slot: 9, digests }).unwrap();
    session.pages().iter().for_each(|page| encoder.page(page).unwrap());
    let summary = encoder.finish().unwrap();
    assert_eq!((summary.totals.partial_pages, summary.totals.pages), (63 * 8064, 0));
    assert_eq!(encoder.chunks().count(), 1);
}

#[test]
fn heads_come_in_one_way_only() {
    let session = session();
    let mut encoder = frozen(&session);
    encoder.held(&held(&session)).unwrap();
    let slices: Vec<StateSlice> = session.slices();
    assert!(matches!(encoder.state(&slices[0]), Err(HandoffError::DuplicateHead { head: 0, .. })));
    assert!(matches!(encoder.held(&held(&session)), Err(HandoffError::DuplicateHead { head: 0, .. })));
    let mut encoder = frozen(&session);
    encoder.state(&slices[3]).unwrap();
    assert!(matches!(encoder.held(&held(&session)), Err(HandoffError::DuplicateHead { .. })));
}

#[test]
fn it_comes_behind_the_segments_and_with_all_digests() {
    let session = session();
    let mut early = HandoffEncoder::new(session.header.clone(), CHUNK_BYTES).unwrap();
    let error = early.held(&held(&session)).unwrap_err();
    assert!(matches!(error, HandoffError::Order { found: PartName::Held, .. }), "{error}");
    let (head, mut body) = of_held(&held(&session));
    body.truncate(8);
    let mut parts = session.raw();
    let first = parts.iter().position(|(head, _)| matches!(head.name(), PartName::State { .. })).unwrap();
    parts.insert(first, (head, body));
    let error = decode_raw(&session, &parts).unwrap_err();
    assert!(matches!(error, HandoffError::Shape { part: PartName::Held, what: "bytes", .. }), "{error}");
}
