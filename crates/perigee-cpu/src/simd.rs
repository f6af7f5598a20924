//! Inner loops that the compiler vectorises, compiled for the widest instruction set of the machine by `pulp`'s dispatch:
//! dot products, scaled additions and the exponential. Each is a plain loop over fixed-size lanes.

use half::bf16;
use pulp::{Simd, WithSimd};

const LANES: usize = 32;

/// An element of a stored matrix, widened to float32 on use.
pub(crate) trait Element: Copy + Send + Sync {
    /// The value as float32, exactly.
    fn widen(self) -> f32;
}

impl Element for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
}

struct Dot<'a, E> {
    x: &'a [f32],
    w: &'a [E],
}

impl<E: Element> WithSimd for Dot<'_, E> {
    type Output = f32;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> f32 {
        let mut lanes = [0f32; LANES];
        let (x, x_rest) = self.x.as_chunks::<LANES>();
        let (w, w_rest) = self.w.as_chunks::<LANES>();
        for (x, w) in x.iter().zip(w) {
            for lane in 0..LANES {
                lanes[lane] = x[lane].mul_add(w[lane].widen(), lanes[lane]);
            }
        }
        let mut sum = 0f32;
        for (x, w) in x_rest.iter().zip(w_rest) {
            sum = x.mul_add(w.widen(), sum);
        }
        sum + pairwise(&mut lanes)
    }
}

/// Sum of x[i] w[i].
#[inline]
pub(crate) fn dot<E: Element>(x: &[f32], w: &[E]) -> f32 {
    pulp::Arch::new().dispatch(Dot { x, w })
}

/// Rows of activations that share one pass over a weight.
pub(crate) const GROUP: usize = 4;

struct DotRows<'a, E, const N: usize> {
    x: [&'a [f32]; N],
    w: &'a [E],
    out: &'a mut [f32],
    stride: usize,
}

impl<E: Element, const N: usize> WithSimd for DotRows<'_, E, N> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let width = self.x[0].len();
        let x = self.x.map(|x| S::as_simd_f32s(x));
        // A row of the weight is widened once and then read N times from the nearest cache.
        let mut wide = vec![0f32; width];
        for (row, w) in self.w.chunks_exact(width).enumerate() {
            for (to, from) in wide.iter_mut().zip(w) {
                *to = from.widen();
            }
            let (w, w_rest) = S::as_simd_f32s(&wide);
            for (index, (x, x_rest)) in x.iter().enumerate() {
                let mut sums = [simd.splat_f32s(0.0); 4];
                let (x4, x1) = x.as_chunks::<4>();
                let (w4, w1) = w.as_chunks::<4>();
                for (x, w) in x4.iter().zip(w4) {
                    sums[0] = simd.mul_add_f32s(x[0], w[0], sums[0]);
                    sums[1] = simd.mul_add_f32s(x[1], w[1], sums[1]);
                    sums[2] = simd.mul_add_f32s(x[2], w[2], sums[2]);
                    sums[3] = simd.mul_add_f32s(x[3], w[3], sums[3]);
                }
                for (&x, &w) in x1.iter().zip(w1) {
                    sums[0] = simd.mul_add_f32s(x, w, sums[0]);
                }
                let pair = [simd.add_f32s(sums[0], sums[1]), simd.add_f32s(sums[2], sums[3])];
                let mut sum = simd.reduce_sum_f32s(simd.add_f32s(pair[0], pair[1]));
                for (x, w) in x_rest.iter().zip(w_rest) {
                    sum += x * w;
                }
                self.out[index * self.stride + row] = sum;
            }
        }
    }
}

/// Adds lanes in pairs, so that the error grows with the logarithm of their number.
#[inline(always)]
fn pairwise(lanes: &mut [f32]) -> f32 {
    let mut width = lanes.len() / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// out[i * stride + r] = x[i] . w[r, :] for the rows of a row-major block; all N rows of x share each pass over w.
pub(crate) fn dot_rows<E: Element, const N: usize>(x: [&[f32]; N], w: &[E], out: &mut [f32], stride: usize) {
    pulp::Arch::new().dispatch(DotRows { x, w, out, stride });
}

struct AddScaledRows<'a, E> {
    scales: &'a [f32],
    w: &'a [E],
    out: &'a mut [f32],
}

impl<E: Element> WithSimd for AddScaledRows<'_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let width = self.out.len();
        for (&scale, row) in self.scales.iter().zip(self.w.chunks_exact(width)) {
            for (out, w) in self.out.iter_mut().zip(row) {
                *out = scale.mul_add(w.widen(), *out);
            }
        }
    }
}

/// out += sum over rows r of scales[r] w[r, :]: a row vector times a matrix.
pub(crate) fn add_scaled_rows<E: Element>(scales: &[f32], w: &[E], out: &mut [f32]) {
    pulp::Arch::new().dispatch(AddScaledRows { scales, w, out });
}

struct Widen<'a, E> {
    from: &'a [E],
    to: &'a mut [f32],
}

impl<E: Element> WithSimd for Widen<'_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for (to, from) in self.to.iter_mut().zip(self.from) {
            *to = from.widen();
        }
    }
}

/// Copies elements, widened.
pub(crate) fn widen<E: Element>(from: &[E], to: &mut [f32]) {
    pulp::Arch::new().dispatch(Widen { from, to });
}

