"""How long one IsoBN training step takes: the kernels beside the formula in plain PyTorch.

    python benchmarks/bench_op.py --device cpu
    python benchmarks/bench_op.py --device cpu --shapes 32x768 32x4096 --threads 2 --output today.json
    python benchmarks/bench_op.py --device cuda --dtype bfloat16

Providers, in one process:

* published: the formula of the paper in eager PyTorch, with the statistics in plain tensors;
* compiled: the same function under torch.compile, at --compile-shapes only, since compiling takes a while;
* batch_norm (CUDA only): torch.nn.functional.batch_norm, a different operation, there for scale;
* each backend of isobn_kernels that can run on the device. The fastest of them is the base of all ratios.

Method. First a gate: from one common state every provider takes one step, and its output, gradient and statistics are
compared with float64; a provider that is wrong is reported, and not timed. Then rounds: each times every provider
once, in rotating order, on a batch drawn before; a sample is the mean of enough calls to fill a millisecond, after one
untimed call. Statistics live on from call to call, as in training. Both modes hand in a batch that requires grad;
"forward+backward" adds the gradient of the batch from a ready dout. Shown are medians and quartiles, and the median
over rounds of the ratio to the base within the same round. On CUDA each mode is timed by two clocks: events around
every call, launches included, and replays of a CUDA graph; both find small statistics in the L2 cache.

Of this script only the CPU half has ever run: the CUDA half is unproven.

Exit status: 0; 1 if a provider was wrong or failed; 2 if an argument is.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from isobn_kernels import backends, isobn

MOMENTUM, EPS, BETA = 0.05, 1e-3, 0.5
TOLERANCE = 1e-5  # of the gate, relative, plus one rounding to the dtype of x for output and gradient
MIN_ROUNDS = 3
MIN_SAMPLE = 1e-3  # seconds
MAX_SPREAD = 1.3  # third over first quartile; above, a row is noisy
MAX_LOAD = 0.5  # load average that is not ours; above, the machine is busy

Shape = tuple[int, int]
CPU_SHAPES = [(N, D) for D in (384, 768, 1024, 4096) for N in (16, 32, 256, 4096) if N * D**2 <= 2**33]
CUDA_SHAPES = [*CPU_SHAPES, (64, 4096), (4096, 4096), (65536, 1024)]
COMPILE_SHAPES = [(32, 384), (32, 768), (32, 4096)]


# ---- Providers: a step takes a batch and a state, updates the state in place and returns the output ----


class State(NamedTuple):
    cov: Tensor
    std: Tensor
    scale: Tensor
    batches: Tensor

    def clone(self) -> State:
        return State(*(tensor.clone() for tensor in self))


Step = Callable[[Tensor, State], Tensor]


def published(x: Tensor, cov: Tensor, std: Tensor) -> Tensor:
    """The formula as the paper's authors compute it. Half-precision batches get float32 statistics, as ours do."""
    batch = x.detach().to(cov.dtype)
    y = batch - batch.mean(dim=0)
    batch_std = (y**2).mean(dim=0) ** 0.5
    batch_cov = y.T @ y / len(y)
    cov += MOMENTUM * (batch_cov - cov)
    std += MOMENTUM * (batch_std - std)
    correlation = torch.clamp(cov / torch.outer(std, std), -1, 1)
    gamma = (correlation**2).mean(dim=1)
    scale = 1 / (gamma * std + EPS) ** BETA
    variance = torch.diag(cov)
    scale = scale * (variance.sum() / ((variance * scale**2).sum() + EPS)) ** 0.5
    return (x * scale).to(x.dtype)


def published_step(x: Tensor) -> Step:
    return lambda x, state: published(x, state.cov, state.std)


def compiled_step(x: Tensor) -> Step:
    torch.compiler.reset()  # compiled code has the shape and the number of threads built in
    compiled = torch.compile(published, dynamic=False, fullgraph=True)
    return lambda x, state: compiled(x, state.cov, state.std)


def batch_norm_step(x: Tensor) -> Step:
    return lambda x, state: F.batch_norm(x, state.scale, state.std, training=True, momentum=MOMENTUM)


def backend_step(name: str, x: Tensor) -> Step:
    backends.select(name, x)  # raises with the reason if it cannot run
    step = partial(isobn, training=True, momentum=MOMENTUM, eps=EPS, beta=BETA, backend=name)
    return lambda x, state: step(x, state.cov, state.std, scale=state.scale, num_batches_tracked=state.batches)


BACKENDS = {name: partial(backend_step, name) for name in backends.NAMES}  # fastest first
PROVIDERS: dict[str, Callable[[Tensor], Step]] = {
    "published": published_step,
    "compiled": compiled_step,
    "batch_norm": batch_norm_step,
    **BACKENDS,
}
UNGATED = ("batch_norm",)  # computes something else


