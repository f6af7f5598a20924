//! The report for a terminal.

use std::fmt::Write;

use super::Report;

pub(super) fn render(report: &Report) -> String {
    let counted = &report.counted;
    let mut text = format!("{} against {}, {:.1} s\n", report.scenario.name, report.target, report.seconds);
    // Writing into a string does not fail.
    let _ = writeln!(
        text,
        "requests {}: {} completed, {} cancelled, {} failed; {} moves",
        counted.requests, counted.completed, counted.cancelled, counted.failed, counted.moves
    );
    for (code, count) in &counted.failures {
        let message = report.messages.get(code).map_or("", String::as_str);
        let _ = writeln!(text, "  {count} × {code}: {message}");
    }
    if report.lost > 0 {
        let _ = writeln!(text, "LOST {} of {} requests sent: a fault of this program", report.lost, report.sent);
    }
    let _ = writeln!(
        text,
        "per second: {:.2} requests, {:.1} output tokens, {:.1} prompt tokens ({} of {} cached); \
         goodput {:.2} requests ({:.1} %)",
        report.requests_s,
        report.output_tok_s,
        report.prompt_tok_s,
        counted.cached_tokens,
        counted.prompt_tokens,
        report.goodput_s,
        report.good_share * 100.0
    );
    let _ = writeln!(
        text,
        "{:<12} {:>8} {:>10} {:>10} {:>10} {:>10} {:>10}",
        "ms", "count", "mean", "p50", "p90", "p99", "max"
    );
    for (name, times) in report.latencies.named() {
        let _ = writeln!(
            text,
            "{name:<12} {:>8} {:>10.2} {:>10.2} {:>10.2} {:>10.2} {:>10.2}",
            times.count, times.mean, times.p50, times.p90, times.p99, times.max
        );
    }
    text
}
