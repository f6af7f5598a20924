//! Joining attention over disjoint parts of the keys, which makes attention over a split cache exact. This is the owner's
//! side of split attention on the host; backends have their own for parts that are on a device.
//!
//! For part a with normalised output o_a and l_a = ln of its sum of exponentials: with M = max l_a and w_a = e^(l_a - M),
//! the whole has o = sum w_a o_a / sum w_a and l = M + ln sum w_a. Joining two at a time gives the same, in any order and
//! grouping, up to rounding.

/// Parts that do not fit together.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MergeError {
    /// The parts have different numbers of rows.
    #[error("a part of {found} rows of attention, expected {expected}")]
    Rows {
        /// Rows of the first part.
        expected: usize,
        /// Rows of the second.
        found: usize,
    },
    /// The outputs do not have the same whole number of values for each row.
    #[error("outputs of {first} and {second} values for {rows} rows of attention")]
    Width {
        /// Rows.
        rows: usize,
        /// Values of the first part.
        first: usize,
        /// Values of the second.
        second: usize,
    },
}

/// Merges the part (`other_output` [rows, width], `other_lse` `[rows]`) into (`output`, `lse`), row by row. An empty part
/// has lse -inf: it changes nothing, whatever its output holds. Where both are empty the row stays as it was.
///
/// # Errors
/// [`MergeError`] where the shapes differ; nothing is changed then.
pub fn merge(output: &mut [f32], lse: &mut [f32], other_output: &[f32], other_lse: &[f32]) -> Result<(), MergeError> {
    let rows = lse.len();
    if other_lse.len() != rows {
        return Err(MergeError::Rows { expected: rows, found: other_lse.len() });
    }
    let is_whole = if rows == 0 { output.is_empty() } else { output.len().is_multiple_of(rows) };
    if output.len() != other_output.len() || !is_whole {
        return Err(MergeError::Width { rows, first: output.len(), second: other_output.len() });
    }
    let width = output.len() / rows.max(1);
    for (row, (mine, &theirs)) in lse.iter_mut().zip(other_lse).enumerate() {
        let top = mine.max(theirs);
        if top == f32::NEG_INFINITY {
            continue;
        }
        let (a, b) = ((*mine - top).exp(), (theirs - top).exp());
        let total = a + b;
        *mine = top + total.ln();
        let (a, b) = (a / total, b / total);
        let range = row * width..(row + 1) * width;
        for (value, other) in output[range.clone()].iter_mut().zip(&other_output[range]) {
            // A weight of 0 drops its side whatever that holds, not-a-number included.
            *value = match (a == 0.0, b == 0.0) {
                (_, true) => *value,
                (true, false) => *other,
                (false, false) => a * *value + b * other,
            };
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::config;

    const WIDTH: usize = 3;

    /// Attention of one row over scores and values in float64: the output and the log-sum-exp.
    fn attend(keys: &[(f32, [f32; WIDTH])]) -> ([f32; WIDTH], f32) {
        let top = keys.iter().map(|(score, _)| f64::from(*score)).fold(f64::NEG_INFINITY, f64::max);
        if keys.is_empty() {
            return ([0.0; WIDTH], f32::NEG_INFINITY);
        }
        let weights: Vec<f64> = keys.iter().map(|(score, _)| (f64::from(*score) - top).exp()).collect();
        let total: f64 = weights.iter().sum();
        let average = |c: usize| keys.iter().zip(&weights).map(|((_, v), w)| w * f64::from(v[c])).sum::<f64>() / total;
        (std::array::from_fn(|c| average(c) as f32), (top + total.ln()) as f32)
    }

    fn join(a: ([f32; WIDTH], f32), b: ([f32; WIDTH], f32)) -> ([f32; WIDTH], f32) {
        let (mut output, mut lse) = (a.0, [a.1]);
        merge(&mut output, &mut lse, &b.0, &[b.1]).unwrap();
        (output, lse[0])
    }

    /// A log-sum-exp is rounded at its own magnitude, up to 125 here, three times on each path; that is the relative error
    /// of a weight, and values that it weighs lie up to 8 apart.
    fn close(a: ([f32; WIDTH], f32), b: ([f32; WIDTH], f32)) -> bool {
        let rounding = 3.0 * (1.0 + a.1.abs().min(125.0)) * f32::EPSILON;
        let near = |x: f32, y: f32, scale: f32| x == y || (x - y).abs() <= rounding * scale;
        near(a.1, b.1, 1.0) && a.0.iter().zip(&b.0).all(|(&x, &y)| near(x, y, 8.0))
    }

    fn keys() -> impl Strategy<Value = Vec<(f32, [f32; WIDTH])>> {
        prop::collection::vec((-120.0_f32..120.0, prop::array::uniform3(-4.0_f32..4.0)), 0..20)
    }

    proptest! {
        #![proptest_config(config(500))]

        #[test]
        fn parts_in_any_order_and_grouping_are_the_whole(a in keys(), b in keys(), c in keys()) {
            let whole = attend(&[a.clone(), b.clone(), c.clone()].concat());
            let (a, b, c) = (attend(&a), attend(&b), attend(&c));
            prop_assert!(close(join(join(a, b), c), whole));
            prop_assert!(close(join(a, join(b, c)), whole));
            prop_assert!(close(join(join(c, a), b), whole));
            prop_assert_eq!(join(a, b).1.to_bits(), join(b, a).1.to_bits(), "the order of two does not show");
            prop_assert_eq!(join(a, b).0, join(b, a).0);
        }
    }

    #[test]
    fn empty_parts_change_nothing() {
        let part = ([1.0, 2.0, 3.0], -7.5);
        let empty = ([f32::NAN; WIDTH], f32::NEG_INFINITY);
        assert_eq!(join(part, empty), part);
        assert_eq!(join(empty, part), part);
        let zero = ([0.0; WIDTH], f32::NEG_INFINITY);
        assert_eq!(join(zero, empty), zero, "two empty parts are empty and finite");
    }

    #[test]
    fn large_scores_do_not_overflow() {
        let (output, lse) = join(([1.0; WIDTH], 3e38), ([3.0; WIDTH], 3e38));
        assert_eq!(output, [2.0; WIDTH]);
        assert!(lse.is_finite());
    }

    #[test]
    fn shapes_must_agree() {
        let (mut output, mut lse) = ([0.0; 4], [0.0; 2]);
        let rows = merge(&mut output, &mut lse, &[0.0; 4], &[0.0; 1]).unwrap_err();
        assert_eq!(rows, MergeError::Rows { expected: 2, found: 1 });
        let width = merge(&mut output, &mut lse, &[0.0; 6], &[0.0; 2]).unwrap_err();
        assert_eq!(width, MergeError::Width { rows: 2, first: 4, second: 6 });
        let odd = merge(&mut [0.0; 3], &mut lse, &[0.0; 3], &[0.0; 2]).unwrap_err();
        assert_eq!(odd, MergeError::Width { rows: 2, first: 3, second: 3 });
        assert_eq!(merge(&mut [], &mut [], &[], &[]), Ok(()));
        assert!(merge(&mut [1.0], &mut [], &[1.0], &[]).is_err());
    }
}
