"""Which block sizes the Triton backend should use: measures candidates on this GPU and prints the table to paste.

    python -m tools.tune

For each row of `isobn_kernels.backends.triton.config.TABLE`, at shapes that the row serves, in float32 and bfloat16:

1. Each candidate (the row's entry, and those that differ from it in one number) takes the place of the row for one
   training step, which is compared with float64. One that is wrong, does not compile or does not fit the GPU is
   reported, and not timed.
2. The others are timed in interleaved rounds, by replays of a CUDA graph of the forward.
3. The row goes to the smallest geometric mean over the shapes of the ratio to the fastest candidate at the shape, if
   that one is right in the backward of stop_gradient=False, too, which takes its block sizes from the same row.

Nothing is written. The last thing printed is the table, for isobn_kernels/backends/triton/config.py: paste it and run
again, until the table stays the same. Some candidates need more than ten seconds to compile, for each D and dtype.

Of this command only what needs no GPU has ever run: the measuring is unproven.

Exit status: 0; 1 if a row was left without a candidate, and keeps its entry; 2 without a GPU.
"""

from __future__ import annotations

import importlib.metadata
import sys
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import date
from functools import partial
from statistics import geometric_mean, median
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks import parser_for
from benchmarks.clocks import Call, Sampler, device, interleaved
from benchmarks.providers import Provider, Shape, State, draw, gate, in_float64, our_step
from benchmarks.results import grid
from benchmarks.run import failure
from isobn_kernels import backends
from isobn_kernels.backends.triton.config import _ANY, TABLE, Config, Settings
from isobn_kernels.backends.triton.launches import INTERPRETED, TritonBackend

Row = tuple[int, int, Config]  # of TABLE
Cell = tuple[Shape, str]  # shape and dtype

CHOICES: dict[str, tuple[Any, ...]] = {
    "block": (32, 64, 128),
    "block_n": (16, 32, 64),
    "warps": (2, 4, 8),
    "precision": ("ieee", "tf32x3"),
}
# Each belongs to the row of the table that serves it.
SHAPES = [(8, 384), (16, 384), (16, 768), (16, 1024), (16, 2048), (32, 384), (64, 384), (1024, 384), (32, 768)]
SHAPES += [(64, 768), (64, 1024), (64, 4096), (4096, 1024)]
DTYPES = ("float32", "bfloat16")
ROUNDS = 20


def candidates(row: Row) -> list[Config]:
    """The row's own entry first. No guess at what would work: compiling and measuring decide."""
    most_n, _, present = row
    found = [replace(present, **{name: value}) for name, values in CHOICES.items() for value in values]
    if most_n <= max(CHOICES["block_n"]):  # one block of rows takes a batch; a smaller block would give that away
        found = [config for config in found if config.block_n >= most_n]
    return list(dict.fromkeys([present, *found]))


def settings_with(index: int, config: Config) -> Settings:
    """Those of the backend with ``config`` as the entry of row ``index``."""
    return Settings((*TABLE[:index], (*TABLE[index][:2], config), *TABLE[index + 1 :]))


def instead(index: int, config: Config) -> AbstractContextManager[None]:
    """Inside, ``config`` is the entry of row ``index``."""
    present = cast(TritonBackend, backends.load("triton"))
    return backends.replaced(TritonBackend(present.kernels, present.missing, settings_with(index, config)))


def cells_of(index: int) -> list[Cell]:
    """The shapes that row ``index`` of the table serves, in each dtype."""
    marker = Config(0, 0, 0, "")
    config_for = settings_with(index, marker).config_for
    return [(shape, dtype) for shape in SHAPES if config_for(*shape) is marker for dtype in DTYPES]


def step_with(index: int, config: Config, **options: Any) -> Provider:
    def step(x: Tensor, state: State, training: bool) -> Tensor:
        with instead(index, config):
            return our_step(x, state, training, backend="triton", **options)

    return step


def fault_of(index: int, config: Config, cell: Cell, where: str, **options: Any) -> str | None:
    """What is wrong with a step, or None."""
    try:
        x, dout, start = draw(*cell, where)
        expected = in_float64(partial(our_step, backend="reference", **options), x, dout, start)
        return gate(step_with(index, config, **options), x, dout, start, expected)
    except Exception as error:  # whatever the compiler or the driver has against it
        return failure(error)


