//! `perigee bench serve`, `bench grid`, `bench router` and `bench migrate` as people run them. What they measure is judged under virtual clocks, beside the
//! code; here it counts that every request arrives and that a missed threshold is told.

use std::path::Path;
use std::process::{Command, Output};

use perigee_testkit::sandbox::Sandbox;
use serde_json::Value;

use super::up;

/// Latents of a position in all layers of `random:tiny` in fp32: 2 × (32 + 8) numbers.
const POSITION_BYTES: u64 = 320;
const SMOKE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/load/smoke.toml");

fn bench(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_perigee")).arg("bench").args(arguments).output().expect("started")
}

fn report(output: &Output) -> Value {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

fn smoke(cluster: &Sandbox, more: &[&str]) -> Output {
    let router = cluster.grpc.to_string();
    let common = ["serve", "--scenario", SMOKE, "--conversations=20", "--json", "--router", &router];
    bench(&[&common, more].concat())
}

#[test]
fn every_request_of_a_scenario_is_answered_over_both_protocols() {
    let cluster = up(2, 1).start().expect("a cluster");
    let folder = tempfile::tempdir().expect("a folder");
    let page = folder.path().join("report.html");
    let grpc = report(&smoke(&cluster, &["--html", &page.display().to_string()]));
    let counted = &grpc["counted"];
    assert_eq!((counted["completed"].as_u64(), grpc["lost"].as_u64()), (Some(20), Some(0)), "{counted}");
    assert!(counted["output_tokens"].as_u64() > Some(20 * 8) && counted["prompt_tokens"].as_u64() > Some(20 * 8));
    assert!(grpc["ttft_ms"]["p99"].as_f64() >= grpc["ttft_ms"]["p50"].as_f64(), "{}", grpc["ttft_ms"]);
    assert!(std::fs::read_to_string(page).expect("a page").contains("<svg"));

    let http = format!("http://{}", cluster.http);
    for api in ["completions", "chat"] {
        let openai = ["--openai", &http, "--model", "random:tiny@0", "--api", api];
        let counted = report(&smoke(&cluster, &openai))["counted"].clone();
        assert_eq!(counted["completed"].as_u64(), Some(20), "{api}: {counted}");
        // Drawn by the same seed: the same lengths.
        assert_eq!(counted["output_tokens"], grpc["counted"]["output_tokens"], "{api}");
    }
}

#[test]
fn missed_thresholds_end_with_1_and_bad_scenarios_with_2() {
    let cluster = up(1, 1).start().expect("a cluster");
    let folder = tempfile::tempdir().expect("a folder");
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).expect("written");
        path.display().to_string()
    };
    let smoke = std::fs::read_to_string(Path::new(SMOKE)).expect("a scenario");
    let strict = write("strict.toml", &format!("{smoke}output_tok_s = 1e9\n"));
    let router = cluster.grpc.to_string();
    let output = bench(&["serve", "--scenario", &strict, "--conversations=3", "--router", &router]);
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(1) && told.contains("output_tok_s"), "{told}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("3 completed"), "the report comes first");

    let wrong = write("wrong.toml", &smoke.replace("rate = 20.0", "rate = -1.0"));
    let output = bench(&["serve", "--scenario", &wrong, "--router", &router]);
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(2) && told.contains("arrivals.rate"), "{told}");
}

#[test]
fn a_server_that_refuses_all_and_a_report_without_a_place_are_told_before_the_load() {
    let cluster = up(1, 1).start().expect("a cluster");
    let http = format!("http://{}", cluster.http);
    for (more, reason) in [
        (["--openai", &http, "--model", "another"].as_slice(), "does not exist"),
        (&["--html", "/nonexistent/report.html"], "--html: /nonexistent/report.html"),
    ] {
        let output = smoke(&cluster, more);
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(1) && told.contains(reason), "{told}");
        assert!(output.stdout.is_empty(), "nothing was measured");
    }
}

#[test]
fn a_served_replica_is_measured_by_batch_and_context() {
    let cluster = up(1, 1).start().expect("a cluster");
    let router = cluster.grpc.to_string();
    let cells = report(&bench(&["grid", "--cells=1x64,4x200", "--steps=8", "--json", "--router", &router]));
    let cells = cells.as_array().expect("cells");
    let told: Vec<_> = cells.iter().map(|cell| (cell["batch"].as_u64(), cell["context"].as_u64())).collect();
    assert_eq!(told, [(Some(1), Some(64)), (Some(4), Some(200))]);
    for cell in cells {
        let number =
            |path: &str| cell.pointer(path).and_then(Value::as_f64).unwrap_or_else(|| panic!("{path}: {cell}"));
        assert!(
            number("/steps") >= 8.0 && number("/gaps/count") >= 8.0 * number("/batch") - number("/batch"),
            "{cell}"
        );
        assert!(number("/gaps/p50_ms") <= number("/gaps/p99_ms") && number("/gaps/p99_ms") <= number("/gaps/max_ms"));
        assert!(number("/ttft_s") > 0.0 && number("/tpot_ms") > 0.0, "{cell}");
    }
}

