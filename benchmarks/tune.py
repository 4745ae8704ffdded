"""Which block sizes the Triton backend should use: measures candidates on this GPU and prints the table to paste.

    python -m benchmarks tune [--quick]

For each row of `isobn_kernels.backends.triton.config.TABLE`, at shapes that the row serves, in float32 and bfloat16:

1. Each candidate takes the place of the row and one training step, which is compared with the reference in float64. One
   that is wrong, does not compile or does not fit the GPU is reported, and not timed.
2. The others are timed in interleaved rounds. A sample is the mean of enough replays of a CUDA graph of the forward
   to fill a millisecond; small statistics are then in the L2 cache. Where no graph can be captured, events before
   and after take its place, and the launches are in the figures. One that takes three times as long as the fastest at
   one shape is not tried at the others, but for the present entry.
3. The row goes to the smallest geometric mean over the shapes of the ratio to the fastest candidate at the shape, if
   that one is right in the backward of stop_gradient=False, too, which takes its block sizes from the same row.

--quick tries only candidates that differ from the row in one number, in fewer rounds. Nothing is written: the last
thing printed is the table, for isobn_kernels/backends/triton/config.py. It takes its time: some candidates need more
than ten seconds to compile, for each D and dtype.

Of this command only what needs no GPU has ever run: the measuring is unproven.

Exit status: 0; 1 if a row was left without a candidate, and keeps its entry; 2 without a GPU.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import math
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import astuple
from datetime import datetime, timezone
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks.clocks import Call, Clock, Quartiles, captured, event_clock, quartiles, repeats, wall_clock
from benchmarks.measure import failure
from benchmarks.providers import Shape, State, Step, draw, gate, one_step
from benchmarks.run import grid
from isobn_kernels import backends
from isobn_kernels.backends.triton.config import _ANY, TABLE, Config, Settings
from isobn_kernels.backends.triton.launches import INTERPRETED, TritonBackend

Row = tuple[int, int, Config]  # of TABLE
Cell = tuple[Shape, str]  # shape and dtype
CLOCKS: dict[str, Clock] = {"wall": wall_clock, "events": event_clock, "graph": event_clock}

BLOCKS, BLOCKS_N, WARPS, PRECISIONS = (32, 64, 128), (16, 32, 64), (2, 4, 8), ("ieee", "tf32x3")
# Each belongs to the row of the table that serves it.
SHAPES = [(8, 384), (16, 384), (16, 768), (16, 1024), (16, 2048), (32, 384), (64, 384), (1024, 384), (32, 768)]
SHAPES += [(64, 768), (64, 1024), (64, 4096), (4096, 1024)]
DTYPES = ("float32", "bfloat16")
TOO_SLOW = 3.0  # times the fastest; not tried at further shapes
ROUNDS, QUICK_ROUNDS = 30, 10


# ---- What is tried, and where ----


def candidates(row: Row, quick: bool) -> list[Config]:
    """The row's own entry first. No guess at what would work: compiling and measuring decide."""
    most_n, _, present = row
    every = [Config(*values) for values in itertools.product(BLOCKS, BLOCKS_N, WARPS, PRECISIONS)]
    found = [present, *(config for config in every if config != present)]
    if most_n <= max(BLOCKS_N):  # batches of this row fit one block of rows; a smaller block would give that away
        found = [config for config in found if config.block_n >= most_n]
    if quick:
        found = [config for config in found if differences(config, present) <= 1]
    return found


def differences(a: Config, b: Config) -> int:
    return sum(x != y for x, y in zip(astuple(a), astuple(b), strict=True))


def shapes_of(index: int) -> list[Shape]:
    """The shapes that row ``index`` of the table serves."""
    marker = Config(0, 0, 0, "")
    with instead(index, marker):
        return [shape for shape in SHAPES if config_for(*shape) is marker]


def config_for(N: int, D: int) -> Config:
    """The entry in use for a shape."""
    return cast(TritonBackend, backends.load("triton")).settings.config_for(N, D)


def instead(index: int, config: Config) -> AbstractContextManager[Any]:
    """Inside, ``config`` is the entry of row ``index``."""
    most_n, most_d, _ = TABLE[index]
    table = (*TABLE[:index], (most_n, most_d, config), *TABLE[index + 1 :])
    present = cast(TritonBackend, backends.load("triton"))
    return backends.replaced(TritonBackend(present.kernels, present.missing, Settings(table)))


# ---- Measuring ----


def step_with(index: int, config: Config) -> Step:
    def step(x: Tensor, state: State) -> Tensor:
        with instead(index, config):
            return one_step(x, state, "triton")

    return step


