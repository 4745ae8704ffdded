"""What a training call of `isobn` costs on the host: the Python around the kernels, in microseconds.

    python -m benchmarks host [--output FILE]

The launches are stubbed: each kernel of the Triton backend, and each function of the C++ extensions, is replaced by one
that returns at once. Everything before and after runs as it is, on CPU tensors, in one thread; no GPU is needed.
Beside it, for scale: a step of ``x * scale`` in plain PyTorch, and the argument checks alone.

Method: rounds, each of which times every entry once, in rotating order; a sample is the mean of 200 calls, after one
untimed call. Shown are medians and quartiles. Batches require grad; "forward+backward" adds the gradient of the batch
from a ready dout.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from benchmarks import results
from benchmarks.clocks import Call, Quartiles, quartiles, wall_clock
from benchmarks.providers import BETA, EPS, MOMENTUM, Shape
from benchmarks.run import busy_reasons, grid
from isobn_kernels import _checks, backends, functional, isobn
from isobn_kernels.backends.cpu import CpuBackend
from isobn_kernels.backends.cuda import CudaBackend
from isobn_kernels.backends.triton.launches import TritonBackend, create
from isobn_kernels.state import Options, State

CASES = (((32, 768), torch.float32), ((32, 384), torch.bfloat16))
ROUNDS, CALLS = 40, 200
NOTES = """\
Launches are stubbed: these are microseconds of the host, and no kernel of this package ran.
Left out, triton: Triton's own launcher (each launch checks its arguments and finds its binary, on top of these
  figures), the choice of the device, PyTorch's allocator for GPUs, torch.cuda.is_available() at each call by name.
Left out, cuda: the call into C++ (0.5 us or so) and the launch in it, the handle of the stream, PyTorch's allocator for
  GPUs.
Left out, cpu: the call into C++.
In the figures: a call that returns at once for each launch left out; memory from PyTorch's allocator for CPUs; the
  product with scale and its backward where PyTorch computes them: in "x * scale", and in "cpu" at these shapes."""


# ---- Stubs ----


def nothing(*args: Any, **kwargs: Any) -> None:
    """Stands in for a launch."""


LAUNCHES = ("train_forward", "compute_scale", "apply_scale", "train_backward")


class NoKernel:
    """Stands in for a kernel: ``kernel[grid](...)`` returns at once."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return nothing


@contextlib.contextmanager
def stubbed_triton() -> Iterator[None]:
    """The Triton backend takes CPU tensors, as in the interpreter, and launches nothing."""
    from isobn_kernels.backends.triton import kernels

    stub = SimpleNamespace(**{name: NoKernel() for name in kernels.__all__})
    with (
        backends.replaced(TritonBackend(stub, interpreted=True)),
        mock.patch.object(functional, "_SMALL", -1),  # a GPU's batches are never left to plain PyTorch
    ):
        yield


def stubbed_cpu() -> AbstractContextManager[None]:
    """The C++ backend calls nothing but the function that sizes its workspace."""
    from isobn_kernels import _C

    return backends.replaced(CpuBackend(SimpleNamespace(**{**vars(_C), **dict.fromkeys(LAUNCHES, nothing)})))


class StubbedCuda(CudaBackend):
    """Takes CPU tensors, on a device that needs no trial."""

    device_type = "cpu"

    def machine_reason(self) -> None:
        return None

    def device_reason(self, device: int) -> None:
        return None

    def processor(self, x: torch.Tensor) -> tuple[int, int]:
        return x.get_device(), 0


@contextlib.contextmanager
def stubbed_cuda() -> Iterator[None]:
    """The CUDA backend calls nothing; a workspace is as large as where a step is one launch."""
    stub = SimpleNamespace(
        **dict.fromkeys(LAUNCHES, nothing),
        workspace_bytes=lambda *args: 1536,
        MAX_ROWS=128,
        MAX_FEATURES=2048,
        DTYPES={"float32": 0, "float16": 2, "bfloat16": 3},
        **dict.fromkeys(("TRAIN_FORWARD", "COMPUTE_SCALE", "TRAIN_BACKWARD"), 0),
    )
    with (
        backends.replaced(StubbedCuda(stub)),
        mock.patch.object(functional, "_SMALL", -1),  # a GPU's batches are never left to plain PyTorch
    ):
        yield


