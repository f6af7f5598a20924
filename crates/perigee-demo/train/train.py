"""Trains the demo model and writes its checkpoint; README.md beside this file has the commands and what came out.

A step (forward, backward, update) is recorded as one CUDA graph for each phase. On a CPU the same code runs op by op, for
trials with few steps. The weights that are kept have the lowest loss on the validation chapters after rounding to bf16.
"""
import argparse
import json
import math
import pathlib
import time

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch.nn import functional as F

import text
import tokens
from model import KimiLinear, published, rounded

PHASES = ((512, 32, 0.8), (2048, 8, 1.0))  # tokens of a window, windows of a step, until which part of the training
WARM_UP, CLIP, EVALUATIONS = 200, 1.0, 40


def bits_per_byte(model, texts, tokenizer):
    """Bits of every token of whole chapters, each read by itself, over their bytes; the end of a chapter counts too."""
    rows = [torch.tensor(tokens.encode(tokenizer, chapter)) for chapter in texts]
    device, nats = next(model.parameters()).device, 0.0
    with torch.no_grad():
        for batch in (rows[i:i + 16] for i in range(0, len(rows), 16)):
            padded = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=-1).to(device)
            logits = model(padded[:, :-1].clamp(min=0)).transpose(1, 2)
            nats += F.cross_entropy(logits, padded[:, 1:], ignore_index=-1, reduction="sum").item()
    return nats / math.log(2) / sum(len(chapter.encode()) for chapter in texts)


def evaluate(model, texts, tokenizer):
    """The same with the weights that a checkpoint would keep, in whole float32."""
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    torch.backends.cuda.matmul.allow_tf32 = False
    model.eval()
    model.load_state_dict(rounded(model))
    bits = bits_per_byte(model, texts, tokenizer)
    model.load_state_dict(kept)
    model.train()
    torch.backends.cuda.matmul.allow_tf32 = True
    return bits


def schedule(step, progress, rate):
    """Warm-up, then a cosine to nothing."""
    return rate * min(1, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * progress))


class Training:
    def __init__(self, config, stream, device, decay):
        self.model, self.device = KimiLinear(config).to(device), device
        self.stream = stream.to(device)
        matrices = [p for p in self.model.parameters() if p.ndim == 2]
        others = [p for p in self.model.parameters() if p.ndim != 2]
        self.rate = torch.tensor(0.0, device=device)
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}],
            lr=self.rate, betas=(0.9, 0.95), capturable=device == "cuda")

    def step(self, windows):
        """One update; returns the mean loss in nats a token."""
        self.optimizer.zero_grad(set_to_none=False)
        logits = self.model(windows[:, :-1]).flatten(0, 1)
        loss = F.cross_entropy(logits, windows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        return loss.detach()

    def draw(self, length, count):
        """Windows that begin anywhere."""
        starts = torch.randint(len(self.stream) - length, (count, 1), device=self.device)
        return self.stream[starts + torch.arange(length + 1, device=self.device)]

    def phase(self, length, count):
        """A function that makes one step with windows of this size."""
        if self.device == "cpu":
            return lambda: self.step(self.draw(length, count))
        windows = self.draw(length, count)
        self.rate.zero_()  # so that the steps that warm up leave the weights alone
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.step(windows)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = self.step(windows)

        def replay():
            windows.copy_(self.draw(length, count))
            graph.replay()
            return loss

        return replay


def train(args, config, parts, tokenizer):
    end = tokenizer.token_to_id(tokens.END)
    stream = torch.tensor([id for chapter in parts[0] for id in (*tokenizer.encode(chapter).ids, end)])
    per_byte = sum(len(chapter.encode()) for chapter in parts[0]) / len(stream)
    print(f"{len(stream)} tokens, {per_byte:.3f} bytes a token", flush=True)
    training = Training(config, stream, args.device, args.decay)
    print(f"{sum(p.numel() for p in training.model.parameters())} parameters", flush=True)
    curve, best, losses, step, began = [], math.inf, [], 0, time.time()
    phases = [(*(args.windows or phase[:2]), phase[2]) for phase in PHASES]
    replay, until = None, 0.0
    while (progress := max(step / args.steps, (time.time() - began) / args.seconds)) < 1:
        if progress >= until:
            length, count, until = phases.pop(0)
            replay = training.phase(length, count)
        training.rate.fill_(schedule(step, progress, args.rate))
        losses.append(replay().item())
        step += 1
        if progress >= (len(curve) + 1) / EVALUATIONS or step == args.steps:
            bits = evaluate(training.model, parts[1], tokenizer)
            trained = sum(losses) / len(losses) / math.log(2) / per_byte
            losses.clear()
            curve.append({"step": step, "train": trained, "validation": bits})
            print(f"{time.time() - began:6.1f} s step {step:6} train {trained:.4f} validation {bits:.4f}", flush=True)
            (args.out / "curve.json").write_text(json.dumps(curve))
            if bits < best:
                best = bits
                save_file(published(training.model), args.out / "model.safetensors")
            if not math.isfinite(trained):
                raise SystemExit("the loss is not finite")
    print(f"kept the weights with {best:.4f} bits a byte on the validation chapters")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path, help="folder with config.json; tokenizer.json and weights are written there")
    parser.add_argument("--verses", type=pathlib.Path, help="what `bible` printed, where it is not installed")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=20_000, help="most steps")
    parser.add_argument("--seconds", type=float, default=150, help="longest training; the learning rate falls over whichever ends it")
    parser.add_argument("--rate", type=float, default=6e-3, help="highest learning rate")
    parser.add_argument("--decay", type=float, default=0.1, help="weight decay of matrices")
    parser.add_argument("--windows", type=int, nargs=2, metavar=("LENGTH", "COUNT"), help="instead of the phases' sizes")
    parser.add_argument("--untrained", action="store_true", help="write the weights that training begins with")
    args = parser.parse_args()
    torch.manual_seed(0)
    config = json.loads((args.out / "config.json").read_text())
    parts = text.split(text.chapters(args.verses.read_text().splitlines() if args.verses else text.lines()))
    path = args.out / "tokenizer.json"
    tokens.learn(parts[0]).save(str(path), pretty=False)
    tokenizer = Tokenizer.from_file(str(path))
    if args.untrained:
        model = KimiLinear(config)
        save_file(published(model), args.out / "model.safetensors")
        return
    torch.backends.cuda.matmul.allow_tf32 = True
    train(args, config, parts, tokenizer)


if __name__ == "__main__":
    main()
