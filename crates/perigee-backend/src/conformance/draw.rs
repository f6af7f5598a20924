//! Seeded draws for the suite: a SplitMix64 stream, and weights whose float64 values are exactly what their stored bytes
//! (or their random rule) say. It knows nothing of layers; the reference modules decide what is drawn and how widely.

use std::borrow::Cow;

use crate::random::{Distribution, RandomFill, mix, tensor_key};
use crate::weights::{DType, TensorSlice, TensorSource};

/// A SplitMix64 stream (Steele, Lea, Flood 2014).
pub(super) struct Draw(u64);

impl Draw {
    pub(super) fn new(seed: u64) -> Self {
        Self(mix(seed.wrapping_add(0x9e37_79b9_7f4a_7c15)))
    }

    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// Uniform on [0, 1), 53 bits.
    fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1_u64 << 53) as f64
    }

    pub(super) fn uniform(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.unit()
    }

    /// Standard normal, by Box and Muller.
    pub(super) fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.unit()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.unit()).cos()
    }

    /// Uniform on 0..bound; the modulo bias is beneath notice for the bounds used here.
    pub(super) fn below(&mut self, bound: usize) -> usize {
        (self.bits() % bound as u64) as usize
    }

    /// `count` normals of this deviation, rounded to `dtype`.
    pub(super) fn normals(&mut self, count: usize, deviation: f64, dtype: DType) -> Vec<f64> {
        (0..count).map(|_| round(deviation * self.normal(), dtype)).collect()
    }

    /// 0..count in a random order (Fisher and Yates).
    pub(super) fn permutation(&mut self, count: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..count).collect();
        for last in (1..count).rev() {
            order.swap(last, self.below(last + 1));
        }
        order
    }

    /// Sizes of consecutive chunks that make up `total`: single tokens, sizes beside the powers of two, and large ones.
    pub(super) fn chunks(&mut self, total: usize) -> Vec<usize> {
        const SIZES: [usize; 12] = [1, 1, 2, 3, 7, 15, 16, 17, 33, 64, 65, 100];
        let mut left = total;
        let mut chunks = Vec::new();
        while left > 0 {
            let size = SIZES[self.below(SIZES.len())].min(left);
            chunks.push(size);
            left -= size;
        }
        chunks
    }
}

/// The nearest number that `dtype` can hold.
pub(super) fn round(value: f64, dtype: DType) -> f64 {
    match dtype {
        DType::Fp32 => f64::from(value as f32),
        DType::Bf16 => half::bf16::from_f64(value).to_f64(),
    }
}

/// Little-endian elements of `dtype`; values are rounded to it.
pub(super) fn encode(values: &[f64], dtype: DType) -> Vec<u8> {
    match dtype {
        DType::Fp32 => values.iter().flat_map(|&value| (value as f32).to_le_bytes()).collect(),
        DType::Bf16 => values.iter().flat_map(|&value| half::bf16::from_f64(value).to_le_bytes()).collect(),
    }
}

/// Elements of little-endian bytes.
pub(super) fn decode(bytes: &[u8], dtype: DType) -> Vec<f32> {
    match dtype {
        DType::Fp32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        DType::Bf16 => bytes.chunks_exact(2).map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
    }
}

/// A weight in both forms: what the backend loads, and the same numbers in float64.
pub(super) struct Weight {
    name: String,
    shape: Vec<usize>,
    dtype: DType,
    source: TensorSource<'static>,
    /// Row-major, exactly the stored numbers.
    pub(super) values: Vec<f64>,
}

impl Weight {
    /// Stored as bytes: `values` rounded to `dtype`.
    pub(super) fn stored(name: &str, shape: &[usize], dtype: DType, values: &[f64]) -> Self {
        let bytes = encode(values, dtype);
        Self {
            name: name.to_owned(),
            shape: shape.to_vec(),
            dtype,
            values: decode(&bytes, dtype).into_iter().map(f64::from).collect(),
            source: TensorSource::Bytes(Cow::Owned(bytes)),
        }
    }

    /// Not stored: the backend follows the rule by itself.
    fn ruled(name: &str, shape: &[usize], dtype: DType, fill: RandomFill) -> Self {
        Self {
            name: name.to_owned(),
            shape: shape.to_vec(),
            dtype,
            values: fill.values(shape, dtype).into_iter().map(f64::from).collect(),
            source: TensorSource::Random(fill),
        }
    }

