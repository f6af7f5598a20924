//! What reports say of servers whose times are known. The virtual clock counts whole milliseconds, so that is what a time may
//! be off by where arrivals are not whole ones; with those that are, only the histogram's rounding is left.

use std::time::Duration;

use super::stub::{Stub, report, scenario};
use crate::report::Summary;

/// Within 2 % or 0.2 ms.
fn is_near(found: f64, expected: f64) -> bool {
    (found - expected).abs() <= (expected * 0.02).max(0.2)
}

pub(super) fn assert_near(what: &str, found: &Summary, expected: [f64; 5]) {
    let found = [found.mean, found.p50, found.p90, found.p99, found.max];
    for (found, expected) in found.into_iter().zip(expected) {
        assert!(is_near(found, expected), "{what}: {found}, expected {expected}");
    }
}

#[tokio::test(start_paused = true)]
async fn percentiles_are_those_of_the_server() {
    // First tokens after 1, 2, ... 1000 ms, in no order that matters.
    let first = |number: usize| Duration::from_millis(1 + (number as u64 * 387) % 1000);
    let asked = scenario("conversations = 1000\narrivals = { kind = \"closed\", concurrency = 7 }");
    let report = report(&asked, Stub { first, step: Duration::from_millis(3), ..Stub::default() }).await;
    let latencies = &report.latencies;
    assert_near("TTFT", &latencies.ttft_ms, [500.5, 500.0, 900.0, 990.0, 1000.0]);
    assert_near("TPOT", &latencies.tpot_ms, [3.0; 5]);
    assert_near("inter-token", &latencies.itl_ms, [3.0; 5]);
    assert_near("end to end", &latencies.e2e_ms, [512.5, 512.0, 912.0, 1002.0, 1012.0]);
    assert_eq!(latencies.itl_ms.count, 4000);
    let median = report.curves.ttft_ms.iter().find(|point| point[1] >= 0.5).expect("a median");
    assert!(is_near(median[0], 500.0), "{median:?}");
}

#[tokio::test(start_paused = true)]
async fn a_server_that_falls_behind_is_charged_for_the_queue() {
    // 10 a second are due, and it takes 190 ms for each, one at a time: the n-th waits for 90 ms more than the one before.
    let asked = scenario("conversations = 200\narrivals = { kind = \"gamma\", rate = 10.0, cv = 0.0001 }");
    let step = Duration::from_millis(10);
    let room = Some(tokio::sync::Semaphore::new(1));
    let first = |_| Duration::from_millis(150);
    let report = report(&asked, Stub { first, step, room, ..Stub::default() }).await;
    let ttft = &report.latencies.ttft_ms;
    assert!((ttft.max - (150.0 + 199.0 * 90.0)).abs() < 20.0, "{ttft:?}");
    assert!((ttft.p50 / (150.0 + 99.5 * 90.0) - 1.0).abs() < 0.02, "{ttft:?}");
    assert!(report.latencies.lateness_ms.max < 1.5, "this program was on time: {:?}", report.latencies.lateness_ms);
}

#[tokio::test(start_paused = true)]
async fn of_fifty_thousand_requests_none_is_lost() {
    let asked = scenario(
        "conversations = 50000\narrivals = { kind = \"poisson\", rate = 2000.0 }\ntimeout_s = 5.0\n\
         cancel = { share = 0.1, after = { kind = \"fixed\", tokens = 2 } }",
    );
    let failing = |number: usize| (number % 100 == 7).then_some(1);
    let report = report(&asked, Stub { failing, ..Stub::default() }).await;
    let counted = &report.counted;
    assert_eq!((report.sent, report.lost, counted.requests), (50_000, 0, 50_000));
    assert_eq!(counted.completed + counted.cancelled + counted.failed, 50_000);
    assert_eq!((counted.failed, counted.failures.get("UNAVAILABLE")), (500, Some(&500)));
    assert!((4600..5400).contains(&counted.cancelled), "{}", counted.cancelled);
    // Two tokens before it is given up, one before it fails.
    assert_eq!(counted.output_tokens, counted.completed * 5 + counted.cancelled * 2 + 500);
    let buckets = |of: fn(&crate::report::Bucket) -> u64| report.timeline.iter().map(of).sum::<u64>();
    assert_eq!((buckets(|bucket| bucket.started), buckets(|bucket| bucket.ended)), (50_000, 50_000));
    assert_eq!(
        (buckets(|bucket| bucket.tokens), report.timeline.last().map(|last| last.running)),
        (counted.output_tokens, Some(0))
    );
    assert!(report.latencies.lateness_ms.max < 1.5, "{:?}", report.latencies.lateness_ms);
}

