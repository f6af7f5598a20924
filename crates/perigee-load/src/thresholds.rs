//! Holds a report to what its scenario says the whole must reach.

use crate::Limits;
use crate::report::{Report, Summary};

pub(crate) fn misses(report: &Report) -> Vec<String> {
    let thresholds = &report.scenario.thresholds;
    let latencies = &report.latencies;
    let mut misses = Vec::new();
    for (name, limits, found) in [
        ("ttft_ms", &thresholds.ttft_ms, &latencies.ttft_ms),
        ("tpot_ms", &thresholds.tpot_ms, &latencies.tpot_ms),
        ("itl_ms", &thresholds.itl_ms, &latencies.itl_ms),
        ("e2e_ms", &thresholds.e2e_ms, &latencies.e2e_ms),
    ] {
        misses.extend(slow(name, limits, found));
    }
    let mut hold = |name: &str, found: f64, limit: Option<f64>, at_most: bool| {
        let Some(limit) = limit else { return };
        let (holds, word) = if at_most { (found <= limit, "most") } else { (found >= limit, "least") };
        if !holds {
            misses.push(format!("{name}: {found:.4}, expected at {word} {limit}"));
        }
    };
    hold("failed_share", report.failed_share, thresholds.failed_share, true);
    hold("good_share", report.good_share, thresholds.good_share, false);
    hold("output_tok_s", report.output_tok_s, thresholds.output_tok_s, false);
    hold("requests_s", report.requests_s, thresholds.requests_s, false);
    misses
}

fn slow(name: &str, limits: &Limits, found: &Summary) -> Vec<String> {
    let limits = [
        ("mean", limits.mean, found.mean),
        ("p50", limits.p50, found.p50),
        ("p90", limits.p90, found.p90),
        ("p99", limits.p99, found.p99),
        ("max", limits.max, found.max),
    ];
    let miss = |(what, limit, value): (&str, Option<f64>, f64)| {
        let limit = limit?;
        if found.count == 0 {
            return Some(format!("{name}.{what}: nothing was measured, expected at most {limit}"));
        }
        (value > limit).then(|| format!("{name}.{what}: {value:.3}, expected at most {limit}"))
    };
    limits.into_iter().filter_map(miss).collect()
}
