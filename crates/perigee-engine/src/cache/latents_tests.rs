//! Tests of the segment list: growth, forks, parking, moves.

use super::*;

fn local(pages: &[u32]) -> Latents {
    let mut latents = Latents::new();
    pages.iter().for_each(|&page| latents.append(page));
    latents
}

/// Two pages elsewhere, then two here.
fn moved() -> Latents {
    let home = Home::Remote {
        replica: "a".into(),
        incarnation: "1".into(),
        endpoint: "a:1".into(),
        ranks: 2,
        layout: Layout::Replicated,
        pages: 2,
    };
    let mut latents = Latents { segments: vec![LatentSegment { first_page: 0, home }] };
    latents.append(7);
    latents.append(8);
    latents
}

#[test]
fn pages_are_counted_from_position_zero() {
    let latents = local(&[4, 5]);
    assert_eq!(latents.capacity(), 128);
    assert_eq!(latents.missing_for(128), 0);
    assert_eq!(latents.missing_for(129), 1);
    assert_eq!(moved().capacity(), 256);
    assert_eq!(moved().missing_for(257), 1);
    assert_eq!(moved().local_pages().collect::<Vec<_>>(), [7, 8]);
}

#[test]
fn a_row_names_only_local_pages_up_to_its_end() {
    assert_eq!(local(&[4, 5]).row_segments(60), [Segment { start: 0, end: 60, pages: vec![4] }]);
    assert_eq!(moved().row_segments(193), [Segment { start: 128, end: 193, pages: vec![7, 8] }]);
    assert_eq!(moved().row_segments(128), []);
}

#[test]
fn a_fork_shares_full_pages_and_names_the_partial_one() {
    assert_eq!(local(&[4, 5]).fork(70), (local(&[4]), Some(5)));
    assert_eq!(local(&[4, 5]).fork(128), (local(&[4, 5]), None));
    assert_eq!(local(&[4, 5]).fork(64), (local(&[4]), None), "an empty page is not worth a copy");
    assert_eq!(local(&[4]).fork(0), (Latents::new(), None));
    let (forked, partial) = moved().fork(200);
    assert_eq!((forked.local_pages().collect::<Vec<_>>(), partial), (vec![7], Some(8)));
    assert_eq!(forked.capacity(), 192);
}

#[test]
fn parking_keeps_the_shape() {
    let mut latents = moved();
    assert_eq!(latents.detach(), [7, 8]);
    assert_eq!(latents.capacity(), 256);
    latents.attach(&[1, 2]);
    assert_eq!(latents.row_segments(256), [Segment { start: 128, end: 256, pages: vec![1, 2] }]);
}
