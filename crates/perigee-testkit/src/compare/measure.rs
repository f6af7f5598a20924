//! Differences between two float32 tensors of one shape, summed in float64.

/// How far a tensor is from the expected one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Measured {
    /// Relative L2 of the whole tensor.
    pub relative: f64,
    /// Largest relative L2 of a row.
    pub worst_row: f64,
    /// Largest difference of an element.
    pub absolute: f64,
    /// Whether every element is finite; otherwise the numbers above say nothing.
    pub finite: bool,
}

/// Measures rows of this width.
pub(super) fn measure(got: &[f32], want: &[f32], width: usize) -> Measured {
    let (mut difference, mut norm, mut worst_row, mut absolute) = (0f64, 0f64, 0f64, 0f64);
    for (got, want) in got.chunks(width.max(1)).zip(want.chunks(width.max(1))) {
        let (mut row_difference, mut row_norm) = (0f64, 0f64);
        for (got, want) in got.iter().zip(want) {
            let apart = f64::from(*got) - f64::from(*want);
            row_difference += apart * apart;
            row_norm += f64::from(*want) * f64::from(*want);
            absolute = absolute.max(apart.abs());
        }
        worst_row = worst_row.max(ratio(row_difference, row_norm));
        difference += row_difference;
        norm += row_norm;
    }
    let finite = got.iter().all(|value| value.is_finite());
    Measured { relative: ratio(difference, norm), worst_row, absolute, finite }
}

/// Square root of a quotient; where nothing was expected, anything at all is infinitely far.
fn ratio(difference: f64, norm: f64) -> f64 {
    if difference == 0.0 { 0.0 } else { (difference / norm).sqrt() }
}

/// The largest element's index, the lowest of equals, and how far it is above the next.
pub(super) fn choice(row: &[f32]) -> (usize, f32) {
    let (mut best, mut first, mut second) = (0, f32::NEG_INFINITY, f32::NEG_INFINITY);
    for (index, &value) in row.iter().enumerate() {
        if value > first {
            (best, first, second) = (index, value, first);
        } else if value > second {
            second = value;
        }
    }
    (best, first - second)
}
