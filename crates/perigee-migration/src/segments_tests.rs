//! Tests of segment tables, most of them against a plain list with the home of every page.

use proptest::prelude::*;

use super::*;
use crate::testing::config;

fn place(replica: &str, incarnation: u32) -> Place {
    Place { replica: replica.into(), incarnation: incarnation.to_string(), ranks: 2, layout: Layout::Replicated }
}

fn segment(replica: &str, first_page: u64, pages: u64) -> Segment {
    Segment { home: place(replica, 1), first: first_page * PAGE_POSITIONS, tokens: pages * PAGE_POSITIONS }
}

fn table(segments: &[Segment]) -> SegmentTable {
    SegmentTable::from_segments(segments.iter().cloned()).unwrap()
}

fn ranges(bounds: &[(u64, u64)]) -> Vec<Range<u64>> {
    bounds.iter().map(|&(start, end)| start..end).collect()
}

#[test]
fn bad_segments_are_named() {
    let build = |segments: &[Segment]| SegmentTable::from_segments(segments.iter().cloned()).unwrap_err();
    assert_eq!(build(&[segment("a", 1, 0)]), SegmentError::Length { first: 64, tokens: 0 });
    let cut = Segment { tokens: 65, ..segment("a", 1, 1) };
    assert_eq!(build(&[cut]), SegmentError::Boundary { position: 129 });
    let cut = Segment { first: 63, ..segment("a", 1, 1) };
    assert_eq!(build(&[cut]), SegmentError::Boundary { position: 63 });
    let overlap = build(&[segment("a", 0, 2), segment("b", 1, 2)]);
    assert_eq!(overlap, SegmentError::Order { first: 64, end: 128 });
    let long = Segment { first: u64::MAX - 63, ..segment("a", 0, 1) };
    assert_eq!(build(&[long]), SegmentError::Length { first: u64::MAX - 63, tokens: 64 });
    let unsealed = table(&[segment("a", 0, 2)]).check(127).unwrap_err();
    assert_eq!(unsealed, SegmentError::Unsealed { end: 128, sealed: 64 });
    assert_eq!(table(&[segment("a", 0, 2)]).check(128), Ok(()));
}

#[test]
fn a_session_moves_there_and_back() {
    let (a, b, c) = (place("a", 1), place("b", 1), place("c", 1));
    // 130 positions on a, then to b: two pages stay, 2 positions travel.
    let at_b = SegmentTable::new().hand_over(&a, 130, Mode::Split).arrive(&b);
    assert_eq!((at_b.table.segments(), &at_b.returned[..]), (&[segment("a", 0, 2)][..], &[][..]));
    // 320 positions later it goes on to c: pages 2, 3, 4 are b's.
    let at_c = at_b.table.hand_over(&b, 320, Mode::Split).arrive(&c).table;
    assert_eq!(at_c.segments(), [segment("a", 0, 2), segment("b", 2, 3)]);
    // Back on a, which finds its segment.
    let back = at_c.hand_over(&c, 330, Mode::Split).arrive(&a);
    assert_eq!(back.table.segments(), [segment("b", 2, 3)]);
    assert_eq!(back.returned, ranges(&[(0, 128)]));
    assert_eq!(back.table.gaps(330), ranges(&[(0, 128), (320, 330)]));
    let view = back.table.view(&a, 330);
    assert_eq!(
        view.iter().map(|s| (s.home.replica.as_str(), s.first, s.tokens)).collect::<Vec<_>>(),
        [("a", 0, 128), ("b", 128, 192), ("a", 320, 10)]
    );
    // A whole move from a leaves only b's segment; a split one back to c has three.
    assert_eq!(back.table.hand_over(&a, 400, Mode::Whole).segments(), [segment("b", 2, 3)]);
    let again = back.table.hand_over(&a, 400, Mode::Split);
    assert_eq!(again.segments(), [segment("a", 0, 2), segment("b", 2, 3), segment("a", 5, 1)]);
    assert_eq!(again.homes(), [(&a, ranges(&[(0, 128), (320, 384)])), (&b, ranges(&[(128, 320)]))]);
}

#[test]
fn an_earlier_run_has_nothing() {
    let arrival = table(&[segment("a", 0, 2), segment("b", 2, 1), segment("a", 3, 1)]).arrive(&place("a", 2));
    assert_eq!(arrival.table.segments(), [segment("b", 2, 1)]);
    assert_eq!((arrival.returned, arrival.lost), (vec![], ranges(&[(0, 128), (192, 256)])));
    let table = table(&[segment("a", 0, 2), segment("b", 2, 1)]);
    assert_eq!(table.lost_at("a", None), ranges(&[(0, 128)]));
    assert_eq!(table.lost_at("a", Some("2")), ranges(&[(0, 128)]));
    assert_eq!(table.lost_at("a", Some("1")), ranges(&[]));
}

