"""How long a step of IsoBN takes: the kernels beside the formula in plain PyTorch.

    python -m benchmarks run                       # on the CPU
    python -m benchmarks run --device cuda --dtype bfloat16
    python -m benchmarks run --shapes 256x768 64x4096 --threads 2 --output today.csv

The providers, in one process, are those of benchmarks/providers.py; our fastest that can run is the base of all ratios.
torch.compile takes part at three shapes. The modes: a training forward, an evaluation forward, and a training forward
with its backward. Evaluation by our other backends is the same expression and is left out.

Method. First a gate: from one common state every provider takes one step, and its output, gradient and statistics are
compared with float64; a provider that is wrong is reported, and not timed. Then rounds: each times everything once, in
rotating order; a sample is the mean of enough calls to fill five milliseconds, after untimed calls. Shown are medians
and quartiles, and the median over rounds of the ratio to the base within the same round. The table also has what is
counted beside the time (operations or launches, allocations, memory, page faults), and the rates of a large copy and a
large matrix product in the same run.

Of this command only the CPU half has ever run: the CUDA half is unproven.

Exit status: 0; 1 if a provider was wrong or failed; 2 if an argument is.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import clocks, parser_for, providers, results
from benchmarks.clocks import CLOCKS, Call
from benchmarks.providers import OTHERS, Provider, Shape, State

MODES = ("forward", "evaluation", "forward+backward")
NS, DS = (8, 16, 32, 64, 256, 4096), (384, 768, 1024, 2048, 4096)
SHAPES = {
    "cpu": [(N, D) for D in DS for N in NS if N * D**2 <= 2**33],  # above, seconds a step in plain PyTorch
    "cuda": [(N, D) for D in (*DS, 8192) for N in (*NS, 65536)],
}
COMPILE_SHAPES = [(32, 384), (32, 768), (32, 4096)]  # compiling takes a while
ONE_THREAD_ROWS = 32  # on a CPU batches of this size are also timed on one thread
QUARTILES, RATIOS = ("q1_us", "median_us", "q3_us"), ("ratio_q1", "ratio", "ratio_q3")
MAX_SPREAD = 1.3  # third over first quartile; above, a row is not to be trusted

Row = dict[str, Any]  # a line of the table


def failure(error: Exception) -> str:
    return f"failed: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def call_of(mode: str, provider: Provider, x: Tensor, dout: Tensor, start: State) -> Call:
    """A call of the mode. Its statistics live on from call to call, as in training; x requires grad, as in training."""
    state, batch = start.clone(), x.detach()
    return {
        "forward": lambda: provider(x, state, True),
        "evaluation": lambda: provider(batch, state, False),
        "forward+backward": lambda: torch.autograd.grad(provider(x, state, True), x, dout),
    }[mode]


def measure(
    shape: Shape, dtype: str, device: str, names: list[str], base: str, rounds: int, seconds: float
) -> tuple[list[Row], list[str]]:
    """A row for each provider, mode and clock; and what was wrong with those that have none."""
    x, dout, start = providers.draw(shape, dtype, device)
    expected = providers.in_float64(providers.published_step, x, dout, start)
    calls, samplers, wrong = {}, {}, []
    for name in names:
        try:  # a provider that cannot run must not take the others with it
            provider = providers.provider(name, x)
            fault = providers.gate(provider, x, dout, start, expected) if name not in providers.UNGATED else None
            if fault:
                wrong.append(f"{name}: WRONG: {fault}")
                continue
            for mode in MODES:
                if mode == "evaluation" and name not in OTHERS and name != base:
                    continue
                for clock in CLOCKS if device == "cuda" else ("wall",):
                    key = (mode, clock, name)
                    calls[key] = call_of(mode, provider, x, dout, start)
                    samplers[key] = CLOCKS[clock](calls[key])
        except Exception as error:
            wrong.append(f"{name}: {failure(error)}")
    samples = clocks.interleaved(samplers, rounds, seconds)
    rows = []
    for (mode, clock, name), values in samples.items():
        row: Row = {"threads": torch.get_num_threads(), "dtype": dtype, "N": shape[0], "D": shape[1], "mode": mode}
        row |= {"clock": clock, "provider": name, "base": base, "rounds": len(values)}
        row |= in_microseconds(values)
        if (mode, clock, base) in samples:
            ratios = clocks.paired_ratio(values, samples[mode, clock, base])
            row |= dict(zip(RATIOS, ratios, strict=True))
        if clock == "wall":
            row |= clocks.counts(calls[mode, clock, name], device)._asdict()
        if device == "cpu":
            row["page_faults"] = clocks.page_faults(calls[mode, clock, name])
        rows.append(row)
    return rows, wrong


def in_microseconds(values: list[float]) -> Row:
    """Quartiles of samples, as columns of the table."""
    return dict(zip(QUARTILES, (second * 1e6 for second in clocks.quartiles(values)), strict=True))


def rates(device: str, dtype: str) -> Row:
    """Gigabytes a second of a large copy (read and written), and GFLOP a second of a large matrix product."""
    cuda = device == "cuda"
    a = torch.ones((1 << 28) if cuda else (1 << 24), device=device)  # float32, far more than a cache holds
    b, size = torch.empty_like(a), 8192 if cuda else 1024
    m = torch.ones(size, size, device=device, dtype=getattr(torch, dtype) if cuda else torch.float32)
    samplers = {"copy": clocks.wall(partial(b.copy_, a)), "matmul": clocks.wall(lambda: m @ m)}
    samples = clocks.interleaved(samplers, 5)
    copy, matmul = min(samples["copy"]), min(samples["matmul"])
    return {"copy_gb_s": 2 * a.nbytes / copy / 1e9, "matmul_gflop_s": 2 * size**3 / matmul / 1e9}


# ---- Report ----


def spread(rows: list[Row]) -> list[str]:
    """A reason not to trust the figures if the base's vary too much, or none."""
    of_base = [row for row in rows if row["provider"] == row["base"]]
    wide = [row["base"] for row in of_base if row["q3_us"] > MAX_SPREAD * row["q1_us"]]
    if len(wide) * 4 <= len(of_base):
        return []
    return [f"quartiles of {wide[0]} more than a factor {MAX_SPREAD} apart in {len(wide)} of {len(of_base)} rows"]


