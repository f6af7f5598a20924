"""Writes what tests expect of the checkpoint, as this framework computes it in float32 on a CPU: greedy continuations of
prompts, with the smallest margin between the best two logits and the smallest router gap on their way, and the log
probability of every token of a held-out page. Prints the held-out loss.
"""
import argparse
import json
import pathlib

import torch
from tokenizers import Tokenizer

import text
import tokens
from check import read
from model import Gate
from train import bits_per_byte

PAGE = ("Ruth", 1)  # book and chapter
PROMPTS = ("In the beginning", "And Jesus said unto him,", "And God said", "The LORD is my shepherd;", "Hello", "Then Joab")
MARGIN, ROUTER_GAP = 1e-3, 2e-5  # texts that come closer to another choice are not kept: rounding might decide them


class Gaps:
    """The smallest difference in score between an expert that was chosen and one that was not, at any last position."""

    def __init__(self, model):
        self.smallest = float("inf")
        for module in model.modules():
            if isinstance(module, Gate):
                module.register_forward_hook(self.look)

    def look(self, gate, inputs, _output):
        scores = torch.nn.functional.linear(inputs[0], gate.weight).sigmoid() + gate.e_score_correction_bias
        best = scores.sort(-1, descending=True).values
        self.smallest = min(self.smallest, (best[..., gate.chosen - 1] - best[..., gate.chosen]).min().item())


def continuation(model, tokenizer, prompt, count):
    """Greedy text without the end token, and the smallest margin and router gap of prompt and answer."""
    ids, start, margin, gaps = tokenizer.encode(prompt).ids, len(tokenizer.encode(prompt).ids), float("inf"), Gaps(model)
    end = tokenizer.token_to_id(tokens.END)
    while len(ids) < start + count and ids[-1] != end:
        best = model(torch.tensor([ids]))[0, -1].topk(2)
        margin = min(margin, (best.values[0] - best.values[1]).item())
        ids.append(best.indices[0].item())
    return {"prompt": prompt, "tokens": ids[start:], "text": tokenizer.decode(ids[start:]), "margin": margin,
            "router_gap": gaps.smallest}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("--verses", type=pathlib.Path, help="what `bible` printed, where it is not installed")
    parser.add_argument("--prompts", nargs="*", default=PROMPTS)
    parser.add_argument("--count", type=int, default=48)
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    pairs = text.chapters(args.verses.read_text().splitlines() if args.verses else text.lines())
    tokenizer, model = Tokenizer.from_file(str(args.model / "tokenizer.json")), read(args.model)
    torch.set_grad_enabled(False)
    _, validation, held_out = text.split(pairs)
    for name, part in (("validation", validation), ("held out", held_out)):
        print(f"{name}: {bits_per_byte(model, part, tokenizer):.4f} bits a byte over {sum(map(len, part))} bytes")
    page = [chapter for book, chapter in pairs if book == PAGE[0]][PAGE[1] - 1]
    print(f"{PAGE[0]} {PAGE[1]}: {bits_per_byte(model, [page], tokenizer):.4f} bits a byte")
    ids = tokens.encode(tokenizer, page)
    logprobs = model(torch.tensor([ids]))[0, :-1].log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
    known = []
    for prompt in args.prompts:
        entry = continuation(model, tokenizer, prompt, args.count)
        print(json.dumps({key: value for key, value in entry.items() if key != "tokens"}), flush=True)
        if entry["margin"] > MARGIN and entry["router_gap"] > ROUTER_GAP:
            known.append(entry)
    if args.out:
        page = {"text": page, "tokens": ids, "logprobs": [round(value, 6) for value in logprobs.tolist()]}
        args.out.write_text(json.dumps({"page": page, "continuations": known}, indent=None))


if __name__ == "__main__":
    main()
