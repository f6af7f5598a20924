//! From the text of config.json to a [`ModelConfig`]: every key is checked by itself, then the relations between keys.
//! Whatever this program would compute differently from the published model is refused here, not worked around later.

use serde_json::Value;

use super::keys::Keys;
use super::{KdaConfig, LayerConfig, LayerKind, MlaConfig, ModelConfig, MoeConfig};
use crate::error::{ModelError, Result};
use crate::inventory;

const MAX_LAYERS: usize = 1 << 10;
const MAX_EXPERTS: usize = 1 << 16;
/// Largest width made of two sizes (heads times channels, shared experts times their width), so that a matrix of two
/// such widths still has fewer than 2^48 elements.
const MAX_WIDTH: usize = 1 << 24;
/// Largest model, in parameters; byte counts of anything in the model then fit 64 bits with room to spare.
const MAX_PARAMETERS: u128 = 1 << 48;
/// Largest number of routed experts over all layers: bounds the list of tensors, which names each of them.
const MAX_EXPERT_COPIES: usize = 1 << 20;

pub(super) fn parse(text: &str) -> Result<ModelConfig> {
    let document: Value = serde_json::from_str(text).map_err(ModelError::ConfigSyntax)?;
    let keys = Keys::root(&document)?;
    refuse_other_models(&keys)?;

    let mut layers = mixers(&keys)?;
    let first_dense = keys.within("first_k_dense_replace", 0, MAX_LAYERS)?;
    let moe = experts(&keys)?;
    for (number, layer) in layers.iter_mut().enumerate() {
        layer.dense = moe.experts == 0 || number < first_dense;
    }
    let config = ModelConfig {
        vocab: keys.size("vocab_size")?,
        hidden: keys.size("hidden_size")?,
        kda: kda(&keys)?,
        mla: mla(&keys)?,
        intermediate: keys.size("intermediate_size")?,
        moe,
        eps: keys.positive("rms_norm_eps")?,
        bos: keys.token_id("bos_token_id")?,
        eos: keys.token_ids("eos_token_id")?,
        pad: keys.token_id("pad_token_id")?,
        max_length: match keys.present("model_max_length") {
            Some(_) => keys.within("model_max_length", 1, u32::MAX as usize)?,
            None => 1 << 20,
        },
        layers,
    };
    check_total(&config)?;
    Ok(config)
}

/// Keys that must have the one value whose meaning is implemented.
fn refuse_other_models(keys: &Keys<'_>) -> Result<()> {
    keys.required("model_type", &"kimi_linear".into())?;
    keys.required("mla_use_nope", &true.into())?;
    keys.only("rope_scaling", &Value::Null)?;
    keys.only("hidden_act", &"silu".into())?;
    keys.only("moe_router_activation_func", &"sigmoid".into())?;
    keys.only("moe_layer_freq", &1.into())?;
    keys.only("use_grouped_topk", &true.into())?;
    keys.only("tie_word_embeddings", &false.into())
}

/// The layers' mixers from the two 1-based lists; `dense` is filled in later.
fn mixers(keys: &Keys<'_>) -> Result<Vec<LayerConfig>> {
    let count = keys.within("num_hidden_layers", 1, MAX_LAYERS)?;
    let lists = keys.object("linear_attn_config", "linear_attn_config.")?;
    let mut kinds = vec![None; count];
    for (key, kind) in [("kda_layers", LayerKind::Kda), ("full_attn_layers", LayerKind::Mla)] {
        for number in lists.layer_numbers(key, count)? {
            if let Some(earlier) = kinds[number - 1].replace(kind) {
                let found = if earlier == kind { "twice here" } else { "also in kda_layers" };
                return Err(lists.fault(key, "every layer in one list, once", format!("layer {number} {found}")));
            }
        }
    }
    let mut layers = Vec::with_capacity(count);
    for (index, kind) in kinds.into_iter().enumerate() {
        let Some(kind) = kind else {
            return Err(lists.fault(
                "kda_layers",
                format!("layers 1 to {count} in it or in full_attn_layers"),
                format!("layer {} in neither", index + 1),
            ));
        };
        layers.push(LayerConfig { kind, dense: false });
    }
    Ok(layers)
}

