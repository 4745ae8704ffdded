"""How time is taken: samplers, interleaved rounds, statistics of samples, and what else a call costs.

Two clocks, whose figures are never mixed:

* wall: time per call with the host's share included; on CUDA the device is waited for after the last call;
* device (CUDA only): time on the device per call, from replays of a CUDA graph of many calls, by Triton's function. It
  has never run.
"""

from __future__ import annotations

import math
import os
import resource
import statistics
import time
import timeit
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import timer

Call = Callable[[], Any]
Sampler = Callable[[], float]  # seconds per call, the mean of a number of calls
Quartiles = tuple[float, float, float]  # first, median, third
Key = TypeVar("Key")

MIN_SAMPLE = 5e-3  # seconds
MIN_ROUNDS = 3
_MMAP_THRESHOLD_MAX = 32 << 20  # bytes; of glibc on 64-bit machines

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler has a line to say at each start


def wall(call: Call) -> Sampler:
    timed = timeit.Timer(call, timer=timer)  # PyTorch's, which waits for the device

    def sample(number: int) -> float:
        call()  # what others left in the caches is not the cost of this one
        return timed.timeit(number) / number

    number = repeats(min(sample(1), sample(1)))
    return lambda: sample(number)


def device(call: Call) -> Sampler:
    from triton.testing import do_bench_cudagraph

    def sample() -> float:
        return do_bench_cudagraph(call, rep=int(MIN_SAMPLE * 1e3), return_mode="median") / 1e3

    sample()  # raises here if the call cannot be captured
    return sample


CLOCKS: dict[str, Callable[[Call], Sampler]] = {"wall": wall, "device": device}


def repeats(seconds: float) -> int:
    """How many calls fill a sample."""
    return min(10_000, math.ceil(MIN_SAMPLE / seconds))


def interleaved(samplers: dict[Key, Sampler], rounds: int, seconds: float = math.inf) -> dict[Key, list[float]]:
    """Samples from rounds, each of which takes one of everything in rotating order: a slow spell slows all alike.

    At most ``rounds`` rounds, and fewer where they take longer than ``seconds``.
    """
    keys, samples = list(samplers), {key: list[float]() for key in samplers}
    began = time.monotonic()
    for i in range(rounds):
        if i >= MIN_ROUNDS and time.monotonic() - began > seconds:
            break
        for k in range(len(keys)):
            key = keys[(k + i) % len(keys)]
            samples[key].append(samplers[key]())
    return samples


def quartiles(values: list[float]) -> Quartiles:
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return q1, median, q3


def paired_ratio(samples: list[float], base: list[float]) -> Quartiles:
    """Quartiles over rounds of the ratio of the two samples of a round."""
    return quartiles([a / b for a, b in zip(samples, base, strict=True)])


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


def counts(call: Call, device: str) -> Counts:
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities, profile_memory=True) as profiler:
        result = call()
        if device == "cuda":
            torch.cuda.synchronize()
        del result
    memory = sorted(
        (event.start_ns(), event.nbytes())
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]" and event.device_type().name == device.upper()
    )
    held, peak = 0, 0
    for _, size in memory:
        held += size
        peak = max(peak, held)
    sizes = [size for _, size in memory if size > 0]

    def counted(event: Any) -> bool:
        if device == "cuda":
            return event.device_type.name == "CUDA" and "Mem" not in event.name
        parent = event.cpu_parent
        return event.name.startswith("aten::") and not (parent and parent.name.startswith("aten::"))

    operations = sum(map(counted, profiler.events()))
    return Counts(operations, len(sizes), peak, max(sizes, default=0))
