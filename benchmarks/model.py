"""The share of a fine-tuning step that the normaliser takes: none, the published formula, ours.

    python -m benchmarks model                  # the shapes of MiniLM-L6, on the CPU
    python -m benchmarks model --device cuda    # the shapes of BERT-base

One encoder, of random weights, with a classifier on its pooler output, trained with AdamW on random tokens. The
normalisers take turns between the two, so that a round times one step with each, in rotating order. Steps vary by more
than a normaliser takes, so that a round also times forward and backward of each normaliser alone: "share" is that over
the step without one.

Of this command only the CPU half has ever run: the CUDA half is unproven.

Exit status: 0; 2 if an argument is wrong or transformers is missing.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import parser_for, results
from benchmarks.clocks import Call, interleaved, paired_ratio, settle_allocator, wall
from benchmarks.providers import published
from benchmarks.run import QUARTILES, RATIOS, in_microseconds
from isobn_kernels import IsoBN

CLASSES = 5
Layer = Callable[[Tensor], Tensor]
ENCODERS: dict[str, tuple[str, dict[str, int]]] = {
    "cpu": (
        "MiniLM-L6",
        {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    ),
    "cuda": ("BERT-base", {}),
}


def published_layer(features: int, device: str) -> Layer:
    # Not as published, but after a batch from zero statistics nothing divides by zero here.
    cov, std = torch.eye(features, device=device), torch.ones(features, device=device)
    return lambda x: published(x, cov, std, training=True)


LAYERS: dict[str, Callable[[int, str], Layer]] = {
    "none": lambda features, device: lambda x: x,
    "published": published_layer,
    "ours": lambda features, device: IsoBN(features, device=device),
}


def calls_of(encoder: Any, tokens: Tensor, labels: Tensor) -> dict[str, Call]:
    """A training step with each normaliser, and for each that does something, forward and backward of it alone."""
    features, device = encoder.config.hidden_size, tokens.device.type
    x = torch.randn(len(tokens), features, device=device, requires_grad=True)
    dout = torch.randn_like(x)
    head = nn.Sequential(nn.Dropout(0.1), nn.Linear(features, CLASSES)).to(device)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=1e-5)

    def step(layer: Layer) -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(layer(encoder(input_ids=tokens).pooler_output)), labels).backward()
        optimizer.step()

    def alone(layer: Layer) -> None:
        torch.autograd.grad(layer(x), x, dout)

    found: dict[str, Call] = {}
    for name, make in LAYERS.items():
        found[name] = partial(step, make(features, device))
        if name != "none":
            found[f"{name} alone"] = partial(alone, make(features, device))
    return found


def main(argv: list[str] | None = None) -> int:
    parser = parser_for("benchmarks model", __doc__)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--batch", type=int, default=32, help="texts of a step (%(default)s)")
    add("--length", type=int, default=32, help="tokens of a text (%(default)s)")
    add("--rounds", type=int, default=30, help="at most (%(default)s)")
    add("--seconds", type=float, default=60.0, help="of timing, but at least three rounds (%(default)s)")
    add("--output", type=Path, default=results.TABLE, help="CSV table to add to")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA device here")
    if min(args.batch, args.length, args.rounds) < 2:
        parser.error("--batch, --length and --rounds must be at least 2")
    if importlib.util.find_spec("transformers") is None:
        parser.error('transformers is missing: pip install ".[finetune]"')
    from transformers import BertConfig, BertModel

    settle_allocator()
    watch = results.Watch()
    name, sizes = ENCODERS[args.device]
    label = f"model {name}, length {args.length}"
    encoder = BertModel(BertConfig(**sizes)).to(args.device).train()
    features = encoder.config.hidden_size
    tokens = torch.randint(0, encoder.config.vocab_size, (args.batch, args.length), device=args.device)
    labels = torch.randint(0, CLASSES, (args.batch,), device=args.device)
    samplers = {name: wall(call) for name, call in calls_of(encoder, tokens, labels).items()}
    samples = interleaved(samplers, args.rounds, args.seconds)

    shown = [["normaliser", "milliseconds [quartiles]", "ratio to none [quartiles]", "share"]]
    rows: list[dict[str, Any]] = []
    for name, values in samples.items():
        ratio = paired_ratio(values, samples["none"])
        row = {"threads": torch.get_num_threads(), "dtype": "float32", "N": args.batch, "D": features, "mode": label}
        row |= {"clock": "wall", "provider": name, "base": "none", "rounds": len(values)} | in_microseconds(values)
        row |= dict(zip(RATIOS, ratio, strict=True))
        rows.append(row)
        milliseconds = "{1:.3f} [{0:.3f}..{2:.3f}]".format(*(row[k] / 1e3 for k in QUARTILES))
        ratios = "{1:.4f} [{0:.4f}..{2:.4f}]".format(*ratio)
        shown.append([name, milliseconds, ratios, f"{ratio[1] * 100:.3f} %" if name.endswith(" alone") else ""])
    print(f"{label}: {args.batch} texts, {features} features\n\n{results.grid(shown)}\n")
    common = results.environment(args.device) | watch.finish()
    results.upsert(args.output, [common | row for row in rows])
    print(f"written: {args.output}")
    return 0
