//! A distribution of times: a histogram of three significant digits, and mean and maximum to the last one.

use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;

/// Microseconds in an hour: longer times count as that.
const LONGEST_US: u64 = 3_600_000_000;
/// Points of a curve.
const POINTS: usize = 200;

/// A distribution of times.
#[derive(Debug, Clone)]
pub(crate) struct Spread {
    /// Absent only where the histogram could not be made, which its fixed bounds exclude.
    histogram: Option<Histogram<u64>>,
    sum: Duration,
    max: Duration,
    count: u64,
}

/// What a report says of it, in milliseconds.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Summary {
    /// Number of values.
    pub count: u64,
    /// Mean.
    pub mean: f64,
    /// Median.
    pub p50: f64,
    /// 90th percentile.
    pub p90: f64,
    /// 99th percentile.
    pub p99: f64,
    /// The longest.
    pub max: f64,
}

impl Default for Spread {
    fn default() -> Self {
        let histogram = Histogram::new_with_bounds(1, LONGEST_US, 3).ok();
        Self { histogram, sum: Duration::ZERO, max: Duration::ZERO, count: 0 }
    }
}

impl Spread {
    pub(crate) fn add(&mut self, time: Duration) {
        if let Some(histogram) = &mut self.histogram {
            histogram.saturating_record(time.as_micros() as u64);
        }
        self.sum += time;
        self.max = self.max.max(time);
        self.count += 1;
    }

    fn quantile(&self, quantile: f64) -> f64 {
        let value = self.histogram.as_ref().map_or(0, |histogram| histogram.value_at_quantile(quantile));
        (value as f64 / 1e3).min(milliseconds(self.max))
    }

    pub(crate) fn summary(&self) -> Summary {
        if self.count == 0 {
            return Summary::default();
        }
        Summary {
            count: self.count,
            mean: milliseconds(self.sum) / self.count as f64,
            p50: self.quantile(0.5),
            p90: self.quantile(0.9),
            p99: self.quantile(0.99),
            max: milliseconds(self.max),
        }
    }

    /// Points [milliseconds, share of values not above], ascending.
    pub(crate) fn curve(&self) -> Vec<[f64; 2]> {
        if self.count == 0 {
            return Vec::new();
        }
        // Even steps, and closer ones at the end, where what matters is.
        let even = (1..POINTS).map(|step| step as f64 / POINTS as f64);
        let tail = [0.9975, 0.999, 0.9995, 1.0];
        even.chain(tail).map(|quantile| [self.quantile(quantile), quantile]).collect()
    }
}

pub(crate) fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_summary_is_near_the_values_and_exact_at_the_ends() {
        let mut spread = Spread::default();
        assert_eq!((spread.summary(), spread.curve().len()), (Summary::default(), 0));
        (1..=10_000).for_each(|step| spread.add(Duration::from_micros(step * 37)));
        let summary = spread.summary();
        for (found, expected) in [(summary.p50, 185.0), (summary.p90, 333.0), (summary.p99, 366.3)] {
            assert!((found / expected - 1.0).abs() < 2e-3, "{found}, {expected}");
        }
        assert!((summary.mean - 0.037 * 5000.5).abs() < 1e-6);
        assert_eq!((summary.count, summary.max), (10_000, 370.0));
        let curve = spread.curve();
        assert!(curve.windows(2).all(|pair| pair[0][0] <= pair[1][0] && pair[0][1] < pair[1][1]));
        assert_eq!(curve.last(), Some(&[370.0, 1.0]));
    }

    #[test]
    fn times_beyond_the_range_are_not_lost() {
        let mut spread = Spread::default();
        spread.add(Duration::from_secs(100_000));
        spread.add(Duration::ZERO);
        assert_eq!((spread.summary().count, spread.summary().max), (2, 1e8));
    }
}