def usable_backends(device: str) -> tuple[list[str], dict[str, str]]:
    """Names of the backends that can run on ``device``, and for each of the others why not."""
    reasons = {}
    for name, make in BACKENDS.items():
        try:
            make(torch.zeros(2, 2, device=device))
        except RuntimeError as error:
            reasons[name] = str(error)
    return [name for name in BACKENDS if name not in reasons], reasons


# ---- Correctness ----


def exact(x: Tensor, dout: Tensor, state: State) -> dict[str, Tensor]:
    """One step in float64: what a provider's output, gradient, covariance and deviation are compared with."""
    x, dout = x.detach().double(), dout.double()
    y = x - x.mean(dim=0)
    cov = torch.lerp(state.cov.double(), y.T @ y / x.shape[0], MOMENTUM)
    std = torch.lerp(state.std.double(), y.std(dim=0, correction=0), MOMENTUM)
    gamma = (cov / std / std[:, None]).clamp(-1, 1).square().mean(dim=0)
    t = (gamma * std + EPS).pow(-BETA)
    scale = t * (cov.trace() / (cov.diagonal() @ t.square() + EPS)).sqrt()
    return {"out": x * scale, "grad": dout * scale, "cov": cov, "std": std}


def gate(step: Step, x: Tensor, dout: Tensor, start: State, expected: dict[str, Tensor]) -> str | None:
    """What is wrong with one step from ``start``, or None. ``start`` is left as it is."""
    state = start.clone()
    out = step(x, state)
    if out.dtype != x.dtype:
        return f"out is {out.dtype}, expected {x.dtype}"
    (grad,) = torch.autograd.grad(out, x, dout)
    deviation = expected["cov"].diagonal().sqrt()
    sizes = {name: expected[name].abs().amax(dim=0) for name in ("out", "grad")}
    sizes |= {"cov": torch.outer(deviation, deviation), "std": expected["std"]}
    for name, tensor in (("out", out), ("grad", grad), ("cov", state.cov), ("std", state.std)):
        error = ((tensor.detach().double() - expected[name]).abs() / sizes[name]).max().item()
        tolerance = TOLERANCE + (torch.finfo(x.dtype).eps if name in ("out", "grad") else 0)
        if not error <= tolerance:  # NaN is wrong, too
            return f"{name} is off by {error:.1e}, tolerance {tolerance:.1e}"
    return None


# ---- Clocks: seconds per call, the mean of a number of calls ----

Call = Callable[[], Any]
Clock = Callable[[Call, int], float]


def wall_clock(call: Call, times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) / times


def event_clock(call: Call, times: int) -> float:
    """On the device, with an event before and after each call."""
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(times)]
    for before, after in events:
        before.record()
        call()
        after.record()
    torch.cuda.synchronize()
    return sum(before.elapsed_time(after) for before, after in events) / 1e3 / times


def replay_clock(replay: Call, times: int) -> float:
    """On the device, of calls that follow one another without a gap."""
    return event_clock(lambda: [replay() for _ in range(times)], 1) / times


