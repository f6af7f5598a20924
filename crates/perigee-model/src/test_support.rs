//! What several test modules of this crate share: a configuration that is small but has every variant, and checkpoints
//! made from it.

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::init::write_checkpoint;
use crate::source::WeightSource;

/// A tiny model with everything unusual at once: first layer MLA, low-rank queries, value width unlike the key's, head
/// counts that differ, two dense layers, expert groups, two shared experts, no renormalisation, a vocabulary that 2 and
/// 4 do not divide.
pub(crate) fn odd_config() -> Value {
    json!({
        "model_type": "kimi_linear",
        "dtype": "bfloat16",
        "vocab_size": 11,
        "hidden_size": 8,
        "num_hidden_layers": 4,
        "linear_attn_config": {
            "kda_layers": [2, 4], "full_attn_layers": [1, 3],
            "num_heads": 4, "head_dim": 6, "short_conv_kernel_size": 3
        },
        "num_attention_heads": 8, "num_key_value_heads": 8,
        "q_lora_rank": 5, "kv_lora_rank": 6,
        "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 3,
        "mla_use_nope": true, "rope_scaling": null,
        "intermediate_size": 16, "moe_intermediate_size": 8,
        "num_experts": 4, "num_experts_per_token": 2, "num_shared_experts": 2,
        "num_expert_group": 2, "topk_group": 1, "use_grouped_topk": true,
        "moe_renormalize": false, "routed_scaling_factor": 1.5,
        "moe_router_activation_func": "sigmoid", "moe_layer_freq": 1, "first_k_dense_replace": 2,
        "hidden_act": "silu", "rms_norm_eps": 1e-5, "tie_word_embeddings": false,
        "bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": null
    })
}

/// The random source of a configuration, with seed 5.
pub(crate) fn random(config: &Value) -> WeightSource {
    WeightSource::random(config.to_string(), 5).unwrap()
}

/// That source written as a checkpoint.
pub(crate) fn written(config: &Value) -> TempDir {
    let directory = TempDir::new().unwrap();
    write_checkpoint(directory.path(), &random(config), &mut |_, _| {}).unwrap();
    directory
}