def example(cell: Cell, device: str) -> tuple[Tensor, Tensor, State]:
    """A batch, an upstream gradient, and a state that has seen one other batch."""
    shape, dtype = cell
    batch, state = draw(shape, dtype, device)
    return batch().requires_grad_(), batch(), state


def in_float64(x: Tensor, dout: Tensor, start: State, stop_gradient: bool = True) -> dict[str, Tensor]:
    """One step of the reference, which `gate` compares with."""
    x = x.detach().double().requires_grad_()
    state = State(start.cov.double(), start.std.double(), start.scale.double(), start.batches.clone())
    out = one_step(x, state, "reference", stop_gradient)
    (grad,) = torch.autograd.grad(out, x, dout.double())
    return {"out": out.detach(), "grad": grad, "cov": state.cov, "std": state.std}


def measure(
    cell: Cell, steps: dict[Config, Step], rounds: int, device: str, clock_name: str
) -> dict[Config, Quartiles | str]:
    """For each candidate its time, or what is wrong with it."""
    x, dout, start = example(cell, device)
    expected, clock = in_float64(x, dout, start), CLOCKS[clock_name]
    batch, state = x.detach(), start.clone()
    found: dict[Config, Quartiles | str] = {}
    timed: list[tuple[Config, Call, int, list[float]]] = []
    for config, step in steps.items():
        print(".", end="", flush=True)  # compiling takes longer than timing
        try:
            wrong = gate(step, x, dout, start, expected)
            if wrong:
                found[config] = f"WRONG: {wrong}"
                continue
            call = partial(step, batch, state)
            run = captured([call]) if clock_name == "graph" else call
            run()
            timed.append((config, run, repeats(clock(run, 1)), []))
        except Exception as error:  # whatever the compiler or the driver has against it
            found[config] = failure(error)
    for i in range(rounds):
        for k in range(len(timed)):
            _, run, times, samples = timed[(k + i) % len(timed)]
            run()  # what the one before left in the caches is not its cost
            samples.append(clock(run, times) * 1e6)
    return found | {config: quartiles(samples) for config, _, _, samples in timed}


def wrong_through_statistics(index: int, config: Config, cells: list[Cell], device: str) -> str | None:
    """What is wrong with the backward of stop_gradient=False, or None."""
    step = partial(one_step, name="triton", stop_gradient=False)
    for cell in cells:
        x, dout, start = example(cell, device)
        try:
            expected = in_float64(x, dout, start, stop_gradient=False)
            with instead(index, config):
                wrong = gate(step, x, dout, start, expected)
        except Exception as error:
            wrong = failure(error)
        if wrong:
            return f"through the statistics at {label(cell)}: {wrong}"
    return None


def clock_for(call: Call) -> str:
    """Replays of a CUDA graph, or where there can be none, events."""
    try:
        captured([call])
    except Exception as error:
        print(f"no CUDA graph of a step ({failure(error)}): timed by events, launches included")
        return "events"
    return "graph"


# ---- Choosing ----

Times = dict[Config, dict[Cell, Quartiles]]


def ranking(times: Times, cells: list[Cell]) -> dict[Config, float]:
    """The candidates that ran at every cell, best first, each with the geometric mean of its ratios to the best."""
    complete = {config: row for config, row in times.items() if set(row) == set(cells)}
    best = {cell: min((row[cell][1] for row in complete.values()), default=1.0) for cell in cells}

    def mean_ratio(row: dict[Cell, Quartiles]) -> float:
        return math.exp(sum(math.log(row[cell][1] / best[cell]) for cell in cells) / len(cells))

    ratios = {config: mean_ratio(row) for config, row in complete.items()}
    return dict(sorted(ratios.items(), key=lambda item: item[1]))


def slow_ones(times: Times, cell: Cell) -> dict[Config, str]:
    """Those far behind the fastest of a cell, and how far."""
    here = {config: row[cell][1] for config, row in times.items() if cell in row}
    best = min(here.values(), default=1.0)
    return {
        config: f"slow: {us / best:.1f}x the fastest at {label(cell)}"
        for config, us in here.items()
        if us > TOO_SLOW * best
    }


def choose(
    ratios: dict[Config, float], wrong_with: Callable[[Config], str | None]
) -> tuple[Config | None, dict[Config, str]]:
    """The first of a ranking that nothing is wrong with; and what is, with those before it."""
    reasons: dict[Config, str] = {}
    for config in ratios:
        wrong = wrong_with(config)
        if wrong is None:
            return config, reasons
        reasons[config] = wrong
    return None, reasons


