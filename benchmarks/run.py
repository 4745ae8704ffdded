"""How long a step of IsoBN takes: the kernels beside the formula in plain PyTorch.

    python -m benchmarks run                       # on the CPU; --quick for a few shapes
    python -m benchmarks run --device cuda --dtype bfloat16
    python -m benchmarks run --shapes 32x768 32x4096 --threads 2 --output today.csv

The providers, in one process, are those of benchmarks/providers.py; our fastest that can run is the base of all ratios.
The modes: a training forward, an evaluation forward, a backward, and a training forward with its backward.

Method. First a gate: from one common state every provider takes one step, and its output, gradient and statistics are
compared with float64; a provider that is wrong is reported, and not timed. Then rounds: each times everything once, in
rotating order, on a batch drawn before; a sample is the mean of enough calls to fill a millisecond, after one untimed
call. Shown are medians and quartiles, and the median over rounds of the ratio to the base within the same round. The
clocks are those of benchmarks/clocks.py, as is what is counted beside the time: operations or launches, allocations,
memory, page faults. The rates of a large copy and a large matrix product are measured in the same run.

Of this command only the CPU half has ever run: the CUDA half is unproven.

Exit status: 0; 1 if a provider was wrong or failed; 2 if an argument is.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

from benchmarks import results
from benchmarks.clocks import settle_allocator
from benchmarks.measure import ALL, MAX_SPREAD, Row, floor, measure, rates
from benchmarks.providers import COMPILED, Shape, base_of, usable

MAX_LOAD = 0.5  # load average that is not ours; above, the machine is busy
CPU_SHAPES = [(N, D) for D in (384, 768, 1024, 2048, 4096) for N in (8, 16, 32, 64, 256, 4096) if N * D**2 <= 2**33]
CUDA_SHAPES = [(N, D) for D in (384, 768, 1024, 2048, 4096, 8192) for N in (8, 16, 32, 64, 256, 4096, 65536)]
QUICK_SHAPES = {
    "cpu": [(32, 384), (8, 768), (32, 768), (256, 768), (32, 1024), (32, 2048)],
    "cuda": [(32, 768), (64, 4096), (4096, 1024), (32, 384), (8, 768), (256, 768), (32, 4096), (65536, 1024)],
}
COMPILE_SHAPES = [(32, 384), (32, 768), (32, 4096)]
ONE_THREAD_ROWS = 32  # batches of this size are also timed on one thread


def cells(args: argparse.Namespace) -> list[tuple[Shape, int]]:
    """Shapes and numbers of threads, in order."""
    if args.threads:
        return [(shape, threads) for shape in args.shapes for threads in args.threads]
    most = torch.get_num_threads()
    found = []
    for shape in args.shapes:
        if args.device == "cpu" and not args.quick and shape[0] == ONE_THREAD_ROWS and most > 1:
            found.append((shape, 1))
        found.append((shape, most))
    return found


def skipped(args: argparse.Namespace, unavailable: dict[str, str]) -> list[str]:
    """What this run leaves out, and why."""
    lines = [f"{name}: {reason}" for name, reason in unavailable.items()]
    if args.device == "cpu":
        lines.append("clocks other than wall: there is no queue and no graph on a CPU")
        if not args.given_shapes and not args.quick:
            lines.append("shapes with N D^2 above 2^33: seconds a step in plain PyTorch")
    few = " ".join("{}x{}".format(*shape) for shape in args.compile_shapes if shape in args.shapes)
    lines.append(f"torch.compile at shapes other than {few or 'none'}: compiling takes a while")
    lines.append("evaluation by backends other than the base: it is the same expression for all")
    if args.quick:
        lines.append("most of the shapes: --quick")
    return lines


def busy_reasons(before: float, after: float, own_threads: int, rows: list[Row], base: str) -> list[str]:
    """Why the figures should not be believed: other work on the machine, or a wide spread."""
    reasons = []
    if before > MAX_LOAD:
        reasons.append(f"load average {before:.2f} before the run")
    if after > own_threads + MAX_LOAD:
        reasons.append(f"load average {after:.2f} after the run, of which {own_threads} at most are ours")
    of_base = [row for row in rows if row.provider == base and row.microseconds]
    noisy = sum(row.noisy for row in of_base)
    if noisy * 4 > len(of_base):
        reasons.append(f"quartiles of {base} more than a factor {MAX_SPREAD} apart in {noisy} of {len(of_base)} rows")
    return reasons


# ---- Report ----


def grid(lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def time_table(rows: list[Row], names: list[str], base: str) -> str:
    """A line per shape, threads, mode and clock; a column per provider. "~" marks a wide spread."""
    found = {(row.shape, row.threads, row.mode, row.clock, row.provider): row for row in rows}

    def cell(row: Row | None) -> str:
        if row is None or row.microseconds is None:
            return row.status.split(":")[0] if row else "-"
        q1, median, q3 = (f"{us:,.0f}" if us >= 100 else f"{us:.1f}" for us in row.microseconds)
        ratio = f" {row.ratio[1]:.2f}x" if row.ratio and row.provider != base else ""
        return f"{median} [{q1}..{q3}]{'~' if row.noisy else ''}{ratio}"

    lines = [["shape", "threads", "mode", "clock", *names]]
    for shape, threads, mode, clock in dict.fromkeys(key[:4] for key in found if key[2] != ALL):
        here = [found.get((shape, threads, mode, clock, n)) or found.get((shape, threads, ALL, ALL, n)) for n in names]
        lines.append(["{}x{}".format(*shape), str(threads), mode, clock, *map(cell, here)])
    return grid(lines)


def cost_table(rows: list[Row]) -> str:
    """What a training step costs beside time: a line per shape and provider."""
    lines = [["shape", "threads", "provider", "operations", "allocations", "peak MB", "page faults"]]
    for row in rows:
        if row.mode == "forward+backward" and row.counts:
            faults = "-" if row.page_faults is None else f"{row.page_faults:.0f}"
            mb = f"{row.counts.peak_bytes / 1e6:.2f}"
            numbers = [str(row.counts.operations), str(row.counts.allocations), mb, faults]
            lines.append(["{}x{}".format(*row.shape), str(row.threads), row.provider, *numbers])
    return grid(lines)


def floor_table(lines: list[dict[str, object]], base: str) -> str:
    """How close the base comes to what the machine can do."""
    found = [["shape", "threads", "clock", "MB", "MFLOP", "% of copy", "% of matmul"]]
    for line in lines:
        copy, matmul = line["percent_of_copy"], line["percent_of_matmul"]
        if line["provider"] == base and line["mode"] == "forward" and isinstance(copy, float):
            amounts = [f"{line['floor_bytes'] / 1e6:.2f}", f"{line['floor_flop'] / 1e6:.1f}"]  # type: ignore[operator]
            place = [f"{line['N']}x{line['D']}", str(line["threads"]), str(line["clock"])]
            found.append([*place, *amounts, f"{copy:.0f}", f"{matmul:.0f}"])
    return grid(found)


def table_lines(rows: list[Row], base: str, common: dict[str, object]) -> list[dict[str, object]]:
    """The rows as lines of the table of results; ``common`` is what holds for all."""
    lines = []
    for row in rows:
        line: dict[str, object] = common | {"threads": row.threads, "dtype": row.dtype}
        line |= {"N": row.shape[0], "D": row.shape[1], "mode": row.mode, "clock": row.clock, "provider": row.provider}
        line |= {"status": row.status, "rounds": row.rounds, "page_faults": row.page_faults, "base": base}
        if row.counts:
            line |= {key: value for key, value in row.counts._asdict().items() if key in results.COLUMNS}
        if row.microseconds:
            line |= dict(zip(("q1_us", "median_us", "q3_us"), row.microseconds, strict=True))
            size, flop = floor(row.shape, getattr(torch, row.dtype).itemsize, row.mode)
            per_second = 1e6 / row.microseconds[1]
            line |= {"floor_bytes": size, "floor_flop": flop, "percent_of_copy": None, "percent_of_matmul": None}
            if row.clock != "host":
                line["percent_of_copy"] = size * per_second / float(str(common["copy_gb_s"])) / 1e7
                line["percent_of_matmul"] = flop * per_second / float(str(common["matmul_gflop_s"])) / 1e7
        if row.ratio:
            line |= dict(zip(("ratio_q1", "ratio", "ratio_q3"), row.ratio, strict=True))
        lines.append(line)
    return lines


# ---- Command ----


def parse_shape(text: str) -> Shape:
    N, _, D = text.partition("x")
    if not (N.isdecimal() and D.isdecimal() and int(N) > 1 and int(D) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not NxD, such as 32x768, with N at least 2")
    return int(N), int(D)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    title, details = str(__doc__).split("\n\n", 1)
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("benchmarks run", description=title, epilog=details, formatter_class=formatter)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the batch")
    add("--quick", action="store_true", help="a few shapes, one second each; into no table unless --output is given")
    add("--shapes", type=parse_shape, nargs="+", metavar="NxD", help="default: the whole grid")
    add("--compile-shapes", type=parse_shape, nargs="*", metavar="NxD", help="default: three; one with --quick")
    add("--threads", type=int, nargs="+", help="default: PyTorch's own number; on a CPU at N = 32 also 1")
    add("--rounds", type=int, default=50, help="at most, for each shape and number of threads")
    add("--seconds", type=float, help="of timing for each, but at least three rounds; default 3, 1 with --quick")
    add("--output", type=Path, help=f"CSV table to add to; default {results.TABLE.relative_to(results.ROOT)}, and none "
        "where --shapes or --quick is given")  # fmt: skip
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA device here")
    if args.rounds < 1 or (args.threads and min(args.threads) < 1):
        parser.error("--rounds and --threads must be at least 1")
    args.given_shapes = args.shapes is not None
    if args.output is None and not args.given_shapes and not args.quick:
        args.output = results.TABLE
    if args.output:
        try:
            results.read(args.output)  # now, rather than after minutes of measuring
        except ValueError as error:
            parser.error(str(error))
    full = CPU_SHAPES if args.device == "cpu" else CUDA_SHAPES
    args.shapes = args.shapes or (QUICK_SHAPES[args.device] if args.quick else full)
    if args.compile_shapes is None:
        args.compile_shapes = [(32, 768)] if args.quick else COMPILE_SHAPES
    args.seconds = args.seconds or (1.0 if args.quick else 3.0)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    if args.device == "cpu":
        settle_allocator()
    names, unavailable = usable(args.device)
    base = base_of(names)
    before = os.getloadavg()[0]
    common = results.environment(args.device)
    todo = cells(args)
    print("\n".join(f"{key}: {value}" for key, value in common.items()))
    print("skipped:", *skipped(args, unavailable), sep="\n  ", flush=True)
    copy, matmul = rates(args.device, args.dtype)
    common |= {"copy_gb_s": copy / 1e9, "matmul_gflop_s": matmul / 1e9}

    rows: list[Row] = []
    for i, (shape, threads) in enumerate(todo, 1):
        print("[{}/{}] {}x{}, threads: {}".format(i, len(todo), *shape, threads), file=sys.stderr, flush=True)
        here = [name for name in names if name not in COMPILED or shape in args.compile_shapes]
        found = measure(shape, args.dtype, args.device, threads, here, base, args.rounds, args.seconds)
        if args.output:  # at once, for a run that is cut short; again at the end, with the load
            results.upsert(args.output, table_lines(found, base, common))
        rows += found
    after = os.getloadavg()[0]
    busy = busy_reasons(before, after, max(threads for _, threads in todo), rows, base)
    common |= {"load_before": before, "load_after": after, "busy": "; ".join(busy)}
    lines = table_lines(rows, base, common)

    print(f"\nA step: median microseconds [quartiles], median of the ratios to {base} round by round\n")
    print(time_table(rows, names, base))
    print("\nForward and backward: operations (CPU: ATen calls; CUDA: launches), memory on top of what was held\n")
    print(cost_table(rows))
    print("\nA training forward of", base, "against the least it must move and compute, in per cent of the measured")
    print(f"rates of a large copy, {copy / 1e9:.1f} GB/s, and of a large product, {matmul / 1e9:.1f} GFLOP/s;")
    print("what stays in the caches can exceed the former\n")
    print(floor_table(lines, base))
    print(f"\nload average {before:.2f} before, {after:.2f} after")
    for reason in busy:
        print(f"BUSY MACHINE, do not trust these figures: {reason}")
    for row in rows:
        if row.status != "ok":
            print(
                "{}x{}, threads: {}, {}, {} by {}:".format(*row.shape, row.threads, row.provider, row.mode, row.clock)
            )
            print(f"  {row.status}")
    if args.output:
        results.upsert(args.output, lines)
        print(f"written: {args.output}")
    return int(any(row.status != "ok" for row in rows))
