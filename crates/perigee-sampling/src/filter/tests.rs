//! The filters against a brute-force reference that sorts everything, and their margins against disturbed logits.

use proptest::prelude::*;

use super::*;

/// Closer cuts than this may fall either way by the rounding of sums taken in another order.
const ROUNDING: f64 = 1e-9;

fn candidates(scaled: &[f64]) -> Vec<Candidate> {
    scaled.iter().enumerate().map(|(token, &scaled)| Candidate { token: token as u32, scaled }).collect()
}

fn kept_tokens(params: &SamplingParams, scaled: &[f64]) -> (Vec<u32>, f64) {
    let mut kept = candidates(scaled);
    let margin = apply(params, &mut kept);
    let mut tokens: Vec<u32> = kept.iter().map(|candidate| candidate.token).collect();
    tokens.sort_unstable();
    (tokens, margin)
}

/// The documented semantics word for word: one sort, then plain probabilities.
fn reference(params: &SamplingParams, scaled: &[f64]) -> Vec<u32> {
    let mut sorted: Vec<(u32, f64)> = scaled.iter().enumerate().map(|(token, &s)| (token as u32, s)).collect();
    sorted.sort_by(|a, b| b.1.partial_cmp(&a.1).unwrap().then(a.0.cmp(&b.0)));
    if params.top_k > 0 {
        sorted.truncate(params.top_k as usize);
    }
    let max = sorted[0].1;
    let total: f64 = sorted.iter().map(|&(_, s)| (s - max).exp()).sum();
    let probability = |s: f64| (s - max).exp() / total;
    if params.top_p < 1.0 {
        let mut sum = 0.0;
        let enough = sorted.iter().position(|&(_, s)| {
            sum += probability(s);
            sum >= f64::from(params.top_p)
        });
        sorted.truncate(enough.map_or(sorted.len(), |last| last + 1));
    }
    let largest = probability(max);
    sorted.retain(|&(_, s)| probability(s) >= f64::from(params.min_p) * largest);
    let mut tokens: Vec<u32> = sorted.into_iter().map(|(token, _)| token).collect();
    tokens.sort_unstable();
    tokens
}

fn filters(top_k: u32, top_p: f32, min_p: f32) -> SamplingParams {
    SamplingParams { top_k, top_p, min_p, ..SamplingParams::default() }
}

fn any_filters() -> impl Strategy<Value = SamplingParams> {
    let top_k = prop_oneof![Just(0u32), 1u32..60];
    let top_p = prop_oneof![Just(1.0f32), 0.001f32..1.0, Just(0.999_999f32)];
    let min_p = prop_oneof![Just(0.0f32), 0.0001f32..1.0];
    (top_k, top_p, min_p).prop_map(|(top_k, top_p, min_p)| filters(top_k, top_p, min_p))
}

/// Rows with and without ties, flat and steep.
fn any_row() -> impl Strategy<Value = Vec<f64>> {
    prop_oneof![
        prop::collection::vec(-4.0f64..4.0, 1..400),
        prop::collection::vec(-40.0f64..40.0, 1..100),
        prop::collection::vec((-3i8..4).prop_map(f64::from), 1..100),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2000) })]

    #[test]
    fn filters_equal_the_reference(params in any_filters(), row in any_row()) {
        let (kept, margin) = kept_tokens(&params, &row);
        prop_assert!(margin >= 0.0 && !kept.is_empty());
        if margin > ROUNDING {
            prop_assert_eq!(kept, reference(&params, &row));
        }
        // Top-k compares without rounding, so it is exact with ties too.
        let only_top_k = filters(params.top_k, 1.0, 0.0);
        prop_assert_eq!(kept_tokens(&only_top_k, &row).0, reference(&only_top_k, &row));
    }

    /// Logits that differ by less than half the margin keep the same tokens.
    #[test]
    fn the_margin_bounds_what_can_move_a_cut(
        params in any_filters(),
        (row, shifts) in any_row().prop_flat_map(|row| {
            let length = row.len();
            (Just(row), prop::collection::vec(-1.0f64..1.0, length))
        }),
    ) {
        let (kept, margin) = kept_tokens(&params, &row);
        if margin > ROUNDING {
            let size = 0.499 * margin.min(50.0);
            let disturbed: Vec<f64> = row.iter().zip(&shifts).map(|(s, shift)| s + shift.signum() * size).collect();
            prop_assert_eq!(&kept, &kept_tokens(&params, &disturbed).0);
            let disturbed: Vec<f64> = row.iter().zip(&shifts).map(|(s, shift)| s + shift * size).collect();
            prop_assert_eq!(&kept, &kept_tokens(&params, &disturbed).0);
        }
    }
}

