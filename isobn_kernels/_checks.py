"""What the arguments must be, and what is said when they are not."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_STATE_DTYPE = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}


def check_hyperparameters(momentum: float, eps: float, beta: float) -> None:
    for name, value in (("momentum", momentum), ("eps", eps), ("beta", beta)):
        if not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a float, got {type(value).__name__}")
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum must be in [0, 1], got {momentum}")
    if not 0 < eps < math.inf:
        raise ValueError(f"eps must be a finite number above 0, got {eps}")
    if not 0 <= beta < math.inf:
        raise ValueError(f"beta must be a finite number, 0 or above, got {beta}")


def check_tensors(
    x: Tensor,
    running_cov: Tensor,
    running_std: Tensor,
    scale: Tensor | None,
    num_batches_tracked: Tensor | None,
) -> None:
    given = {"x": x, "running_cov": running_cov, "running_std": running_std}
    if scale is not None:
        given["scale"] = scale
    if num_batches_tracked is not None:
        given["num_batches_tracked"] = num_batches_tracked
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.layout is not torch.strided:
            raise TypeError(f"{name} must be dense (layout torch.strided), got layout {tensor.layout}: use to_dense()")
    state_dtype = _STATE_DTYPE.get(x.dtype)
    if state_dtype is None:
        raise TypeError(f"x must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if running_std.dim() != 1 or running_std.shape[0] == 0:
        raise ValueError(
            f"running_std must have shape (num_features,), num_features at least 1, got {tuple(running_std.shape)}"
        )
    D = running_std.shape[0]
    if x.dim() == 0 or x.shape[-1] != D:
        raise ValueError(f"x must have shape (..., {D}), as running_std has {D} features, got {tuple(x.shape)}")
    vector = ((D,), state_dtype)
    expected = {"running_cov": ((D, D), state_dtype), "running_std": vector, "scale": vector}
    expected["num_batches_tracked"] = ((), torch.int64)
    del given["x"]
    for name, tensor in given.items():
        shape, dtype = expected[name]
        if tensor.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
        if tensor.dtype != dtype:
            because = "" if dtype is torch.int64 else f" for x in {x.dtype}"
            hint = ": module.double() makes the statistics float64" if x.dtype is torch.float64 else ""
            raise TypeError(f"{name} must be {dtype}{because}, got {tensor.dtype}{hint}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {tensor.device}")
        if tensor.requires_grad:
            raise ValueError(f"{name} must not require grad: it is a statistic that training overwrites")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
