//! Gumbel noise as a function of (seed, choice, absolute position, token id). It defines the exact arithmetic that a
//! device sampler must repeat; it does not pick a token.
//!
//! Bit for bit:
//! 1. key = (low 32 bits of the seed, high 32 bits of the seed);
//!    counter = (choice, low 32 bits of the position, high 32 bits of the position, token id >> 2).
//! 2. words = Philox4x32-10(counter, key); x = words\[token id & 3\], so one evaluation serves four neighbours.
//! 3. u = (x + 0.5) * 2^-32 in f64. Both operations are exact there, so u is the same number on every machine and lies
//!    in \[2^-33, 1 - 2^-33\], never 0 or 1. (In f32 the sum would round, and u could reach 1.)
//! 4. g = -ln(-ln u) in f64. Libraries may differ in the last bit of ln, which is far below the margin that
//!    [`crate::Sampled`] reports.

use crate::philox::philox4x32_10;

/// No noise value exceeds this: the largest u gives 33 ln 2 = 22.87.
pub const GUMBEL_CEILING: f64 = 23.0;

/// The noise of one position of one choice: a row with one value a token. It remembers the last Philox block, so
/// walking the tokens in order costs one evaluation for four of them.
#[derive(Clone, Debug)]
pub struct Noise {
    key: [u32; 2],
    row: [u32; 3],
    block: u32,
    words: [u32; 4],
}

impl Noise {
    /// The noise row for `seed`, the `choice` (0 for the first of n) and the absolute position of the token to be
    /// drawn, counted from the start of the prompt.
    pub fn new(seed: u64, choice: u32, position: u64) -> Self {
        let key = [seed as u32, (seed >> 32) as u32];
        let row = [choice, position as u32, (position >> 32) as u32];
        let words = philox4x32_10([row[0], row[1], row[2], 0], key);
        Self { key, row, block: 0, words }
    }

    /// 32 random bits for a token.
    pub fn bits(&mut self, token: u32) -> u32 {
        let block = token >> 2;
        if block != self.block {
            self.words = philox4x32_10([self.row[0], self.row[1], self.row[2], block], self.key);
            self.block = block;
        }
        self.words[(token & 3) as usize]
    }

    /// The token's Gumbel noise, between -3.2 and [`GUMBEL_CEILING`].
    pub fn gumbel(&mut self, token: u32) -> f64 {
        gumbel(uniform(self.bits(token)))
    }
}

/// Maps 32 bits to the open interval (0, 1): (x + 0.5) * 2^-32, exact in f64.
pub fn uniform(bits: u32) -> f64 {
    const TWO_TO_MINUS_32: f64 = 1.0 / 4_294_967_296.0;
    (f64::from(bits) + 0.5) * TWO_TO_MINUS_32
}

/// The standard Gumbel quantile of `u` in (0, 1): -ln(-ln u).
pub fn gumbel(u: f64) -> f64 {
    -(-u.ln()).ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_is_open_and_exact_at_both_ends() {
        assert_eq!(uniform(0), 2f64.powi(-33));
        assert_eq!(uniform(u32::MAX), 1.0 - 2f64.powi(-33));
        assert!(gumbel(uniform(u32::MAX)) < GUMBEL_CEILING);
        assert!((gumbel(uniform(u32::MAX)) - 33.0 * std::f64::consts::LN_2).abs() < 1e-6);
        assert!(gumbel(uniform(0)) > -3.2);
    }

    #[test]
    fn bits_follow_the_documented_counter_and_lane() {
        let seed = 0x0123_4567_89ab_cdef;
        let position = 0x5_0000_0007;
        let mut noise = Noise::new(seed, 3, position);
        for token in [9, 0, 1, 2, 3, 4, 163_839, 5, 0] {
            let words = philox4x32_10([3, 7, 5, token / 4], [0x89ab_cdef, 0x0123_4567]);
            assert_eq!(noise.bits(token), words[token as usize % 4], "token {token}");
        }
    }

    /// The standard Gumbel distribution has mean 0.5772 (Euler) and variance pi^2 / 6.
    #[test]
    fn moments_are_those_of_the_gumbel_distribution() {
        let mut noise = Noise::new(1, 0, 0);
        let values: Vec<f64> = (0..100_000).map(|token| noise.gumbel(token)).collect();
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let variance = values.iter().map(|g| (g - mean).powi(2)).sum::<f64>() / values.len() as f64;
        assert!((mean - 0.577_215_66).abs() < 0.015, "mean {mean}");
        assert!((variance - std::f64::consts::PI.powi(2) / 6.0).abs() < 0.04, "variance {variance}");
    }
}
