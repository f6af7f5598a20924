//! Digests of tensors that move: position-weighted sums of their elements' bits, cheap enough to run on a device over a
//! slot after it was written. They find damage, mix-ups and omissions; they are no protection against forgery.
//!
//! Element number i of a tensor (counted over all heads, or over all positions of a layer's latents) with bits b, read as
//! an unsigned 32-bit word (bf16 extended by zeros), contributes (i + 1) b; the digest is the sum mod 2^64. So digests of
//! disjoint parts add up to the digest of the whole, whoever holds the parts. Below 2^33 elements no single bit can
//! change without changing the sum: (i + 1) 2^k with k < 32 is then no multiple of 2^64.

use std::fmt;
use std::iter::Sum;
use std::ops::{Add, AddAssign};

use perigee_backend::{DType, StateKind};

use crate::geometry::{Geometry, STATE_KINDS, Tensor};

/// Digest of a tensor or of a part of one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Digest(pub u64);

impl Digest {
    /// Digest of a run of elements, little-endian bytes, the first of which is number `first` of its tensor. Bytes after
    /// the last whole element are left out: whoever has checked the shape has none.
    pub fn of(bytes: &[u8], dtype: DType, first: u64) -> Self {
        Self(match dtype {
            DType::Fp32 => weighted(bytes.as_chunks().0, first, u32::from_le_bytes),
            DType::Bf16 => weighted(bytes.as_chunks().0, first, |element| u16::from_le_bytes(element).into()),
        })
    }

    /// Digest of some heads of a state tensor; `first_head` is counted over the whole model.
    pub fn of_heads(geometry: &Geometry, kind: StateKind, first_head: u32, bytes: &[u8]) -> Self {
        Self::of(bytes, geometry.dtype(kind), u64::from(first_head).wrapping_mul(geometry.head_elements(kind)))
    }

    /// Digest of some positions of an MLA layer's latents, [positions, R + r]; `first` is absolute.
    pub fn of_positions(geometry: &Geometry, first: u64, bytes: &[u8]) -> Self {
        Self::of(bytes, geometry.latent_dtype, first.wrapping_mul(geometry.latent_width.into()))
    }
}

/// Elements that are summed up by their place among them, so that no factor has more than 32 bits: those products are what
/// processors have instructions for, several at a time.
const RUN: usize = 1 << 12;

/// The sum over elements by their number, that of the first of them being `first`.
fn weighted<const BYTES: usize>(elements: &[[u8; BYTES]], first: u64, bits: impl Fn([u8; BYTES]) -> u32) -> u64 {
    let (mut sum, mut begin) = (0_u64, first);
    for run in elements.chunks(RUN) {
        let (mut plain, mut by_place) = (0_u64, 0_u64);
        for (place, &element) in (1_u32..).zip(run) {
            let bits = u64::from(bits(element));
            plain += bits;
            by_place += u64::from(place) * bits;
        }
        sum = sum.wrapping_add(begin.wrapping_mul(plain)).wrapping_add(by_place);
        begin = begin.wrapping_add(RUN as u64);
    }
    sum
}

impl Add for Digest {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self(self.0.wrapping_add(other.0))
    }
}

impl AddAssign for Digest {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl Sum for Digest {
    fn sum<I: Iterator<Item = Self>>(parts: I) -> Self {
        parts.fold(Self::default(), Add::add)
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// A tensor that is not what it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DigestMismatch {
    /// A tensor's digests differ.
    #[error("{tensor}: digest {found}, expected {expected}; the copy is not the original, hand the session over again")]
    Tensor {
        /// The tensor.
        tensor: Tensor,
        /// Digest at the source.
        expected: Digest,
        /// Digest at the target.
        found: Digest,
    },
    /// There are more or fewer tensors.
    #[error("digests of {found} tensors, expected {expected}; the other side has another model")]
    Count {
        /// Tensors of this side's model.
        expected: usize,
        /// Tensors that the other side named.
        found: usize,
    },
}

/// Digests of every tensor of a session: of the state over all heads, of the latents over the positions that travel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorDigests {
    kda_layers: u32,
    /// [KDA layers, 4], then [MLA layers].
    digests: Vec<Digest>,
}

impl TensorDigests {
    /// Those of no elements at all.
    pub fn new(geometry: &Geometry) -> Self {
        let tensors = geometry.kda_layers as usize * STATE_KINDS.len() + geometry.mla_layers as usize;
        Self { kda_layers: geometry.kda_layers, digests: vec![Digest::default(); tensors] }
    }

