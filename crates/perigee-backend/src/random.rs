//! Random weights as a rule: a weight is a function of (seed, tensor name, element index), made of integers and one
//! rounding, so that every device and every tensor-parallel degree gets the same bits without a checkpoint.

use crate::weights::DType;

/// How the elements of a random tensor are spread.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
pub enum Distribution {
    /// Always this value.
    Constant(f32),
    /// Uniform on [low, high).
    Uniform {
        /// Lower end.
        low: f32,
        /// Upper end.
        high: f32,
    },
    /// About normal with mean 0: the centred sum of four 16-bit uniforms, scaled to this standard deviation.
    Normal {
        /// Standard deviation.
        deviation: f32,
    },
}

/// The rule for a slice of a tensor: element (i, j) of the slice is element `first + i * row_stride + j` of the tensor.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct RandomFill {
    /// Key of the tensor: [`tensor_key`] of seed and name.
    pub key: u64,
    /// How elements are spread.
    pub distribution: Distribution,
    /// Index of the slice's first element in the whole tensor.
    pub first: u64,
    /// Elements of the whole tensor between the starts of two rows of the slice.
    pub row_stride: u64,
}

/// Finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection of 64-bit words that mixes every bit.
pub fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// The key of a tensor: FNV-1a of its name, mixed with the seed.
pub fn tensor_key(seed: u64, name: &str) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for byte in name.bytes() {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    mix(hash ^ mix(seed.wrapping_add(0x9e37_79b9_7f4a_7c15)))
}

/// Element `index` of the tensor with this key, in float32 before rounding to the stored type. Devices repeat exactly
/// these operations; each float operation here is one IEEE operation (no fused multiply-add).
pub fn element(key: u64, distribution: Distribution, index: u64) -> f32 {
    let bits = mix(key.wrapping_add(index.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
    match distribution {
        Distribution::Constant(value) => value,
        Distribution::Uniform { low, high } => {
            // 24 bits: exact in float32.
            let unit = (bits >> 40) as f32 * (1.0 / 16_777_216.0);
            low + (high - low) * unit
        }
        Distribution::Normal { deviation } => {
            let sum = (bits & 0xffff) + ((bits >> 16) & 0xffff) + ((bits >> 32) & 0xffff) + (bits >> 48);
            // The sum of four uniforms on 0..65536 has mean 2 * 65535 and variance 4 * (65536^2 - 1) / 12; the factor
            // below is 1 / sqrt(that). The centred sum is an integer under 2^18: exact in float32.
            let centred = sum as i64 - 131_070;
            centred as f32 * (2.642_899_8e-5 * deviation)
        }
    }
}

impl RandomFill {
    /// All elements of a slice of this shape (one or two dimensions), rounded to `dtype` and widened again.
    pub fn values(&self, shape: &[usize], dtype: DType) -> Vec<f32> {
        let columns = shape.last().copied().unwrap_or(1);
        let rows = shape.iter().product::<usize>().checked_div(columns).unwrap_or(0);
        let mut out = Vec::with_capacity(rows * columns);
        for row in 0..rows as u64 {
            let start = self.first + row * self.row_stride;
            out.extend((0..columns as u64).map(|column| {
                let value = element(self.key, self.distribution, start + column);
                match dtype {
                    DType::Fp32 => value,
                    DType::Bf16 => half::bf16::from_f32(value).to_f32(),
                }
            }));
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normal_has_the_asked_mean_and_deviation() {
        let key = tensor_key(7, "model.norm.weight");
        let draws: Vec<f64> =
            (0..200_000).map(|i| f64::from(element(key, Distribution::Normal { deviation: 0.02 }, i))).collect();
        let mean = draws.iter().sum::<f64>() / draws.len() as f64;
        let variance = draws.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / draws.len() as f64;
        assert!(mean.abs() < 2e-4, "mean {mean}");
        assert!((variance.sqrt() / 0.02 - 1.0).abs() < 0.01, "deviation {}", variance.sqrt());
    }

    #[test]
    fn uniform_stays_in_its_range() {
        let key = tensor_key(0, "x");
        let draws: Vec<f32> =
            (0..10_000).map(|i| element(key, Distribution::Uniform { low: -6.9, high: -2.3 }, i)).collect();
        assert!(draws.iter().all(|x| (-6.9..-2.3).contains(x)));
        assert!(draws.iter().any(|&x| x < -6.8) && draws.iter().any(|&x| x > -2.4));
    }

    #[test]
    fn a_slice_equals_the_same_part_of_the_whole() {
        let whole = RandomFill {
            key: tensor_key(3, "w"),
            distribution: Distribution::Normal { deviation: 1.0 },
            first: 0,
            row_stride: 8,
        };
        let all = whole.values(&[6, 8], DType::Bf16);
        let part = RandomFill { first: 2 * 8 + 4, ..whole }.values(&[3, 4], DType::Bf16);
        for row in 0..3 {
            assert_eq!(part[row * 4..][..4], all[(row + 2) * 8 + 4..][..4]);
        }
    }

    #[test]
    fn names_and_seeds_give_different_tensors() {
        let draw = |seed, name: &str| element(tensor_key(seed, name), Distribution::Normal { deviation: 1.0 }, 5);
        assert_ne!(draw(0, "a"), draw(0, "b"));
        assert_ne!(draw(0, "a"), draw(1, "a"));
    }
}
