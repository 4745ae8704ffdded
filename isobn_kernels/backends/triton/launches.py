"""The Triton backend: which launches make up each function."""

from __future__ import annotations

import contextlib
import os
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from isobn_kernels.backends.base import Backend
from isobn_kernels.backends.triton.config import Plan, Settings
from isobn_kernels.state import Options, State

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class TritonBackend(Backend):
    """The four functions by ``kernels``; where there are none, ``missing`` says why.

    Kernels that are ``interpreted`` take CPU tensors too.
    """

    name = "triton"

    def __init__(
        self,
        kernels: Any,
        missing: str | None = None,
        settings: Settings | None = None,
        interpreted: bool = INTERPRETED,
    ) -> None:
        self.kernels, self.missing, self.interpreted = kernels, missing, interpreted
        self.settings = Settings() if settings is None else settings
        self._plan = lru_cache(maxsize=4096)(lambda N, D: Plan(N, D, self.settings))

    def unavailable_reason(self) -> str | None:
        if self.missing is not None:
            return self.missing
        if not self.interpreted and not torch.cuda.is_available():
            return "there is no GPU that torch can use (TRITON_INTERPRET=1 runs the kernels on CPU tensors, for tests)"
        return None

    def unsupported_reason(self, x: Tensor) -> str | None:
        if x.dtype == torch.float64:
            return "x is float64 and it takes float16, bfloat16 and float32: use the backend 'reference' or 'cpu'"
        if x.is_cuda or (self.interpreted and x.device.type == "cpu"):
            return None
        return f"x is on {x.device} and it takes GPU tensors"

    def train_forward(self, x: Tensor, state: State, options: Options) -> tuple[Tensor, Tensor]:
        N, D = x.shape
        plan = self._plan(N, D)
        if state.scale is None:
            state = state._replace(scale=torch.empty_like(state.running_std))
        out = torch.empty((N, D), dtype=x.dtype, device=x.device)
        saved_scale = torch.empty_like(state.running_std)
        work = plan.workspace(x, 1 if plan.summed else 0)
        with _on_device_of(x):
            if plan.summed:
                self._column_sums(plan, x, work)
            self.kernels.update_pairs[plan.pairs](
                x,
                state.running_cov,
                state.running_std,
                state.num_batches_tracked,
                work,
                N,
                *x.stride(),
                plan.chunks,
                plan.rows_per_chunk,
                float(options.momentum),
                **plan.sizes,
                BLOCK_N=plan.config.block_n,
                WHOLE=plan.config.block_n >= N,
                SUMMED=plan.summed,
                BIAS_CORRECTION=options.bias_correction,
                PRECISION=plan.config.precision,
                num_warps=plan.config.warps,
            )
            if not plan.fused:
                self.kernels.shrink[plan.grid](
                    work, float(options.eps), float(options.beta), **plan.sizes, T_POW2=plan.tiles_pow2
                )
            written = (state.scale, state.running_std, state.num_batches_tracked)
            self._finish(plan, work, options, saved_scale, x, out, written, plan.fused)
        # Autograd must know of the writes it did not see, to refuse a backward that saved one of these.
        torch.autograd.graph.increment_version([t for t in state if t is not None and not t.is_inference()])
        return out, saved_scale

    def compute_scale(self, state: State, options: Options) -> Tensor:
        plan = self._plan(0, state.running_std.shape[0])
        scale = torch.empty_like(state.running_std)
        work = plan.workspace(scale)
        with _on_device_of(scale):
            self._inspect(plan, work, state, options)
            self._finish(plan, work, options, scale, None, None, (None, None, None), True)
        return scale

    def apply_scale(self, x: Tensor, scale: Tensor) -> Tensor:
        N, D = x.shape
        out = torch.empty((N, D), dtype=x.dtype, device=x.device)
        if N > 0:
            block, block_n = min(256, max(16, 1 << (D - 1).bit_length())), 16
            with _on_device_of(x):
                self.kernels.scale_rows[(-(-N // block_n), -(-D // block))](
                    x, scale, out, N, *x.stride(), D=D, BLOCK=block, BLOCK_N=block_n
                )
        return out

    def train_backward(self, dout: Tensor, x: Tensor, state: State, options: Options) -> Tensor:
        N, D = x.shape
        plan = self._plan(N, D)
        config, eps, beta = plan.config, float(options.eps), float(options.beta)
        warps = config.block // 8  # with fewer, some compilers spill a register
        # NVIDIA's ptxas prefers spilling to losing occupancy, unless it is told how many registers a thread may have:
        # all there are, up to 255. Triton has no such option for AMD, which does not need it.
        limit = {} if torch.version.hip else {"maxnreg": min(255, 65536 // (32 * warps))}
        dx = torch.empty((N, D), dtype=x.dtype, device=x.device)
        work = plan.workspace(x, 3)
        with _on_device_of(x):
            self._column_sums(plan, x, work)
            self.kernels.column_products[plan.chunk_grid](
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
            self._inspect(plan, work, state, options)
            self.kernels.backward_features[plan.grid](
                work, N, plan.chunks, eps, beta, **plan.sizes, T_POW2=plan.tiles_pow2, num_warps=2
            )
            self.kernels.gradient[plan.block_grid](
                dout,
                x,
                state.running_cov,
                state.scale,
                work,
                dx,
                N,
                *x.stride(),
                *dout.stride(),
                float(options.momentum),
                eps,
                beta,
                **plan.sizes,
                T_POW2=plan.tiles_pow2,
                BLOCK_N=config.block_n,
                PRECISION=config.precision,
                num_warps=warps,
                num_stages=1,  # loads ahead of their use would spill registers on gfx942 and sm_120
                **limit,
            )
        return dx

    # ---- Launches that several functions share ----

    def _column_sums(self, plan: Plan, x: Tensor, work: Tensor) -> None:
        self.kernels.column_sums[plan.chunk_grid](
            x,
            work,
            x.shape[0],
            *x.stride(),
            plan.rows_per_chunk,
            **plan.sizes,
            BLOCK_N=plan.config.block_n,
            num_warps=plan.config.warps,
        )

    def _inspect(self, plan: Plan, work: Tensor, state: State, options: Options) -> None:
        self.kernels.inspect_pairs[plan.pairs](
            state.running_cov,
            state.running_std,
            state.num_batches_tracked,
            work,
            float(options.momentum),
            **plan.sizes,
            BIAS_CORRECTION=options.bias_correction,
            num_warps=plan.config.warps,
        )

    def _finish(
        self,
        plan: Plan,
        work: Tensor,
        options: Options,
        saved_scale: Tensor,
        x: Tensor | None,
        out: Tensor | None,
        written: tuple[Tensor | None, Tensor | None, Tensor | None],  # scale, running_std, num_batches_tracked
        fused: bool,
    ) -> None:
        N, strides = (0, (1, 1)) if x is None else (x.shape[0], x.stride())
        self.kernels.finish[plan.block_grid](
            x,
            out,
            saved_scale,
            *written,
            work,
            N,
            *strides,
            float(options.eps),
            float(options.beta),
            **plan.sizes,
            T_POW2=plan.tiles_pow2,
            BLOCK_N=plan.config.block_n,
            CHUNK=plan.features_per_pass,
            FUSED=fused,
            num_warps=plan.config.warps,
        )


def _on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def create() -> TritonBackend:
    """The backend of this process."""
    try:
        from isobn_kernels.backends.triton import kernels
    except ImportError as error:
        return TritonBackend(
            None, f"Triton cannot be imported ({error}): pip install triton (Linux; it comes with torch's CUDA builds)"
        )
    return TritonBackend(kernels)
