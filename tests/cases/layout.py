"""The tensors of a checkpoint in the published Kimi Linear layout, as its configuration implies them."""


def tensor_shapes(c):
    """Name and shape of every tensor of the published layout, in layer order."""
    d, linear = c["hidden_size"], c["linear_attn_config"]
    heads, dim, taps = linear["num_heads"], linear["head_dim"], linear["short_conv_kernel_size"]
    channels, mla_heads, latent = heads * dim, c["num_attention_heads"], c["kv_lora_rank"]
    nope, rope, value, rank = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"], c["q_lora_rank"]

    def mlp(prefix, width, names=("gate_proj", "up_proj", "down_proj")):
        return {f"{prefix}{names[0]}.weight": (width, d), f"{prefix}{names[1]}.weight": (width, d),
                f"{prefix}{names[2]}.weight": (d, width)}

    shapes = {"model.embed_tokens.weight": (c["vocab_size"], d)}
    for layer in range(c["num_hidden_layers"]):
        p = f"model.layers.{layer}."
        shapes |= {p + "input_layernorm.weight": (d,), p + "post_attention_layernorm.weight": (d,)}
        a = p + "self_attn."
        if layer + 1 in linear["full_attn_layers"]:
            query = mla_heads * (nope + rope)
            shapes |= {a + "q_proj.weight": (query, d)} if rank is None else {
                a + "q_a_proj.weight": (rank, d), a + "q_a_layernorm.weight": (rank,),
                a + "q_b_proj.weight": (query, rank)}
            shapes |= {a + "kv_a_proj_with_mqa.weight": (latent + rope, d), a + "kv_a_layernorm.weight": (latent,),
                       a + "kv_b_proj.weight": (mla_heads * (nope + value), latent),
                       a + "o_proj.weight": (d, mla_heads * value)}
        else:
            for part in "qkv":
                shapes |= {f"{a}{part}_proj.weight": (channels, d), f"{a}{part}_conv1d.weight": (channels, 1, taps)}
            for part in "fg":
                shapes |= {f"{a}{part}_a_proj.weight": (dim, d), f"{a}{part}_b_proj.weight": (channels, dim)}
            shapes |= {a + "dt_bias": (channels,), a + "A_log": (1, 1, heads, 1), a + "b_proj.weight": (heads, d),
                       a + "o_norm.weight": (dim,), a + "o_proj.weight": (d, channels)}
        if layer < c["first_k_dense_replace"]:
            shapes |= mlp(p + "mlp.", c["intermediate_size"])
            continue
        m, width = p + "block_sparse_moe.", c["moe_intermediate_size"]
        shapes |= {m + "gate.weight": (c["num_experts"], d), m + "gate.e_score_correction_bias": (c["num_experts"],)}
        for expert in range(c["num_experts"]):
            shapes |= mlp(f"{m}experts.{expert}.", width, ("w1", "w3", "w2"))
        if c["num_shared_experts"]:
            shapes |= mlp(m + "shared_experts.", width * c["num_shared_experts"])
    return shapes | {"model.norm.weight": (d,), "lm_head.weight": (c["vocab_size"], d)}
