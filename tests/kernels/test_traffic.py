"""What the Triton kernels read and write, counted address by address while the interpreter runs them.

The floor of a training step is what no kernel can avoid: the upper triangle of C and x read once, C and out written
once. Distinct bytes are compared with it. What is read again (panels of x by each pair of tiles, sums by each program
that adds them up) comes out of a GPU's cache as a rule; how often is bounded for each row of the backend's table.
"""

import os
from collections import defaultdict

import numpy as np
import pytest
import torch
from helpers import batch, warm

from isobn_kernels import backends
from isobn_kernels.backends.triton.config import Settings
from isobn_kernels.backends.triton.launches import TritonBackend
from isobn_kernels.state import Options
from isobn_kernels.state import State as Bundle

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="TRITON_INTERPRET=1 is not set, which counts the accesses"
)


class Traffic:
    """Every access to memory, by the tensor it falls into; what falls into none is the workspace."""

    def __init__(self, monkeypatch, **tensors):
        from triton.runtime.interpreter import InterpreterBuilder

        self.tensors = tensors
        self.read, self.written = defaultdict(list), defaultdict(list)
        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

        def counted_load(builder, ptrs, mask, *rest):
            self.note(self.read, ptrs, mask)
            return load(builder, ptrs, mask, *rest)

        def counted_store(builder, ptrs, value, mask, *rest):
            self.note(self.written, ptrs, mask)
            return store(builder, ptrs, value, mask, *rest)

        monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counted_load)
        monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counted_store)

    def owner(self, address):
        for name, tensor in self.tensors.items():
            if 0 <= int(address) - tensor.data_ptr() < tensor.numel() * tensor.element_size():
                return name
        return "workspace"

    def note(self, accesses, ptrs, mask):
        addresses = np.broadcast_to(ptrs.data, mask.data.shape)[mask.data]
        if addresses.size == 0:
            return
        name = self.owner(addresses[0])
        size = ptrs.dtype.scalar.element_ty.primitive_bitwidth // 8
        accesses[name].append((addresses.astype(np.uint64), size))

    def total(self, accesses, name):
        return sum(addresses.size * size for addresses, size in accesses[name])

    def distinct(self, accesses, name):
        sizes = {size for _, size in accesses[name]}
        assert len(sizes) <= 1, f"{name} is accessed in units of {sizes} bytes"
        if not sizes:
            return 0
        return np.unique(np.concatenate([addresses for addresses, _ in accesses[name]])).size * sizes.pop()


def training_step(monkeypatch, N, D, dtype, **settings):
    state = warm(D)
    x = batch(N, D, dtype=dtype)
    C, sigma, scale, count = state.tensors.values()
    # Handed out by the backend itself, so that their accesses can be told from those of the workspace.
    out, saved_scale = torch.empty(N, D, dtype=dtype), torch.empty(D)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda size, **rest: out if size == (N, D) else empty(size, **rest))
    monkeypatch.setattr(torch, "empty_like", lambda _: saved_scale)
    named = {"x": x, "C": C, "sigma": sigma, "scale": scale, "count": count, "out": out, "saved_scale": saved_scale}
    traffic = Traffic(monkeypatch, **named)
    backend = TritonBackend(backends.load("triton").kernels, settings=Settings(**settings))
    backend.train_forward(x, Bundle(C, sigma, scale, count), Options())
    return traffic


# One shape for each row of the backend's table and each path through it, and how often x and the workspace are read
# there. With T = 12 tiles, a panel of x is in T + 1 pairs and the output needs it once more. A batch of more than one
# block is read twice by each pair (mean, product), or once and once for all by the column sums. Row 0 is read apart.
# Each program of `finish` (T for each block of rows) reads all sums, and its own again.
BOUNDS = {
    (16, 384): (14.9, 13),
    (16, 768): (14.9, 13),
    (32, 384): (14.5, 13),
    (64, 384): (27.3, 26),
    (32, 768): (14.5, 13),
    (64, 768): (27.3, 26),
    (144, 768): (15.2, 52),
}


@pytest.mark.parametrize(
    ("N", "D", "dtype"), [*((*shape, torch.float32) for shape in BOUNDS), (16, 384, torch.bfloat16)], ids=str
)
def test_training_step(monkeypatch, N, D, dtype):
    traffic = training_step(monkeypatch, N, D, dtype)
    rows = N * D * dtype.itemsize
    floor = (D * (D + 1) // 2 + D * D) * 4 + 2 * rows
    names = set(traffic.read) | set(traffic.written)
    distinct = sum(traffic.distinct(accesses, name) for accesses in (traffic.read, traffic.written) for name in names)
    assert distinct <= 1.2 * floor
    # Each of these once and no more.
    assert traffic.total(traffic.written, "C") == D * D * 4
    assert traffic.total(traffic.written, "out") == rows
    for name in ("sigma", "scale", "saved_scale"):
        assert traffic.total(traffic.written, name) == D * 4
    assert traffic.total(traffic.read, "C") == traffic.distinct(traffic.read, "C") <= 1.1 * D * (D + 1) // 2 * 4
    assert traffic.read["scale"] == traffic.read["saved_scale"] == traffic.read["out"] == []
    # What is read more than once.
    x_reads, sum_reads = BOUNDS[N, D]
    assert traffic.distinct(traffic.read, "x") == rows
    assert traffic.total(traffic.read, "x") <= x_reads * rows
    assert traffic.distinct(traffic.read, "C") >= D * (D + 1) // 2 * 4
    assert 0 < traffic.total(traffic.read, "workspace") <= sum_reads * traffic.distinct(traffic.written, "workspace")


def test_unfused_tail(monkeypatch):
    """With many features `shrink` reads the sums once, and each block of rows the rest of the workspace."""
    traffic = training_step(monkeypatch, 32, 768, torch.float32, fused_features=0)
    written = traffic.distinct(traffic.written, "workspace")
    assert traffic.total(traffic.read, "workspace") <= 1.2 * written