/// e^x to about one unit in the last place for x in [-87, 88]; 0 below, where float32 has only subnormals left. Range
/// reduction by ln 2 in two parts (Cody and Waite 1980), then the degree-6 Taylor polynomial on |r| <= ln 2 / 2 in
/// Horner form with the last coefficients fitted (Cephes `expf`).
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    let clamped = x.clamp(-87.0, 88.0);
    let n = (clamped * std::f32::consts::LOG2_E + 12_582_912.0) - 12_582_912.0;
    let r = n.mul_add(-0.693_359_4, clamped);
    let r = n.mul_add(2.121_944_4e-4, r);
    let p = 1.987_569_1e-4_f32
        .mul_add(r, 1.398_199_9e-3)
        .mul_add(r, 8.333_452e-3)
        .mul_add(r, 4.166_579_6e-2)
        .mul_add(r, 1.666_666_5e-1)
        .mul_add(r, 0.5);
    let e = p.mul_add(r * r, r) + 1.0;
    let scaled = e * f32::from_bits(((n as i32 + 127) as u32) << 23);
    if x < -87.0 { 0.0 } else { scaled }
}

struct Exp<'a> {
    values: &'a mut [f32],
}

impl WithSimd for Exp<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for value in self.values {
            *value = exp(*value);
        }
    }
}

/// Exponentials in place. Not-a-number stays not-a-number.
pub(crate) fn exp_all(values: &mut [f32]) {
    pulp::Arch::new().dispatch(Exp { values });
}

struct SiluTimes<'a> {
    gate: &'a mut [f32],
    up: &'a [f32],
}

impl WithSimd for SiluTimes<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for (gate, up) in self.gate.iter_mut().zip(self.up) {
            *gate = *gate * logistic(*gate) * up;
        }
    }
}

/// gate = silu(gate) . up, silu(a) = a sigmoid(a).
pub(crate) fn silu_times(gate: &mut [f32], up: &[f32]) {
    pulp::Arch::new().dispatch(SiluTimes { gate, up });
}

struct Silu<'a> {
    values: &'a mut [f32],
}

impl WithSimd for Silu<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for value in self.values {
            *value *= logistic(*value);
        }
    }
}

/// silu in place.
pub(crate) fn silu_all(values: &mut [f32]) {
    pulp::Arch::new().dispatch(Silu { values });
}

struct Sigmoid<'a> {
    values: &'a mut [f32],
}

impl WithSimd for Sigmoid<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for value in self.values {
            *value = logistic(*value);
        }
    }
}

/// The logistic function in place.
pub(crate) fn sigmoid_all(values: &mut [f32]) {
    pulp::Arch::new().dispatch(Sigmoid { values });
}

/// 1 / (1 + e^-x). For large negative x the exponential stops growing at e^88, whose reciprocal is as good as 0.
#[inline(always)]
fn logistic(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

struct Convolve<'a> {
    padded: &'a [f32],
    taps: &'a [f32],
    out: &'a mut [f32],
    width: usize,
}

impl WithSimd for Convolve<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let width = self.width;
        for (step, out) in self.out.chunks_exact_mut(width).enumerate() {
            out.fill(0.0);
            for (tap, weights) in self.taps.chunks_exact(width).enumerate() {
                let x = &self.padded[(step + tap) * width..(step + tap + 1) * width];
                for ((out, weight), x) in out.iter_mut().zip(weights).zip(x) {
                    *out = weight.mul_add(*x, *out);
                }
            }
        }
    }
}

/// Depthwise causal convolution: out[t, c] = sum over i of taps[i, c] padded[t + i, c].
pub(crate) fn convolve(padded: &[f32], taps: &[f32], width: usize, out: &mut [f32]) {
    pulp::Arch::new().dispatch(Convolve { padded, taps, out, width });
}

/// Runs a vectorisable loop under the widest instruction set.
pub(crate) fn dispatch<W: WithSimd>(work: W) -> W::Output {
    pulp::Arch::new().dispatch(work)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_accurate_where_float32_is_normal() {
        let mut worst = 0f64;
        for step in 0..400_000 {
            let x = -87.0 + step as f32 * (175.0 / 400_000.0);
            let mut value = [x];
            exp_all(&mut value);
            let want = f64::from(x).exp();
            worst = worst.max((f64::from(value[0]) / want - 1.0).abs());
        }
        assert!(worst < 2e-7, "worst relative error {worst}");
        let mut edge = [f32::NEG_INFINITY, -1000.0, -88.0, 0.0, f32::NAN];
        exp_all(&mut edge);
        assert_eq!(edge[..4], [0.0, 0.0, 0.0, 1.0]);
        assert!(edge[4].is_nan());
    }

    #[test]
    fn dot_handles_every_length() {
        for length in [0, 1, 31, 32, 33, 64, 100] {
            let x: Vec<f32> = (0..length).map(|i| i as f32).collect();
            let w: Vec<bf16> = (0..length).map(|i| bf16::from_f32((i % 3) as f32)).collect();
            let want: f32 = (0..length).map(|i| i as f32 * (i % 3) as f32).sum();
            assert_eq!(dot(&x, &w), want);
        }
    }
}
