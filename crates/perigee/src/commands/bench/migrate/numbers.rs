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

/// Milliseconds between the last token of an owner and the first of the next one, from token `from` on; none where the owner
/// does not change.
pub(super) fn gap_of_move(pieces: &[Piece], from: usize) -> Option<f64> {
    let pair = pieces.get(from..)?.windows(2).find(|pair| pair[0].replica != pair[1].replica)?;
    Some(milliseconds(pair[1].at - pair[0].at))
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
        assert_eq!(
            [gap_of_move(&pieces, 0), gap_of_move(&pieces, 2), gap_of_move(&pieces, 3)],
            [Some(40.0), Some(37.0), Some(37.0)]
        );
        assert_eq!([gap_of_move(&pieces[..2], 0), gap_of_move(&pieces, 9)], [None, None]);
    }
}