#[test]
fn pages_are_fetched_in_pieces() {
    let mut table = table(&[segment("b", 0, 1), segment("a", 1, 3)]);
    assert_eq!(table.first_of(&place("a", 1), 2), Some(64..192));
    table.localise(64..192).unwrap();
    assert_eq!(table.first_of(&place("a", 1), 2), Some(192..256));
    table.localise(192..256).unwrap();
    assert_eq!(table.first_of(&place("a", 1), 2), None);
    assert_eq!(table.segments(), [segment("b", 0, 1)]);
    assert_eq!(table.localise(0..63).unwrap_err(), SegmentError::Boundary { position: 63 });
}

/// The home of every page, 0 for the owner.
type Pages = Vec<u8>;

fn of_pages(pages: &[u8]) -> SegmentTable {
    let names = ["", "a", "b", "c"];
    let remote = (0..).zip(pages).filter(|(_, home)| **home > 0);
    table(&remote.map(|(page, &home)| segment(names[usize::from(home)], page, 1)).collect::<Vec<_>>())
}

/// A page's home, read from the table position by position.
fn to_pages(table: &SegmentTable, pages: usize) -> Pages {
    let mut homes = vec![0; pages];
    for segment in table.segments() {
        let name = segment.home.replica.as_bytes()[0] - b'a' + 1;
        for position in segment.positions() {
            homes[(position / PAGE_POSITIONS) as usize] = name;
        }
    }
    homes
}

proptest! {
    #![proptest_config(config(500))]

    #[test]
    fn tables_say_where_every_page_is(pages in prop::collection::vec(0_u8..4, 0..12), tail in 0_u64..64) {
        let table = of_pages(&pages);
        prop_assert_eq!(&to_pages(&table, pages.len()), &pages);
        for pair in table.segments().windows(2) {
            prop_assert!(pair[0].end() < pair[1].first || pair[0].home != pair[1].home, "neighbours are joined");
        }
        let context = pages.len() as u64 * PAGE_POSITIONS + tail;
        prop_assert_eq!(table.check(context), Ok(()));
        let local: u64 = table.gaps(context).iter().map(|gap| gap.end - gap.start).sum();
        prop_assert_eq!(local + table.tokens(), context);
        // The view has every position once.
        let mut next = 0;
        for segment in table.view(&place("c", 9), context) {
            prop_assert_eq!(segment.first, next);
            next = segment.end();
        }
        prop_assert_eq!(next, context);
        let by_home: u64 = table.homes().iter().flat_map(|(_, ranges)| ranges).map(|r| r.end - r.start).sum();
        prop_assert_eq!(by_home, table.tokens());
    }

    #[test]
    fn localising_changes_only_its_range(pages in prop::collection::vec(0_u8..4, 1..12), start in 0_usize..12, length in 1_usize..12) {
        let (start, end) = (start % pages.len(), (start % pages.len() + length).min(pages.len()));
        let mut table = of_pages(&pages);
        table.localise(start as u64 * PAGE_POSITIONS..end as u64 * PAGE_POSITIONS).unwrap();
        let mut expected = pages.clone();
        expected[start..end].fill(0);
        prop_assert_eq!(to_pages(&table, pages.len()), &expected[..]);
        prop_assert_eq!(table, of_pages(&expected));
    }

    /// Owners 1 to 3 in any order; whoever steps appends pages; the list remembers who wrote what.
    #[test]
    fn moves_keep_every_page_with_its_writer(moves in prop::collection::vec((1_u8..4, 0_u64..200, any::<bool>()), 1..8)) {
        let names = ["", "a", "b", "c"];
        let (mut owner, mut context, mut table) = (1_u8, 70_u64, SegmentTable::new());
        let mut writer: Pages = vec![1; 1];
        for (to, grown, whole) in moves {
            context += grown;
            writer.resize((sealed(context) / PAGE_POSITIONS) as usize, owner);
            if to == owner {
                continue;
            }
            let mode = if whole { Mode::Whole } else { Mode::Split };
            if whole {
                writer.iter_mut().filter(|home| **home == owner).for_each(|home| *home = to);
            }
            let arrival = table.hand_over(&place(names[usize::from(owner)], 1), context, mode).arrive(&place(names[usize::from(to)], 1));
            prop_assert!(arrival.lost.is_empty());
            owner = to;
            table = arrival.table;
            let remote: Pages = writer.iter().map(|&home| if home == owner { 0 } else { home }).collect();
            prop_assert_eq!(to_pages(&table, writer.len()), &remote[..]);
            prop_assert_eq!(&table, &of_pages(&remote));
        }
    }
}