def tune(index: int, quick: bool, clock_name: str) -> Config | None:
    """The best entry for row ``index``, or None where no candidate is right. Prints what it measured."""
    row = TABLE[index]
    cells = [(shape, dtype) for shape in shapes_of(index) for dtype in DTYPES]
    times: Times = {config: {} for config in candidates(row, quick)}
    reasons: dict[Config, str] = {}
    print(f"\n{row_text(row)}: candidates: {len(times)}, the first is the present entry", flush=True)
    for i, cell in enumerate(cells, 1):
        steps = {config: step_with(index, config) for config in times if config not in reasons}
        print(f"  [{i}/{len(cells)}] {label(cell)} ", end="", flush=True)
        found = measure(cell, steps, QUICK_ROUNDS if quick else ROUNDS, "cuda", clock_name)
        print()
        out = {config: f"{label(cell)}: {value}" for config, value in found.items() if isinstance(value, str)}
        for config, value in found.items():
            if not isinstance(value, str):
                times[config][cell] = value
        out |= {config: reason for config, reason in slow_ones(times, cell).items() if config != row[2]}
        for config, reason in out.items():
            print(f"    out: {config_text(config)}: {reason}", flush=True)
        reasons |= out
    ratios = ranking(times, cells)
    winner, wrong = choose(ratios, lambda config: wrong_through_statistics(index, config, cells, "cuda"))
    print(f"\n{time_table(times, ratios, reasons | wrong, cells)}\n", flush=True)
    print(f"chosen: {config_text(winner)}" if winner else "chosen: none, the row keeps its entry", flush=True)
    return winner


# ---- Text ----


def label(cell: Cell) -> str:
    (N, D), dtype = cell
    return f"{N}x{D} {dtype}"


def config_text(config: Config) -> str:
    return f'Config({config.block}, {config.block_n}, {config.warps}, "{config.precision}")'


def row_text(row: Row) -> str:
    most_n, most_d, config = row
    limits = ["_ANY" if most == _ANY else str(most) for most in (most_n, most_d)]
    return f"({', '.join(limits)}, {config_text(config)})"


def table_text(table: tuple[Row, ...], comment: str) -> str:
    """Python that gives ``table`` again."""
    rows = "".join(f"    {row_text(row)},\n" for row in table)
    return f"# {comment}\nTABLE: tuple[tuple[int, int, Config], ...] = (\n{rows})"


def time_table(times: Times, ratios: dict[Config, float], reasons: dict[Config, str], cells: list[Cell]) -> str:
    """A line per candidate, best first: geometric mean of the ratios, medians [quartiles] in microseconds."""
    lines = [["candidate", "ratio", *map(label, cells), ""]]
    for config in [*ratios, *(config for config in times if config not in ratios)]:
        ratio = f"{ratios[config]:.3f}" if config in ratios else "-"
        found = [times[config].get(cell) for cell in cells]
        medians = ["{1:.1f} [{0:.1f}..{2:.1f}]".format(*us) if us else "-" for us in found]
        lines.append([config_text(config), ratio, *medians, reasons.get(config, "")])
    return grid(lines)


def missing() -> str | None:
    """Why there is nothing to measure here, or None."""
    if INTERPRETED:
        return "TRITON_INTERPRET=1 is set, which runs the kernels without one: unset it"
    return backends.load("triton").unavailable_reason()


def main(argv: list[str] | None = None) -> int:
    title, details = str(__doc__).split("\n\n", 1)
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("benchmarks tune", description=title, epilog=details, formatter_class=formatter)
    parser.add_argument("--quick", action="store_true", help="fewer candidates and rounds")
    args = parser.parse_args(argv)
    reason = missing()
    if reason:
        print(f"tune needs a GPU, and changed nothing: {reason}", file=sys.stderr)
        return 2
    versions = f"torch {torch.__version__}, triton {importlib.metadata.version('triton')}"
    here = f"{torch.cuda.get_device_name()}, {versions}, {datetime.now(timezone.utc):%Y-%m-%d}"
    command = "python -m benchmarks tune --quick" if args.quick else "python -m benchmarks tune"
    print(here)
    x, _, state = example(((32, 768), "float32"), "cuda")
    clock_name = clock_for(partial(one_step, x.detach(), state, "triton"))
    winners = [tune(index, args.quick, clock_name) for index in range(len(TABLE))]
    table = tuple((*row[:2], winner or row[2]) for row, winner in zip(TABLE, winners, strict=True))
    print(f"\n{table_text(table, f'Measured by {command}: {here}.')}")
    return int(None in winners)
