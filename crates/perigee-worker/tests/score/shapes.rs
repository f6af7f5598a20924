//! Random checkpoints of odd shapes: sizes that no power of two divides, layers of one kind only, every option of the
//! architecture. However the work is split over ranks, chunks and segments, the outputs agree within float32 limits.

use perigee_backend::DType;
use perigee_testkit::{ScoreRun, Tensors, checkpoints, compare};
use serde_json::{Value, json};

/// (ranks, chunk, segments, prompts side by side); all against the plain run.
const SPLITTINGS: [(usize, Option<usize>, usize, Option<usize>); 6] = [
    (1, Some(1), 3, None),
    (1, Some(64), 7, Some(1)),
    (2, None, 3, None),
    (2, Some(7), 1, None),
    (4, None, 7, None),
    (4, Some(9), 1, Some(2)),
];

/// Lengths around the edges of pages and chunks.
const PROMPTS: [usize; 5] = [1, 8, 63, 65, 130];

/// Scores the shape in every splitting that its ranks allow.
fn agree(change: impl FnOnce(&mut Value), ranks: &[usize]) {
    let mut config = checkpoints::small_config();
    change(&mut config);
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    checkpoints::write_random(&model, &config, 11).unwrap();
    let prompts = folder.path().join("prompts.safetensors");
    let vocab = config["vocab_size"].as_u64().unwrap() as usize;
    checkpoints::write_prompts(&prompts, vocab, &PROMPTS).unwrap();
    let plain = ScoreRun { greedy: Some(6), trace: true, ..ScoreRun::new(model.display().to_string(), &prompts) };
    let expected = plain.run().unwrap();
    holds_everything(&expected, &config);
    for (tp, chunk, segments, batch) in SPLITTINGS {
        if ranks.contains(&tp) {
            let out = ScoreRun { tp, chunk, segments, batch, ..plain.clone() }.run().unwrap();
            let report = compare(&expected, &out, DType::Fp32);
            assert!(report.passed(), "{tp} ranks, chunk {chunk:?}, {segments} segments, {batch:?}:\n{report}");
        }
    }
}

/// A comparison of nothing would agree too.
fn holds_everything(out: &Tensors, config: &Value) {
    let layers = config["num_hidden_layers"].as_u64().unwrap() as usize;
    for (number, length) in PROMPTS.into_iter().enumerate() {
        let vocab = config["vocab_size"].as_u64().unwrap() as usize;
        assert_eq!(out[&format!("logits_{number}")].shape, [length, vocab]);
        assert_eq!(out[&format!("greedy_{number}")].shape, [6]);
        for layer in 0..layers {
            assert_eq!(out[&format!("hidden_{number}_{layer}")].rows(), length);
        }
        for layer in config["linear_attn_config"]["kda_layers"].as_array().unwrap() {
            let name = format!("kda_state_{number}_{}", layer.as_u64().unwrap() - 1);
            assert!(out.contains_key(&name), "{name}");
        }
    }
}

fn layers(config: &mut Value, kda: &[u32], mla: &[u32]) {
    config["num_hidden_layers"] = json!(kda.len() + mla.len());
    config["linear_attn_config"]["kda_layers"] = json!(kda);
    config["linear_attn_config"]["full_attn_layers"] = json!(mla);
}

#[test]
fn small() {
    agree(|_| {}, &[1, 2, 4]);
}

#[test]
fn two_taps() {
    agree(|config| config["linear_attn_config"]["short_conv_kernel_size"] = json!(2), &[1, 2, 4]);
}

#[test]
fn three_taps_and_several_dense_layers() {
    let change = |config: &mut Value| {
        layers(config, &[1, 3, 4], &[2, 5]);
        config["linear_attn_config"]["short_conv_kernel_size"] = json!(3);
        config["first_k_dense_replace"] = json!(3);
    };
    agree(change, &[1, 2, 4]);
}

#[test]
fn low_rank_query_first_mla_and_wide_values() {
    let change = |config: &mut Value| {
        layers(config, &[2, 4], &[1, 3]);
        config["q_lora_rank"] = json!(17);
        config["v_head_dim"] = json!(22);
        config["num_attention_heads"] = json!(8);
        config["num_key_value_heads"] = json!(8);
    };
    agree(change, &[1, 2, 4]);
}

#[test]
fn groups_without_renormalisation_or_shared_experts() {
    let change = |config: &mut Value| {
        config["num_experts"] = json!(12);
        config["num_expert_group"] = json!(3);
        config["topk_group"] = json!(2);
        config["num_experts_per_token"] = json!(3);
        config["num_shared_experts"] = json!(0);
        config["moe_renormalize"] = json!(false);
    };
    agree(change, &[1, 2, 4]);
}

#[test]
fn three_shared_experts_and_every_expert_chosen() {
    let change = |config: &mut Value| {
        config["num_shared_experts"] = json!(3);
        config["num_experts"] = json!(4);
        config["num_experts_per_token"] = json!(4);
    };
    agree(change, &[1, 2, 4]);
}

#[test]
fn all_dense() {
    let change = |config: &mut Value| {
        config["first_k_dense_replace"] = json!(3);
        config["num_experts"] = json!(0);
    };
    agree(change, &[1, 2, 4]);
}

#[test]
fn all_kda() {
    agree(|config| layers(config, &[1, 2, 3], &[]), &[1, 2, 4]);
}

#[test]
fn all_mla() {
    agree(|config| layers(config, &[], &[1, 2, 3]), &[1, 2, 4]);
}

/// 3 divides neither 2 nor 4; a vocabulary of 5 leaves the last of 4 ranks one row and the last of 2 ranks two.
#[test]
fn few_ids_and_odd_heads() {
    let change = |config: &mut Value| {
        config["vocab_size"] = json!(5);
        config["linear_attn_config"]["num_heads"] = json!(3);
    };
    agree(change, &[1]);
    agree(|config| config["vocab_size"] = json!(5), &[1, 2, 4]);
}
