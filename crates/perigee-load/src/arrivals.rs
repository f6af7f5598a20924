//! Times at which conversations of an open loop begin, drawn from a seed.

use std::time::Duration;

use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, Exp1, Gamma};

use crate::scenario::Arrivals;

/// Times from the start of the run, never falling. Ends only where the arrivals are no process with a rate.
pub(crate) struct Times {
    process: Process,
    random: ChaCha8Rng,
    /// Seconds; for the ramp the expected number of arrivals until then.
    now: f64,
}

enum Process {
    Poisson { rate: f64 },
    Gamma(Gamma<f64>),
    Ramp { from: f64, to: f64, over: f64 },
}

impl Times {
    /// None where times come from elsewhere: a trace, or clients that wait.
    pub(crate) fn new(arrivals: &Arrivals, random: ChaCha8Rng) -> Option<Self> {
        let process = match *arrivals {
            Arrivals::Poisson { rate } => Process::Poisson { rate },
            Arrivals::Gamma { rate, cv } => Process::Gamma(Gamma::new(1.0 / (cv * cv), cv * cv / rate).ok()?),
            Arrivals::Ramp { from, to, over_s } => Process::Ramp { from, to, over: over_s },
            Arrivals::Trace { .. } | Arrivals::Closed { .. } => return None,
        };
        Some(Self { process, random, now: 0.0 })
    }
}

impl Iterator for Times {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let step = |random: &mut ChaCha8Rng| -> f64 { Exp1.sample(random) };
        let seconds = match &self.process {
            Process::Poisson { rate } => {
                self.now += step(&mut self.random) / rate;
                self.now
            }
            Process::Gamma(gaps) => {
                self.now += gaps.sample(&mut self.random);
                self.now
            }
            Process::Ramp { from, to, over } => {
                self.now += step(&mut self.random);
                when_expected(self.now, *from, *to, *over)
            }
        };
        Duration::try_from_secs_f64(seconds).ok()
    }
}

/// When a ramp has had `count` arrivals in the mean: the inverse of its rate's integral.
fn when_expected(count: f64, from: f64, to: f64, over: f64) -> f64 {
    let on_the_ramp = (from + to) / 2.0 * over;
    if count >= on_the_ramp {
        return over + (count - on_the_ramp) / to;
    }
    // from t + slope t² / 2 = count, in the form that has no difference of nearly equal numbers.
    let slope = (to - from) / over;
    2.0 * count / (from + (from * from + 2.0 * slope * count).max(0.0).sqrt())
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    fn times(arrivals: &Arrivals, seed: u64, count: usize) -> Vec<f64> {
        let times = Times::new(arrivals, ChaCha8Rng::seed_from_u64(seed)).expect("a process");
        times.take(count).map(|time| time.as_secs_f64()).collect()
    }

    fn gaps(times: &[f64]) -> Vec<f64> {
        times.windows(2).map(|pair| pair[1] - pair[0]).collect()
    }

    fn mean_and_cv(values: &[f64]) -> (f64, f64) {
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / values.len() as f64;
        (mean, variance.sqrt() / mean)
    }

    #[test]
    fn gaps_have_the_mean_and_the_variation_that_were_asked_for() {
        for (arrivals, cv) in [
            (Arrivals::Poisson { rate: 50.0 }, 1.0),
            (Arrivals::Gamma { rate: 50.0, cv: 2.0 }, 2.0),
            (Arrivals::Gamma { rate: 50.0, cv: 0.5 }, 0.5),
        ] {
            let (mean, found) = mean_and_cv(&gaps(&times(&arrivals, 7, 50_000)));
            assert!(
                (mean * 50.0 - 1.0).abs() < 0.03 && (found / cv - 1.0).abs() < 0.05,
                "{arrivals:?}: {mean}, {found}"
            );
        }
    }

    #[test]
    fn a_ramp_has_as_many_arrivals_as_the_area_under_it() {
        for (from, to) in [(0.0, 200.0), (200.0, 20.0), (100.0, 100.0)] {
            let times = times(&Arrivals::Ramp { from, to, over_s: 100.0 }, 3, 100_000);
            for until in [50.0_f64, 100.0, 150.0] {
                let ramp = until.min(100.0);
                let expected = from * ramp + (to - from) * ramp * ramp / 200.0 + to * (until - ramp);
                let found = times.iter().filter(|time| **time < until).count() as f64;
                assert!(
                    (found - expected).abs() < 5.0 * expected.sqrt(),
                    "{from} to {to}, {until} s: {found}, {expected}"
                );
            }
        }
    }

    #[test]
    fn the_seed_decides() {
        let arrivals = Arrivals::Poisson { rate: 10.0 };
        assert_eq!(times(&arrivals, 1, 100), times(&arrivals, 1, 100));
        assert_ne!(times(&arrivals, 1, 100), times(&arrivals, 2, 100));
    }
}
