//! A stream of this version, kept as a file: a build that reads or writes it otherwise has another version and must say
//! so in `HANDOFF_VERSION`.

use super::super::HANDOFF_VERSION;
use super::harness::{Session, decode, place};
use crate::geometry::PAGE_POSITIONS;
use crate::segments::{Mode, Segment, SegmentTable};
use crate::testing::small_geometry;

const CAPTURE: &[u8] = include_bytes!("../../../tests/handoff-v1.bin");

#[test]
fn the_captured_handoff_still_decodes_and_is_still_written() {
    let mut session = Session::new(small_geometry(), 2, Mode::Whole, 150, 42);
    let remote = Segment { home: place("c", 4), first: 0, tokens: PAGE_POSITIONS };
    session.table = SegmentTable::from_segments([remote]).unwrap();
    let (chunks, summary) = session.encode(512);
    assert_eq!(HANDOFF_VERSION, 1, "a new version needs a new capture; keep this one, as one that is refused");
    assert_eq!(decode(session.decoder(), &[CAPTURE.to_vec()]).map(|(_, found)| found), Ok(summary));
    // Not assert_eq: thousands of bytes help nobody.
    assert!(chunks.concat() == CAPTURE, "the encoder writes other bytes under the same version");
}
