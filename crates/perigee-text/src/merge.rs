//! Byte pair encoding of one piece of text by ranks: of all neighbours whose concatenation is a token, those of the lowest
//! rank are joined first, the leftmost of equal ones. A heap of candidates instead of tiktoken's scans, so that a piece of
//! n bytes takes n log n steps whatever is in it; the result is the same.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// No neighbour.
const NONE: usize = usize::MAX;

/// The tokens of a piece. `rank` gives the rank of a byte string that is a token; every single byte must be one, and one
/// that is not is left out.
pub(crate) fn merge(piece: &[u8], rank: impl Fn(&[u8]) -> Option<u32>, tokens: &mut Vec<u32>) {
    if let Some(whole) = rank(piece) {
        tokens.push(whole);
        return;
    }
    // A part is named by where it starts; it ends where the next one starts.
    let mut next: Vec<usize> = (1..=piece.len()).collect();
    let mut previous: Vec<usize> = (0..piece.len()).map(|start| start.checked_sub(1).unwrap_or(NONE)).collect();
    let mut is_joined = vec![false; piece.len()];
    // The order of tuples is the order of joining: rank, then place.
    let mut candidates = BinaryHeap::new();
    let pair = |start: usize, end: usize| {
        let rank = rank(piece.get(start..end)?)?;
        Some(Reverse((rank, start, end)))
    };
    candidates.extend((0..piece.len()).filter_map(|start| pair(start, start + 2)));
    while let Some(Reverse((_, start, end))) = candidates.pop() {
        let middle = next[start];
        // A candidate is of the past where either part has grown since.
        if is_joined[start] || middle >= piece.len() || next[middle] != end {
            continue;
        }
        is_joined[middle] = true;
        next[start] = end;
        if end < piece.len() {
            previous[end] = start;
            candidates.extend(pair(start, next[end]));
        }
        if previous[start] != NONE {
            candidates.extend(pair(previous[start], end));
        }
    }
    let mut start = 0;
    while start < piece.len() {
        tokens.extend(rank(&piece[start..next[start]]));
        start = next[start];
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    /// tiktoken's rule, word for word: scan for the lowest rank, the leftmost of equal ones, join, repeat.
    fn by_scanning(piece: &[u8], ranks: &HashMap<Vec<u8>, u32>) -> Vec<u32> {
        let mut parts: Vec<Vec<u8>> = piece.iter().map(|&byte| vec![byte]).collect();
        loop {
            let joined = |at: usize| [parts[at].as_slice(), parts[at + 1].as_slice()].concat();
            let candidates = (0..parts.len().saturating_sub(1)).filter_map(|at| Some((*ranks.get(&joined(at))?, at)));
            let Some((_, at)) = candidates.min() else { break };
            parts[at] = joined(at);
            parts.remove(at + 1);
        }
        parts.iter().map(|part| ranks[part]).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2000) })]

        #[test]
        fn joining_by_heap_equals_joining_by_scanning(
            words in prop::collection::vec("[abc]{2,5}", 0..24),
            piece in "[abc]{1,40}",
        ) {
            let mut ranks: HashMap<Vec<u8>, u32> = (b'a'..=b'c').map(|byte| (vec![byte], u32::from(byte))).collect();
            for (rank, word) in words.into_iter().enumerate() {
                ranks.entry(word.into_bytes()).or_insert(200 + rank as u32);
            }
            let mut tokens = Vec::new();
            merge(piece.as_bytes(), |bytes| ranks.get(bytes).copied(), &mut tokens);
            let expected = match ranks.get(piece.as_bytes()) {
                Some(&whole) => vec![whole],
                None => by_scanning(piece.as_bytes(), &ranks),
            };
            prop_assert_eq!(tokens, expected);
        }
    }

    #[test]
    fn a_long_piece_takes_no_square_of_its_length() {
        let ranks: HashMap<Vec<u8>, u32> = (1..=8u32).map(|n| (vec![b'a'; 1 << (n - 1)], n)).collect();
        let mut tokens = Vec::new();
        merge(&vec![b'a'; 1 << 18], |bytes| ranks.get(bytes).copied(), &mut tokens);
        assert_eq!(tokens, vec![8; 1 << 11]);
    }
}
