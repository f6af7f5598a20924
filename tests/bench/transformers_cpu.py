#!/usr/bin/env python3
"""Prefill and decode on this machine's CPUs: `perigee score` beside transformers, same checkpoint, same prompts, one run.

Not a test. Both use all cores in float32 with bf16 weights widened by transformers at load; Perigee keeps them bf16.
transformers runs its own greedy cached decoding loop; Perigee runs one rank. Prints tokens per second and the ratio.

    python3 tests/bench/transformers_cpu.py CHECKPOINT_DIR [--perigee target/release/perigee] [--batch 8] [--steps 64]

Needs torch, transformers (tests/cases/requirements.txt) and a release build. The vocabulary must exceed 3.
"""
import argparse
import json
import pathlib
import subprocess
import tempfile
import time

import torch
import transformers
from safetensors.torch import save_file


def perigee_seconds(args, prompts, greedy):
    """Seconds of computing that `perigee score` reports, loading apart."""
    with tempfile.TemporaryDirectory() as folder:
        tokens, out = pathlib.Path(folder, "in.safetensors"), pathlib.Path(folder, "out.safetensors")
        save_file({f"prompt_{i}": row.clone() for i, row in enumerate(prompts)}, tokens)
        command = [args.perigee, "score", "--model", args.checkpoint, "--tokens", tokens, "--out", out, "--json"]
        command += ["--greedy", str(greedy)] if greedy else []
        answer = subprocess.run(command, check=True, capture_output=True, text=True)
        return json.loads(answer.stdout)["seconds"]


def transformers_seconds(model, prompts, steps):
    """(prefill, decode) seconds of a cached greedy loop."""
    with torch.inference_mode():
        started = time.perf_counter()
        out = model(input_ids=prompts, use_cache=True)
        prefill = time.perf_counter() - started
        started = time.perf_counter()
        for _ in range(steps):
            out = model(input_ids=out.logits[:, -1:].argmax(-1), cache=out.cache, use_cache=True)
        return prefill, time.perf_counter() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--perigee", default="target/release/perigee")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the one prompt of the prefill row")
    parser.add_argument("--steps", type=int, default=64, help="decode steps")
    parser.add_argument("--repeats", type=int, default=3, help="each figure is the best of that many")
    args = parser.parse_args()
    model = transformers.KimiLinearForCausalLM.from_pretrained(
        args.checkpoint, dtype=torch.float32, attn_implementation="eager").eval()
    draw = torch.Generator().manual_seed(0)
    vocab = model.config.vocab_size
    long = torch.randint(3, vocab, (1, args.prompt), generator=draw)
    short = torch.randint(3, vocab, (args.batch, 8), generator=draw)

    def best(measure):
        return min(measure() for _ in range(args.repeats))

    peer = {
        "prefill": args.prompt / best(lambda: transformers_seconds(model, long, 0)[0]),
        "decode": args.batch * args.steps / best(lambda: transformers_seconds(model, short, args.steps)[1]),
    }
    base = best(lambda: perigee_seconds(args, short, 1))
    ours = {
        "prefill": args.prompt / best(lambda: perigee_seconds(args, long, 0)),
        "decode": args.batch * args.steps / (best(lambda: perigee_seconds(args, short, args.steps + 1)) - base),
    }
    print(f"{args.checkpoint}, {torch.get_num_threads()} threads, transformers {transformers.__version__}")
    print(f"{'':28} {'perigee':>10} {'transformers':>13} {'ratio':>7}")
    for name, label in (("prefill", f"prefill, 1 x {args.prompt}"), ("decode", f"decode, batch {args.batch}")):
        print(f"{label + ', tok/s':28} {ours[name]:10.0f} {peer[name]:13.0f} {ours[name] / peer[name]:7.2f}")


if __name__ == "__main__":
    main()