    /// The weight as a backend takes it.
    pub(super) fn slice(&self) -> TensorSlice<'_> {
        let source = match &self.source {
            TensorSource::Bytes(bytes) => TensorSource::Bytes(Cow::Borrowed(bytes.as_ref())),
            TensorSource::Random(fill) => TensorSource::Random(*fill),
        };
        TensorSlice { name: self.name.clone(), shape: self.shape.clone(), dtype: self.dtype, source }
    }

    /// The same weight after a change of its numbers; the result is stored as bytes.
    pub(super) fn edited(&self, change: impl FnOnce(&mut [f64])) -> Self {
        let mut values = self.values.clone();
        change(&mut values);
        Self::stored(&self.name, &self.shape, self.dtype, &values)
    }

    /// W x for one vector: x W^T of the model description.
    pub(super) fn apply(&self, x: &[f64]) -> Vec<f64> {
        self.values.chunks_exact(x.len()).map(|row| dot(row, x)).collect()
    }
}

/// An inner product.
pub(super) fn dot(left: &[f64], right: &[f64]) -> f64 {
    left.iter().zip(right).map(|(a, b)| a * b).sum()
}

/// How the weights of a case reach the backend.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    /// Drawn here and handed over as bytes.
    Bytes,
    /// As random rules, each with an offset and a row stride of its own, as a slice of a larger tensor has.
    Rules,
}

/// Draws the weights of a layer.
pub(super) struct WeightDraw {
    draw: Draw,
    origin: Origin,
    seed: u64,
}

impl WeightDraw {
    pub(super) fn new(seed: u64, origin: Origin) -> Self {
        Self { draw: Draw::new(seed), origin, seed }
    }

    /// Normal with mean 0, stored in bfloat16.
    pub(super) fn normal(&mut self, name: &str, shape: &[usize], deviation: f64) -> Weight {
        self.weight(name, shape, DType::Bf16, Distribution::Normal { deviation: deviation as f32 })
    }

    /// Uniform, stored in `dtype`.
    pub(super) fn uniform(&mut self, name: &str, shape: &[usize], dtype: DType, range: [f64; 2]) -> Weight {
        self.weight(name, shape, dtype, Distribution::Uniform { low: range[0] as f32, high: range[1] as f32 })
    }

    fn weight(&mut self, name: &str, shape: &[usize], dtype: DType, distribution: Distribution) -> Weight {
        if self.origin == Origin::Rules {
            let columns = shape.last().copied().unwrap_or(1) as u64;
            let row_stride = columns + 24;
            let fill =
                RandomFill { key: tensor_key(self.seed, name), distribution, first: 3 * row_stride + 8, row_stride };
            return Weight::ruled(name, shape, dtype, fill);
        }
        let count = shape.iter().product();
        let values: Vec<f64> = match distribution {
            Distribution::Constant(value) => vec![f64::from(value); count],
            Distribution::Uniform { low, high } => {
                (0..count).map(|_| self.draw.uniform(low.into(), high.into())).collect()
            }
            Distribution::Normal { deviation } => {
                (0..count).map(|_| f64::from(deviation) * self.draw.normal()).collect()
            }
        };
        Weight::stored(name, shape, dtype, &values)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stored_values_are_those_of_the_bytes() {
        let weight = Weight::stored("w", &[2, 2], DType::Bf16, &[1.0, 1.0 + 1.0 / 512.0, -3.0, 0.1]);
        let read: Vec<f64> = weight.slice().to_f32().unwrap().into_iter().map(f64::from).collect();
        assert_eq!(weight.values, read);
        assert_eq!(weight.values[1], 1.0, "a tie rounds to even");
        assert_eq!(weight.apply(&[2.0, 1.0]), vec![3.0, -6.0 + weight.values[3]]);
    }

    #[test]
    fn rules_give_the_values_that_a_backend_will_draw() {
        let weight = WeightDraw::new(5, Origin::Rules).normal("w", &[3, 4], 1.0);
        let read: Vec<f64> = weight.slice().to_f32().unwrap().into_iter().map(f64::from).collect();
        assert_eq!(weight.values, read);
        assert!(matches!(weight.slice().source, TensorSource::Random(_)));
    }

    #[test]
    fn chunks_cover_the_whole_and_permutations_are_complete() {
        let mut draw = Draw::new(1);
        for total in [1, 2, 64, 200] {
            let chunks = draw.chunks(total);
            assert_eq!(chunks.iter().sum::<usize>(), total);
            assert!(chunks.iter().all(|&size| size > 0));
        }
        let mut order = draw.permutation(20);
        order.sort_unstable();
        assert_eq!(order, (0..20).collect::<Vec<_>>());
    }

    #[test]
    fn normals_have_unit_deviation() {
        let draws = Draw::new(2).normals(100_000, 1.0, DType::Fp32);
        let mean = draws.iter().sum::<f64>() / draws.len() as f64;
        let variance = draws.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / draws.len() as f64;
        assert!(mean.abs() < 0.02 && (variance - 1.0).abs() < 0.02, "mean {mean}, variance {variance}");
    }
}
