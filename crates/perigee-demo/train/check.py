"""Checks the training code on a CPU: the chunked KDA against the step recurrence, values and gradients, also where the decay
is strong; and, with --case, writes prompts and logits of the checkpoint in a folder for tests/cases/compare.py.
"""
import argparse
import json
import pathlib

import torch
from safetensors.torch import load_file, save_file

import kda
from model import KimiLinear, unit


def worst(got, want):
    return ((got - want).norm() / want.norm()).item()


def compare_kda(strength):
    shape = (2, 5 * kda.CHUNK, 3, 32)
    q, k, v = unit(torch.randn(shape)), unit(torch.randn(shape)), torch.randn(shape)
    g, beta = -torch.rand(shape) * strength, torch.rand(shape[:-1])
    weight, results = torch.randn(shape), []
    for form in (kda.by_steps, kda.chunked):
        inputs = [x.clone().requires_grad_() for x in (q, k, v, g, beta)]
        out = form(*inputs)
        (out * weight).sum().backward()
        results.append([out.detach(), *(x.grad for x in inputs)])
    return [worst(got, want) for want, got in zip(*results)]


def read(folder):
    """The model of a checkpoint, in float32."""
    config = json.loads((folder / "config.json").read_text())
    model, tensors = KimiLinear(config), load_file(folder / "model.safetensors")
    state = {}
    for name in model.state_dict():
        head, stacked, part = name.partition(".experts.")
        if stacked:
            parts = [tensors[f"{head}.experts.{e}.{part}"] for e in range(config["num_experts"])]
            state[name] = torch.cat(parts, 1 if part.startswith("w2") else 0).float()
        else:
            state[name] = tensors[name].float()
    model.load_state_dict(state)
    return model.eval()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", type=pathlib.Path, nargs=2, metavar=("MODEL", "OUT"))
    args = parser.parse_args()
    torch.manual_seed(1)
    for strength in (0.01, 1.0, 80.0):
        errors = compare_kda(strength)
        print(f"log decay down to -{strength:g}: relative L2 of o and of the gradients of q, k, v, g, beta:",
              " ".join(f"{error:.1e}" for error in errors))
        assert max(errors) < 1e-4, "the chunked form and the recurrence differ"
    if args.case:
        model, case = read(args.case[0]), {}
        for i, length in enumerate((1, 17, 200)):
            prompt = torch.randint(model.config["vocab_size"], (1, length))
            with torch.no_grad():
                case |= {f"prompt_{i}": prompt[0], f"logits_{i}": model(prompt)[0].contiguous()}
        save_file(case, args.case[1])


if __name__ == "__main__":
    main()
