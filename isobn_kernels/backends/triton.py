"""The Triton kernels for GPUs: which launches make up each function, and with what block sizes.

Under ``TRITON_INTERPRET=1`` (set before the first import) the same kernels run on CPU tensors, slowly, for tests.
"""

from __future__ import annotations

import contextlib
import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from isobn_kernels.backends.base import Backend
from isobn_kernels.state import Options, State

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


# (largest N, largest D) -> Config; the first row that fits. Chosen from the compiled code (python -m benchmarks aot: no
# spills, 128-bit accesses) and not yet tuned on a GPU; `python -m benchmarks tune` measures candidates and prints it.
_ANY = 1 << 62
TABLE: tuple[tuple[int, int, Config], ...] = (
    (16, 512, Config(32, 16, 2, "ieee")),
    (16, _ANY, Config(64, 16, 4, "ieee")),
    (_ANY, 512, Config(32, 32, 4, "ieee")),
    (_ANY, _ANY, Config(64, 32, 8, "ieee")),
)
ONE_PASS_ROWS = 128  # up to here a program sums the columns of its own panels, which saves a launch
FUSED_FEATURES = 2048  # up to here every program of `finish` adds up all features itself, which saves a launch
_CHUNK_ELEMENTS = 16384  # of the sums that it adds at a time
_MAX_CHUNKS = 64  # row chunks of a column sum


def config_for(N: int, D: int) -> Config:
    """The first row of the table that fits."""
    for most_n, most_d, config in TABLE:
        if most_n >= N and most_d >= D:
            return config
    raise AssertionError("the last row takes any shape")