#[tokio::test(start_paused = true)]
async fn warm_up_counts_nowhere_but_in_the_timeline() {
    let asked =
        scenario("duration_s = 10.0\nwarmup_s = 4.0\narrivals = { kind = \"gamma\", rate = 100.0, cv = 0.001 }");
    let first = |number| Duration::from_millis(if number < 390 { 700 } else { 50 });
    let report = report(&asked, Stub { first, ..Stub::default() }).await;
    assert!((995..=1000).contains(&report.sent) && (595..=602).contains(&report.counted.requests), "{report:?}");
    assert!(is_near(report.latencies.ttft_ms.p50, 50.0) && report.latencies.ttft_ms.max < 760.0);
    assert!((report.seconds - 6.09).abs() < 0.05, "{}", report.seconds);
    assert!((report.requests_s - 98.5).abs() < 2.0 && (report.output_tok_s - 5.0 * report.requests_s).abs() < 1e-9);
}

#[tokio::test(start_paused = true)]
async fn goodput_counts_what_kept_every_objective_and_thresholds_hold_the_whole() {
    let text = "conversations = 100\narrivals = { kind = \"closed\", concurrency = 10 }\nslo = { ttft_ms = 60.0, tpot_ms = 12.0 }\n\
                [thresholds]\nfailed_share = 0.05\ngood_share = 0.5\nttft_ms = { p50 = 55.0, p99 = 100.0 }\n";
    let first = |number: usize| Duration::from_millis(if number.is_multiple_of(4) { 200 } else { 50 });
    let failing = |number| (number == 1).then_some(0);
    let report = report(&scenario(text), Stub { first, failing, ..Stub::default() }).await;
    assert_eq!((report.counted.good, report.good_share, report.failed_share), (74, 0.74, 0.01));
    let misses = report.misses();
    assert!(misses.len() == 1 && misses[0].starts_with("ttft_ms.p99: 200"), "{misses:?}");
}

#[tokio::test(start_paused = true)]
async fn turns_carry_what_was_said_and_end_with_a_failure() {
    let asked = scenario(
        "conversations = 20\narrivals = { kind = \"poisson\", rate = 5.0 }\nturns = { count = { kind = \"fixed\", tokens = 3 }, think_s = 1.5 }",
    );
    let report = report(&asked, Stub { failing: |number| (number == 3).then_some(2), ..Stub::default() }).await;
    // 19 whole conversations; prompts of 8, 8 + 5 + 8, and 21 + 5 + 8 tokens.
    assert_eq!((report.sent, report.counted.completed, report.counted.failed), (58, 57, 1));
    assert_eq!(report.counted.prompt_tokens, 19 * (8 + 21 + 34));
}

#[tokio::test(start_paused = true)]
async fn moves_and_failures_are_marked_and_shown() {
    let asked = scenario("conversations = 40\narrivals = { kind = \"poisson\", rate = 20.0 }");
    let report = report(&asked, Stub { failing: |number| (number == 5).then_some(3), ..Stub::default() }).await;
    let kinds = |kind: &str| report.marks.iter().filter(|mark| mark.kind == kind).count();
    assert_eq!((kinds("move"), kinds("failure"), report.counted.moves), (4, 1, 4));
    let page = report.page();
    assert!(page.contains("<title>a to b</title>") && page.contains("<title>UNAVAILABLE: it broke</title>"));
    assert!(!page.contains("src=") && !page.contains("href="), "it loads nothing");
    let table = report.table();
    assert!(
        table.contains("39 completed, 0 cancelled, 1 failed; 4 moves") && table.contains("1 × UNAVAILABLE"),
        "{table}"
    );
    let json = serde_json::to_value(&report).expect("JSON");
    assert_eq!((&json["counted"]["moves"], &json["ttft_ms"]["count"]), (&4.into(), &40.into()));
}

#[tokio::test(start_paused = true)]
async fn what_takes_too_long_is_a_failure() {
    let asked = scenario("conversations = 3\ntimeout_s = 0.06\narrivals = { kind = \"closed\", concurrency = 1 }");
    let report = report(&asked, Stub::default()).await;
    assert_eq!(report.counted.failures.get("TIMEOUT"), Some(&3));
    assert_eq!(report.latencies.ttft_ms.count, 3, "first tokens came");
}
