//! Tests of the configuration: what is read, and the message of every refusal.

use serde_json::{Value, json};

use super::{LATENT_EPS, LayerConfig, LayerKind, ModelConfig};
use crate::presets::Preset;
use crate::test_support::odd_config;

/// The odd configuration with keys replaced, or removed where the value is none; nested keys are joined by a dot.
fn changed(changes: &[(&str, Option<Value>)]) -> String {
    let mut document = odd_config();
    for (key, value) in changes {
        let (parent, key) = match key.split_once('.') {
            Some((parent, key)) => (&mut document[parent], key),
            None => (&mut document, *key),
        };
        let map = parent.as_object_mut().unwrap();
        match value {
            Some(value) => map.insert(key.to_owned(), value.clone()),
            None => map.remove(key),
        };
    }
    document.to_string()
}

fn parsed(changes: &[(&str, Option<Value>)]) -> ModelConfig {
    ModelConfig::parse(&changed(changes)).unwrap()
}

fn refusal(changes: &[(&str, Option<Value>)]) -> String {
    ModelConfig::parse(&changed(changes)).unwrap_err().to_string()
}

#[test]
fn every_field_is_read() {
    let config = parsed(&[]);
    let layer = |kind, dense| LayerConfig { kind, dense };
    assert_eq!(
        config.layers,
        [
            layer(LayerKind::Mla, true),
            layer(LayerKind::Kda, true),
            layer(LayerKind::Mla, false),
            layer(LayerKind::Kda, false)
        ]
    );
    assert_eq!((config.vocab, config.hidden, config.intermediate), (11, 8, 16));
    assert_eq!((config.kda.heads, config.kda.head_dim, config.kda.conv), (4, 6, 3));
    let mla = config.mla;
    assert_eq!((mla.heads, mla.nope, mla.rope, mla.value, mla.latent, mla.query_rank), (8, 4, 2, 3, 6, Some(5)));
    let moe = config.moe;
    assert_eq!((moe.experts, moe.top_k, moe.intermediate, moe.shared), (4, 2, 8, 2));
    assert_eq!((moe.groups, moe.top_groups, moe.renormalize, moe.scale), (2, 1, false, 1.5));
    assert_eq!(config.eps, 1e-5);
    assert_eq!(
        (config.bos, config.eos.as_slice(), config.pad, config.max_length),
        (Some(1), &[2, 3][..], None, 1 << 20)
    );
}

#[test]
fn harmless_keys_may_be_missing_or_unknown() {
    let config = parsed(&[
        ("num_key_value_heads", None),
        ("q_lora_rank", None),
        ("num_expert_group", Some(Value::Null)),
        ("num_shared_experts", None),
        ("eos_token_id", Some(json!(7))),
        ("model_max_length", Some(json!(4096))),
        ("head_dim", Some(json!(-3))),
        ("something_new", Some(json!({"a": [1]}))),
    ]);
    assert_eq!((config.mla.query_rank, config.moe.groups, config.moe.shared), (None, 1, 0));
    assert_eq!((config.eos, config.max_length), (vec![7], 4096));
}

#[test]
fn without_experts_every_layer_is_dense() {
    for experts in [Some(json!(0)), Some(Value::Null), None] {
        let config = parsed(&[("num_experts", experts), ("moe_intermediate_size", None)]);
        assert!(config.layers.iter().all(|layer| layer.dense));
        assert_eq!((config.has_dense(), config.has_experts(), config.moe.experts), (true, false, 0));
    }
}

