//! Prompts whose beginning is filled in: what is scored begins behind it, and is the same however the rest is cut.

use perigee_backend::DType;
use perigee_testkit::{GoldenCase, ScoreRun, checkpoints, compare, tensors};

/// Filled in, computed, and fed behind them.
const FILLED: usize = 200;
const COMPUTED: [usize; 2] = [70, 33];
const FED: usize = 5;

/// Prompts of `FILLED` and more tokens, and tokens to feed, in a file.
fn inputs(folder: &tempfile::TempDir, vocab: usize) -> std::path::PathBuf {
    let file = folder.path().join("tokens.safetensors");
    checkpoints::write_prompts(&file, vocab, &COMPUTED.map(|computed| FILLED + computed)).unwrap();
    let mut all = tensors::read(&file).unwrap();
    for number in 0..COMPUTED.len() {
        let fed = (0..FED).map(|at| ((at * 17 + number) % vocab) as i64).collect();
        all.insert(format!("greedy_{number}"), perigee_testkit::Tensor::integers(&[FED], fed));
    }
    tensors::write(&file, &all).unwrap();
    file
}

#[test]
fn what_lies_behind_a_filled_context_is_scored_alike_however_it_is_cut() {
    let case = GoldenCase::committed("tiny").unwrap();
    let vocab = case.expected["logits_0"].shape[1];
    let folder = tempfile::tempdir().unwrap();
    let tokens = inputs(&folder, vocab);
    let plain = ScoreRun {
        filled: Some(FILLED as u64),
        feed: Some(tokens.clone()),
        trace: true,
        ..ScoreRun::new(case.model(), &tokens)
    };
    // The context counts: without it the same tokens give something else.
    let behind = |run: ScoreRun| run.run().unwrap()["greedy_logits_0"].slice(0..1).values;
    assert_ne!(behind(ScoreRun { filled: None, ..plain.clone() }), behind(plain.clone()));

    // What a rank fills in is for its heads, so a number of ranks is compared with itself.
    for tp in [1, 2] {
        let plain = ScoreRun { tp, ..plain.clone() };
        let expected = plain.run().unwrap();
        for (number, computed) in COMPUTED.into_iter().enumerate() {
            assert_eq!(expected[&format!("logits_{number}")].shape, [computed, vocab]);
            assert_eq!(expected[&format!("greedy_logits_{number}")].shape, [FED, vocab]);
            assert_eq!(expected[&format!("hidden_{number}_1")].rows(), computed);
            assert_eq!(expected[&format!("experts_{number}_1")].rows(), computed);
        }
        let experts = folder.path().join(format!("experts-{tp}.safetensors"));
        tensors::write(&experts, &expected).unwrap();
        for (chunk, segments) in [(Some(64), 1), (Some(9), 3), (Some(37), 7)] {
            for experts in [None, Some(experts.clone())] {
                let out = ScoreRun { chunk, segments, experts, ..plain.clone() }.run().unwrap();
                let report = compare(&expected, &out, DType::Fp32);
                assert!(report.passed(), "{tp} ranks, chunk {chunk:?}, {segments} segments:\n{report}");
            }
        }
    }
}

#[test]
fn a_prompt_that_would_be_filled_in_whole_is_refused_by_name() {
    let case = GoldenCase::committed("tiny").unwrap();
    let folder = tempfile::tempdir().unwrap();
    let tokens = inputs(&folder, 64);
    let most = (FILLED + COMPUTED[1]) as u64;
    let fault = ScoreRun { filled: Some(most), ..ScoreRun::new(case.model(), &tokens) }.run().unwrap_err();
    assert!(fault.to_string().contains("prompt_1: all of its 233 tokens would be filled in"), "{fault}");
}