STUBS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "cuda": stubbed_cuda,
    "triton": stubbed_triton,
    "cpu": stubbed_cpu,
}


def missing() -> dict[str, str]:
    """The backends whose host code cannot run here, and why."""
    reasons = {"triton": create().missing, "cpu": backends.load("cpu").unavailable_reason()}
    return {name: reason for name, reason in reasons.items() if reason is not None}


# ---- Measuring ----


@dataclass
class Row:
    """One entry at one shape. Quartiles are (first, median, third)."""

    shape: Shape
    dtype: str
    what: str
    mode: str
    microseconds: Quartiles


def entries(shape: Shape, dtype: torch.dtype) -> dict[tuple[str, str], tuple[Callable[[], Any], Call]]:
    """What is timed, by name and mode: the stub that it needs, and the call."""
    N, D = shape
    x, dout = torch.zeros(N, D, dtype=dtype, requires_grad=True), torch.zeros(N, D, dtype=dtype)
    cov, std, scale, batches = torch.zeros(D, D), torch.zeros(D), torch.ones(D), torch.zeros((), dtype=torch.int64)
    factor = scale.to(dtype)

    def backward(forward: Call) -> Call:
        return lambda: torch.autograd.grad(forward(), x, dout)

    def checks() -> None:
        _checks.check_arguments(x, State(cov, std, scale, batches), Options(MOMENTUM, EPS, BETA))

    options: dict[str, Any] = {"training": True, "momentum": MOMENTUM, "eps": EPS, "beta": BETA}
    options |= {"scale": scale, "num_batches_tracked": batches}
    found: dict[tuple[str, str], tuple[Callable[[], Any], Call]] = {}
    for name, stub in STUBS.items():
        if name not in missing():
            forward = partial(isobn, x, cov, std, backend=name, **options)
            found[name, "forward"] = (stub, forward)
            found[name, "forward+backward"] = (stub, backward(forward))
    found["x * scale", "forward+backward"] = (contextlib.nullcontext, backward(lambda: x * factor))
    found["argument checks", ""] = (contextlib.nullcontext, checks)
    return found


def measure(rounds: int = ROUNDS, calls: int = CALLS) -> list[Row]:
    """Every entry at every shape. What the stubs replaced is back afterwards."""
    timed = []
    for shape, dtype in CASES:
        for key, (stub, call) in entries(shape, dtype).items():
            timed.append(((shape, str(dtype).removeprefix("torch."), *key), stub, call, list[float]()))
    torch.set_flush_denormal(True)  # what stubs leave unwritten is multiplied, and denormal numbers would be slow
    try:
        for i in range(rounds):
            for k in range(len(timed)):
                _, stub, call, samples = timed[(k + i) % len(timed)]
                with stub():
                    call()
                    samples.append(wall_clock(call, calls) * 1e6)
    finally:
        torch.set_flush_denormal(False)
    return [Row(*key, quartiles(samples)) for key, _, _, samples in timed]


# ---- Report ----


def time_table(rows: list[Row]) -> str:
    lines = [["shape", "dtype", "what", "mode", "microseconds [quartiles]"]]
    for row in rows:
        us = "{1:.1f} [{0:.1f}..{2:.1f}]".format(*row.microseconds)
        lines.append(["{}x{}".format(*row.shape), row.dtype, row.what, row.mode, us])
    return grid(lines)


def main(argv: list[str] | None = None) -> int:
    title, details = str(__doc__).split("\n\n", 1)
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("benchmarks host", description=title, epilog=details, formatter_class=formatter)
    parser.add_argument("--output", type=Path, help="also write the table to this file, as JSON")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    before = os.getloadavg()[0]
    rows = measure()
    after = os.getloadavg()[0]
    busy = busy_reasons(before, after, 1, [], "")
    print(f"{NOTES}\n\n{time_table(rows)}\n\nload average {before:.2f} before, {after:.2f} after")
    for name, reason in missing().items():
        print(f"{name} is not measured: {reason}")
    for reason in busy:
        print(f"BUSY MACHINE, do not trust these figures: {reason}")
    if args.output:
        result = results.environment("cpu")
        result |= {"stubbed": NOTES, "missing": missing(), "load_before": before, "load_after": after, "busy": busy}
        result |= {"rows": [asdict(row) for row in rows]}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written: {args.output}")
    return 0