def captured(call: Call) -> Call:
    """The replay of ``call`` as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


CLOCKS: dict[str, dict[str, Clock]] = {
    "cpu": {"wall": wall_clock},
    "cuda": {"events": event_clock, "graph": replay_clock},
}

# ---- One shape at one number of threads ----


ALL = ("all", "all")  # mode and clock of a row that says why a provider was not timed


@dataclass
class Row:
    """One provider, at one shape, number of threads, mode and clock. Quartiles are (first, median, third)."""

    shape: Shape
    threads: int
    mode: str
    clock: str
    provider: str
    status: str = "ok"  # or what is wrong
    microseconds: tuple[float, float, float] | None = None
    ratio: tuple[float, float, float] | None = None  # to the base
    rounds: int = 0
    noisy: bool = False


def quartiles(values: list[float]) -> tuple[float, float, float]:
    points = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    q1, median, q3 = torch.tensor(values, dtype=torch.float64).quantile(points).tolist()
    return q1, median, q3


def paired_ratio(samples: list[float], base: list[float]) -> tuple[float, float, float]:
    """Quartiles over rounds of the ratio of the two samples of a round."""
    return quartiles([a / b for a, b in zip(samples, base, strict=True)])


def failure(error: Exception) -> str:
    return f"failed: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def measure(shape: Shape, threads: int, names: list[str], base: str, args: argparse.Namespace) -> list[Row]:
    """Gate and time the providers called ``names``."""
    torch.set_num_threads(threads)
    (N, D), device = shape, args.device
    random = torch.Generator(device).manual_seed(N + D)
    spread = torch.rand(D, device=device, generator=random) + 0.1
    mean = torch.randn(D, device=device, generator=random)

    def draw() -> Tensor:
        batch = torch.randn(N, D, device=device, generator=random) * spread + mean
        return batch.to(getattr(torch, args.dtype))

    zeros = partial(torch.zeros, device=device)
    start = State(zeros(D, D), zeros(D), zeros(D) + 1, zeros((), dtype=torch.int64))
    published(draw(), start.cov, start.std)  # one batch ahead: a step from empty statistics is a special case
    x, dout = draw().requires_grad_(), draw()
    expected = exact(x, dout, start)

    def modes(step: Step) -> dict[str, Call]:
        state = start.clone()
        return {
            "forward": lambda: step(x, state),
            "forward+backward": lambda: torch.autograd.grad(step(x, state), x, dout),
        }

    rows: list[Row] = []
    timed: list[tuple[Row, Clock, Call, int, list[float]]] = []
    for name in names:
        row = Row(shape, threads, *ALL, name)
        try:  # a provider that cannot run must not take the others with it
            step = PROVIDERS[name](x)
            wrong = None if name in UNGATED else gate(step, x, dout, start, expected)
            if wrong:
                rows.append(replace(row, status=f"WRONG: {wrong}"))
                continue
            for mode, call in modes(step).items():
                for clock_name, clock in CLOCKS[device].items():
                    row = Row(shape, threads, mode, clock_name, name)
                    run = captured(call) if clock_name == "graph" else call
                    once = clock(run, 1)  # warms up
                    once = clock(run, 1) if once < 0.1 else once
                    timed.append((row, clock, run, min(1000, ceil(MIN_SAMPLE / once)), []))
                    rows.append(row)
        except Exception as error:
            rows.append(replace(row, status=failure(error)))
    del expected

    began, rounds = time.monotonic(), 0
    while rounds < args.rounds and (rounds < MIN_ROUNDS or time.monotonic() - began < args.seconds):
        with torch.no_grad():
            x.copy_(draw())
        for i in range(len(timed)):
            _, clock, run, times, samples = timed[(i + rounds) % len(timed)]
            run()  # what the one before left in the caches is not its cost
            samples.append(clock(run, times))
        rounds += 1

    of_base = {(row.mode, row.clock): samples for row, *_, samples in timed if row.provider == base}
    for row, *_, samples in timed:
        q1, median, q3 = quartiles(samples)
        row.microseconds, row.rounds, row.noisy = (q1 * 1e6, median * 1e6, q3 * 1e6), rounds, q3 > MAX_SPREAD * q1
        if (row.mode, row.clock) in of_base:
            row.ratio = paired_ratio(samples, of_base[row.mode, row.clock])
    return rows


# ---- Report ----


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


def floor(shape: Shape, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes and floating-point operations that a forward step cannot do without."""
    N, D = shape
    return 4 * (D * (D + 1) / 2 + D * D) + 2 * N * D * dtype.itemsize, N * D * (D + 1)