#[test]
fn a_batch_that_no_replica_runs_as_a_whole_is_told() {
    let cluster = up(1, 2).option("--max-batch=2").start().expect("a cluster");
    let router = cluster.grpc.to_string();
    let output = bench(&["grid", "--cells=2x64,3x64", "--steps=8", "--router", &router]);
    let (printed, told) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(1), "{told}");
    assert!(
        printed.lines().count() == 1 && printed.contains("2 x      64"),
        "the cell that fits comes first: {printed}"
    );
    for part in ["3x64", "of 3 sessions 2 run and 1 wait", "--max-batch 3"] {
        assert!(told.contains(part), "{part}: {told}");
    }
}

#[test]
fn the_router_is_measured_between_stubs() {
    let output =
        bench(&["router", "--replicas=1,7", "--streams=10", "--requests=30", "--output=20", "--step-ms=2", "--json"]);
    let rows = report(&output);
    let rows = rows.as_array().expect("rows");
    assert_eq!(rows.iter().map(|row| row["replicas"].as_u64()).collect::<Vec<_>>(), [Some(1), Some(7)]);
    for row in rows {
        assert_eq!((row["requests"].as_u64(), row["failed"].as_u64()), (Some(30), Some(0)), "{row}");
        assert_eq!(row["transit_ms"]["count"].as_u64(), Some(600), "{row}");
        assert!(row["transit_ms"]["p50"].as_f64() > Some(0.0), "{row}");
    }
}

#[test]
fn the_price_of_a_move_is_told_by_context_and_mode() {
    let folder = tempfile::tempdir().unwrap();
    let svg = folder.path().join("moves.svg");
    let plot = format!("--svg={}", svg.display());
    let sizes = ["--context=200,1000", "--filled=3000", "--moves=4", "--whole=2", "--window=8"];
    let output = bench(&[&["migrate"], &sizes[..], &["--json", &plot]].concat());
    let rows = report(&output);
    let rows = rows.as_array().expect("rows");
    let told: Vec<_> = rows.iter().map(|row| (row["context"].as_u64(), row["mode"].as_str())).collect();
    let modes = |context| ["split", "whole", "replay"].map(|mode| (Some(context), Some(mode)));
    let filled = &modes(3000)[..2];
    assert_eq!(told, [&modes(200), &modes(1000), filled].concat());
    let is_filled: Vec<_> = rows.iter().map(|row| row["filled"].as_bool()).collect();
    assert_eq!(is_filled, [[Some(false); 6].as_slice(), &[Some(true); 2]].concat());
    let bytes = |index: usize, kind: &str| rows[index][kind].as_u64().expect("a count");
    for (short, long) in [(0, 3), (1, 4), (0, 6)] {
        // A last page that is not full goes along: up to 63 positions more or less.
        let (least, most) = (bytes(short, "state_bytes"), bytes(long, "state_bytes"));
        assert!(least > 0 && least.abs_diff(most) < 64 * POSITION_BYTES, "state: {least} and {most}");
    }
    assert_eq!([0, 3, 6].map(|index| bytes(index, "page_bytes")), [0; 3], "split moves leave pages where they are");
    // How far a session has come when it moves depends on how fast its client is told, so the bytes are held against the
    // token ids of the same move, 4 bytes each, the last of which has no position yet. Full pages count.
    for index in [1, 4, 7] {
        let positions = bytes(index, "token_bytes") / 4 - 1;
        assert_eq!(bytes(index, "page_bytes"), positions / 64 * 64 * POSITION_BYTES, "{}", rows[index]);
    }
    for (index, moves) in [(0, 4), (1, 2), (2, 1), (3, 4), (4, 2), (5, 1), (6, 4), (7, 2)] {
        let row = &rows[index];
        assert_eq!(
            (row["moves"].as_u64(), row["stalls_ms"].as_array().map(Vec::len)),
            (Some(moves), Some(moves as usize))
        );
        assert!(row["tpot_local_ms"].as_f64() > Some(0.0) && bytes(index, "token_bytes") > 0, "{row}");
        let is_split = row["mode"] == "split";
        let has = |path: &str| row.pointer(path).and_then(Value::as_f64).is_some_and(|time| time > 0.0);
        assert!(
            [
                "/tpot_remote_ms",
                "/remote/waiting_ms",
                "/beside/remote_ms",
                "/home/undisturbed_ms",
                "/home/answering_ms"
            ]
            .iter()
            .all(|path| has(path) == is_split),
            "{row}"
        );
    }
    let svg = std::fs::read_to_string(svg).expect("written");
    assert_eq!(svg.matches("<polyline").count(), 5, "{svg}");
}
