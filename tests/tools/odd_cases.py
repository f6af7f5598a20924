"""Make golden cases of odd shapes from the float64 reference, for runs of golden_matrix.sh.

    tests/tools/odd_cases.py FOLDER

Their shapes are in no committed case: sizes that no power of two divides, two taps, one kind of layer alone, no shared
experts, a vocabulary smaller than the hidden width. They are made anew in every run, a second or two each, and so need no
room in the repository. Seeds whose margins are too small for an exact comparison are passed over.
"""
import argparse
import json
import pathlib
import sys

import numpy as np
from safetensors.numpy import save_file

CASES = pathlib.Path(__file__).resolve().parents[1] / "cases"
sys.path.insert(0, str(CASES))

import reference  # noqa: E402  (the path above comes first)
from layout import tensor_shapes  # noqa: E402

PROMPT_LENGTHS = (1, 17, 66)
TRACED_PROMPT = 2
GREEDY_TOKENS = 8
# Smallest margins and router gap: well above what float32 rounding moves.
GREEDY_MARGIN, PROMPT_MARGIN, ROUTER_GAP = 1e-3, 3e-4, 5e-5
SEEDS = 40

COMMON = {
    "model_type": "kimi_linear", "dtype": "bfloat16", "vocab_size": 131, "hidden_size": 48, "num_hidden_layers": 4,
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0, "num_attention_heads": 4, "q_lora_rank": None, "kv_lora_rank": 20, "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 6, "v_head_dim": 10, "mla_use_nope": True, "rope_theta": 10000.0, "rope_scaling": None,
    "intermediate_size": 72, "moe_intermediate_size": 20, "num_experts": 6, "num_experts_per_token": 2,
    "num_shared_experts": 1, "num_expert_group": 1, "topk_group": 1, "use_grouped_topk": True, "moe_renormalize": True,
    "moe_router_activation_func": "sigmoid", "moe_layer_freq": 1, "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.7, "model_max_length": 4096,
}


def linear_attention(mla_layers, layers=4, heads=4, dim=24, taps=4):
    kda_layers = [number for number in range(1, layers + 1) if number not in mla_layers]
    return {"kda_layers": kda_layers, "full_attn_layers": mla_layers, "num_heads": heads, "head_dim": dim,
            "short_conv_kernel_size": taps}


SHAPES = {
    "two_taps": {"linear_attn_config": linear_attention([2], dim=20, taps=2), "moe_intermediate_size": 12},
    "all_kda": {"linear_attn_config": linear_attention([], heads=12, dim=8), "first_k_dense_replace": 2},
    "all_mla": {"linear_attn_config": linear_attention([1, 2, 3, 4]), "q_lora_rank": 17, "v_head_dim": 22,
                "num_attention_heads": 8},
    "all_dense": {"linear_attn_config": linear_attention([1, 3], taps=3), "first_k_dense_replace": 4},
    "no_shared": {"linear_attn_config": linear_attention([4], dim=33), "num_shared_experts": 0, "num_experts": 12,
                  "num_expert_group": 3, "topk_group": 2, "num_experts_per_token": 3, "moe_renormalize": False},
    "few_ids": {"linear_attn_config": linear_attention([3]), "vocab_size": 37, "num_shared_experts": 3,
                "num_experts_per_token": 1},
    # Heads that no number of ranks divides, and widths of which nothing is a multiple.
    "odd_heads": {"linear_attn_config": linear_attention([4], heads=3, dim=32), "hidden_size": 50, "vocab_size": 97,
                  "num_attention_heads": 5, "kv_lora_rank": 36, "intermediate_size": 70, "moe_intermediate_size": 18,
                  "num_experts": 7, "num_experts_per_token": 3},
    # The published sizes of heads, which GPUs have kernels of their own for, and little else like the published model.
    "wide_heads": {"linear_attn_config": linear_attention([3], heads=3, dim=128), "hidden_size": 72,
                   "num_attention_heads": 3, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
                   "v_head_dim": 128, "first_k_dense_replace": 0},
    "low_rank": {"linear_attn_config": linear_attention([2], heads=2, dim=64), "hidden_size": 100, "q_lora_rank": 33,
                 "num_attention_heads": 6, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
                 "v_head_dim": 96, "moe_intermediate_size": 64, "num_experts": 3},
}


