//! Faults that a source might have, each in a handoff whose checksums are right: a tail dropped, a layer zero, heads
//! rotated, a stale page, a rank's slice missing. The target must find each by what it knows itself.

use perigee_backend::StateKind;

use super::super::part::{Head, of_trailer};
use super::super::{HandoffError, PartName};
use super::harness::{Session, decode_raw, raw_page};
use crate::geometry::{Geometry, Tensor};
use crate::segments::Mode;
use crate::testing::{noise, small_geometry};

fn session() -> Session {
    Session::new(small_geometry(), 2, Mode::Split, 70, 7)
}

fn whole_session() -> Session {
    Session::new(small_geometry(), 2, Mode::Whole, 70, 7)
}

/// What the target says of a session whose parts were changed; the trailer counts parts as they are.
fn refusal(session: &Session, change: impl FnOnce(&mut Vec<(Head, Vec<u8>)>)) -> HandoffError {
    let mut parts = session.raw();
    assert!(decode_raw(session, &parts).is_ok(), "unchanged, it is right");
    change(&mut parts);
    let count = parts.len() as u32 - 1;
    if let Some((Head::Trailer { parts, .. }, _)) = parts.last_mut() {
        *parts = count;
    }
    decode_raw(session, &parts).unwrap_err()
}

/// Index of a rank's slice of a tensor.
fn find(parts: &[(Head, Vec<u8>)], layer: u32, kind: StateKind, first_head: u32) -> usize {
    let is_it = |head: &Head| matches!(head, Head::State { part, .. } if part.layer == layer && part.kind == kind && part.first_head == first_head);
    parts.iter().position(|(head, _)| is_it(head)).unwrap()
}

#[test]
fn a_convolution_tail_is_dropped() {
    let error = refusal(&session(), |parts| {
        let index = find(parts, 1, StateKind::ConvK, 0);
        parts.remove(index);
    });
    let tensor = Tensor::State { layer: 1, kind: StateKind::ConvK };
    assert_eq!(error, HandoffError::MissingHead { tensor, head: 0 });
}

#[test]
fn one_ranks_slices_are_missing() {
    let error = refusal(&session(), |parts| {
        parts.retain(|(head, _)| !matches!(head, Head::State { part, .. } if part.first_head == 2));
    });
    let tensor = Tensor::State { layer: 0, kind: StateKind::Recurrent };
    assert_eq!(error, HandoffError::MissingHead { tensor, head: 2 });
}

#[test]
fn a_layer_is_zero() {
    let error = refusal(&session(), |parts| {
        let index = find(parts, 1, StateKind::Recurrent, 2);
        parts[index].1.fill(0);
    });
    let part = PartName::State { layer: 1, kind: StateKind::Recurrent, first_head: 2 };
    assert!(matches!(error, HandoffError::PartDigest { part: found, .. } if found == part), "{error}");
}

#[test]
fn heads_are_rotated_by_one_within_a_slice() {
    let geometry = small_geometry();
    let error = refusal(&session(), |parts| {
        let index = find(parts, 0, StateKind::Recurrent, 0);
        parts[index].1.rotate_left(geometry.head_bytes(StateKind::Recurrent) as usize);
    });
    let part = PartName::State { layer: 0, kind: StateKind::Recurrent, first_head: 0 };
    assert!(matches!(error, HandoffError::PartDigest { part: found, .. } if found == part), "{error}");
}

/// Both ranks' slices are right in themselves, and each carries the other's heads.
#[test]
fn slices_say_the_wrong_heads() {
    let error = refusal(&session(), |parts| {
        for index in [find(parts, 0, StateKind::ConvQ, 0), find(parts, 0, StateKind::ConvQ, 2)] {
            if let Head::State { part, .. } = &mut parts[index].0 {
                part.first_head = 2 - part.first_head;
            }
        }
    });
    assert!(matches!(error, HandoffError::PartDigest { .. }), "{error}");
}

/// Two tensors of one shape change places; every slice is right in itself.
#[test]
fn tensors_change_places() {
    let error = refusal(&session(), |parts| {
        for (head, _) in parts {
            if let Head::State { part, .. } = head
                && part.layer == 0
            {
                part.kind = match part.kind {
                    StateKind::ConvQ => StateKind::ConvK,
                    StateKind::ConvK => StateKind::ConvQ,
                    other => other,
                };
            }
        }
    });
    assert!(matches!(error, HandoffError::Digest(_)), "{error}");
    assert!(error.to_string().starts_with("tail of the q convolution of KDA layer 0"), "{error}");
}

#[test]
fn the_tail_page_is_stale() {
    let session = session();
    let error = refusal(&session, |parts| {
        // As it was a step ago: another last position, with a digest of its own, while the trailer has the right one.
        let mut old = session.page(1, 1);
        let length = old.bytes.len();
        let position = session.geometry().position_bytes() as usize;
        old.bytes[length - position..].copy_from_slice(&noise(99, position));
        let old = super::super::PageSlice::new(session.geometry(), 1, 64, old.bytes).unwrap();
        let index = parts.len() - 2;
        parts[index] = raw_page(old);
    });
    assert!(error.to_string().starts_with("latents of MLA layer 1: digest"), "{error}");
}