#[test]
fn one_key_that_is_not_supported_is_refused_by_name() {
    let cases: &[(&str, Option<Value>, &str)] = &[
        ("model_type", Some(json!("llama")), "expected \"kimi_linear\", found \"llama\""),
        ("model_type", None, "expected \"kimi_linear\", found no such key"),
        ("mla_use_nope", Some(json!(false)), "expected true, found false"),
        ("mla_use_nope", None, "expected true, found no such key"),
        ("rope_scaling", Some(json!({"type": "yarn"})), "expected null, found {\"type\":\"yarn\"}"),
        ("hidden_act", Some(json!("gelu")), "expected \"silu\", found \"gelu\""),
        ("moe_router_activation_func", Some(json!("softmax")), "expected \"sigmoid\", found \"softmax\""),
        ("moe_layer_freq", Some(json!(2)), "expected 1, found 2"),
        ("use_grouped_topk", Some(json!(false)), "expected true, found false"),
        ("tie_word_embeddings", Some(json!(true)), "expected false, found true"),
        ("num_key_value_heads", Some(json!(4)), "expected 8, the value of num_attention_heads, found 4"),
        ("vocab_size", Some(json!(0)), "expected an integer from 1 to 16777216, found 0"),
        ("vocab_size", Some(json!("many")), "expected an integer from 1 to 16777216, found \"many\""),
        ("hidden_size", Some(json!(8.5)), "expected an integer from 1 to 16777216, found 8.5"),
        ("hidden_size", Some(json!(-8)), "expected an integer from 1 to 16777216, found -8"),
        ("hidden_size", None, "expected an integer from 1 to 16777216, found no such key"),
        (
            "intermediate_size",
            Some(json!(1u64 << 60)),
            "expected an integer from 1 to 16777216, found 1152921504606846976",
        ),
        ("kv_lora_rank", Some(Value::Null), "expected an integer from 1 to 16777216, found null"),
        ("q_lora_rank", Some(json!(0)), "expected an integer from 1 to 16777216, found 0"),
        ("num_hidden_layers", Some(json!(5000)), "expected an integer from 1 to 1024, found 5000"),
        ("first_k_dense_replace", Some(json!(-1)), "expected an integer from 0 to 1024, found -1"),
        ("num_experts", Some(json!(1 << 20)), "expected an integer from 1 to 65536, found 1048576"),
        ("num_expert_group", Some(json!(3)), "expected a divisor of the 4 experts, found 3"),
        ("num_expert_group", Some(json!(8)), "expected a divisor of the 4 experts, found 8"),
        ("num_expert_group", Some(json!(4)), "expected at least 2 experts in a group, found 4 groups of 1"),
        ("topk_group", Some(json!(3)), "expected at most 2, the groups, found 3"),
        ("num_experts_per_token", Some(json!(3)), "expected at most 2, the experts in the kept groups, found 3"),
        ("moe_renormalize", Some(json!(1)), "expected true or false, found 1"),
        ("moe_renormalize", None, "expected true or false, found no such key"),
        ("routed_scaling_factor", Some(json!(0)), "expected a positive number, found 0"),
        ("rms_norm_eps", Some(json!(1e300)), "expected a positive number, found 1e+300"),
        ("rms_norm_eps", Some(json!("1e-5")), "expected a positive number, found \"1e-5\""),
        ("eos_token_id", Some(json!([1, -2])), "expected a token id, a list of token ids or null, found [1,-2]"),
        ("bos_token_id", Some(json!([1, 2])), "expected one token id or null, found [1,2]"),
        ("linear_attn_config", Some(json!([1])), "expected an object, found [1]"),
        ("linear_attn_config", None, "expected an object, found no such key"),
        ("linear_attn_config.num_heads", Some(json!(0)), "expected an integer from 1 to 16777216, found 0"),
        ("linear_attn_config.short_conv_kernel_size", Some(json!(1)), "expected an integer from 2 to 1024, found 1"),
        ("linear_attn_config.kda_layers", Some(json!(2)), "expected a list of layer numbers, found 2"),
        ("linear_attn_config.kda_layers", Some(json!([0, 2, 4])), "expected layer numbers from 1 to 4, found 0"),
        ("linear_attn_config.kda_layers", Some(json!([2, 4, 5])), "expected layer numbers from 1 to 4, found 5"),
        (
            "linear_attn_config.kda_layers",
            Some(json!([2, 4, 2])),
            "expected every layer in one list, once, found layer 2 twice here",
        ),
        (
            "linear_attn_config.kda_layers",
            Some(json!([2])),
            "expected layers 1 to 4 in it or in full_attn_layers, found layer 4 in neither",
        ),
        (
            "linear_attn_config.full_attn_layers",
            Some(json!([1, 2, 3])),
            "expected every layer in one list, once, found layer 2 also in kda_layers",
        ),
    ];
    for (key, value, message) in cases {
        assert_eq!(refusal(&[(key, value.clone())]), format!("config.json: {key}: {message}"));
    }
}

#[test]
fn sizes_that_are_absurd_together_are_refused() {
    let big = || Some(json!(1 << 20));
    assert_eq!(
        refusal(&[("linear_attn_config.num_heads", big()), ("linear_attn_config.head_dim", big())]),
        "config.json: linear_attn_config.num_heads: expected at most 16777216 times head_dim, found 1048576 times 1048576"
    );
    assert_eq!(
        refusal(&[("num_attention_heads", big()), ("num_key_value_heads", None), ("v_head_dim", big())]),
        "config.json: num_attention_heads: expected at most 16777216 times channels of a head, found 1048576 times 1048580"
    );
    assert_eq!(
        refusal(&[("num_shared_experts", Some(json!(65_536))), ("moe_intermediate_size", big())]),
        "config.json: num_shared_experts: expected at most 16777216 times moe_intermediate_size, found 65536 times 1048576"
    );
    let message = refusal(&[("vocab_size", Some(json!(1 << 24))), ("hidden_size", Some(json!(1 << 24)))]);
    assert!(
        message.starts_with("config.json: (sizes together): expected at most 281474976710656 parameters"),
        "{message}"
    );
    let all: Vec<usize> = (1..=1000).collect();
    let message = refusal(&[
        ("num_hidden_layers", Some(json!(1000))),
        ("linear_attn_config.kda_layers", Some(json!(all))),
        ("linear_attn_config.full_attn_layers", Some(json!([]))),
        ("num_experts", Some(json!(65_536))),
    ]);
    assert_eq!(message, "config.json: num_experts: expected at most 1048576 experts over all layers, found 65404928");
}