    /// From their numbers in order, as the target of a handoff answers them.
    ///
    /// # Errors
    /// [`DigestMismatch::Count`] where this geometry has another number of tensors.
    pub fn from_numbers(geometry: &Geometry, numbers: &[u64]) -> Result<Self, DigestMismatch> {
        let mut all = Self::new(geometry);
        if numbers.len() != all.digests.len() {
            return Err(DigestMismatch::Count { expected: all.digests.len(), found: numbers.len() });
        }
        all.digests = numbers.iter().copied().map(Digest).collect();
        Ok(all)
    }

    /// Their numbers: the four state tensors of KDA layer 0, of layer 1, ..., then the latents of MLA layer 0, 1, ...
    pub fn numbers(&self) -> Vec<u64> {
        self.digests.iter().map(|digest| digest.0).collect()
    }

    /// Number of tensors.
    pub fn len(&self) -> usize {
        self.digests.len()
    }

    /// Whether there are no tensors.
    pub fn is_empty(&self) -> bool {
        self.digests.is_empty()
    }

    /// Adds a part's digest to its tensor; parts of layers that do not exist are not counted.
    pub fn add(&mut self, tensor: Tensor, part: Digest) {
        let index = self.index(tensor);
        if let Some(digest) = self.digests.get_mut(index) {
            *digest += part;
        }
    }

    /// Adds another side's digests, tensor by tensor: the ranks of a replica each have a part.
    ///
    /// # Errors
    /// [`DigestMismatch::Count`] where the other has another number of tensors.
    pub fn add_all(&mut self, other: &Self) -> Result<(), DigestMismatch> {
        self.check_count(other)?;
        self.digests.iter_mut().zip(&other.digests).for_each(|(mine, &theirs)| *mine += theirs);
        Ok(())
    }

    /// Compares a copy (`other`) with the original.
    ///
    /// # Errors
    /// The first tensor that differs.
    pub fn compare(&self, other: &Self) -> Result<(), DigestMismatch> {
        self.check_count(other)?;
        let differs = self.digests.iter().zip(&other.digests).position(|(mine, theirs)| mine != theirs);
        match differs {
            None => Ok(()),
            Some(index) => Err(DigestMismatch::Tensor {
                tensor: self.tensor(index),
                expected: self.digests[index],
                found: other.digests[index],
            }),
        }
    }

    fn check_count(&self, other: &Self) -> Result<(), DigestMismatch> {
        if self.digests.len() == other.digests.len() && self.kda_layers == other.kda_layers {
            return Ok(());
        }
        Err(DigestMismatch::Count { expected: self.digests.len(), found: other.digests.len() })
    }

    fn state_tensors(&self) -> usize {
        self.kda_layers as usize * STATE_KINDS.len()
    }

    fn index(&self, tensor: Tensor) -> usize {
        match tensor {
            Tensor::State { layer, .. } if layer >= self.kda_layers => usize::MAX,
            Tensor::State { layer, kind } => {
                let kind = STATE_KINDS.iter().position(|&other| other == kind).unwrap_or_default();
                layer as usize * STATE_KINDS.len() + kind
            }
            Tensor::Latents { layer } => self.state_tensors() + layer as usize,
        }
    }