fn kda(keys: &Keys<'_>) -> Result<KdaConfig> {
    let keys = keys.object("linear_attn_config", "linear_attn_config.")?;
    let kda = KdaConfig {
        heads: keys.size("num_heads")?,
        head_dim: keys.size("head_dim")?,
        // One tap would leave no inputs to keep between steps: not a convolution.
        conv: keys.within("short_conv_kernel_size", 2, 1 << 10)?,
    };
    check_width(&keys, "num_heads", "times head_dim", kda.heads, kda.head_dim)?;
    Ok(kda)
}

fn mla(keys: &Keys<'_>) -> Result<MlaConfig> {
    let heads = keys.size("num_attention_heads")?;
    if let Some(found) = keys.optional_size("num_key_value_heads")?
        && found != heads
    {
        return Err(keys.fault(
            "num_key_value_heads",
            format!("{heads}, the value of num_attention_heads"),
            found.to_string(),
        ));
    }
    let mla = MlaConfig {
        heads,
        nope: keys.size("qk_nope_head_dim")?,
        rope: keys.size("qk_rope_head_dim")?,
        value: keys.size("v_head_dim")?,
        latent: keys.size("kv_lora_rank")?,
        query_rank: keys.optional_size("q_lora_rank")?,
    };
    check_width(keys, "num_attention_heads", "times channels of a head", heads, mla.nope + mla.rope)?;
    check_width(keys, "num_attention_heads", "times channels of a head", heads, mla.nope + mla.value)?;
    Ok(mla)
}

fn check_width(keys: &Keys<'_>, key: &str, times: &str, count: usize, each: usize) -> Result<()> {
    if count * each <= MAX_WIDTH {
        return Ok(());
    }
    Err(keys.fault(key, format!("at most {MAX_WIDTH} {times}"), format!("{count} times {each}")))
}

/// The mixture of experts. A model may have none (num_experts null or 0), and then needs none of the other keys.
fn experts(keys: &Keys<'_>) -> Result<MoeConfig> {
    if keys.present("num_experts").is_none_or(|value| value.as_u64() == Some(0)) {
        return Ok(MoeConfig {
            experts: 0,
            top_k: 0,
            intermediate: 0,
            shared: 0,
            groups: 1,
            top_groups: 1,
            renormalize: false,
            scale: 1.0,
        });
    }
    let experts = keys.within("num_experts", 1, MAX_EXPERTS)?;
    let groups = keys.optional_size("num_expert_group")?.unwrap_or(1);
    if groups > experts || experts % groups != 0 {
        return Err(keys.fault("num_expert_group", format!("a divisor of the {experts} experts"), groups.to_string()));
    }
    let group = experts / groups;
    if groups > 1 && group < 2 {
        // A group's score is the sum of its two largest members.
        return Err(keys.fault("num_expert_group", "at least 2 experts in a group", format!("{groups} groups of 1")));
    }
    let top_groups = keys.optional_size("topk_group")?.unwrap_or(1);
    if top_groups > groups {
        return Err(keys.fault("topk_group", format!("at most {groups}, the groups"), top_groups.to_string()));
    }
    let top_k = keys.size("num_experts_per_token")?;
    if top_k > top_groups * group {
        return Err(keys.fault(
            "num_experts_per_token",
            format!("at most {}, the experts in the kept groups", top_groups * group),
            top_k.to_string(),
        ));
    }
    let shared = match keys.present("num_shared_experts") {
        Some(_) => keys.within("num_shared_experts", 0, MAX_EXPERTS)?,
        None => 0,
    };
    let intermediate = keys.size("moe_intermediate_size")?;
    check_width(keys, "num_shared_experts", "times moe_intermediate_size", shared, intermediate)?;
    Ok(MoeConfig {
        experts,
        top_k,
        intermediate,
        shared,
        groups,
        top_groups,
        renormalize: keys.flag("moe_renormalize", None)?,
        scale: keys.positive("routed_scaling_factor")?,
    })
}

/// Refuses a model whose size as a whole is absurd.
fn check_total(config: &ModelConfig) -> Result<()> {
    let expert_layers = config.layers.iter().filter(|layer| !layer.dense).count();
    let copies = expert_layers * config.moe.experts;
    if copies > MAX_EXPERT_COPIES {
        return Err(ModelError::config(
            "num_experts",
            format!("at most {MAX_EXPERT_COPIES} experts over all layers"),
            copies.to_string(),
        ));
    }
    let parameters = inventory::total_parameters(config);
    if parameters > MAX_PARAMETERS {
        return Err(ModelError::config(
            "(sizes together)",
            format!("at most {MAX_PARAMETERS} parameters"),
            parameters.to_string(),
        ));
    }
    Ok(())
}