def grid(lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def time_table(rows: list[Row], names: list[str], base: str) -> str:
    """A line per shape, threads, mode and clock; a column per provider. "~" marks a wide spread."""
    cells = {(row.shape, row.threads, row.mode, row.clock, row.provider): row for row in rows}

    def cell(row: Row | None) -> str:
        if row is None or row.microseconds is None:
            return row.status.split(":")[0] if row else "-"
        q1, median, q3 = (f"{us:,.0f}" if us >= 100 else f"{us:.1f}" for us in row.microseconds)
        ratio = f" {row.ratio[1]:.2f}x" if row.ratio and row.provider != base else ""
        return f"{median} [{q1}..{q3}]{'~' if row.noisy else ''}{ratio}"

    lines = [["shape", "threads", "mode", "clock", *names]]
    for shape, threads, mode, clock in dict.fromkeys(key[:4] for key in cells if key[2:4] != ALL):
        found = [cells.get((shape, threads, mode, clock, n)) or cells.get((shape, threads, *ALL, n)) for n in names]
        lines.append(["{}x{}".format(*shape), str(threads), mode, clock, *map(cell, found)])
    return grid(lines)


def floor_table(rows: list[Row], base: str, dtype: torch.dtype) -> str:
    lines = [["shape", "threads", "clock", "MB", "MFLOP", "GB/s", "GFLOP/s"]]
    for row in rows:
        if row.provider == base and row.mode == "forward" and row.microseconds:
            size, flop = floor(row.shape, dtype)
            per_second = [f"{work / row.microseconds[1] / 1e3:.1f}" for work in (size, flop)]
            amounts = [f"{size / 1e6:.2f}", f"{flop / 1e6:.1f}"]
            lines.append(["{}x{}".format(*row.shape), str(row.threads), row.clock, *amounts, *per_second])
    return grid(lines)


def environment(args: argparse.Namespace) -> dict[str, Any]:
    """What the figures belong to."""

    def version(module: str) -> str | None:
        try:
            return importlib.metadata.version(module)
        except importlib.metadata.PackageNotFoundError:
            return None

    try:
        instruction_set = importlib.import_module("isobn_kernels._C").instruction_set()
    except (ImportError, AttributeError):
        instruction_set = None
    try:
        describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        commit = subprocess.check_output(describe, cwd=Path(__file__).parent, text=True, stderr=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):
        commit = os.environ.get("GIT_COMMIT", "unknown")
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = [line.split(":")[1].strip() for line in cpuinfo if line.startswith("model name")]
    cuda = args.device == "cuda"
    return {
        "device": args.device,
        "dtype": args.dtype,
        "cpu": cpu[0] if cpu else platform.processor(),
        "cores": os.cpu_count(),
        "instruction_set": instruction_set,
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
        | {module: version(module) for module in ("isobn_kernels", "triton")},
        "commit": commit.strip(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def parse_shape(text: str) -> Shape:
    N, _, D = text.partition("x")
    if not (N.isdecimal() and D.isdecimal() and int(N) > 1 and int(D) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not NxD, such as 32x768, with N at least 2")
    return int(N), int(D)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    title, details = str(__doc__).split("\n\n", 1)
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=title, epilog=details, formatter_class=formatter)
    add = parser.add_argument
    add("--device", choices=tuple(CLOCKS), default="cpu")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the batch")
    add("--shapes", type=parse_shape, nargs="+", metavar="NxD", help="default: the whole table")
    add("--compile-shapes", type=parse_shape, nargs="*", default=COMPILE_SHAPES, metavar="NxD")
    add("--threads", type=int, nargs="+", help="default: 1 and 2 on cpu, PyTorch's own number on cuda")
    add("--rounds", type=int, default=50, help="at most, for each shape and number of threads")
    add("--seconds", type=float, default=3.0, help=f"of timing for each, but at least {MIN_ROUNDS} rounds")
    add("--output", type=Path, help="JSON file; default: benchmarks/results/, and none where --shapes is given")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA device here")
    args.threads = args.threads or ([1, 2] if args.device == "cpu" else [torch.get_num_threads()])
    if args.rounds < 1 or min(args.threads) < 1:
        parser.error("--rounds and --threads must be at least 1")
    if args.output is None and args.shapes is None:
        args.output = Path(__file__).parent / "results" / f"bench_op_{args.device}_{args.dtype}.json"
    args.shapes = args.shapes or (CPU_SHAPES if args.device == "cpu" else CUDA_SHAPES)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    usable, unavailable = usable_backends(args.device)
    base = usable[0]
    names = [name for name in PROVIDERS if name not in BACKENDS and (name, args.device) != ("batch_norm", "cpu")]
    names += reversed(usable)
    before = os.getloadavg()[0]
    result = environment(args) | {"base": base, "unavailable": unavailable}
    print("\n".join(f"{key}: {value}" for key, value in result.items()))

    rows: list[Row] = []
    cells = [(shape, threads) for shape in args.shapes for threads in args.threads]
    for i, (shape, threads) in enumerate(cells, 1):
        print("[{}/{}] {}x{}, threads: {}".format(i, len(cells), *shape, threads), file=sys.stderr, flush=True)
        here = [name for name in names if name != "compiled" or shape in args.compile_shapes]
        rows += measure(shape, threads, here, base, args)
    after = os.getloadavg()[0]
    busy = busy_reasons(before, after, max(args.threads), rows, base)

    print(f"\nA training step: median microseconds [quartiles], median of the ratios to {base} round by round\n")
    print(time_table(rows, names, base))
    print("\nFloor of a forward step: half of C and x read, C and out written, half of y^T y computed;")
    print(f"and the rates at which {base} does that\n")
    print(floor_table(rows, base, getattr(torch, args.dtype)))
    print(f"\nload average {before:.2f} before, {after:.2f} after")
    for reason in busy:
        print(f"BUSY MACHINE, do not trust these figures: {reason}")
    for row in rows:
        if row.status != "ok":
            print("{}x{}, threads: {}, {}, {}".format(*row.shape, row.threads, row.provider, row.status))
    if args.output:
        result |= {"load_before": before, "load_after": after, "busy": busy, "rows": [asdict(row) for row in rows]}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written: {args.output}")
    return int(any(row.status != "ok" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
