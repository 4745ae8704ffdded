"""What a step costs, in counts rather than times: the same on every machine, and a change of one is a decision.

Elsewhere: no graph breaks and no recompilation over batch sizes (test_op.py), launches of each function of the GPU
backends (test_aot.py, test_cuda.py), bytes that the Triton kernels move (test_traffic.py).
"""

import sys
from pathlib import Path

import pytest
import torch

from isobn_kernels import IsoBN, available_backends

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks import clocks, host

N, D = 8, 512
needs_cpu = pytest.mark.skipif("cpu" not in available_backends(), reason="the C++ extension is not built")


@pytest.fixture(autouse=True)
def memory_as_it_is(monkeypatch):
    """Filling fresh memory with NaN, as every other test does, would count as operations."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)


def counts(layer, batch, backward):
    """Of a step like those before it."""

    def step():
        out = layer(batch)
        return torch.autograd.grad(out, batch, dout) if backward else out

    dout = torch.ones_like(batch)
    step()
    return clocks.counts(step, "cpu")


# backend, training, gradient, rows: operations and allocations. The largest batches take a Function of their own.
COSTS = [
    ("cpu", True, False, N, 3, 3),  # out, the scale for backward, workspace
    ("cpu", True, True, N, 6, 5),
    ("cpu", True, True, 1024, 4, 4),
    ("cpu", False, False, N, 1, 1),
    ("cpu", False, True, N, 3, 3),
    ("reference", False, False, N, 1, 1),
]


@needs_cpu
@pytest.mark.parametrize(("backend", "training", "gradient", "rows", "operations", "allocations"), COSTS)
def test_operations_and_allocations(backend, training, gradient, rows, operations, allocations):
    layer = IsoBN(D, backend=backend).train(training)
    found = counts(layer, torch.randn(rows, D, requires_grad=gradient), gradient)
    assert (found.operations, found.allocations) == (operations, allocations)


@needs_cpu
@pytest.mark.parametrize("threads_used", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_memory_of_the_size_of_the_covariance(dtype, threads_used, threads):
    threads(threads_used)
    x = torch.randn(N, D, dtype=dtype, requires_grad=True)
    for options in ({}, {"bias_correction": True}):
        found = counts(IsoBN(D, backend="cpu", **options), x, backward=True)
        assert found.peak_bytes < 4 * D * D / 2
    # Such memory would be seen: this mode keeps a copy of the covariance for its backward.
    assert counts(IsoBN(D, backend="cpu", stop_gradient=False), x, backward=True).largest_bytes == 4 * D * D


@pytest.mark.parametrize(
    ("backend", "rows", "launches"), [("triton", 32, 3), ("triton", 256, 4), ("cuda", 32, 2)], ids=str
)
def test_launches_of_a_step(backend, rows, launches, monkeypatch):
    """Forward and backward on a GPU, where the host's code runs and the launches are counted instead."""
    if reason := host.missing().get(backend):
        pytest.skip(reason)
    seen = []

    def launch(*args, **options):
        if len(args) > 3:  # with fewer the stub stands for a question to the device
            seen.append(args)

    monkeypatch.setattr(host, "nothing", launch)
    layer, x = IsoBN(D, backend=backend), torch.zeros(rows, D, requires_grad=True)
    with host.STUBS[backend]():
        layer(x).sum().backward()
    assert len(seen) == launches
