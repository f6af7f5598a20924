"""Make the small cases in this folder with Hugging Face transformers: checkpoint and expected outputs.

Random weights are written in the published layout, loaded back by transformers' own checkpoint conversion, and run in
float32 on the CPU with eager attention. Not a test: it runs when a case changes, and its outputs are committed.

    python3 -m venv /tmp/venv && /tmp/venv/bin/pip install -r requirements.txt && /tmp/venv/bin/python make_cases.py
"""
import argparse
import json
import math
import pathlib
import sys

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

import reference
from layout import tensor_shapes

PROMPT_LENGTHS = (5, 33, 70)  # below a 64-token chunk, not a multiple of 16, past a chunk
TRACED_PROMPT = 2  # hidden and kda_state are kept for this one
GREEDY_TOKENS = 16
GREEDY_MARGIN, PROMPT_MARGIN, ROUTER_GAP = 1e-3, 3e-4, 5e-5  # far above what float32 rounding moves

COMMON = {
    "architectures": ["KimiLinearForCausalLM"], "model_type": "kimi_linear", "dtype": "bfloat16",
    "hidden_size": 64, "head_dim": 72, "hidden_act": "silu", "rms_norm_eps": 1e-5, "initializer_range": 0.02,
    "use_cache": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
    "num_shared_experts": 1, "moe_renormalize": True, "moe_router_activation_func": "sigmoid", "moe_layer_freq": 1,
    "first_k_dense_replace": 1, "routed_scaling_factor": 2.446, "use_grouped_topk": True, "num_expert_group": 1,
    "topk_group": 1, "num_nextn_predict_layers": 0, "q_lora_rank": None, "mla_use_nope": True, "rope_theta": 10000.0,
    "rope_scaling": None, "model_max_length": 1048576,
}


def linear_attention(mla_layers, layers, heads, dim, taps=4):
    kda_layers = [number for number in range(1, layers + 1) if number not in mla_layers]
    return {"kda_layers": kda_layers, "full_attn_layers": mla_layers, "num_heads": heads, "head_dim": dim,
            "short_conv_kernel_size": taps}


CASES = {
    "q_lora": dict(
        seed=0, shards=1, vocab_size=192, num_hidden_layers=4, intermediate_size=96, moe_intermediate_size=12,
        num_attention_heads=8, q_lora_rank=24, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=24,
        num_experts=8, num_experts_per_token=2, linear_attn_config=linear_attention([4], 4, heads=4, dim=16)),
    "first_mla": dict(
        seed=0, shards=1, vocab_size=251, num_hidden_layers=4, intermediate_size=80, moe_intermediate_size=20,
        first_k_dense_replace=2, num_shared_experts=2, num_attention_heads=4, kv_lora_rank=32, qk_nope_head_dim=16,
        qk_rope_head_dim=8, v_head_dim=16, num_experts=8, num_experts_per_token=3,
        linear_attn_config=linear_attention([1, 4], 4, heads=8, dim=16)),
    "groups": dict(
        seed=1, shards=2, vocab_size=200, num_hidden_layers=4, intermediate_size=64, moe_intermediate_size=8,
        moe_renormalize=False, routed_scaling_factor=1.25, num_expert_group=4, topk_group=2, num_attention_heads=4,
        kv_lora_rank=24, qk_nope_head_dim=24, qk_rope_head_dim=8, v_head_dim=16, num_experts=16,
        num_experts_per_token=4, linear_attn_config=linear_attention([3], 4, heads=4, dim=24, taps=3)),
}


def random_tensor(name, shape, generator):
    """Projections keep the size of their input, A = exp(A_log) spans [1, 16] and dt [1e-3, 1e-1] as in training."""
    def uniform(low, high):
        return low + (high - low) * torch.rand(shape, generator=generator)

    normal = torch.randn(shape, generator=generator)
    if name.endswith("A_log"):
        return uniform(1.0, 16.0).log()
    if name.endswith("dt_bias"):
        dt = uniform(math.log(1e-3), math.log(1e-1)).exp()
        return dt + torch.log(-torch.expm1(-dt))  # softplus of it is dt
    if name.endswith("e_score_correction_bias"):
        return 0.1 * normal
    if "norm" in name:
        return 1 + 0.2 * normal
    if "conv1d" in name:
        return 0.5 * normal
    if "embed_tokens" in name:
        return normal
    return 1.3 / math.sqrt(shape[-1]) * normal


