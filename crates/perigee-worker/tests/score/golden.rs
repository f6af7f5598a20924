//! The committed golden cases, within float32 limits for every number of ranks, chunk size and cut of the latent cache;
//! prompts in one batch and alone; and bfloat16 with forced experts.

use perigee_backend::DType;
use perigee_testkit::golden::COMMITTED;
use perigee_testkit::{GoldenCase, ScoreRun, Tensors, compare};

const CHUNKS: [Option<usize>; 4] = [None, Some(64), Some(7), Some(1)];
const SEGMENTS: [usize; 3] = [1, 3, 7];

/// Judges every combination of chunk and segments over `tp` ranks.
fn matrix(name: &str, tp: usize) {
    let case = GoldenCase::committed(name).unwrap();
    let mut failures = Vec::new();
    for chunk in CHUNKS {
        for segments in SEGMENTS {
            let out = ScoreRun { tp, chunk, segments, ..ScoreRun::golden(&case) }.run().unwrap();
            let report = compare(&case.expected, &out, DType::Fp32);
            if !report.passed() {
                failures.push(format!("{name}, {tp} ranks, chunk {chunk:?}, {segments} segments:\n{report}"));
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n\n"));
}

macro_rules! matrices {
    ($($test:ident: $case:literal over $tp:literal;)*) => {
        $(#[test]
        fn $test() {
            matrix($case, $tp);
        })*
    };
}

matrices! {
    tiny_over_1_rank: "tiny" over 1;
    tiny_over_2_ranks: "tiny" over 2;
    tiny_over_4_ranks: "tiny" over 4;
    q_lora_over_1_rank: "q_lora" over 1;
    q_lora_over_2_ranks: "q_lora" over 2;
    q_lora_over_4_ranks: "q_lora" over 4;
    first_mla_over_1_rank: "first_mla" over 1;
    first_mla_over_2_ranks: "first_mla" over 2;
    first_mla_over_4_ranks: "first_mla" over 4;
    groups_over_1_rank: "groups" over 1;
    groups_over_2_ranks: "groups" over 2;
    groups_over_4_ranks: "groups" over 4;
}

/// The golden outputs hold whether prompts share steps or not, and the two runs agree with each other.
#[test]
fn prompts_in_one_batch_equal_each_alone() {
    for name in COMMITTED {
        let case = GoldenCase::committed(name).unwrap();
        for (tp, chunk) in [(1, None), (2, Some(7))] {
            let run = |batch| ScoreRun { tp, chunk, segments: 3, batch, ..ScoreRun::golden(&case) }.run().unwrap();
            let (together, alone): (Tensors, Tensors) = (run(None), run(Some(1)));
            for (what, expected, out) in [
                ("together", &case.expected, &together),
                ("alone", &case.expected, &alone),
                ("both", &alone, &together),
            ] {
                let report = compare(expected, out, DType::Fp32);
                assert!(report.passed(), "{name}, {tp} ranks, {what}:\n{report}");
            }
        }
    }
}

/// Which file the prompts stand in, and beside which others, is no input of the model: one prompt taken out of its file.
#[test]
fn a_prompt_of_its_own_file_gives_the_same() {
    let case = GoldenCase::committed("tiny").unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("prompt.safetensors");
    let own: Tensors = case.expected.iter().filter(|(name, _)| *name == "prompt_3").map(own_copy).collect();
    perigee_testkit::tensors::write(&file, &own).unwrap();
    let out = ScoreRun::new(case.model(), &file).run().unwrap();
    assert!(out.contains_key("logits_3") && !out.contains_key("logits_0"), "{:?}", out.keys());
    let expected: Tensors = case.expected.iter().filter(|(name, _)| *name == "logits_3").map(own_copy).collect();
    let report = compare(&expected, &out, DType::Fp32);
    assert!(report.passed(), "{report}");
}

fn own_copy((name, tensor): (&String, &perigee_testkit::Tensor)) -> (String, perigee_testkit::Tensor) {
    (name.clone(), tensor.clone())
}

#[test]
fn tiny_in_bfloat16_with_forced_experts() {
    let case = GoldenCase::committed("tiny").unwrap();
    for (tp, chunk, segments) in [(1, None, 1), (1, Some(1), 3), (2, Some(64), 7), (4, Some(7), 1)] {
        let out = ScoreRun { tp, chunk, segments, ..ScoreRun::golden_bf16(&case) }.run().unwrap();
        let report = compare(&case.expected, &out, DType::Bf16);
        assert!(report.passed(), "{tp} ranks, chunk {chunk:?}, {segments} segments:\n{report}");
        // Rounding to bfloat16 shows: a run that forgot it would pass the float32 limits.
        assert!(report.worst("logits") > 1e-3, "{report}");
    }
}
