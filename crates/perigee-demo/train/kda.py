"""Kimi delta attention in plain PyTorch: the chunked form that training differentiates, and the step recurrence that it
is checked against. Both take q (scaled), k, v, log decay g as [B, T, H, D] and beta [B, T, H], and begin from zeros.
"""
import torch

CHUNK = 16  # with it, the inverse below is a product of four factors that is exact enough in float32


def by_steps(q, k, v, g, beta):
    """Decay, correct what the key reads towards the value, then read with the query."""
    state = torch.zeros(*q.shape[:1], *q.shape[2:], q.shape[-1], dtype=q.dtype, device=q.device)
    outputs = []
    for q, k, v, g, beta in zip(*(x.unbind(1) for x in (q, k, v, g, beta))):
        state = g.exp()[..., None] * state
        delta = beta[..., None] * (v - torch.einsum("bhk,bhkv->bhv", k, state))
        state = state + k[..., None] * delta[..., None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q, state))
    return torch.stack(outputs, 1)


def chunked(q, k, v, g, beta):
    """The same by chunks (WY form). Every pair's decay is formed by itself, so strong decay overflows nothing; T must be
    a multiple of CHUNK."""
    batch, length, heads, dim = q.shape

    def cut(x):
        return x.reshape(batch, -1, CHUNK, *x.shape[2:]).transpose(2, 3)

    # [B, chunks, H, CHUNK, D]
    q, k, v, g = cut(q), cut(k), cut(v), cut(g)
    beta = cut(beta[..., None])
    total = g.cumsum(-2)
    later = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).tril()
    pairs = (total[..., :, None, :] - total[..., None, :, :]).masked_fill(~later[..., None], -torch.inf).exp()
    keys = pairs * k[..., None, :, :]
    products = keys @ torch.stack((q, k), -1)  # [..., row, column, (query, key)]
    reads = products[..., 0]
    lower = (beta * products[..., 1]).tril(-1)

    unit = torch.eye(CHUNK, dtype=q.dtype, device=q.device)
    square = lower @ lower
    fourth = square @ square
    inverse = (unit - lower) @ (unit + square) @ (unit + fourth) @ (unit + fourth @ fourth)
    writes = inverse @ (beta * v)
    forgets = inverse @ (beta * k * total.exp())
    last = total[..., -1:, :]
    kept = (k * (last - total).exp()).transpose(-1, -2)

    # A chunk is an affine map of the state, so the loop over chunks is one product each.
    decay = torch.diag_embed(last.squeeze(-2).exp()) - kept @ forgets
    added = kept @ writes
    state = torch.zeros(batch * heads, dim, dim, dtype=q.dtype, device=q.device)
    states = []
    for a, b in zip(decay.unbind(1), added.unbind(1)):
        states.append(state)
        state = torch.baddbmm(b.flatten(0, 1), a.flatten(0, 1), state)
    states = torch.stack(states, 1).unflatten(0, (batch, heads)).transpose(1, 2)
    delta = writes - forgets @ states
    out = (q * total.exp()) @ states + reads @ delta
    return out.transpose(2, 3).reshape(batch, length, heads, dim)
