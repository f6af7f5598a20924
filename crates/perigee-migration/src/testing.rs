//! What this crate's tests share: a geometry small enough to flip every bit of a handoff, the published one, and seeded property tests.

use perigee_backend::{CacheShape, DType};
use proptest::test_runner::{Config, RngSeed};

use crate::geometry::Geometry;

/// Two KDA layers of four heads, two MLA layers.
pub(crate) fn small_geometry() -> Geometry {
    Geometry {
        kda_layers: 2,
        kda_heads: 4,
        kda_head_dim: 2,
        conv: 4,
        mla_layers: 2,
        latent_width: 3,
        recurrent_dtype: DType::Fp32,
        tail_dtype: DType::Bf16,
        latent_dtype: DType::Bf16,
    }
}

/// That of the published 48B model in bfloat16.
pub(crate) fn published_geometry() -> Geometry {
    let rank = CacheShape {
        kda_layers: 20,
        kda_heads: 8,
        kda_head_dim: 128,
        conv: 4,
        mla_layers: 7,
        latent_width: 576,
        slots: 1,
        pages: 1,
    };
    Geometry::of_replica(&rank, 4, DType::Bf16).unwrap()
}

/// The same cases in every run.
pub(crate) fn config(cases: u32) -> Config {
    Config { cases, rng_seed: RngSeed::Fixed(5), failure_persistence: None, ..Config::default() }
}

/// Bytes that look like nothing in particular: splitmix64, low byte of each draw.
pub(crate) fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed;
    std::iter::repeat_with(|| {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) as u8
    })
    .take(length)
    .collect()
}