class _Plan:
    """Tiles, grids and size of the workspace of a call: what follows from the shape of the batch."""

    def __init__(self, N: int, D: int, config: Config) -> None:
        self.config = config
        block, block_n = config.block, config.block_n
        tiles = -(-D // block)
        self.width = tiles * block
        self.sizes = {"D": D, "T": tiles, "WIDTH": self.width, "BLOCK": block}
        self.tiles_pow2 = max(2, 1 << (tiles - 1).bit_length())
        # Rows in at most _MAX_CHUNKS chunks of whole blocks.
        self.rows_per_chunk = -(-N // (_MAX_CHUNKS * block_n)) * block_n
        self.chunks = -(-N // self.rows_per_chunk) if N else 0
        self.grid, self.pairs, self.chunk_grid = (tiles,), ((tiles + 1) // 2, tiles + 1), (tiles, self.chunks)
        self.block_grid = (max(1, -(-N // block_n)), tiles)
        # partial, features and energies; sums and products are only there where a function has them.
        self.rows = tiles + 9

    def workspace(self, like: Tensor, chunk_rows: int = 0) -> Tensor:
        """The float32 workspace that `triton_kernels` describes, with so many rows for each chunk."""
        size = (self.rows + chunk_rows * self.chunks) * self.width
        return torch.empty(size, dtype=torch.float32, device=like.device)


_cached_plan = lru_cache(maxsize=4096)(_Plan)


def _plan(N: int, D: int) -> _Plan:
    return _cached_plan(N, D, config_for(N, D))


def _on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


class TritonBackend(Backend):
    """The kernels of `isobn_kernels.backends.triton_kernels`."""

    name = "triton"

    def unavailable_reason(self) -> str | None:
        """Why this backend cannot run here, or None."""
        if _MISSING is not None:
            return _MISSING
        if not INTERPRETED and not torch.cuda.is_available():
            return "there is no GPU that torch can use (TRITON_INTERPRET=1 runs the kernels on CPU tensors, for tests)"
        return None

    def unsupported_reason(self, x: Tensor) -> str | None:
        """Why this backend cannot take ``x``, or None."""
        if x.dtype == torch.float64:
            return "x is float64 and it takes float16, bfloat16 and float32: use the backend 'reference' or 'cpu'"
        if x.is_cuda or (INTERPRETED and x.device.type == "cpu"):
            return None
        return f"x is on {x.device} and it takes GPU tensors"

    def train_forward(self, x: Tensor, state: State, options: Options) -> tuple[Tensor, Tensor]:
        running_cov, running_std, scale, num_batches_tracked = state
        momentum, eps, beta, bias_correction = options
        N, D = x.shape
        plan, (row_stride, col_stride) = _plan(N, D), x.stride()
        config, fused, summed = plan.config, D <= FUSED_FEATURES, N > ONE_PASS_ROWS
        scale = torch.empty_like(running_std) if scale is None else scale
        out = torch.empty((N, D), dtype=x.dtype, device=x.device)
        saved_scale = torch.empty_like(running_std)
        work = plan.workspace(x, 1 if summed else 0)
        with _on_device_of(x):
            if summed:
                _column_sums(plan, x, work)
            kernels.update_pairs[plan.pairs](
                x,
                running_cov,
                running_std,
                num_batches_tracked,
                work,
                N,
                row_stride,
                col_stride,
                plan.chunks,
                plan.rows_per_chunk,
                float(momentum),
                **plan.sizes,
                BLOCK_N=config.block_n,
                WHOLE=config.block_n >= N,
                SUMMED=summed,
                BIAS_CORRECTION=bias_correction,
                PRECISION=config.precision,
                num_warps=plan.config.warps,
            )
            if not fused:
                kernels.shrink[plan.grid](work, float(eps), float(beta), **plan.sizes, T_POW2=plan.tiles_pow2)
            _finish(plan, x, out, saved_scale, scale, running_std, num_batches_tracked, work, eps, beta, fused)
        written = (running_cov, running_std, scale, num_batches_tracked)
        torch.autograd.graph.increment_version([t for t in written if t is not None and not t.is_inference()])
        return out, saved_scale

    def compute_scale(self, state: State, options: Options) -> Tensor:
        running_cov, running_std, _, num_batches_tracked = state
        momentum, eps, beta, bias_correction = options
        plan = _plan(0, running_std.shape[0])
        scale = torch.empty_like(running_std)
        work = plan.workspace(running_std)
        with _on_device_of(running_std):
            _inspect(plan, running_cov, running_std, num_batches_tracked, work, momentum, bias_correction)
            _finish(plan, None, None, scale, None, None, None, work, eps, beta, True)
        return scale

    def apply_scale(self, x: Tensor, scale: Tensor) -> Tensor:
        N, D = x.shape
        out = torch.empty((N, D), dtype=x.dtype, device=x.device)
        if N > 0:
            block, block_n = min(256, max(16, 1 << (D - 1).bit_length())), 16
            with _on_device_of(x):
                kernels.scale_rows[(-(-N // block_n), -(-D // block))](
                    x, scale, out, N, *x.stride(), D=D, BLOCK=block, BLOCK_N=block_n
                )
        return out

    def train_backward(self, dout: Tensor, x: Tensor, state: State, options: Options) -> Tensor:
        running_cov, running_std, scale, num_batches_tracked = state
        momentum, eps, beta, bias_correction = options
        N, D = x.shape
        plan = _plan(N, D)
        config, numbers = plan.config, (float(eps), float(beta))
        warps = config.block // 8  # with fewer, some compilers spill a register
        # NVIDIA's ptxas prefers spilling to losing occupancy, unless it is told how many registers a thread may have:
        # all there are, up to 255. Triton has no such option for AMD, which does not need it.
        limit = {} if torch.version.hip else {"maxnreg": min(255, 65536 // (32 * warps))}
        dx = torch.empty((N, D), dtype=x.dtype, device=x.device)
        work = plan.workspace(x, 3)
        with _on_device_of(x):
            _column_sums(plan, x, work)
            kernels.column_products[plan.chunk_grid](
                x,
                dout,
                work,
                N,
                *x.stride(),
                *dout.stride(),
                plan.chunks,
                plan.rows_per_chunk,
                **plan.sizes,
                BLOCK_N=config.block_n,
                num_warps=warps,
            )
            _inspect(plan, running_cov, running_std, num_batches_tracked, work, momentum, bias_correction)
            kernels.backward_features[plan.grid](
                work,
                N,
                plan.chunks,
                *numbers,
                **plan.sizes,
                T_POW2=plan.tiles_pow2,
                num_warps=2,
            )
            kernels.gradient[plan.block_grid](
                dout,
                x,
                running_cov,
                scale,
                work,
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
                num_warps=warps,
                num_stages=1,  # loads ahead of their use would spill registers on gfx942 and sm_120
                **limit,
            )
        return dx


create = TritonBackend


def _column_sums(plan: _Plan, x: Tensor, work: Tensor) -> None:
    kernels.column_sums[plan.chunk_grid](
        x,
        work,
        x.shape[0],
        *x.stride(),
        plan.rows_per_chunk,
        **plan.sizes,
        BLOCK_N=plan.config.block_n,
        num_warps=plan.config.warps,
    )


def _inspect(
    plan: _Plan,
    running_cov: Tensor,
    running_std: Tensor,
    num_batches_tracked: Tensor | None,
    work: Tensor,
    momentum: float,
    bias_correction: bool,
) -> None:
    kernels.inspect_pairs[plan.pairs](
        running_cov,
        running_std,
        num_batches_tracked,
        work,
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
    work: Tensor,
    eps: float,
    beta: float,
    fused: bool,
) -> None:
    N, strides = (0, (1, 1)) if x is None else (x.shape[0], x.stride())
    kernels.finish[plan.block_grid](
        x,
        out,
        saved_scale,
        scale,
        running_std,
        num_batches_tracked,
        work,
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