#[test]
fn ties_at_the_cut_keep_the_lower_ids() {
    let row = [1.0, 2.0, 1.0, 1.0, 2.0, 1.0];
    assert_eq!(kept_tokens(&filters(4, 1.0, 0.0), &row), (vec![0, 1, 2, 4], 0.0));
    // Six equal tokens: 0.4 needs three of them.
    assert_eq!(kept_tokens(&filters(0, 0.4, 0.0), &[0.0; 6]).0, [0, 1, 2]);
    assert_eq!(kept_tokens(&filters(1, 1.0, 0.0), &[0.0; 6]).0, [0]);
}

#[test]
fn top_p_works_on_what_top_k_left_renormalised() {
    // Probabilities 0.4, 0.3, 0.2, 0.1. Of the first two, 0.4 / 0.7 = 0.571.
    let row: Vec<f64> = [0.4f64, 0.3, 0.2, 0.1].map(f64::ln).to_vec();
    assert_eq!(kept_tokens(&filters(0, 0.55, 0.0), &row).0, [0, 1]);
    assert_eq!(kept_tokens(&filters(2, 0.55, 0.0), &row).0, [0]);
    assert_eq!(kept_tokens(&filters(0, 0.75, 0.0), &row).0, [0, 1, 2]);
    assert_eq!(kept_tokens(&filters(0, 1.0, 0.6), &row).0, [0, 1]);
    assert_eq!(kept_tokens(&filters(0, 1.0, 1.0), &row).0, [0]);
    // However small p is, one stays.
    assert_eq!(kept_tokens(&filters(0, f32::MIN_POSITIVE, 0.0), &row).0, [0]);
}

#[test]
fn margins_are_the_distance_of_each_cut() {
    let row: Vec<f64> = [0.4f64, 0.3, 0.2, 0.1].map(f64::ln).to_vec();
    let near = |found: f64, expected: f64| assert!((found - expected).abs() < 1e-6, "{found} instead of {expected}");
    near(kept_tokens(&filters(2, 1.0, 0.0), &row).1, (0.3f64 / 0.2).ln());
    // The threshold 0.65 lies between the sums 0.4 and 0.7; 0.7 is nearer.
    near(kept_tokens(&filters(0, 0.65, 0.0), &row).1, (0.7f64 / 0.65).ln());
    near(kept_tokens(&filters(0, 0.41, 0.0), &row).1, (0.41f64 / 0.4).ln());
    near(kept_tokens(&filters(0, 0.55, 0.0), &row).1, (0.7f64 / 0.55).ln());
    // 0.6 of 0.4 is 0.24: 0.3 is above, 0.2 below.
    near(kept_tokens(&filters(0, 1.0, 0.6), &row).1, (0.24f64 / 0.2).ln());
    assert_eq!(kept_tokens(&filters(0, 1.0, 0.0), &row).1, f64::INFINITY);
    assert_eq!(kept_tokens(&filters(4, 1.0, 0.0), &row).1, f64::INFINITY);
    assert_eq!(kept_tokens(&filters(1, 0.5, 0.5), &[3.0]).1, f64::INFINITY);
}

/// A vocabulary of the real size, where top-p drops a tail unsorted and sorts in several groups.
#[test]
fn large_vocabularies_equal_the_reference() {
    let mut noise = crate::Noise::new(11, 0, 0);
    for spread in [0.05, 1.0, 4.0] {
        let row: Vec<f64> = (0..163_840).map(|token| spread * noise.gumbel(token)).collect();
        for params in [filters(0, 0.9, 0.0), filters(0, 0.3, 0.05), filters(1000, 0.95, 0.0), filters(50, 0.8, 0.1)] {
            assert_eq!(kept_tokens(&params, &row).0, reference(&params, &row), "spread {spread}, {params:?}");
        }
    }
}
