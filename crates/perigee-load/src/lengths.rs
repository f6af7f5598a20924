//! Numbers of tokens drawn from what a scenario says.

use rand::Rng;
use rand_distr::{Distribution, LogNormal};

use crate::scenario::Length;

impl Length {
    /// A length, at least 1. `recorded` is the trace's.
    pub(crate) fn draw(&self, random: &mut impl Rng, recorded: u32) -> u32 {
        let length = match *self {
            Self::Fixed { tokens } => tokens,
            Self::Uniform { min, max } => random.random_range(min..=max),
            Self::LogNormal { median, sigma, max } => {
                let drawn = LogNormal::new(median.ln(), sigma).map_or(median, |lengths| lengths.sample(random));
                // A float beyond the range of an integer becomes its largest.
                (drawn.round() as u32).min(max)
            }
            Self::Trace => recorded,
        };
        length.max(1)
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    use super::*;

    #[test]
    fn lengths_follow_their_distribution() {
        let mut random = ChaCha8Rng::seed_from_u64(5);
        let mut draw = |length: &Length| -> Vec<u32> {
            let mut drawn: Vec<u32> = (0..20_001).map(|_| length.draw(&mut random, 17)).collect();
            drawn.sort_unstable();
            drawn
        };
        assert!(draw(&Length::Fixed { tokens: 9 }).iter().all(|length| *length == 9));
        assert!(draw(&Length::Trace).iter().all(|length| *length == 17));
        let uniform = draw(&Length::Uniform { min: 10, max: 30 });
        assert_eq!((uniform[0], uniform[20_000]), (10, 30));
        assert!((19..=21).contains(&uniform[10_000]), "{}", uniform[10_000]);
        let skewed = draw(&Length::LogNormal { median: 200.0, sigma: 1.0, max: 1000 });
        assert!((190..=210).contains(&skewed[10_000]), "{}", skewed[10_000]);
        // One standard deviation above: e times the median.
        assert!((520..=570).contains(&skewed[16_827]), "{}", skewed[16_827]);
        assert_eq!(skewed[20_000], 1000);
    }
}
