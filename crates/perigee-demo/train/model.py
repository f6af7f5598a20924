"""A Kimi Linear model in plain PyTorch, for training. Modules and parameters have the published checkpoint's names, but
that an expert layer's w1, w2 and w3 are stacked; `published` takes them apart.
"""
import math

import torch
from torch import nn
from torch.nn import functional as F

import kda

LATENT_EPS = 1e-6  # of the latent norm, whatever rms_norm_eps says
NORM_EPS = 1e-6  # inside the root of the q and k normalisation
BALANCE = 1e-3  # step of the routing bias


class Norm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


class Taps(nn.Module):
    """Causal depthwise convolution; the last tap multiplies the current token."""

    def __init__(self, channels, taps):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, taps).uniform_(-taps ** -0.5, taps ** -0.5))

    def forward(self, x):
        taps, length = self.weight.shape[-1], x.shape[1]
        x = F.pad(x, (0, 0, taps - 1, 0))
        return F.silu(sum(self.weight[:, 0, i] * x[:, i:i + length] for i in range(taps)))


def linear(inputs, outputs, scale=1.0):
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=scale * inputs ** -0.5)
    return layer


def unit(x):
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + NORM_EPS)


class Kda(nn.Module):
    def __init__(self, config, scale):
        super().__init__()
        hidden, sizes = config["hidden_size"], config["linear_attn_config"]
        self.heads, self.dim = sizes["num_heads"], sizes["head_dim"]
        width = self.heads * self.dim
        for part in "qkv":
            setattr(self, f"{part}_proj", linear(hidden, width))
            setattr(self, f"{part}_conv1d", Taps(width, sizes["short_conv_kernel_size"]))
        self.f_a_proj, self.f_b_proj = linear(hidden, self.dim), linear(self.dim, width)
        self.g_a_proj, self.g_b_proj = linear(hidden, self.dim), linear(self.dim, width)
        self.b_proj = linear(hidden, self.heads)
        self.o_norm, self.o_proj = Norm(self.dim, config["rms_norm_eps"]), linear(width, hidden, scale)
        self.A_log = nn.Parameter(torch.empty(1, 1, self.heads, 1).uniform_(1, 16).log())
        step = torch.empty(width).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # softplus gives the step

    def forward(self, x):
        heads = (self.heads, self.dim)
        q, k, v = (getattr(self, f"{p}_conv1d")(getattr(self, f"{p}_proj")(x)).unflatten(-1, heads) for p in "qkv")
        z = (self.f_b_proj(self.f_a_proj(x)) + self.dt_bias).unflatten(-1, heads)
        log_decay = -self.A_log.exp() * F.softplus(z)
        out = kda.chunked(unit(q) * self.dim ** -0.5, unit(k), v, log_decay, self.b_proj(x).sigmoid())
        gate = self.g_b_proj(self.g_a_proj(x)).unflatten(-1, heads).sigmoid()
        return self.o_proj((self.o_norm(out) * gate).flatten(-2))