def write_checkpoint(folder, config, seed, shards):
    generator = torch.Generator().manual_seed(seed)
    float32 = ("A_log", "dt_bias", "e_score_correction_bias")
    weights = {}
    for name, shape in tensor_shapes(config).items():
        rounded = random_tensor(name, shape, generator).bfloat16()  # float32 tensors too hold bf16 numbers
        weights[name] = rounded.float() if name.endswith(float32) else rounded
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.safetensors*"):
        old.unlink()
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if shards == 1:
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return
    names = list(weights)
    bounds = [round(shard * len(names) / shards) for shard in range(shards + 1)]
    weight_map = {}
    for shard in range(shards):
        file, part = f"model-{shard + 1:05}-of-{shards:05}.safetensors", names[bounds[shard]:bounds[shard + 1]]
        save_file({name: weights[name] for name in part}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in weights.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def load(folder):
    model, report = transformers.KimiLinearForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    faults = {kind: sorted(names) for kind, names in report.items() if names}
    if faults:
        sys.exit(f"{folder}: transformers loads it with {faults}")
    return model.eval()


class Recorder:
    """What a forward pass leaves in the layers and routers, and the strongest log decay seen."""

    def __init__(self, model):
        self.hidden, self.experts, self.log_decay = {}, {}, 0.0
        for layer, block in enumerate(model.model.layers):
            block.register_forward_hook(lambda _m, _i, out, layer=layer: self.hidden.update({layer: out[0]}))
            if hasattr(block.mlp, "gate"):
                block.mlp.gate.register_forward_hook(
                    lambda _m, _i, out, layer=layer: self.experts.update({layer: out[2].sort(dim=-1).values.int()}))
            if hasattr(block.self_attn, "forget_gate"):
                block.self_attn.forget_gate.register_forward_hook(self.note_decay)

    def note_decay(self, _module, _inputs, out):
        self.log_decay = min(self.log_decay, out.min().item())


def expected_outputs(model, config, seed):
    """The tensors of expected.safetensors; also the largest relative L2 of the cached run against a single pass."""
    generator, recorder, out, worst = torch.Generator().manual_seed(1000 + seed), Recorder(model), {}, 0.0
    for i, length in enumerate(PROMPT_LENGTHS):
        prompt = torch.randint(3, config["vocab_size"], (length,), generator=generator)
        result = model(prompt[None], use_cache=True)
        cache, logits = result.cache, result.logits[0]
        out |= {f"prompt_{i}": prompt, f"logits_{i}": logits}
        out |= {f"experts_{i}_{layer}": rows for layer, rows in recorder.experts.items()}
        if i == TRACED_PROMPT:
            out |= {f"hidden_{i}_{layer}": rows for layer, rows in recorder.hidden.items()}
            out |= {f"kda_state_{i}_{number - 1}": cache.get_recurrent_state(number - 1, state_idx=0)[0].clone()
                    for number in config["linear_attn_config"]["kda_layers"]}
        tokens, rows, experts = [logits[-1].argmax()], [], []
        for _ in range(GREEDY_TOKENS):
            rows.append(model(tokens[-1].view(1, 1), cache=cache, use_cache=True).logits[0, -1])
            experts.append(dict(recorder.experts))
            tokens.append(rows[-1].argmax())
        out |= {f"greedy_{i}": torch.stack(tokens[:-1]), f"greedy_logits_{i}": torch.stack(rows)}
        out |= {f"greedy_experts_{i}_{layer}": torch.cat([step[layer] for step in experts]) for layer in experts[0]}

        single_pass = model(torch.cat([prompt, out[f"greedy_{i}"]])[None], use_cache=False).logits[0]
        cached = torch.cat([logits, out[f"greedy_logits_{i}"]])
        worst = max(worst, ((single_pass - cached).norm() / cached.norm()).item())
        for layer, chosen in recorder.experts.items():
            if not torch.equal(chosen, torch.cat([out[f"experts_{i}_{layer}"], out[f"greedy_experts_{i}_{layer}"]])):
                sys.exit(f"layer {layer} of prompt {i}: one pass selects other experts than the cached run")
    return {name: tensor.contiguous() for name, tensor in out.items()}, worst, recorder.log_decay


def make(folder, seed, shards, config):
    """Write the case; returns what is too close to a tie for an exact comparison."""
    write_checkpoint(folder, config, seed, shards)
    with torch.no_grad():
        expected, cached_error, log_decay = expected_outputs(load(folder), config, seed)
    save_file(expected, folder / "expected.safetensors")
    for file in folder.iterdir():
        file.chmod(0o644)

    expected = {name: tensor.numpy() for name, tensor in expected.items()}
    own, gap = reference.run(reference.Model(*reference.read_checkpoint(folder)), expected)
    own_error = max(reference.worst_errors(own, expected).values())
    greedy, prompt = reference.smallest_margins(expected)
    size = sum(file.stat().st_size for file in folder.iterdir())
    logits = np.concatenate([t.reshape(-1) for name, t in expected.items() if name.startswith("logits_")])
    print(f"{folder.name}: seed {seed}, {size / 1000:.0f} kB, logit std {logits.std():.2f}, "
          f"log decay to {log_decay:.0f}, margins {greedy:.1e} greedy {prompt:.1e} prompt, "
          f"router gap {gap:.1e}, single pass {cached_error:.1e}, reference {own_error:.1e}", flush=True)
    if any(np.any(own[name] != expected[name]) for name in own if own[name].dtype != np.float32):
        sys.exit(f"{folder}: the float64 reference chooses other tokens or experts")
    measured = (("greedy margin", greedy, GREEDY_MARGIN), ("prompt margin", prompt, PROMPT_MARGIN),
                ("router gap", gap, ROUTER_GAP))
    return [f"{name} {value:.1e} < {limit:.0e}" for name, value, limit in measured if value < limit]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[[], *CASES], help="default: all")
    parser.add_argument("--search", type=int, default=1, help="try that many seeds from the case's own one upwards")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the order of sums, and so the last bit, follows the number of threads
    for name in args.cases or CASES:
        case = COMMON | CASES[name]
        seed, shards = case.pop("seed"), case.pop("shards")
        case["num_key_value_heads"] = case["num_attention_heads"]
        for attempt in range(seed, seed + args.search):
            ties = make(pathlib.Path(__file__).parent / name, attempt, shards, case)
            if not ties:
                break
            print(f"{name}: seed {attempt}: {', '.join(ties)}")
        else:
            sys.exit(f"{name}: no seed without near ties; search further with --search")


if __name__ == "__main__":
    main()