def time_table(rows: list[Row]) -> str:
    lines = [["mode", "clock", "provider", "median us [quartiles]", "ratio [quartiles]"]]
    for row in rows:
        us, ratio = ("{1:,.1f} [{0:,.1f}..{2:,.1f}]", "{1:.2f} [{0:.2f}..{2:.2f}]")
        lines.append([row["mode"], row["clock"], row["provider"], us.format(*(row[k] for k in QUARTILES))])
        lines[-1].append(ratio.format(*(row[k] for k in RATIOS)) if "ratio" in row else "")
    return results.grid(lines)


# ---- Command ----


def parse_shape(text: str) -> Shape:
    N, _, D = text.partition("x")
    if not (N.isdecimal() and D.isdecimal() and int(N) > 1 and int(D) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not NxD, such as 32x768, with N at least 2")
    return int(N), int(D)


def cells(device: str, shapes: list[Shape], threads: list[int] | None) -> list[tuple[Shape, int]]:
    """Shapes and numbers of threads, in order."""
    most = torch.get_num_threads()
    one_too = {1, most} if device == "cpu" else {most}
    return [(s, n) for s in shapes for n in threads or sorted(one_too if s[0] == ONE_THREAD_ROWS else {most})]


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = parser_for("benchmarks run", __doc__)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the batch")
    add("--shapes", type=parse_shape, nargs="+", metavar="NxD", help="default: the whole grid")
    add("--threads", type=int, nargs="+", help="default: PyTorch's own number; on a CPU at N = 32 also 1")
    add("--rounds", type=int, default=50, help="at most, for each shape and number of threads (%(default)s)")
    add("--seconds", type=float, default=3.0, help="of timing for each, but at least three rounds (%(default)s)")
    add("--output", type=Path, help=f"CSV table to add to; default {results.TABLE.relative_to(results.ROOT)}, and none "
        "where --shapes is given")  # fmt: skip
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA device here")
    if args.rounds < 2 or (args.threads and min(args.threads) < 1):
        parser.error("--rounds must be at least 2, --threads at least 1")
    if args.output is None and args.shapes is None:
        args.output = results.TABLE
    if args.output:
        try:
            results.read(args.output)  # now, rather than after minutes of measuring
        except ValueError as error:
            parser.error(str(error))
    args.shapes = args.shapes or SHAPES[args.device]
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    if args.device == "cpu":
        clocks.settle_allocator()
    watch = results.Watch()
    names = [*OTHERS, *reversed(providers.ours(args.device))]
    base = names[-1]
    common = results.environment(args.device)
    print("\n".join(f"{key}: {value}" for key, value in common.items()), flush=True)
    common |= rates(args.device, args.dtype)

    todo = cells(args.device, args.shapes, args.threads)
    rows: list[Row] = []
    wrong: list[str] = []
    for i, (shape, threads) in enumerate(todo, 1):
        label = "{}x{}, threads: {}".format(*shape, threads)
        print(f"\n[{i}/{len(todo)}] {label}", flush=True)
        torch.set_num_threads(threads)
        here = [name for name in names if name != "compiled" or shape in COMPILE_SHAPES]
        found, faults = measure(shape, args.dtype, args.device, here, base, args.rounds, args.seconds)
        rows += found
        wrong += [f"{label}, {fault}" for fault in faults]
        print(time_table(found), *faults, sep="\n", flush=True)
    print()
    common |= watch.finish(*spread(rows))
    print(*wrong, sep="\n")
    if args.output:
        results.upsert(args.output, [common | row for row in rows])
        print(f"written: {args.output}")
    return int(bool(wrong))
