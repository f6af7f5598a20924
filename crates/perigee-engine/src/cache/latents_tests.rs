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

/// A place by its name alone.
fn place(replica: &str) -> Place {
    Place { replica: replica.into(), incarnation: "1".into(), ranks: 2, layout: Layout::Replicated }
}

fn remote(replica: &str, pages: std::ops::Range<u64>) -> RemoteSegment {
    RemoteSegment { home: place(replica), first: pages.start * 64, tokens: (pages.end - pages.start) * 64 }
}

#[test]
fn an_arrival_is_put_together_and_tells_its_table() {
    let table = SegmentTable::from_segments([remote("a", 0..2), remote("b", 3..4)]).unwrap();
    let local = [(2, 9), (4, 5), (5, 6)].into_iter().collect();
    let endpoint = |place: &Place| format!("{}:1", place.replica);
    let latents = Latents::assemble(&table, endpoint, &local, 300).unwrap();
    assert_eq!(latents.capacity(), 320, "a page that is not needed is left out");
    assert_eq!(latents.numbered_local_pages().collect::<Vec<_>>(), [(2, 9), (4, 5)]);
    assert_eq!(latents.table(), table);
    assert!(latents.is_remote());
    assert_eq!(latents.remote_positions(), 192);
    let ranges: Vec<_> = latents
        .remote_ranges()
        .map(|(home, range)| match home {
            Home::Remote { replica, endpoint, .. } => (replica.as_str(), endpoint.as_str(), range),
            Home::Local { .. } => panic!("a local segment among the remote ones"),
        })
        .collect();
    assert_eq!(ranges, [("a", "a:1", 0..128), ("b", "b:1", 192..256)]);
    assert_eq!(
        latents.row_segments(290),
        [Segment { start: 128, end: 192, pages: vec![9] }, Segment { start: 256, end: 290, pages: vec![5] }],
        "the gaps are the homes'"
    );
    assert_eq!(Latents::from_segments(latents.segments().to_vec()), latents);
}

#[test]
fn an_arrival_without_all_pages_is_none() {
    let table = SegmentTable::from_segments([remote("a", 0..2)]).unwrap();
    let assemble = |table: &SegmentTable, local: &[(u64, u32)], context| {
        Latents::assemble(table, |_| String::new(), &local.iter().copied().collect(), context)
    };
    assert_eq!(assemble(&table, &[(2, 9)], 200), None, "page 3 is missing");
    assert_eq!(assemble(&table, &[], 128).map(|latents| latents.capacity()), Some(128));
    assert_eq!(assemble(&table, &[(2, 9)], 127), None, "a segment with the unfilled page");
    assert_eq!(assemble(&SegmentTable::new(), &[(0, 3), (1, 4)], 65), Some(local(&[3, 4])));
    assert!(!local(&[3, 4]).is_remote() && local(&[3, 4]).table().is_empty());
}

#[test]
fn full_local_pages_stay_as_a_home() {
    assert_eq!(local(&[4, 5, 6]).home_pages(130).pages, [(0, vec![4, 5])], "the last page is not full");
    assert_eq!(local(&[4, 5]).home_pages(128).pages, [(0, vec![4, 5])]);
    assert!(local(&[4]).home_pages(63).is_empty());
    assert_eq!(moved().home_pages(256).pages, [(2, vec![7, 8])]);
    assert!(moved().home_pages(130).is_empty());
    let mut parked = moved();
    parked.detach();
    assert!(parked.home_pages(256).is_empty(), "they are in host memory");
}

#[test]
fn a_layout_is_its_number_on_the_wire() {
    let json = serde_json::to_string(&moved()).unwrap();
    assert!(json.contains(r#""layout":0"#), "{json}");
    assert_eq!(serde_json::from_str::<Latents>(&json).unwrap(), moved());
    let error = serde_json::from_str::<Latents>(&json.replace(r#""layout":0"#, r#""layout":9"#)).unwrap_err();
    assert!(error.to_string().contains("number 9"), "{error}");
}
