//! Gaps of a stream and what is made of them. Pure.

use std::time::{Duration, Instant};

/// A token as its client had it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Piece {
    pub(super) at: Instant,
    pub(super) replica: String,
}

/// The middle of some numbers; 0 of none.
pub(super) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => 0.0,
        count if count % 2 == 1 => sorted[count / 2],
        count => (sorted[count / 2 - 1] + sorted[count / 2]) / 2.0,
    }
}

/// Milliseconds between neighbours.
pub(super) fn gaps(pieces: &[Piece]) -> Vec<f64> {
    pieces.windows(2).map(|pair| milliseconds(pair[1].at - pair[0].at)).collect()
}

/// A change of owners in a stream, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Change {
    /// Between the last token of the old owner and the first of the new one.
    pub(super) gap: f64,
    /// What it is beyond the median of the `after` gaps behind it: the new owner's first token takes a step of its own as well.
    pub(super) stall: f64,
}

/// The first change of owners from token `from` on; none where there is none.
pub(super) fn change(pieces: &[Piece], from: usize, after: usize) -> Option<Change> {
    let is_change = |pair: &[Piece]| pair[0].replica != pair[1].replica;
    let last = from + pieces.get(from..)?.windows(2).position(is_change)?;
    let gap = milliseconds(pieces[last + 1].at - pieces[last].at);
    let there = gaps(&pieces[last + 1..pieces.len().min(last + 2 + after)]);
    Some(Change { gap, stall: gap - median(&there) })
}

pub(super) fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_gaps() {
        assert_eq!([median(&[]), median(&[3.0]), median(&[4.0, 1.0, 2.0]), median(&[4.0, 1.0])], [0.0, 3.0, 2.0, 2.5]);
        let start = Instant::now();
        let piece = |at, replica: &str| Piece { at: start + Duration::from_millis(at), replica: replica.to_owned() };
        let pieces = [piece(0, "a"), piece(10, "a"), piece(50, "b"), piece(62, "b"), piece(99, "a")];
        assert_eq!(gaps(&pieces), [10.0, 40.0, 12.0, 37.0]);
        let found = |from, after| change(&pieces, from, after).map(|change| (change.gap, change.stall));
        assert_eq!(
            [found(0, 1), found(0, 9), found(2, 9)],
            [Some((40.0, 28.0)), Some((40.0, 15.5)), Some((37.0, 37.0))]
        );
        assert_eq!([change(&pieces[..2], 0, 9), change(&pieces, 9, 9)], [None, None]);
    }
}
