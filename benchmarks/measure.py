"""One shape: gate the providers, then time them in interleaved rounds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.clocks import (
    GRAPH_CALLS,
    Call,
    Clock,
    Counts,
    Quartiles,
    captured,
    counts,
    enqueue_clock,
    event_clock,
    page_faults,
    paired_ratio,
    quartiles,
    repeats,
    synchronized_clock,
    wall_clock,
)
from benchmarks.providers import BACKENDS, COMPILED, PROVIDERS, UNGATED, Provider, Shape, State, draw, exact, gate

MODES = ("forward", "evaluation", "backward", "forward+backward")
ALL = "all"  # mode and clock of a row that says why a provider was not timed
MIN_ROUNDS = 3
MAX_SPREAD = 1.3  # third over first quartile; above, a row is noisy
MAX_CLONES = 64


@dataclass
class Row:
    """One provider, at one shape, number of threads, mode and clock. Times are microseconds."""

    shape: Shape
    dtype: str
    threads: int
    mode: str
    clock: str
    provider: str
    status: str = "ok"  # or what is wrong
    microseconds: Quartiles | None = None
    ratio: Quartiles | None = None  # to the base, median of the rounds' ratios
    rounds: int = 0
    counts: Counts | None = None
    page_faults: float | None = None  # per call, on a CPU

    @property
    def noisy(self) -> bool:
        return self.microseconds is not None and self.microseconds[2] > MAX_SPREAD * self.microseconds[0]


@dataclass
class Timed:
    """What a round takes a sample of: ``run`` makes ``calls`` calls."""

    row: Row
    clock: Clock
    run: Call
    calls: int
    times: int
    samples: list[float]

    def sample(self) -> None:
        self.run()  # what the one before left in the caches is not its cost
        self.samples.append(self.clock(self.run, self.times) / self.calls)


def failure(error: Exception) -> str:
    return f"failed: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def call_of(mode: str, provider: Provider, x: Tensor, dout: Tensor, start: State) -> Call:
    """A call of the mode. Its statistics live on from call to call, as in training; x requires grad, as in training."""
    state, batch = start.clone(), x.detach()
    provider.prepare(state)
    if mode == "forward":
        return lambda: provider.train(x, state)
    if mode == "evaluation":
        return lambda: provider.evaluate(batch, state)
    if mode == "forward+backward":
        return lambda: torch.autograd.grad(provider.train(x, state), x, dout)
    out = provider.train(x, state)
    return lambda: torch.autograd.grad(out, x, dout, retain_graph=True)


# ---- Which clock runs what ----


def clones_for(shape: Shape, itemsize: int, cache_bytes: int) -> int:
    """How many copies of batches and state are three times the cache."""
    N, D = shape
    return min(MAX_CLONES, math.ceil(3 * cache_bytes / (4 * D * D + 3 * N * D * itemsize)))


def clocks_on_cuda(name: str, call: Call, make: Callable[[int], Call], clones: int, pool: Any) -> dict[str, Callable]:
    """For each clock what makes the thing to run: (clock, run, calls in it). ``make(i)`` gives a call on copy i."""
    side = torch.cuda.Stream()

    def on_side(copies: int, repeat: int) -> tuple[Clock, Call, int]:
        # The backward of a graph runs on the stream that recorded it, which has to be the one that is captured.
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            calls = [make(i) for i in range(copies)] * repeat
        return event_clock, captured(calls, side, pool), len(calls)

    found: dict[str, Callable] = {
        "wall": lambda: (synchronized_clock, call, 1),
        "host": lambda: (enqueue_clock, call, 1),
    }
    if name not in COMPILED or name == "compiled":  # the others are CUDA graphs already
        found["cold"] = lambda: on_side(clones, 1)
        found["hot"] = lambda: on_side(1, GRAPH_CALLS)
    return found


# ---- Measuring ----


def prepared(
    name: str, base: str, x: Tensor, dout: Tensor, start: State, expected: dict[str, Tensor], threads: int, pool: Any
) -> tuple[list[Row], list[Timed]]:
    """The gate, and everything of a provider that is timed at a shape. What fails is a row that says so."""
    device, dtype = x.device.type, str(x.dtype).removeprefix("torch.")
    N, D = x.shape
    row = Row((N, D), dtype, threads, ALL, ALL, name)
    try:  # a provider that cannot run must not take the others with it
        provider = PROVIDERS[name](x)
        wrong = None if name in UNGATED else gate(provider.train, x, dout, start, expected, provider.evaluate)
        if wrong:
            return [replace(row, status=f"WRONG: {wrong}")], []
        # The same expression for every backend: timed for one.
        modes = [mode for mode in MODES if mode != "evaluation" or name == base or name not in BACKENDS]
        calls = {mode: call_of(mode, provider, x, dout, start) for mode in modes}
    except Exception as error:
        return [replace(row, status=failure(error))], []

    rows, timed = [], []
    for mode, call in calls.items():
        if device == "cuda":
            cache = getattr(torch.cuda.get_device_properties(x.device), "L2_cache_size", 64 << 20)

            def make(i: int, mode: str = mode) -> Call:
                if i == 0:
                    return call_of(mode, provider, x, dout, start)
                return call_of(mode, provider, x.detach().clone().requires_grad_(), dout.clone(), start)

            clocks = clocks_on_cuda(name, call, make, clones_for((N, D), x.element_size(), cache), pool)
        else:
            clocks = {"wall": lambda call=call: (wall_clock, call, 1)}
        for clock_name, start_clock in clocks.items():
            row = Row((N, D), dtype, threads, mode, clock_name, name)
            rows.append(row)
            try:
                clock, run, size = start_clock()
                clock(run, 1)  # warms up
                times = repeats(clock(run, 1))
                times = min(times, 20) if clock_name == "host" else times  # a full queue would block the host
                if clock_name == "wall":
                    row.counts = counts(call, device)
                timed.append(Timed(row, clock, run, size, times, []))
            except Exception as error:
                row.status = failure(error)
    return rows, timed


def measure(
    shape: Shape, dtype: str, device: str, threads: int, names: list[str], base: str, rounds: int, seconds: float
) -> list[Row]:
    """Rows of the providers called ``names``. A round takes one sample of everything, in rotating order."""
    torch.set_num_threads(threads)
    batch, start = draw(shape, dtype, device)
    x, dout = batch().requires_grad_(), batch()
    expected = exact(x, dout, start)
    # One pool for all graphs, as none runs beside another and nothing reads what they leave behind.
    pool = torch.cuda.graph_pool_handle() if device == "cuda" else None
    if any(name in COMPILED for name in names):
        torch.compiler.reset()  # compiled code has the shape and the number of threads built in
    rows: list[Row] = []
    timed: list[Timed] = []
    for name in names:
        more = prepared(name, base, x, dout, start, expected, threads, pool)
        rows += more[0]
        timed += more[1]
    del expected

    began, done = time.monotonic(), 0
    while timed and done < rounds and (done < MIN_ROUNDS or time.monotonic() - began < seconds):
        x.data.copy_(batch())  # unseen by autograd, which keeps batches for the backward
        for i in range(len(timed)):
            timed[(i + done) % len(timed)].sample()
        done += 1

    of_base = {(each.row.mode, each.row.clock): each.samples for each in timed if each.row.provider == base}
    for each in timed:
        row = each.row
        q1, median, q3 = quartiles(each.samples)
        row.microseconds, row.rounds = (q1 * 1e6, median * 1e6, q3 * 1e6), done
        if (row.mode, row.clock) in of_base:
            row.ratio = paired_ratio(each.samples, of_base[row.mode, row.clock])
        if device == "cpu":
            row.page_faults = page_faults(each.run)  # after the rounds: the allocator needs a few calls to settle
    return rows


# ---- What the machine can do, measured in the same run ----


def floor(shape: Shape, itemsize: int, mode: str) -> tuple[float, float]:
    """Bytes and floating-point operations that a call cannot do without.

    A training step reads the upper triangle of C and writes C, and computes half of y^T y; every pass over a batch
    reads one and writes one.
    """
    N, D = shape
    passes = 2 if mode == "forward+backward" else 1
    size = 2 * N * D * itemsize * passes
    if not mode.startswith("forward"):
        return size, N * D
    return size + 4 * (D * (D + 1) / 2 + D * D), N * D * (D + 1)


def rates(device: str, dtype: str) -> tuple[float, float]:
    """Bytes a second of a large copy (read and written), and operations a second of a large matrix product."""
    cuda = device == "cuda"
    clock: Clock = event_clock if cuda else wall_clock
    a = torch.ones((1 << 28) if cuda else (1 << 24), device=device)  # float32, far more than a cache holds
    b, size = torch.empty_like(a), 8192 if cuda else 1024
    m = torch.ones(size, size, device=device, dtype=getattr(torch, dtype) if cuda else torch.float32)

    def best(call: Call) -> float:
        clock(call, 1)
        return min(clock(call, 3) for _ in range(5))

    return 2 * a.nbytes / best(partial(b.copy_, a)), 2 * size**3 / best(lambda: m @ m)