def measure(index: int, cell: Cell, configs: list[Config]) -> dict[Config, float]:
    """Seconds of a forward with each candidate."""
    x, _, start = draw(*cell, "cuda")

    def forward(config: Config) -> Call:
        return partial(step_with(index, config), x.detach(), start.clone(), True)

    samplers: dict[Config, Sampler] = {config: device(forward(config)) for config in configs}
    return {config: median(samples) for config, samples in interleaved(samplers, ROUNDS).items()}


def ranking(times: dict[Config, dict[Cell, float]]) -> dict[Config, float]:
    """The candidates, best first, each with the geometric mean over the cells of its ratio to the best."""
    cells = {cell for row in times.values() for cell in row}
    best = {cell: min(row[cell] for row in times.values()) for cell in cells}
    ratios = {config: geometric_mean([row[cell] / best[cell] for cell in cells]) for config, row in times.items()}
    return dict(sorted(ratios.items(), key=lambda item: item[1]))


def tune(index: int) -> Config | None:
    """The best entry for row ``index``, or None where no candidate is right. Prints what it measured."""
    cells, configs = cells_of(index), []
    print(f"\n{row_text(TABLE[index])}", flush=True)
    for config in candidates(TABLE[index]):
        faults = ((cell, fault_of(index, config, cell, "cuda")) for cell in cells)
        wrong = next((f"{label(cell)}: {fault}" for cell, fault in faults if fault), None)
        print(f"  {config_text(config)}: {wrong or 'right'}", flush=True)
        if wrong is None:
            configs.append(config)
    found = {cell: measure(index, cell, configs) for cell in cells}
    times = {config: {cell: found[cell][config] for cell in cells} for config in configs}
    ratios = ranking(times)
    lines = [[config_text(c), f"{ratio:.3f}", *(f"{times[c][cell] * 1e6:.1f}" for cell in cells)]
             for c, ratio in ratios.items()]  # fmt: skip
    print(f"\n{grid([['candidate, us', 'ratio', *map(label, cells)], *lines])}\n", flush=True)
    for config in ratios:
        faults = ((cell, fault_of(index, config, cell, "cuda", stop_gradient=False)) for cell in cells)
        wrong = next((f"{label(cell)}: {fault}" for cell, fault in faults if fault), None)
        if wrong is None:
            return config
        print(f"  {config_text(config)}: through the statistics at {wrong}", flush=True)
    return None


# ---- Text ----


def label(cell: Cell) -> str:
    (N, D), dtype = cell
    return f"{N}x{D} {dtype}"


def config_text(config: Config) -> str:
    return f'Config({config.block}, {config.block_n}, {config.warps}, "{config.precision}")'


def row_text(row: Row) -> str:
    limits = ["_ANY" if most == _ANY else str(most) for most in row[:2]]
    return f"({', '.join(limits)}, {config_text(row[2])})"


def table_text(table: tuple[Row, ...]) -> str:
    """Python that gives ``table`` again."""
    rows = "".join(f"    {row_text(row)},\n" for row in table)
    return f"TABLE: tuple[tuple[int, int, Config], ...] = (\n{rows})"


def main(argv: list[str] | None = None) -> int:
    parser_for("python -m tools.tune", __doc__).parse_args(argv)
    reason = "TRITON_INTERPRET=1 is set: unset it" if INTERPRETED else backends.load("triton").unavailable_reason()
    if reason:
        print(f"tune needs a GPU, and changed nothing: {reason}", file=sys.stderr)
        return 2
    versions = f"torch {torch.__version__}, triton {importlib.metadata.version('triton')}"
    winners = [tune(index) for index in range(len(TABLE))]
    table = tuple((*row[:2], winner or row[2]) for row, winner in zip(TABLE, winners, strict=True))
    print(f"\n# Measured by python -m tools.tune: {torch.cuda.get_device_name()}, {versions}, {date.today()}.")
    print(table_text(table))
    return int(None in winners)


if __name__ == "__main__":
    sys.exit(main())