#[test]
fn what_is_not_json_is_refused() {
    for (text, start) in [
        ("", "config.json: not valid JSON: EOF"),
        ("{\"vocab_size\": ", "config.json: not valid JSON: EOF"),
        ("[]", "config.json: (document): expected an object, found []"),
    ] {
        let message = ModelConfig::parse(text).unwrap_err().to_string();
        assert!(message.starts_with(start), "{message}");
    }
    let whole = changed(&[]);
    for end in 0..whole.len() {
        assert!(ModelConfig::parse(&whole[..end]).is_err(), "cut at {end}");
    }
}

#[test]
fn a_degree_that_does_not_divide_is_refused_with_the_count() {
    let config = parsed(&[]);
    for tp in [1, 2, 4] {
        config.check_tp(tp).unwrap();
    }
    assert_eq!(
        config.check_tp(3).unwrap_err().to_string(),
        "tensor-parallel degree 3 does not divide KDA heads (linear_attn_config.num_heads): expected a multiple of 3, found 4"
    );
    assert_eq!(
        config.check_tp(0).unwrap_err().to_string(),
        "expected a rank below the tensor-parallel degree, found rank 0 of 0"
    );
    assert_eq!(
        config.check_rank(2, 2).unwrap_err().to_string(),
        "expected a rank below the tensor-parallel degree, found rank 2 of 2"
    );
    let message = |changes: &[(&str, Option<Value>)]| parsed(changes).check_tp(4).unwrap_err().to_string();
    let six = || Some(json!(6));
    assert_eq!(
        message(&[("num_attention_heads", six()), ("num_key_value_heads", None)]),
        "tensor-parallel degree 4 does not divide MLA heads (num_attention_heads): expected a multiple of 4, found 6"
    );
    assert_eq!(
        message(&[("intermediate_size", six())]),
        "tensor-parallel degree 4 does not divide the dense MLP's width (intermediate_size): expected a multiple of 4, found 6"
    );
    assert_eq!(
        message(&[("moe_intermediate_size", six())]),
        "tensor-parallel degree 4 does not divide an expert's width (moe_intermediate_size): expected a multiple of 4, found 6"
    );
}

#[test]
fn counts_of_layers_that_do_not_exist_need_not_divide() {
    let six = || Some(json!(6));
    parsed(&[("intermediate_size", six()), ("first_k_dense_replace", Some(json!(0)))]).check_tp(4).unwrap();
    parsed(&[("moe_intermediate_size", six()), ("first_k_dense_replace", Some(json!(4)))]).check_tp(4).unwrap();
}

#[test]
fn the_vocabulary_is_shared_out_in_blocks_of_its_rounded_up_share() {
    let config = parsed(&[]);
    let shards = |tp: usize| (0..tp).map(|rank| config.vocab_shard(rank, tp)).collect::<Vec<_>>();
    assert_eq!(config.vocab_shard(0, 1), 0..11);
    assert_eq!(shards(2), [0..6, 6..11]);
    assert_eq!(shards(4), [0..3, 3..6, 6..9, 9..11]);
    assert_eq!(shards(8), [0..2, 2..4, 4..6, 6..8, 8..10, 10..11, 11..11, 11..11]);
}

#[test]
fn shapes_of_a_rank_are_divided_where_they_should_be() {
    let config = parsed(&[]);
    let kda = config.kda_shape(2);
    assert_eq!((kda.hidden, kda.heads, kda.head_dim, kda.conv, kda.eps), (8, 2, 6, 3, 1e-5));
    let mla = config.mla_shape(2);
    assert_eq!((mla.heads, mla.nope, mla.rope, mla.value, mla.latent, mla.query_rank), (4, 4, 2, 3, 6, Some(5)));
    assert_eq!(mla.eps, LATENT_EPS);
    assert_eq!(config.mlp_shape(4).width, 4);
    let moe = config.moe_shape(4);
    assert_eq!((moe.experts, moe.top_k, moe.groups, moe.top_groups, moe.width, moe.shared_width), (4, 2, 2, 1, 2, 4));
    let cache = config.cache_shape(2, 3, 5);
    assert_eq!((cache.kda_layers, cache.kda_heads, cache.mla_layers, cache.latent_width), (2, 2, 2, 8));
    assert_eq!((cache.slots, cache.pages, cache.conv, cache.kda_head_dim), (3, 5, 3, 6));
}

#[test]
fn the_published_shape_has_the_published_number_of_parameters() {
    let config = Preset::Kimi48b.config().unwrap();
    assert_eq!(crate::inventory::total_parameters(&config), 49_122_681_728);
    for tp in [1, 2, 4, 8, 16, 32] {
        config.check_tp(tp).unwrap();
    }
    let bytes = crate::inventory::weight_bytes(&config, 0, 1);
    assert_eq!(bytes, 2 * 49_122_681_728 + 2 * (20 * (32 + 4096) + 26 * 256));
}
