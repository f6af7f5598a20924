//! The report as one page of HTML: nothing is loaded from elsewhere, so that it can be kept and sent.

use std::fmt::Write;

use super::plot::{self, Line, Plot, Scale, Upright, escape};
use super::{Bucket, Report};

/// The left end of latency curves, in milliseconds.
const LEAST_MS: f64 = 0.1;
/// Colours of marks.
const MOVE: &str = "#56b4e9";
const FAILURE: &str = "#e00000";

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}\
table{border-collapse:collapse}td,th{padding:.2em .8em;text-align:right;border-bottom:1px solid #ddd}\
td:first-child,th:first-child{text-align:left}.miss{color:#c00}pre{background:#f6f6f6;padding:1em;overflow:auto}";

pub(super) fn render(report: &Report) -> String {
    let name = escape(&report.scenario.name);
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{name}</title>\
         <style>{STYLE}{}</style></head><body>\n<h1>{name}</h1>\n<p>{}</p>\n",
        plot::STYLE,
        escape(&report.target)
    );
    // Writing into a string does not fail.
    for miss in report.misses() {
        let _ = writeln!(page, "<p class=\"miss\">missed: {}</p>", escape(&miss));
    }
    counts(&mut page, report);
    times(&mut page, report);
    for plot in [curves(report), tokens(report), running(report), ttft(report)] {
        page.push_str(&plot.render());
    }
    let _ = writeln!(
        page,
        "<p>Upright lines: <span style=\"color:{MOVE}\">sessions that moved</span>, \
         <span style=\"color:{FAILURE}\">requests that failed</span>; their titles say more.</p>"
    );
    if report.marks_left_out > 0 {
        let _ = writeln!(page, "<p>{} more are not shown.</p>", report.marks_left_out);
    }
    let scenario = serde_json::to_string_pretty(&report.scenario).unwrap_or_default();
    let _ = write!(page, "<h2>Scenario</h2><pre>{}</pre>\n</body></html>\n", escape(&scenario));
    page
}

fn counts(page: &mut String, report: &Report) {
    let counted = &report.counted;
    let rows = [
        ("requests", counted.requests.to_string()),
        ("completed", counted.completed.to_string()),
        ("cancelled", counted.cancelled.to_string()),
        ("failed", counted.failed.to_string()),
        ("lost", report.lost.to_string()),
        ("moves", counted.moves.to_string()),
        ("seconds", format!("{:.1}", report.seconds)),
        ("requests/s", format!("{:.2}", report.requests_s)),
        ("output tokens/s", format!("{:.1}", report.output_tok_s)),
        ("prompt tokens/s", format!("{:.1}", report.prompt_tok_s)),
        ("goodput, requests/s", format!("{:.2} ({:.1} %)", report.goodput_s, report.good_share * 100.0)),
    ];
    page.push_str("<table>");
    for (name, value) in rows {
        let _ = write!(page, "<tr><td>{name}</td><td>{value}</td></tr>");
    }
    for (code, count) in &counted.failures {
        let message = report.messages.get(code).map_or("", String::as_str);
        let _ = write!(page, "<tr><td>{}: {}</td><td>{count}</td></tr>", escape(code), escape(message));
    }
    page.push_str("</table>\n");
}

fn times(page: &mut String, report: &Report) {
    page.push_str("<table><tr><th>ms</th><th>mean</th><th>p50</th><th>p90</th><th>p99</th><th>max</th></tr>");
    for (name, times) in report.latencies.named() {
        let _ = write!(page, "<tr><td>{name}</td>");
        for value in [times.mean, times.p50, times.p90, times.p99, times.max] {
            let _ = write!(page, "<td>{value:.2}</td>");
        }
        page.push_str("</tr>");
    }
    page.push_str("</table>\n");
}

fn curves(report: &Report) -> Plot<'_> {
    let curves = &report.curves;
    let lines = [
        ("TTFT", &curves.ttft_ms),
        ("TPOT", &curves.tpot_ms),
        ("inter-token", &curves.itl_ms),
        ("end to end", &curves.e2e_ms),
    ];
    let lines = lines.into_iter().map(|(name, points)| Line { name, points: points.clone() }).collect();
    let x_scale = Scale::Log { from: LEAST_MS };
    Plot { title: "Share of values not above", x_label: "milliseconds", x_scale, lines, uprights: Vec::new() }
}

fn tokens(report: &Report) -> Plot<'_> {
    over_time(report, "Tokens a second", vec![line(report, "", |bucket| Some(bucket.tokens as f64 / bucket.seconds))])
}

fn running(report: &Report) -> Plot<'_> {
    let lines = vec![
        line(report, "in flight", |bucket| Some(bucket.running as f64)),
        line(report, "due a second", |bucket| Some(bucket.started as f64 / bucket.seconds)),
    ];
    over_time(report, "Requests", lines)
}

fn ttft(report: &Report) -> Plot<'_> {
    let lines =
        vec![line(report, "p50", |bucket| bucket.ttft_p50_ms), line(report, "p99", |bucket| bucket.ttft_p99_ms)];
    over_time(report, "TTFT of first tokens in each second, ms", lines)
}

fn line<'a>(report: &Report, name: &'a str, value: impl Fn(&Bucket) -> Option<f64>) -> Line<'a> {
    let middle = |bucket: &Bucket| bucket.from_s + bucket.seconds / 2.0;
    let points = report.timeline.iter().filter_map(|bucket| Some([middle(bucket), value(bucket)?])).collect();
    Line { name, points }
}

fn over_time<'a>(report: &'a Report, title: &'a str, lines: Vec<Line<'a>>) -> Plot<'a> {
    let uprights = report.marks.iter().map(|mark| {
        let colour = if mark.kind == "move" { MOVE } else { FAILURE };
        Upright { at: mark.at_s, colour, text: &mark.text }
    });
    Plot { title, x_label: "seconds", x_scale: Scale::Linear, lines, uprights: uprights.collect() }
}