#[test]
fn the_tail_page_is_short() {
    let session = session();
    let error = refusal(&session, |parts| {
        let page = session.page(0, 1);
        let bytes = page.bytes[..page.bytes.len() - session.geometry().position_bytes() as usize].to_vec();
        let index = parts.len() - 3;
        parts[index] = raw_page(super::super::PageSlice::new(session.geometry(), 0, 64, bytes).unwrap());
    });
    let part = PartName::Page { layer: 0, first: 64 };
    assert_eq!(error, HandoffError::Shape { part, what: "positions", expected: 6, found: 5 });
}

#[test]
fn pages_are_missing_double_or_undue() {
    let drop_page = |parts: &mut Vec<(Head, Vec<u8>)>| {
        let index = parts.len() - 2;
        parts.remove(index);
    };
    assert_eq!(refusal(&whole_session(), drop_page), HandoffError::MissingPage { layer: 1, first: 64 });
    let double_page = |parts: &mut Vec<(Head, Vec<u8>)>| {
        let index = parts.len() - 2;
        parts.insert(index, parts[index].clone());
    };
    assert_eq!(refusal(&whole_session(), double_page), HandoffError::DuplicatePage { layer: 1, first: 64 });
    let session = session();
    let undue = refusal(&session, |parts| {
        let index = parts.len() - 1;
        parts.insert(index, raw_page(session.page(0, 0)));
    });
    assert_eq!(undue, HandoffError::UnduePage { layer: 0, first: 0 }, "split mode moves no page");
}

#[test]
fn heads_come_twice() {
    let error = refusal(&session(), |parts| {
        let index = find(parts, 0, StateKind::ConvV, 2);
        parts.insert(index, parts[index].clone());
    });
    let tensor = Tensor::State { layer: 0, kind: StateKind::ConvV };
    assert_eq!(error, HandoffError::DuplicateHead { tensor, head: 2 });
}

#[test]
fn a_slice_has_another_shape() {
    let geometry = small_geometry();
    let change = |change: fn(&mut perigee_backend::StatePart, &mut Vec<u8>)| {
        refusal(&session(), |parts| {
            let index = find(parts, 1, StateKind::ConvV, 2);
            let (head, body) = &mut parts[index];
            if let Head::State { part, .. } = head {
                change(part, body);
            }
        })
    };
    let name = |layer, first_head| PartName::State { layer, kind: StateKind::ConvV, first_head };
    let shape = |part, what, expected, found| HandoffError::Shape { part, what, expected, found };
    assert_eq!(change(|part, _| part.layer = 2), shape(name(2, 2), "KDA layer, at most", 1, 2));
    assert_eq!(change(|part, _| part.first_head = 3), shape(name(1, 3), "heads up to", 4, 5));
    assert_eq!(change(|part, _| part.heads = 0), shape(name(1, 2), "heads up to", 4, 2));
    assert_eq!(change(|part, _| part.heads = u32::MAX), shape(name(1, 2), "heads up to", 4, 4_294_967_297));
    let bytes = 2 * geometry.head_bytes(StateKind::ConvV);
    assert_eq!(change(|_, body| body.truncate(5)), shape(name(1, 2), "bytes", bytes, 5));
    assert_eq!(change(|_, body| body.push(0)), shape(name(1, 2), "bytes", bytes, bytes + 1));
}

#[test]
fn a_slice_has_another_type() {
    let error = refusal(&session(), |parts| {
        let index = find(parts, 1, StateKind::Recurrent, 0);
        if let Head::State { dtype, .. } = &mut parts[index].0 {
            *dtype = perigee_backend::DType::Bf16;
        }
    });
    let (expected, found) = (perigee_backend::DType::Fp32, perigee_backend::DType::Bf16);
    assert_eq!(error, HandoffError::Dtype { what: "state", expected, found });
}

#[test]
fn the_trailer_counts_otherwise() {
    let session = session();
    let parts = session.raw();
    let (Some((Head::Trailer { totals, .. }, _)), count) = (parts.last(), parts.len() as u32 - 1) else { panic!() };
    let (mut totals, digests) = (*totals, {
        let (_, summary) = decode_raw(&session, &parts).unwrap();
        summary.digests
    });
    let ends = |parts_counted, totals| {
        let mut parts = session.raw();
        *parts.last_mut().unwrap() =
            of_trailer(parts_counted, &super::super::Summary { totals, digests: digests.clone() });
        decode_raw(&session, &parts).unwrap_err()
    };
    let wrong = ends(count + 1, totals);
    assert_eq!(wrong, HandoffError::Totals { what: "parts", expected: (count + 1).into(), found: count.into() });
    totals.tails += 1;
    let found = totals.tails - 1;
    let wrong = ends(count, totals);
    assert_eq!(wrong, HandoffError::Totals { what: "bytes of convolution tails", expected: totals.tails, found });
}

#[test]
fn a_model_whose_convolutions_have_one_tap_has_empty_tails() {
    let geometry = Geometry { conv: 1, ..small_geometry() };
    let session = Session::new(geometry, 1, Mode::Split, 3, 1);
    let (_, summary) = decode_raw(&session, &session.raw()).unwrap();
    assert_eq!(summary.totals.tails, 0);
}
