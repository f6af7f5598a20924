"""Kimi Linear in float64 NumPy, one token at a time, written for reading and not for speed.

It states the equations once more, apart from every engine: the KDA state by its step recurrence, latent attention with
keys and values expanded, experts one after the other. Run on a case it prints how far the expected values are from its
own; with --out it also writes its tensors, which compare.py can judge like an engine's.
"""
import argparse
import json
import pathlib

import numpy as np
from safetensors.numpy import load_file, save_file

L2_NORM_EPS = 1e-6  # inside the root of the q and k normalisation
LATENT_NORM_EPS = 1e-6  # the latent norms do not use rms_norm_eps


def read_safetensors(path):
    """All tensors of one file as float64; NumPy has no bf16, whose 16 bits are the upper half of a float32."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        raw = data[start + begin:start + end]
        if entry["dtype"] == "BF16":
            values = (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
        elif entry["dtype"] == "F32":
            values = np.frombuffer(raw, "<f4")
        else:
            raise ValueError(f"{path}: {name} has dtype {entry['dtype']}, expected BF16 or F32")
        tensors[name] = values.astype(np.float64).reshape(entry["shape"])
    return tensors


def read_checkpoint(case_dir):
    """The configuration and every weight, from model.safetensors or from the shards that the index names."""
    config = json.loads((case_dir / "config.json").read_text())
    index = case_dir / "model.safetensors.index.json"
    files, weights = ["model.safetensors"], {}
    if index.exists():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    for name in files:
        weights |= read_safetensors(case_dir / name)
    return config, weights


def sigmoid(x):
    return np.where(x >= 0, 1 / (1 + np.exp(-np.abs(x))), np.exp(-np.abs(x)) / (1 + np.exp(-np.abs(x))))


def silu(x):
    return x * sigmoid(x)


def softplus(x):
    return np.logaddexp(0, x)


def rms_norm(x, weight, eps):
    return weight * x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)


def l2_norm(x):
    return x / np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + L2_NORM_EPS)


def mlp(x, gate, up, down):
    return (silu(x @ gate.T) * (x @ up.T)) @ down.T


class Model:
    """The forward pass; a method for each part, so that a test can plant a fault in one of them."""

    def __init__(self, config, weights):
        self.config, self.weights = config, weights
        linear = config["linear_attn_config"]
        self.kda_heads, self.kda_dim = linear["num_heads"], linear["head_dim"]
        self.taps = linear["short_conv_kernel_size"]
        self.mla_layers = {number - 1 for number in linear["full_attn_layers"]}  # published numbers count from 1
        self.layers = config["num_hidden_layers"]
        self.mla_heads, self.latent = config["num_attention_heads"], config["kv_lora_rank"]
        self.nope, self.rope, self.value = (config[k] for k in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
        self.eps = self.o_norm_eps = config["rms_norm_eps"]
        self.q_scale = self.kda_dim ** -0.5
        self.softmax_scale = (self.nope + self.rope) ** -0.5

    def new_cache(self):
        """Per layer: what the next token needs of the tokens before it."""
        state, tail = (self.kda_heads, self.kda_dim, self.kda_dim), (self.taps - 1, self.kda_heads * self.kda_dim)
        return [{"latents": [], "rope_keys": []} if layer in self.mla_layers else
                {"state": np.zeros(state), "tails": {part: np.zeros(tail) for part in "qkv"}}
                for layer in range(self.layers)]

    def step(self, token, cache, trace=None):
        """Feed one token. Returns its logits [V]; `trace` receives the residual stream and the experts by layer."""
        w, trace = self.weights, {} if trace is None else trace
        h = w["model.embed_tokens.weight"][token]
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            mixer = self.mla if layer in self.mla_layers else self.kda
            x = rms_norm(h, w[prefix + "input_layernorm.weight"], self.eps)
            h = h + mixer(prefix + "self_attn.", x, cache[layer])
            x = rms_norm(h, w[prefix + "post_attention_layernorm.weight"], self.eps)
            if layer < self.config["first_k_dense_replace"]:
                h = h + mlp(x, *(w[f"{prefix}mlp.{part}_proj.weight"] for part in ("gate", "up", "down")))
            else:
                out, trace[f"experts_{layer}"], trace[f"gap_{layer}"] = self.moe(prefix + "block_sparse_moe.", x)
                h = h + out
            trace[f"hidden_{layer}"] = h
        return rms_norm(h, w["model.norm.weight"], self.eps) @ w["lm_head.weight"].T

    # Kimi delta attention

    def kda(self, prefix, x, cache):
        w, heads = self.weights, (self.kda_heads, self.kda_dim)
        q, k, v = (self.short_convolution(prefix + part, x, cache["tails"], part).reshape(heads) for part in "qkv")
        z = (x @ w[prefix + "f_a_proj.weight"].T) @ w[prefix + "f_b_proj.weight"].T + w[prefix + "dt_bias"]
        log_decay = -np.exp(w[prefix + "A_log"].reshape(-1, 1)) * softplus(z.reshape(heads))
        beta = sigmoid(x @ w[prefix + "b_proj.weight"].T)[:, None]
        cache["state"], o = self.delta_rule(cache["state"], l2_norm(q) * self.q_scale, l2_norm(k), v, log_decay, beta)
        gate = (x @ w[prefix + "g_a_proj.weight"].T) @ w[prefix + "g_b_proj.weight"].T
        y = rms_norm(o, w[prefix + "o_norm.weight"], self.o_norm_eps) * self.output_gate(gate.reshape(heads))
        return y.reshape(-1) @ w[prefix + "o_proj.weight"].T

    def short_convolution(self, prefix, x, tails, part):
        """Project, then convolve with the tokens before, channel by channel; `tails` keeps the projected inputs."""
        window = np.concatenate([tails[part], x[None] @ self.weights[prefix + "_proj.weight"].T])
        tails[part] = window[1:]
        return silu(np.sum(self.convolution_taps(prefix) * window, axis=0))

    def convolution_taps(self, prefix):
        """[taps, channels], oldest token first: the last tap multiplies the current one."""
        return self.weights[prefix + "_conv1d.weight"][:, 0].T

    def delta_rule(self, state, q, k, v, log_decay, beta):
        """Per head: decay, correct what the key reads towards the value, then read with the query. State [H, K, V]."""
        state = np.exp(log_decay)[:, :, None] * state
        delta = beta * (v - np.einsum("hk,hkv->hv", k, state))
        state = state + k[:, :, None] * delta[:, None, :]
        return state, np.einsum("hk,hkv->hv", q, state)

    def output_gate(self, gate):
        return sigmoid(gate)

    # Multi-head latent attention without positional encoding

    def mla(self, prefix, x, cache):
        w = self.weights
        query = self.mla_query(prefix, x).reshape(self.mla_heads, self.nope + self.rope)
        latent, rope_key = np.split(x @ w[prefix + "kv_a_proj_with_mqa.weight"].T, [self.latent])
        query, rope_key = self.position(query, rope_key, len(cache["latents"]))
        cache["latents"].append(rms_norm(latent, w[prefix + "kv_a_layernorm.weight"], LATENT_NORM_EPS))
        cache["rope_keys"].append(rope_key)
        latents, rope_keys = np.array(cache["latents"]), np.array(cache["rope_keys"])
        key_value = (latents @ w[prefix + "kv_b_proj.weight"].T).reshape(len(latents), self.mla_heads, -1)
        key, value = np.split(key_value, [self.nope], axis=2)
        scores = np.einsum("hn,jhn->hj", query[:, :self.nope], key) + query[:, self.nope:] @ rope_keys.T
        p = np.exp(self.softmax_scale * (scores - scores.max(axis=1, keepdims=True)))
        out = np.einsum("hj,jhm->hm", p / p.sum(axis=1, keepdims=True), value)
        return out.reshape(-1) @ w[prefix + "o_proj.weight"].T

    def mla_query(self, prefix, x):
        w = self.weights
        if self.config["q_lora_rank"] is None:
            return x @ w[prefix + "q_proj.weight"].T
        low_rank = x @ w[prefix + "q_a_proj.weight"].T
        return self.query_norm(low_rank, w[prefix + "q_a_layernorm.weight"]) @ w[prefix + "q_b_proj.weight"].T

    def query_norm(self, low_rank, weight):
        return rms_norm(low_rank, weight, LATENT_NORM_EPS)

    def position(self, query, rope_key, _position):
        """The "rope" channels of query and key, which this model does not rotate."""
        return query, rope_key

    # Mixture of experts

    def moe(self, prefix, x):
        w = self.weights
        scores = sigmoid(x @ w[prefix + "gate.weight"].T)
        chosen, gap = self.select(scores + self.selection_bias(w[prefix + "gate.e_score_correction_bias"]))
        weights = self.routing_weights(scores, w[prefix + "gate.e_score_correction_bias"], chosen)
        out = np.zeros_like(x)
        if self.config["num_shared_experts"]:
            out = mlp(x, *(w[f"{prefix}shared_experts.{part}_proj.weight"] for part in ("gate", "up", "down")))
        for expert, weight in zip(chosen, weights):
            out = out + weight * mlp(x, *(w[f"{prefix}experts.{expert}.{part}.weight"] for part in ("w1", "w3", "w2")))
        return out, chosen, gap

    def selection_bias(self, bias):
        return bias

    def select(self, biased):
        """The chosen experts, ascending, and the smallest difference in score that another choice would need."""
        groups, kept = self.config["num_expert_group"], self.config["topk_group"]
        grouped, gap = biased.reshape(groups, -1), np.inf
        if kept < groups:
            group_scores = self.group_scores(grouped)
            ranked = np.argsort(-group_scores)
            gap = group_scores[ranked[kept - 1]] - group_scores[ranked[kept]]
            grouped = np.where(np.isin(np.arange(groups), ranked[:kept])[:, None], grouped, -np.inf)
        biased, k = grouped.reshape(-1), self.config["num_experts_per_token"]
        ranked = np.argsort(-biased)
        return np.sort(ranked[:k]).astype(np.int32), min(gap, biased[ranked[k - 1]] - biased[ranked[k]])

    def group_scores(self, grouped):
        return np.sort(grouped, axis=1)[:, -2:].sum(axis=1)

    def routing_weights(self, scores, _bias, chosen):
        """From the unbiased scores: the bias selects and does nothing else."""
        weights = scores[chosen]
        if self.config["moe_renormalize"]:
            weights = weights / (weights.sum() + 1e-20)
        return weights * self.config["routed_scaling_factor"]


def run(model, expected):
    """The tensors of expected.safetensors as the model computes them, and the smallest router gap."""
    out, smallest_gap = {}, np.inf
    prompts = sorted(name for name in expected if name.startswith("prompt_"))
    for i in range(len(prompts)):
        cache = model.new_cache()
        for prefix, tokens in (("", expected[f"prompt_{i}"]), ("greedy_", expected[f"greedy_{i}"])):
            rows = []
            for token in tokens:
                trace = {}
                rows.append(trace | {"logits": model.step(token, cache, trace)})
            out[f"{prefix}logits_{i}"] = np.array([row["logits"] for row in rows], np.float32)
            for layer in range(model.layers):
                if f"experts_{layer}" in rows[0]:
                    out[f"{prefix}experts_{i}_{layer}"] = np.array([row[f"experts_{layer}"] for row in rows], np.int32)
                    smallest_gap = min(smallest_gap, *(row[f"gap_{layer}"] for row in rows))
                if f"{prefix}hidden_{i}_{layer}" in expected:
                    out[f"{prefix}hidden_{i}_{layer}"] = np.array([row[f"hidden_{layer}"] for row in rows], np.float32)
                if not prefix and f"kda_state_{i}_{layer}" in expected:
                    out[f"kda_state_{i}_{layer}"] = cache[layer]["state"].astype(np.float32)
        first = out[f"logits_{i}"][-1:].argmax(axis=1)
        out[f"greedy_{i}"] = np.concatenate([first, out[f"greedy_logits_{i}"][:-1].argmax(axis=1)]).astype(np.int64)
    return out, smallest_gap


def worst_errors(out, expected):
    """Per kind of float tensor the largest relative L2; for integers the number of tensors that differ."""
    errors = {}
    for name, got in out.items():
        kind, want = name.rstrip("_0123456789"), expected[name]
        if got.dtype == np.float32:
            difference = np.linalg.norm(got.astype(np.float64) - want) / np.linalg.norm(want.astype(np.float64))
            errors[kind] = max(errors.get(kind, 0.0), float(difference))
        else:
            errors[kind] = errors.get(kind, 0) + int(not np.array_equal(got, want))
    return errors


def smallest_margins(expected):
    """Top-1 over top-2 logit: where a greedy token is chosen, and at all positions of the prompts."""
    def margins(logits):
        second, first = np.partition(logits, -2, axis=1)[:, -2:].T
        return (first - second).min()

    prompts = sum(name.startswith("prompt_") for name in expected)
    greedy = min(margins(np.concatenate([expected[f"logits_{i}"][-1:], expected[f"greedy_logits_{i}"][:-1]]))
                 for i in range(prompts))
    return float(greedy), float(min(margins(expected[f"logits_{i}"]) for i in range(prompts)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case_dir", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, help="write the tensors computed here to this safetensors file")
    args = parser.parse_args()
    expected = load_file(args.case_dir / "expected.safetensors")
    out, gap = run(Model(*read_checkpoint(args.case_dir)), expected)
    for kind, error in sorted(worst_errors(out, expected).items()):
        print(f"{kind:16} {f'relative L2 {error:.1e}' if isinstance(error, float) else f'{error} tensors differ'}")
    greedy, prompt = smallest_margins(expected)
    print(f"smallest margin: greedy {greedy:.1e}, prompt position {prompt:.1e}; smallest router gap {gap:.1e}")
    if args.out:
        save_file(out, args.out)


if __name__ == "__main__":
    main()
