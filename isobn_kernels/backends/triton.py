"""The Triton kernels for GPUs: which launches make up each function, and with what block sizes.

Under ``TRITON_INTERPRET=1`` (set before the first import) the same kernels run on CPU tensors, slowly, for tests.
"""

from __future__ import annotations

import contextlib
import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NAME = "triton"

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

try:
    from isobn_kernels.backends import triton_kernels as kernels

    _MISSING = None
except ImportError as error:
    _MISSING = f"Triton cannot be imported ({error}): pip install triton (Linux; it comes with torch's CUDA builds)"


@dataclass(frozen=True)
class Config:
    """Block sizes of a launch: features of a tile, rows at a time, warps, and how float32 products are made."""

    block: int
    block_n: int
    warps: int
    precision: str


# (largest N, largest D) -> Config; the first row that fits. Chosen from the compiled code (benchmarks/aot_report.py: no
# spills, 128-bit accesses) and not yet tuned on a GPU; benchmarks/tune.py measures candidates and prints this table.
_ANY = 1 << 62
TABLE: tuple[tuple[int, int, Config], ...] = (
    (16, 512, Config(32, 16, 4, "ieee")),
    (16, _ANY, Config(64, 16, 8, "ieee")),
    (_ANY, 512, Config(32, 32, 4, "ieee")),
    (_ANY, _ANY, Config(64, 32, 8, "ieee")),
)
ONE_PASS_ROWS = 128  # up to here a program sums the columns of its own panels, which saves a launch
FUSED_FEATURES = 2048  # up to here every program of `finish` adds up all features itself, which saves a launch
_CHUNK_ELEMENTS = 16384  # of the sums that it adds at a time
_MAX_CHUNKS = 64  # row chunks of a column sum


def config_for(N: int, D: int) -> Config:
    """The first row of the table that fits."""
    return next(config for most_n, most_d, config in TABLE if most_n >= N and most_d >= D)


def unavailable_reason() -> str | None:
    """Why this backend cannot run here, or None."""
    if _MISSING is not None:
        return _MISSING
    if not INTERPRETED and not torch.cuda.is_available():
        return "there is no GPU that torch can use (TRITON_INTERPRET=1 runs the kernels on CPU tensors, for tests)"
    return None


def unsupported_reason(x: Tensor) -> str | None:
    """Why this backend cannot take ``x``, or None."""
    if x.dtype == torch.float64:
        return "x is float64 and it takes float16, bfloat16 and float32: use the backend 'reference' or 'cpu'"
    if x.is_cuda or (INTERPRETED and x.device.type == "cpu"):
        return None
    return f"x is on {x.device} and it takes GPU tensors"


