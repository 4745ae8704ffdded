"""The CUDA C++ kernels for NVIDIA GPUs (csrc/cuda): a training step is one cooperative launch.

They are for batches of up to 128 rows and 2048 features, where launches and not arithmetic take the time: each block of
threads keeps its rows of the covariance in shared memory, and all blocks must fit on the GPU at once (where they do
not, a step is two ordinary launches). Larger ones are left to other backends.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isobn_kernels.state import Options, State

NAME = "cuda"

_DEVICE_TYPE = "cuda"
_DTYPE = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 3}  # DType in csrc/cuda/cuda.h
_TRAIN_FORWARD, _COMPUTE_SCALE, _TRAIN_BACKWARD = range(3)  # Function in csrc/cuda/cuda.h


def _load() -> tuple[Any, str | None]:
    """The extension, or the reason why there is none."""
    try:
        from isobn_kernels import _cuda
    except ImportError as error:
        package = Path(__file__).parent.parent
        source = package.parent if (package.parent / "setup.py").exists() else "FOLDER"
        return None, (
            f"its extension is not here ({error}). It is built where nvcc (CUDA 12 or later) is on the PATH: "
            f"pip install --force-reinstall --no-deps {source}"
        )
    return _cuda, None


_cuda, _REASON = _load()

# The handle of the caller's stream, by the index of the device: without torch.cuda.current_stream's objects, which take
# microseconds. PyTorch built without CUDA has none.
_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0)


def unavailable_reason() -> str | None:
    """Why this backend cannot run here, or None.

    To try a device out initialises CUDA, so that it is left to `unsupported_reason` until something else has done that.
    """
    return _REASON or _machine_reason() or (_devices_reason() if torch.cuda.is_initialized() else None)


@cache
def _machine_reason() -> str | None:
    if not torch.cuda.is_available():
        return f"there is no GPU that torch can use; {_built()}"
    driver, runtime = _cuda.driver_version(), _cuda.runtime_version()
    if driver == 0:
        return f"there is no driver of NVIDIA's; {_built()}"
    if driver // 1000 < runtime // 1000:
        return (
            f"the driver is too old: it supports CUDA {_version(driver)}, and {_built()} of CUDA {_version(runtime)}. "
            "Update the driver, or build with an older nvcc"
        )
    return None


def _devices_reason() -> str | None:
    # A launch makes a context (half a GB), which a GPU that this process never uses must not get: of several,
    # `unsupported_reason` tries the one that the tensor is on.
    return device_reason(0) if torch.cuda.device_count() == 1 else None


_tried: set[int] = set()  # GPUs that a kernel ran on; a failure may pass, as when memory is short


def device_reason(device: int) -> str | None:
    """Why a GPU cannot run these kernels, or None. Tries one that does nothing, once, and waits for it."""
    if device in _tried:
        return None
    failure: str = _cuda.probe(device)
    if not failure:
        _tried.add(device)
        return None
    major, minor = torch.cuda.get_device_capability(device)
    name = torch.cuda.get_device_name(device)
    return f"a kernel does not run on cuda:{device}, {name} of sm_{major}{minor}; {_built()}: {failure}"


def _built() -> str:
    return "this build has code for " + _cuda.build_info()["targets"]


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def unsupported_reason(x: Tensor) -> str | None:
    """Why this backend cannot take ``x``, or None."""
    if x.device.type != _DEVICE_TYPE:
        return f"x is on {x.device} and it takes GPU tensors"
    if x.dtype not in _DTYPE:
        return "x is float64 and it takes float16, bfloat16 and float32: use the backend 'reference'"
    if x.shape[-1] > _cuda.MAX_FEATURES:
        return f"x has {x.shape[-1]} features and it takes at most {_cuda.MAX_FEATURES}: use 'triton' or 'reference'"
    if x.dim() == 2 and x.shape[0] > _cuda.MAX_ROWS:
        return f"x has {x.shape[0]} rows and it takes at most {_cuda.MAX_ROWS}: use the backend 'triton' or 'reference'"
    return device_reason(x.get_device())


def too_few_rows(x: Tensor) -> bool:
    return x.shape[0] < 2


def train_forward(x: Tensor, state: State, options: Options) -> tuple[Tensor, Tensor]:
    running_cov, running_std, scale, num_batches_tracked = state
    momentum, eps, beta, bias_correction = options
    N, D = x.shape
    dtype, device, index = _DTYPE[x.dtype], x.device, x.get_device()
    scale = torch.empty_like(running_std) if scale is None else scale
    out = torch.empty((N, D), dtype=x.dtype, device=device)
    saved_scale = torch.empty_like(running_std)
    workspace = torch.empty(_cuda.workspace_bytes(_TRAIN_FORWARD, D), dtype=torch.uint8, device=device)
    _cuda.train_forward(
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
        index,
        _stream(index),
        workspace.data_ptr(),
    )
    # Autograd must know of the writes it did not see, to refuse a backward that saved one of these.
    written = (running_cov, running_std, scale, num_batches_tracked)
    torch.autograd.graph.increment_version([t for t in written if t is not None and not t.is_inference()])
    return out, saved_scale


def compute_scale(state: State, options: Options) -> Tensor:
    running_cov, running_std, _, num_batches_tracked = state
    momentum, eps, beta, bias_correction = options
    (D,), index = running_std.shape, running_std.get_device()
    scale = torch.empty_like(running_std)
    workspace = torch.empty(_cuda.workspace_bytes(_COMPUTE_SCALE, D), dtype=torch.uint8, device=running_std.device)
    _cuda.compute_scale(
        D,
        running_cov.data_ptr(),
        running_std.data_ptr(),
        0 if num_batches_tracked is None else num_batches_tracked.data_ptr(),
        scale.data_ptr(),
        momentum,
        eps,
        beta,
        bias_correction,
        index,
        _stream(index),
        workspace.data_ptr(),
    )
    return scale


def apply_scale(x: Tensor, scale: Tensor) -> Tensor:
    N, D = x.shape
    index = x.get_device()
    out = torch.empty((N, D), dtype=x.dtype, device=x.device)
    if N > 0:
        _cuda.apply_scale(
            x.data_ptr(),
            _DTYPE[x.dtype],
            *x.stride(),
            N,
            D,
            scale.data_ptr(),
            out.data_ptr(),
            index,
            _stream(index),
        )
    return out


def train_backward(dout: Tensor, x: Tensor, state: State, options: Options) -> Tensor:
    running_cov, running_std, _, num_batches_tracked = state
    momentum, eps, beta, bias_correction = options
    N, D = x.shape
    dtype, device, index = _DTYPE[x.dtype], x.device, x.get_device()
    dx = torch.empty((N, D), dtype=x.dtype, device=device)
    workspace = torch.empty(_cuda.workspace_bytes(_TRAIN_BACKWARD, D), dtype=torch.uint8, device=device)
    _cuda.train_backward(
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
        index,
        _stream(index),
        workspace.data_ptr(),
    )
    return dx