    fn tensor(&self, index: usize) -> Tensor {
        match index.checked_sub(self.state_tensors()) {
            Some(layer) => Tensor::Latents { layer: layer as u32 },
            None => Tensor::State {
                layer: (index / STATE_KINDS.len()) as u32,
                kind: STATE_KINDS[index % STATE_KINDS.len()],
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::{config, small_geometry};

    fn words(bytes: &[u8]) -> u64 {
        bytes.as_chunks().0.iter().map(|&b| u64::from(u32::from_le_bytes(b))).sum()
    }

    #[test]
    fn a_digest_by_hand() {
        let bytes = [3_u32, 0, 5].map(u32::to_le_bytes).concat();
        assert_eq!(Digest::of(&bytes, DType::Fp32, 0), Digest(3 + 3 * 5));
        assert_eq!(Digest::of(&bytes, DType::Fp32, 10), Digest(11 * 3 + 13 * 5));
        let halves = [7_u16, 9].map(u16::to_le_bytes).concat();
        assert_eq!(Digest::of(&halves, DType::Bf16, 2), Digest(3 * 7 + 4 * 9));
        assert_eq!(Digest::of(&[0xff; 4], DType::Fp32, u64::MAX), Digest(0), "indices wrap rather than panic");
    }

    proptest! {
        #![proptest_config(config(300))]

        #[test]
        fn any_single_bit_shows(bytes in prop::collection::vec(any::<u8>(), 4..200), first in 0_u64..(1 << 32), bit in any::<usize>(), bf16 in any::<bool>()) {
            let dtype = if bf16 { DType::Bf16 } else { DType::Fp32 };
            let mut bytes = bytes;
            bytes.truncate(bytes.len() / 4 * 4);
            let before = Digest::of(&bytes, dtype, first);
            let bit = bit % (bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert_ne!(Digest::of(&bytes, dtype, first), before);
        }

        #[test]
        fn every_element_counts_by_its_number(
            seed in any::<u64>(),
            elements in prop::sample::select(vec![0, 1, RUN - 1, RUN, RUN + 1, 3 * RUN + 5]),
            first in any::<u64>(),
            bf16 in any::<bool>(),
        ) {
            let dtype = if bf16 { DType::Bf16 } else { DType::Fp32 };
            let numbers = (0..elements as u64).map(|i| (seed ^ i).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29) as u32);
            let bits: Vec<u32> = numbers.map(|number| if bf16 { number & 0xffff } else { number }).collect();
            let bytes: Vec<u8> = bits.iter().flat_map(|bits| bits.to_le_bytes()[..dtype.bytes()].to_vec()).collect();
            let term = |(i, &bits): (u64, &u32)| first.wrapping_add(i).wrapping_add(1).wrapping_mul(bits.into());
            let expected = (0..).zip(&bits).map(term).fold(0, u64::wrapping_add);
            prop_assert_eq!(Digest::of(&bytes, dtype, first), Digest(expected));
        }

        #[test]
        fn parts_add_up(bytes in prop::collection::vec(any::<u8>(), 0..200), cut in any::<usize>(), first in any::<u32>()) {
            let elements = bytes.len() / 2;
            let cut = cut % (elements + 1);
            let first = u64::from(first);
            let bytes = &bytes[..elements * 2];
            let (low, high) = bytes.split_at(cut * 2);
            let sum = Digest::of(low, DType::Bf16, first) + Digest::of(high, DType::Bf16, first + cut as u64);
            prop_assert_eq!(sum, Digest::of(bytes, DType::Bf16, first));
        }

        /// Heads a < b of equal size s: the digest changes by (b - a) s (sum of a - sum of b), so it shows unless their
        /// words have the same sum.
        #[test]
        fn swapped_heads_show(bytes in prop::collection::vec(any::<u8>(), 64), a in 0_usize..4, b in 0_usize..4) {
            let mut swapped = bytes.clone();
            swapped[a * 16..(a + 1) * 16].copy_from_slice(&bytes[b * 16..(b + 1) * 16]);
            swapped[b * 16..(b + 1) * 16].copy_from_slice(&bytes[a * 16..(a + 1) * 16]);
            let same_sum = words(&bytes[a * 16..(a + 1) * 16]) == words(&bytes[b * 16..(b + 1) * 16]);
            let same_digest = Digest::of(&swapped, DType::Fp32, 0) == Digest::of(&bytes, DType::Fp32, 0);
            prop_assert_eq!(same_digest, same_sum);
        }

        #[test]
        fn heads_rotated_by_one_show(bytes in prop::collection::vec(any::<u8>(), 64)) {
            let mut rotated = bytes.clone();
            rotated.rotate_left(16);
            // The first head goes back by 3 heads, the others come forward by one.
            let moved = 3 * i128::from(words(&bytes[..16])) == i128::from(words(&bytes[16..]));
            let same_digest = Digest::of(&rotated, DType::Fp32, 0) == Digest::of(&bytes, DType::Fp32, 0);
            prop_assert_eq!(same_digest, moved);
        }
    }

    #[test]
    fn tensors_are_told_apart() {
        let geometry = small_geometry();
        let mut source = TensorDigests::new(&geometry);
        assert_eq!(source.len(), 2 * 4 + 2);
        assert!(!source.is_empty());
        let tensor = Tensor::State { layer: 1, kind: StateKind::ConvK };
        source.add(tensor, Digest(5));
        source.add(Tensor::Latents { layer: 1 }, Digest(7));
        source.add(Tensor::State { layer: 2, kind: StateKind::Recurrent }, Digest(100));
        source.add(Tensor::Latents { layer: 2 }, Digest(100));
        assert_eq!(source.numbers(), [0, 0, 0, 0, 0, 0, 5, 0, 0, 7]);
        let mut target = TensorDigests::from_numbers(&geometry, &[0, 0, 0, 0, 0, 0, 4, 0, 0, 7]).unwrap();
        let error = source.compare(&target).unwrap_err();
        assert_eq!(error, DigestMismatch::Tensor { tensor, expected: Digest(5), found: Digest(4) });
        assert!(error.to_string().starts_with("tail of the k convolution of KDA layer 1: digest 0000000000000004"));
        let one = TensorDigests::from_numbers(&geometry, &[0, 0, 0, 0, 0, 0, 1, 0, 0, 0]).unwrap();
        target.add_all(&one).unwrap();
        assert_eq!(source.compare(&target), Ok(()));
        let count = TensorDigests::from_numbers(&geometry, &[1]).unwrap_err();
        assert_eq!(count, DigestMismatch::Count { expected: 10, found: 1 });
    }
}