def random_tensor(name, shape, random):
    """Distributed as in cases/make_cases.py."""
    normal = random.standard_normal(shape)
    if name.endswith("A_log"):
        return np.log(random.uniform(1.0, 16.0, shape))
    if name.endswith("dt_bias"):
        dt = np.exp(random.uniform(np.log(1e-3), np.log(1e-1), shape))
        return dt + np.log(-np.expm1(-dt))  # softplus of it is dt
    if name.endswith("e_score_correction_bias"):
        return 0.1 * normal
    if "norm" in name:
        return 1 + 0.2 * normal
    if "conv1d" in name:
        return 0.5 * normal
    if "embed_tokens" in name:
        return normal
    return 1.3 / np.sqrt(shape[-1]) * normal


def write_checkpoint(folder, config, random):
    """NumPy has no bf16, so the file is written byte by byte; float32 tensors too hold bf16 numbers."""
    float32 = ("A_log", "dt_bias", "e_score_correction_bias")
    header, parts, begin = {}, [], 0
    for name, shape in tensor_shapes(config).items():
        bits = random_tensor(name, shape, random).astype("<f4").view("<u4")
        upper = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to the nearest, ties to even
        stored = (upper << 16).astype("<u4") if name.endswith(float32) else upper.astype("<u2")
        parts.append(stored.tobytes())
        header[name] = {"dtype": "F32" if name.endswith(float32) else "BF16", "shape": list(shape),
                        "data_offsets": [begin, begin + len(parts[-1])]}
        begin += len(parts[-1])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def continue_greedily(model, prompt):
    cache, tokens = model.new_cache(), []
    for token in prompt:
        logits = model.step(token, cache)
    for _ in range(GREEDY_TOKENS):
        tokens.append(int(logits.argmax()))
        logits = model.step(tokens[-1], cache)
    return np.array(tokens, np.int64)


def expected_outputs(model, random):
    """The tensors of expected.safetensors, and the smallest router gap."""
    inputs = {}
    for i, length in enumerate(PROMPT_LENGTHS):
        inputs[f"prompt_{i}"] = random.integers(3, model.config["vocab_size"], length)
        inputs[f"greedy_{i}"] = continue_greedily(model, inputs[f"prompt_{i}"])
    wanted = {f"hidden_{TRACED_PROMPT}_{layer}": None for layer in range(model.layers)}
    wanted |= {f"kda_state_{TRACED_PROMPT}_{layer}": None for layer in range(model.layers)
               if layer not in model.mla_layers}
    out, gap = reference.run(model, inputs | wanted)
    return inputs | out, gap


def make(folder, config):
    for seed in range(SEEDS):
        random = np.random.default_rng(seed)
        write_checkpoint(folder, config, random)
        expected, gap = expected_outputs(reference.Model(*reference.read_checkpoint(folder)), random)
        greedy, prompt = reference.smallest_margins(expected)
        if greedy > GREEDY_MARGIN and prompt > PROMPT_MARGIN and gap > ROUTER_GAP:
            save_file({name: np.ascontiguousarray(t) for name, t in expected.items()}, folder / "expected.safetensors")
            print(f"{folder}: seed {seed}, margins {greedy:.1e} greedy {prompt:.1e} prompt, router gap {gap:.1e}",
                  flush=True)
            return
    sys.exit(f"{folder}: no seed up to {SEEDS} without near ties")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    for name, shape in SHAPES.items():
        config = COMMON | shape
        make(parser.parse_args().folder / name, config | {"num_key_value_heads": config["num_attention_heads"]})


if __name__ == "__main__":
    main()
