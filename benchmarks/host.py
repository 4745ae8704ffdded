"""What a training call of `isobn` costs on the host: the Python around the kernels, in microseconds.

    python -m benchmarks host [--rounds 40]

The launches are stubbed: each kernel of the Triton backend, and each function of the C++ extensions, is replaced by one
that returns at once. Everything before and after runs as it is, on CPU tensors, in one thread; no GPU is needed.
Beside it, for scale: a step of ``x * scale`` in plain PyTorch, and the argument checks alone.

Method: rounds, each of which times every entry once, in rotating order; a sample is the mean of enough calls to fill
five milliseconds, after one untimed call. Shown are medians and quartiles. Batches require grad; "forward+backward"
adds the gradient of the batch from a ready dout.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from benchmarks import parser_for, results
from benchmarks.clocks import Call, Sampler, interleaved, quartiles, wall
from benchmarks.providers import BETA, EPS, MOMENTUM, Shape
from isobn_kernels import _checks, backends, functional, isobn
from isobn_kernels.backends.cpu import CpuBackend
from isobn_kernels.backends.cuda import CudaBackend
from isobn_kernels.backends.triton.launches import TritonBackend, create
from isobn_kernels.state import Options, State

CASES = (((32, 768), torch.float32), ((32, 384), torch.bfloat16))
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

Entry = tuple[str, str, str, str]  # shape, dtype, what, mode


def samplers(shape: Shape, dtype: torch.dtype) -> dict[Entry, Sampler]:
    """Everything that is timed at a shape, each under the stub that it needs."""
    N, D = shape
    x, dout = torch.zeros(N, D, dtype=dtype, requires_grad=True), torch.zeros(N, D, dtype=dtype)
    cov, std, scale, batches = torch.zeros(D, D), torch.zeros(D), torch.ones(D), torch.zeros((), dtype=torch.int64)
    factor = scale.to(dtype)

    def backward(forward: Call) -> Call:
        return lambda: torch.autograd.grad(forward(), x, dout)

    def checks() -> None:
        _checks.check_arguments(x, State(cov, std, scale, batches), Options(MOMENTUM, EPS, BETA))

    def sampler(stub: Callable[[], AbstractContextManager[None]], call: Call) -> Sampler:
        with stub():
            sample = wall(call)

        def under_stub() -> float:
            with stub():
                return sample()

        return under_stub

    options: dict[str, Any] = {"training": True, "momentum": MOMENTUM, "eps": EPS, "beta": BETA}
    options |= {"scale": scale, "num_batches_tracked": batches}
    found: dict[tuple[str, str], Sampler] = {}
    for name, stub in STUBS.items():
        if name not in missing():
            forward = partial(isobn, x, cov, std, backend=name, **options)
            found[name, "forward"] = sampler(stub, forward)
            found[name, "forward+backward"] = sampler(stub, backward(forward))
    found["x * scale", "forward+backward"] = sampler(contextlib.nullcontext, backward(lambda: x * factor))
    found["argument checks", ""] = sampler(contextlib.nullcontext, checks)
    return {("{}x{}".format(*shape), str(dtype).removeprefix("torch."), *key): each for key, each in found.items()}


def main(argv: list[str] | None = None) -> int:
    parser = parser_for("benchmarks host", __doc__)
    parser.add_argument("--rounds", type=int, default=40, help="at least 2 (%(default)s)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    watch = results.Watch()
    torch.set_flush_denormal(True)  # what stubs leave unwritten is multiplied, and denormal numbers would be slow
    try:
        samples = interleaved({key: each for case in CASES for key, each in samplers(*case).items()}, args.rounds)
    finally:
        torch.set_flush_denormal(False)
    lines = [["shape", "dtype", "what", "mode", "microseconds [quartiles]"]]
    for entry, seconds in samples.items():
        lines.append([*entry, "{1:.1f} [{0:.1f}..{2:.1f}]".format(*quartiles([s * 1e6 for s in seconds]))])
    print("\n".join(f"{key}: {value}" for key, value in results.environment("cpu").items()))
    print(f"\n{NOTES}\n\n{results.grid(lines)}\n")
    for name, reason in missing().items():
        print(f"{name} is not measured: {reason}")
    watch.finish()
    return 0
