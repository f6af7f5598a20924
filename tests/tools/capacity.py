"""How many sessions of the 48B model fit beside its weights: prints the table of deploy/runbook.md, computed, not measured.

A rank of N holds 1/N of the weights, but for those that every rank needs; 1/N of each session's KDA state (fp32) and
convolution tails (bf16); and all of its latents (bf16), which are replicated, in pages of 64 positions.
    python3 tests/tools/capacity.py
"""
import math

# Of the published 48B-A3B configuration.
KDA_LAYERS, KDA_HEADS, KDA_DIM, CONV_KERNEL = 20, 32, 128, 4
MLA_LAYERS, LATENT = 7, 512 + 64
WEIGHT_BYTES, REPLICATED_BYTES = 98.25e9, 73e6
PAGE = 64

STATE_BYTES = KDA_LAYERS * KDA_HEADS * KDA_DIM * KDA_DIM * 4
TAIL_BYTES = KDA_LAYERS * 3 * KDA_HEADS * KDA_DIM * (CONV_KERNEL - 1) * 2
TOKEN_BYTES = MLA_LAYERS * LATENT * 2

# What a card has, what of it is used (--memory-fraction), and what activations and libraries are given of that.
CARDS = [("H100, 80 GB", 80e9), ("H200, 141 GB", 141e9)]
FRACTION, WORKSPACE = 0.9, 3e9
DEGREES = [1, 2, 4, 8]
CONTEXTS = [4096, 32_768, 131_072, 1_048_576]


def room(card, degree):
    """Bytes of a rank that are left for sessions."""
    weights = (WEIGHT_BYTES - REPLICATED_BYTES) / degree + REPLICATED_BYTES
    return card * FRACTION - WORKSPACE - weights


def session_bytes(context, degree):
    """Bytes that a session takes on each rank."""
    return (STATE_BYTES + TAIL_BYTES) / degree + math.ceil(context / PAGE) * PAGE * TOKEN_BYTES


def table():
    """Rows of Markdown."""
    heads = [f"{context // 1024:,}k" for context in CONTEXTS[:-1]] + ["1M"]
    rows = [f"| card | TP | room a card, GB | sessions of {' | of '.join(heads)} | longest one |",
            "| --- | ---: | ---: |" + " ---: |" * (len(CONTEXTS) + 1)]
    for name, card in CARDS:
        for degree in DEGREES:
            free = room(card, degree)
            if free < session_bytes(PAGE, degree):
                rows.append(f"| {name} | {degree} | does not fit |" + " |" * (len(CONTEXTS) + 1))
                continue
            counts = [f"{int(free // session_bytes(context, degree)):,}" for context in CONTEXTS]
            longest = (free - (STATE_BYTES + TAIL_BYTES) / degree) / TOKEN_BYTES
            most = f"{longest / 1e6:.1f}M" if longest < 1_048_576 else "1M"
            rows.append(f"| {name} | {degree} | {free / 1e9:.1f} | {' | '.join(counts)} | {most} |")
    return rows


if __name__ == "__main__":
    print("\n".join(table()))