class Mla(nn.Module):
    """Latent attention without positions, in its plain form."""

    def __init__(self, config, scale):
        super().__init__()
        hidden, self.heads = config["hidden_size"], config["num_attention_heads"]
        self.latent = config["kv_lora_rank"]
        self.nope, rope, self.value = (config[k] for k in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
        self.q_proj = linear(hidden, self.heads * (self.nope + rope))
        self.kv_a_proj_with_mqa = linear(hidden, self.latent + rope)
        self.kv_a_layernorm = Norm(self.latent, LATENT_EPS)
        self.kv_b_proj = linear(self.latent, self.heads * (self.nope + self.value))
        self.o_proj = linear(self.heads * self.value, hidden, scale)

    def forward(self, x):
        query = self.q_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        latent, shared = self.kv_a_proj_with_mqa(x).tensor_split([self.latent], -1)
        expanded = self.kv_b_proj(self.kv_a_layernorm(latent)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = expanded.tensor_split([self.nope], -1)
        scores = query[..., :self.nope] @ key.transpose(-1, -2) + query[..., self.nope:] @ shared[:, None].transpose(-1, -2)
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        weights = (scores * query.shape[-1] ** -0.5).masked_fill(future, -torch.inf).softmax(-1)
        return self.o_proj((weights @ value).transpose(1, 2).flatten(-2))


class Mlp(nn.Module):
    def __init__(self, hidden, width, scale):
        super().__init__()
        self.gate_proj, self.up_proj = linear(hidden, width), linear(hidden, width)
        self.down_proj = linear(width, hidden, scale)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Gate(nn.Module):
    """The router: the bias selects and does nothing else, and moves against the load without a gradient."""

    def __init__(self, config):
        super().__init__()
        experts = config["num_experts"]
        self.weight = nn.Parameter(torch.randn(experts, config["hidden_size"]) * config["hidden_size"] ** -0.5)
        self.register_buffer("e_score_correction_bias", torch.zeros(experts))
        self.chosen, self.scale = config["num_experts_per_token"], config["routed_scaling_factor"]

    def forward(self, x):
        scores = F.linear(x, self.weight).sigmoid()
        chosen = (scores.detach() + self.e_score_correction_bias).topk(self.chosen).indices
        mask = torch.zeros_like(scores).scatter(-1, chosen, 1.0)
        if self.training:
            load = mask.flatten(0, -2).mean(0)
            self.e_score_correction_bias += BALANCE * (load.mean() - load).sign()
        weights = scores * mask
        return weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.scale


class Experts(nn.Module):
    """All experts as one wide MLP whose inner columns carry the routing weights: so small, that is cheaper than sorting."""

    def __init__(self, config, scale):
        super().__init__()
        hidden, width = config["hidden_size"], config["moe_intermediate_size"]
        self.gate = Gate(config)
        self.experts = nn.ModuleDict({
            "w1": linear(hidden, config["num_experts"] * width), "w3": linear(hidden, config["num_experts"] * width),
            "w2": linear(config["num_experts"] * width, hidden, scale)})
        nn.init.normal_(self.experts["w2"].weight, std=scale * width ** -0.5)
        self.shared_experts = Mlp(hidden, config["num_shared_experts"] * width, scale)

    def forward(self, x):
        inner = F.silu(self.experts["w1"](x)) * self.experts["w3"](x)
        routed = inner.unflatten(-1, (self.gate.weight.shape[0], -1)) * self.gate(x)[..., None]
        return self.experts["w2"](routed.flatten(-2)) + self.shared_experts(x)


class Layer(nn.Module):
    def __init__(self, config, number):
        super().__init__()
        hidden, eps = config["hidden_size"], config["rms_norm_eps"]
        scale = (2 * config["num_hidden_layers"]) ** -0.5
        full = number + 1 in config["linear_attn_config"]["full_attn_layers"]
        self.input_layernorm, self.post_attention_layernorm = Norm(hidden, eps), Norm(hidden, eps)
        self.self_attn = Mla(config, scale) if full else Kda(config, scale)
        if number < config["first_k_dense_replace"]:
            self.mlp = Mlp(hidden, config["intermediate_size"], scale)
        else:
            self.block_sparse_moe = Experts(config, scale)

    def forward(self, h):
        h = h + self.self_attn(self.input_layernorm(h))
        feed_forward = self.mlp if hasattr(self, "mlp") else self.block_sparse_moe
        return h + feed_forward(self.post_attention_layernorm(h))


class KimiLinear(nn.Module):
    def __init__(self, config):
        super().__init__()
        hidden = config["hidden_size"]
        self.config, self.model = config, nn.Module()
        self.model.embed_tokens = nn.Embedding(config["vocab_size"], hidden)
        nn.init.normal_(self.model.embed_tokens.weight, std=0.1)
        self.model.layers = nn.ModuleList(Layer(config, number) for number in range(config["num_hidden_layers"]))
        self.model.norm = Norm(hidden, config["rms_norm_eps"])
        self.lm_head = linear(hidden, config["vocab_size"])

    def forward(self, tokens):
        """Logits [B, T, V] of ids [B, T]. Padding up to a whole chunk comes last, where nothing sees it."""
        length = tokens.shape[1]
        h = self.model.embed_tokens(F.pad(tokens, (0, -length % kda.CHUNK)))
        for layer in self.model.layers:
            h = layer(h)
        return self.lm_head(self.model.norm(h[:, :length]))


FLOAT32 = ("A_log", "dt_bias", "e_score_correction_bias")


def published(model):
    """The tensors of the checkpoint, as they are stored: bf16, but what FLOAT32 names."""
    tensors = {}
    for name, value in model.state_dict().items():
        dtype = torch.float32 if name.endswith(FLOAT32) else torch.bfloat16
        head, stacked, part = name.partition(".experts.")
        if not stacked:
            tensors[name] = value.to(dtype).contiguous()
            continue
        experts = model.config["num_experts"]
        for number, expert in enumerate(value.chunk(experts, 1 if part.startswith("w2") else 0)):
            tensors[f"{head}.experts.{number}.{part}"] = expert.to(dtype).contiguous()
    return tensors


def rounded(model):
    """The state of the module with the values that the checkpoint keeps."""
    return {name: value if name.endswith(FLOAT32) else value.bfloat16().to(value.dtype)
            for name, value in model.state_dict().items()}
