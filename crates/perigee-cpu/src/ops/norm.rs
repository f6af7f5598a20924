//! RMS norms: w . x / sqrt(mean(x^2) + eps), in float32 whatever the activation type.

/// Normalises one row.
pub(crate) fn rms_norm_row(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let factor = inverse_rms(x, eps);
    for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
        *out = x * factor * weight;
    }
}

/// Normalises one row in place.
pub(crate) fn rms_norm_in_place(x: &mut [f32], weight: &[f32], eps: f32) {
    let factor = inverse_rms(x, eps);
    for (x, weight) in x.iter_mut().zip(weight) {
        *x = *x * factor * weight;
    }
}

fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    let mean = crate::simd::dot(x, x) / x.len() as f32;
    1.0 / (mean + eps).sqrt()
}
