//! The suite's own truth: every op in float64, written from the equations of the model in their plainest form (step
//! recurrence, attention without absorption, experts in a loop). It shares no arithmetic with any backend and is not fast.

pub(super) mod experts;
pub(super) mod kda;
pub(super) mod mla;

/// The logistic function.
pub(super) fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// x sigma(x).
pub(super) fn silu(x: f64) -> f64 {
    x * sigmoid(x)
}

/// ln(1 + e^x), without overflow.
pub(super) fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

/// w . x / sqrt(mean(x^2) + eps).
pub(super) fn rms_norm(x: &[f64], weight: &[f64], eps: f64) -> Vec<f64> {
    let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    let factor = 1.0 / (mean + eps).sqrt();
    x.iter().zip(weight).map(|(x, w)| w * x * factor).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scalar_functions_at_known_points() {
        assert_eq!(sigmoid(0.0), 0.5);
        assert!((silu(1.0) - 0.731_058_578_630_004_9).abs() < 1e-15);
        assert!((softplus(0.0) - 2.0_f64.ln()).abs() < 1e-15);
        assert_eq!(softplus(1000.0), 1000.0);
        assert!((softplus(-40.0) / (-40.0_f64).exp() - 1.0).abs() < 1e-12);
    }

    #[test]
    fn rms_norm_by_hand() {
        // mean of squares 12.5, plus eps 3.5: root 4.
        assert_eq!(rms_norm(&[3.0, 4.0], &[1.0, 2.0], 3.5), vec![0.75, 2.0]);
    }
}
