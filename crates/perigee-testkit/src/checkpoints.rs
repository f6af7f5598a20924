//! Checkpoints for tests: random weights in any shape that a config.json can say, and copies of sound checkpoints with one
//! thing broken. The weights' bytes are kept as they are; only headers, file ends and configurations are rewritten.

mod damage;

pub use damage::{Editable, copy};

use std::path::Path;

use perigee_model::WeightSource;
use perigee_model::init::write_checkpoint;
use serde_json::{Value, json};

use crate::error::Result;
use crate::tensors::{self, Tensor, Tensors};

/// A small configuration with a KDA, an MLA, a dense and two mixture-of-experts layers; tests change what they are about.
pub fn small_config() -> Value {
    json!({
        "model_type": "kimi_linear",
        "dtype": "bfloat16",
        "vocab_size": 131,
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "linear_attn_config": {
            "kda_layers": [1, 3], "full_attn_layers": [2],
            "num_heads": 4, "head_dim": 24, "short_conv_kernel_size": 4
        },
        "num_attention_heads": 4, "num_key_value_heads": 4,
        "q_lora_rank": null, "kv_lora_rank": 20,
        "qk_nope_head_dim": 12, "qk_rope_head_dim": 6, "v_head_dim": 10,
        "mla_use_nope": true, "rope_scaling": null,
        "intermediate_size": 72, "moe_intermediate_size": 20,
        "num_experts": 6, "num_experts_per_token": 2, "num_shared_experts": 1,
        "num_expert_group": 1, "topk_group": 1, "use_grouped_topk": true,
        "moe_renormalize": true, "routed_scaling_factor": 2.0,
        "moe_router_activation_func": "sigmoid", "moe_layer_freq": 1, "first_k_dense_replace": 1,
        "hidden_act": "silu", "rms_norm_eps": 1e-5, "tie_word_embeddings": false,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0
    })
}

/// Writes a random model of this configuration as a checkpoint directory.
///
/// # Errors
/// The configuration is not supported, or the directory is not empty.
pub fn write_random(directory: &Path, config: &Value, seed: u64) -> Result<()> {
    let source = WeightSource::random(config.to_string(), seed)?;
    Ok(write_checkpoint(directory, &source, &mut |_, _| {})?)
}

/// Writes prompts of these lengths as the file that `score --tokens` takes; ids are spread over the vocabulary.
///
/// # Errors
/// The file cannot be written.
pub fn write_prompts(path: &Path, vocab: usize, lengths: &[usize]) -> Result<()> {
    let prompts = lengths.iter().enumerate().map(|(number, &length)| {
        // A step that shares no factor with any vocabulary of tests, from another start in each prompt.
        let ids = (0..length).map(|position| ((position * 7_919 + number * 31 + 3) % vocab) as i64).collect();
        (format!("prompt_{number}"), Tensor::integers(&[length], ids))
    });
    tensors::write(path, &prompts.collect::<Tensors>())
}
