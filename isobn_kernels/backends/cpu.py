"""The C++ kernels for the CPU (csrc/cpu): one fused pass, AVX-512, AVX2 or baseline chosen at run time.

They use the threads of `torch.set_num_threads`, release the GIL and give the same bits at any number of threads. The
environment variable ``ISOBN_CPU_ISA`` ("baseline", "avx2", "avx512"; read at import) forces an instruction set.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isobn_kernels.state import Options, State

NAME = "cpu"

_DTYPE = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}  # DType in csrc/cpu/kernels.h
_TRAIN_FORWARD, _COMPUTE_SCALE, _TRAIN_BACKWARD = range(3)  # Function in csrc/cpu/cpu.h


def _load() -> tuple[Any, str | None]:
    """The extension, or the reason why there is none. torch comes first: the extension shares its OpenMP threads."""
    try:
        from isobn_kernels import _C
    except ImportError as error:
        package = Path(__file__).parent.parent
        if (package.parent / "setup.py").exists():
            remedy = f"This is a source folder, {package.parent}: run pip install -e . in it"
        else:
            remedy = "Reinstall the package from source: pip install --force-reinstall --no-deps FOLDER"
        return None, (
            f"its C++ extension is not here ({error}). {remedy}. "
            "It needs a C++ compiler with OpenMP and Python's headers (Debian: apt install g++ python3-dev)"
        )
    forced = os.environ.get("ISOBN_CPU_ISA")
    if forced:
        try:
            _C.set_instruction_set(forced)
        except ValueError as error:
            reason = f"the environment variable ISOBN_CPU_ISA cannot be followed: {error}"
            warnings.warn(f"the backend 'cpu' is off: {reason}", stacklevel=2)
            return None, reason
    return _C, None


_C, _REASON = _load()


def unavailable_reason() -> str | None:
    """Why this backend cannot run here, or None."""
    return _REASON


def unsupported_reason(x: Tensor) -> str | None:
    """Why this backend cannot take ``x``, or None."""
    return None if x.device.type == "cpu" else f"x is on {x.device} and it takes CPU tensors only"


def too_few_rows(x: Tensor) -> bool:
    return x.shape[0] < 2


def train_forward(x: Tensor, state: State, options: Options) -> tuple[Tensor, Tensor]:
    running_cov, running_std, scale, num_batches_tracked = state
    momentum, eps, beta, bias_correction = options
    N, D = x.shape
    dtype, threads = _DTYPE[x.dtype], torch.get_num_threads()
    scale = torch.empty_like(running_std) if scale is None else scale
    out = torch.empty((N, D), dtype=x.dtype)
    saved_scale = torch.empty_like(running_std)
    workspace = torch.empty(_C.workspace_bytes(_TRAIN_FORWARD, dtype, N, D, threads), dtype=torch.uint8)
    _C.train_forward(
        x.data_ptr(),
        dtype,
        *x.stride(),
        N,
        D,
        running_cov.data_ptr(),
        running_std.data_ptr(),
        0 if num_batches_tracked is None else num_batches_tracked.data_ptr(),
        scale.data_ptr(),
        saved_scale.data_ptr(),
        out.data_ptr(),
        momentum,
        eps,
        beta,
        bias_correction,
        threads,
        workspace.data_ptr(),
    )
    # Autograd must know of the writes it did not see, to refuse a backward that saved one of these.
    written = (running_cov, running_std, scale, num_batches_tracked)
    torch.autograd.graph.increment_version([t for t in written if t is not None and not t.is_inference()])
    return out, saved_scale


def compute_scale(state: State, options: Options) -> Tensor:
    running_cov, running_std, _, num_batches_tracked = state
    momentum, eps, beta, bias_correction = options
    dtype, threads, (D,) = _DTYPE[running_std.dtype], torch.get_num_threads(), running_std.shape
    scale = torch.empty_like(running_std)
    workspace = torch.empty(_C.workspace_bytes(_COMPUTE_SCALE, dtype, 0, D, threads), dtype=torch.uint8)
    _C.compute_scale(
        dtype,
        D,
        running_cov.data_ptr(),
        running_std.data_ptr(),
        0 if num_batches_tracked is None else num_batches_tracked.data_ptr(),
        scale.data_ptr(),
        momentum,
        eps,
        beta,
        bias_correction,
        threads,
        workspace.data_ptr(),
    )
    return scale


def apply_scale(x: Tensor, scale: Tensor) -> Tensor:
    if x.dtype == scale.dtype:  # nothing to convert: PyTorch's own product is twice as fast (4096x768: 0.7, not 1.3 ms)
        return (x * scale).contiguous()
    out = torch.empty(x.shape, dtype=x.dtype)
    threads = torch.get_num_threads()
    _C.apply_scale(x.data_ptr(), _DTYPE[x.dtype], *x.stride(), *x.shape, scale.data_ptr(), out.data_ptr(), threads)
    return out


def train_backward(dout: Tensor, x: Tensor, state: State, options: Options) -> Tensor:
    running_cov, running_std, _, num_batches_tracked = state
    momentum, eps, beta, bias_correction = options
    N, D = x.shape
    dtype, threads = _DTYPE[x.dtype], torch.get_num_threads()
    dx = torch.empty((N, D), dtype=x.dtype)
    workspace = torch.empty(_C.workspace_bytes(_TRAIN_BACKWARD, dtype, N, D, threads), dtype=torch.uint8)
    _C.train_backward(
        dout.data_ptr(),
        *dout.stride(),
        x.data_ptr(),
        dtype,
        *x.stride(),
        N,
        D,
        running_cov.data_ptr(),
        running_std.data_ptr(),
        0 if num_batches_tracked is None else num_batches_tracked.data_ptr(),
        state.stored_scale.data_ptr(),
        dx.data_ptr(),
        momentum,
        eps,
        beta,
        bias_correction,
        threads,
        workspace.data_ptr(),
    )
    return dx
