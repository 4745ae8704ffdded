"""How time is taken: clocks, statistics of samples, and what else a call costs.

Three clocks, whose figures are never mixed:

* wall: time per step with the host's share included; on CUDA the device is waited for after the last call;
* cold and hot (CUDA only): time on the device per call, from replays of a CUDA graph of many calls. Cold: each call
  has its own copy of batch and state, together three times the L2 cache. Hot: all calls share one;
* host (CUDA only): time until a call has been enqueued.

Of this module only the CPU half has ever run: the CUDA half is unproven.
"""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], Any]
Clock = Callable[[Call, int], float]  # seconds per call, the mean of a number of calls
Quartiles = tuple[float, float, float]  # first, median, third

MIN_SAMPLE = 1e-3  # seconds
GRAPH_CALLS = 20  # in a CUDA graph, whose own launch then hardly counts
_MMAP_THRESHOLD_MAX = 32 << 20  # bytes; of glibc on 64-bit machines


def wall_clock(call: Call, times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) / times


def synchronized_clock(call: Call, times: int) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / times


def enqueue_clock(call: Call, times: int) -> float:
    torch.cuda.synchronize()
    seconds = wall_clock(call, times)
    torch.cuda.synchronize()
    return seconds


def event_clock(call: Call, times: int) -> float:
    """On the device, from before the first call to after the last; the launches are in it if they are the slower."""
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    for _ in range(times):
        call()
    after.record()
    torch.cuda.synchronize()
    return before.elapsed_time(after) / 1e3 / times


def captured(calls: list[Call], stream: Any = None, pool: Any = None) -> Call:
    """The replay of ``calls``, one after the other, as a CUDA graph with its memory from ``pool``."""
    side = stream or torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=side):
        for call in calls:
            call()
    return graph.replay


def quartiles(values: list[float]) -> Quartiles:
    points = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    q1, median, q3 = torch.tensor(values, dtype=torch.float64).quantile(points).tolist()
    return q1, median, q3


def paired_ratio(samples: list[float], base: list[float]) -> Quartiles:
    """Quartiles over rounds of the ratio of the two samples of a round."""
    return quartiles([a / b for a, b in zip(samples, base, strict=True)])


def repeats(seconds: float) -> int:
    """How many calls fill a sample."""
    return min(1000, max(1, -int(-MIN_SAMPLE // seconds)))


# ---- What else a call costs ----


def settle_allocator() -> None:
    """Lets glibc keep the memory of temporaries, which is the state of a process that has trained for a while.

    A new process takes each block above 128 KiB from the system and gives it back when freed, and a step that makes
    D x D temporaries then faults every page of them in again: several times slower in eager PyTorch. When such a block
    is freed, glibc raises the threshold to its size, up to 32 MiB, and from then on keeps smaller ones. We free one of
    almost that, so that eager PyTorch is measured at its best after some ten calls, and report page faults. At D above
    2880 a temporary does not fit.
    """
    torch.ones((_MMAP_THRESHOLD_MAX - (64 << 10)) // 4)


def page_faults(call: Call, times: int = 2) -> float:
    """Pages that the system had to hand out, per call."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        call()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / times


class Counts(NamedTuple):
    """Of one call, from PyTorch's profiler."""

    operations: int  # kernel launches on CUDA; on a CPU, ATen operations that no other one called
    allocations: int
    peak_bytes: int  # the most that the call held at once on top of what was there
    largest_bytes: int  # of one allocation


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps off stderr what the profiler, in C++, has to say at each start."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def counts(call: Call, device: str) -> Counts:
    cuda = device == "cuda"
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    with quiet(), profile(activities=activities, profile_memory=True) as profiler:
        result = call()
        if cuda:
            torch.cuda.synchronize()
        del result
    memory = sorted(
        (event.start_ns(), event.nbytes())
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]" and event.device_type().name == device.upper()
    )
    sizes = [size for _, size in memory]
    taken, peak = 0, 0
    for size in sizes:
        taken += size
        peak = max(peak, taken)
    events: Any = profiler.events()
    if cuda:
        kernels = [event for event in events if event.device_type.name == "CUDA" and "Mem" not in event.name]
        return Counts(
            len(kernels),
            sum(size > 0 for size in sizes),
            torch.cuda.max_memory_allocated() - held,
            max(sizes, default=0),
        )
    operations = [
        event
        for event in events
        if event.name.startswith("aten::")
        and not (event.cpu_parent is not None and event.cpu_parent.name.startswith("aten::"))
    ]
    return Counts(len(operations), sum(size > 0 for size in sizes), peak, max([0, *sizes]))
