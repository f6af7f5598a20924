//! Golden `tiny` through processes joined over TCP, and the facts that `--json` prints.

use perigee_testkit::{GoldenCase, compare, tensors};

use crate::binary::{score, text};

/// A golden run over `tp` processes, with some splitting of the work; gives the weight bytes of the ranks.
fn golden(tp: usize, more: &[&str]) -> Vec<u64> {
    let case = GoldenCase::committed("tiny").unwrap();
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out.safetensors");
    let mut command = score(&case.model(), &case.expected_file(), &out);
    command.args(["--json", "--trace", &format!("--tp={tp}"), &format!("--greedy={}", case.greedy()), "--feed"]);
    let output = command.arg(case.expected_file()).args(more).output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    let report = compare(&case.expected, &tensors::read(&out).unwrap(), perigee_testkit::DType::Fp32);
    assert!(report.passed(), "{tp} ranks, {more:?}:\n{report}");
    let printed: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(printed["seconds"].as_f64().unwrap() > 0.0, "{printed}");
    printed["weight_bytes"].as_array().unwrap().iter().map(|bytes| bytes.as_u64().unwrap()).collect()
}

#[test]
fn tiny_over_processes_where_each_reads_only_its_share() {
    let [whole] = golden(1, &[])[..] else { panic!("one rank") };
    for (tp, more) in [(2, &["--chunk=7", "--segments=3"][..]), (4, &["--segments=7"])] {
        let ranks = golden(tp, more);
        assert_eq!(ranks.len(), tp);
        for bytes in &ranks {
            // Norms, routers, low-rank projections and latents' projections are on every rank.
            let share = whole as f64 / tp as f64;
            assert!((share..1.3 * share).contains(&(*bytes as f64)), "{bytes} of {whole} bytes over {tp} ranks");
        }
    }
}

/// One rank reads no other rank's weights: a random model is the same bits whatever the number of ranks.
#[test]
fn a_random_model_is_the_same_over_any_number_of_ranks() {
    let folder = tempfile::tempdir().unwrap();
    let prompts = folder.path().join("prompts.safetensors");
    perigee_testkit::checkpoints::write_prompts(&prompts, 512, &[5, 40]).unwrap();
    let run = |model: &str, tp: usize| {
        let out = folder.path().join(format!("out-{tp}.safetensors"));
        let output = score(model, &prompts, &out).args(["--greedy=8", &format!("--tp={tp}")]).output().unwrap();
        assert!(output.status.success(), "{}", text(&output));
        tensors::read(&out).unwrap()
    };
    let one = run("random:tiny@5", 1);
    let report = compare(&one, &run("random:tiny@5", 4), perigee_testkit::DType::Fp32);
    assert!(report.passed(), "{report}");
    let other = compare(&one, &run("random:tiny@6", 1), perigee_testkit::DType::Fp32);
    assert!(!other.passed(), "another seed gave the same numbers:\n{other}");
}