class _Plan:
    """Tiles and workspace of one call."""

    def __init__(self, N: int, D: int) -> None:
        self.config = config_for(N, D)
        block = self.config.block
        self.tiles = -(-D // block)
        self.width = self.tiles * block
        self.whole = self.config.block_n >= N
        self.sizes = {"D": D, "T": self.tiles, "WIDTH": self.width, "BLOCK": block}
        self.tiles_pow2 = max(2, 1 << (self.tiles - 1).bit_length())
        self.pairs = ((self.tiles + 1) // 2, self.tiles + 1)
        # Rows in at most _MAX_CHUNKS chunks of whole blocks.
        self.rows_per_chunk = -(-N // (_MAX_CHUNKS * self.config.block_n)) * self.config.block_n
        self.chunks = -(-N // self.rows_per_chunk) if N else 0
        self.row_blocks = -(-N // self.config.block_n)

    def workspace(self, x: Tensor, *rows: int) -> list[Tensor]:
        """Pieces of one allocation, each of so many rows of `width` float32 numbers."""
        memory = torch.empty(sum(rows) * self.width, dtype=torch.float32, device=x.device)
        return list(memory.split([count * self.width for count in rows]))


def _on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def train_forward(
    x: Tensor,
    running_cov: Tensor,
    running_std: Tensor,
    scale: Tensor,
    num_batches_tracked: Tensor | None,
    momentum: float,
    eps: float,
    beta: float,
    bias_correction: bool,
) -> tuple[Tensor, Tensor]:
    N, D = x.shape
    plan, (row_stride, col_stride) = _Plan(N, D), x.stride()
    config, fused = plan.config, D <= FUSED_FEATURES
    out = torch.empty((N, D), dtype=x.dtype, device=x.device)
    saved_scale = torch.empty_like(running_std)
    partial, features, energies, sums = plan.workspace(x, plan.tiles, 4, 1, plan.chunks)
    sums_first = N > ONE_PASS_ROWS
    with _on_device_of(x):
        if sums_first:
            _column_sums(plan, x, sums)
        kernels.update_pairs[plan.pairs](
            x,
            running_cov,
            running_std,
            num_batches_tracked,
            sums if sums_first else None,
            partial,
            features,
            N,
            row_stride,
            col_stride,
            plan.chunks,
            float(momentum),
            **plan.sizes,
            BLOCK_N=config.block_n,
            WHOLE=plan.whole,
            BIAS_CORRECTION=bias_correction,
            PRECISION=config.precision,
            num_warps=config.warps,
        )
        if not fused:
            kernels.shrink[(plan.tiles,)](
                partial, features, energies, float(eps), float(beta), **plan.sizes, T_POW2=plan.tiles_pow2
            )
        _finish(plan, x, out, saved_scale, scale, running_std, num_batches_tracked, partial, features, energies,
                eps, beta, fused)  # fmt: skip
    written = (running_cov, running_std, scale, num_batches_tracked)
    torch.autograd.graph.increment_version([t for t in written if t is not None and not t.is_inference()])
    return out, saved_scale


def compute_scale(
    running_cov: Tensor,
    running_std: Tensor,
    num_batches_tracked: Tensor | None,
    momentum: float,
    eps: float,
    beta: float,
    bias_correction: bool,
) -> Tensor:
    plan = _Plan(0, running_std.shape[0])
    scale = torch.empty_like(running_std)
    partial, features = plan.workspace(running_std, plan.tiles, 3)
    with _on_device_of(running_std):
        _inspect(plan, running_cov, running_std, num_batches_tracked, partial, features, momentum, bias_correction)
        _finish(plan, None, None, scale, None, None, None, partial, features, None, eps, beta, True)
    return scale


def apply_scale(x: Tensor, scale: Tensor) -> Tensor:
    N, D = x.shape
    out = torch.empty((N, D), dtype=x.dtype, device=x.device)
    if N > 0:
        block, block_n = min(256, max(16, 1 << (D - 1).bit_length())), 16
        with _on_device_of(x):
            kernels.scale_rows[(-(-D // block), -(-N // block_n))](
                x, scale, out, N, *x.stride(), D=D, BLOCK=block, BLOCK_N=block_n
            )
    return out


def train_backward(
    dout: Tensor,
    x: Tensor,
    running_cov: Tensor,
    running_std: Tensor,
    scale: Tensor,
    num_batches_tracked: Tensor | None,
    momentum: float,
    eps: float,
    beta: float,
    bias_correction: bool,
) -> Tensor:
    N, D = x.shape
    plan = _Plan(N, D)
    config, numbers = plan.config, (float(eps), float(beta))
    dx = torch.empty((N, D), dtype=x.dtype, device=x.device)
    partial, features, energies, sums, products = plan.workspace(x, plan.tiles, 8, 1, plan.chunks, 2 * plan.chunks)
    with _on_device_of(x):
        _column_sums(plan, x, sums)
        kernels.column_products[(plan.tiles, plan.chunks)](
            x,
            dout,
            sums,
            products,
            N,
            *x.stride(),
            *dout.stride(),
            plan.chunks,
            plan.rows_per_chunk,
            D=D,
            WIDTH=plan.width,
            BLOCK=config.block,
            BLOCK_N=config.block_n,
        )
        _inspect(plan, running_cov, running_std, num_batches_tracked, partial, features, momentum, bias_correction)
        kernels.backward_features[(plan.tiles,)](
            sums,
            products,
            partial,
            features,
            energies,
            N,
            plan.chunks,
            *numbers,
            **plan.sizes,
            T_POW2=plan.tiles_pow2,
            num_warps=2,
        )
        kernels.gradient[(plan.tiles, plan.row_blocks)](
            dout,
            x,
            running_cov,
            scale,
            features,
            energies,
            dx,
            N,
            *x.stride(),
            *dout.stride(),
            float(momentum),
            *numbers,
            **plan.sizes,
            T_POW2=plan.tiles_pow2,
            BLOCK_N=config.block_n,
            PRECISION=config.precision,
            num_warps=config.warps,
            num_stages=1,  # loads ahead of their use would spill registers on gfx942 and sm_120
        )
    return dx


def _column_sums(plan: _Plan, x: Tensor, sums: Tensor) -> None:
    kernels.column_sums[(plan.tiles, plan.chunks)](
        x,
        sums,
        x.shape[0],
        *x.stride(),
        plan.rows_per_chunk,
        D=x.shape[1],
        WIDTH=plan.width,
        BLOCK=plan.config.block,
        BLOCK_N=plan.config.block_n,
    )


def _inspect(
    plan: _Plan,
    running_cov: Tensor,
    running_std: Tensor,
    num_batches_tracked: Tensor | None,
    partial: Tensor,
    features: Tensor,
    momentum: float,
    bias_correction: bool,
) -> None:
    kernels.inspect_pairs[plan.pairs](
        running_cov,
        running_std,
        num_batches_tracked,
        partial,
        features,
        float(momentum),
        **plan.sizes,
        BIAS_CORRECTION=bias_correction,
        num_warps=plan.config.warps,
    )


def _finish(
    plan: _Plan,
    x: Tensor | None,
    out: Tensor | None,
    saved_scale: Tensor,
    scale: Tensor | None,
    running_std: Tensor | None,
    num_batches_tracked: Tensor | None,
    partial: Tensor,
    features: Tensor,
    energies: Tensor | None,
    eps: float,
    beta: float,
    fused: bool,
) -> None:
    N, strides = (0, (1, 1)) if x is None else (x.shape[0], x.stride())
    kernels.finish[(plan.tiles, max(1, plan.row_blocks))](
        x,
        out,
        saved_scale,
        scale,
        running_std,
        num_batches_tracked,
        partial,
        features,
        energies,
        N,
        *strides,
        float(eps),
        float(beta),
        **plan.sizes,
        T_POW2=plan.tiles_pow2,
        BLOCK_N=plan.config.block_n,
        CHUNK=max(16, _CHUNK_ELEMENTS // plan.tiles_pow2),
        FUSED=fused,
        num_warps=plan.config.warps,
    )
