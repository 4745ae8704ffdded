"""What the arguments must be, and what is said when they are not.

A check runs in every call. The order of the comparisons is the order of the messages; a message is made only if its
comparison fails.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from isobn_kernels._torch_internals import with_tangents
from isobn_kernels.state import Options, State

_STATE_DTYPE = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}

_NUMBER = (int, float)


def check_hyperparameters(momentum: float, eps: float, beta: float) -> None:
    if not (isinstance(momentum, _NUMBER) and isinstance(eps, _NUMBER) and isinstance(beta, _NUMBER)):
        for name, value in (("momentum", momentum), ("eps", eps), ("beta", beta)):
            if not isinstance(value, _NUMBER):
                raise TypeError(f"{name} must be a float, got {type(value).__name__}")
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum must be in [0, 1], got {momentum}")
    if not 0 < eps < math.inf:
        raise ValueError(f"eps must be a finite number above 0, got {eps}")
    if not 0 <= beta < math.inf:
        raise ValueError(f"beta must be a finite number, 0 or above, got {beta}")


def check_arguments(x: Tensor, state: State, options: Options) -> None:
    """Raise unless a step with these arguments can be computed, for ``x`` (..., D)."""
    _check_dense("x", x)
    state_dtype = _STATE_DTYPE.get(x.dtype)
    if state_dtype is None:
        raise TypeError(f"x must be float16, bfloat16, float32 or float64, got {x.dtype}")
    D = _num_features(state)
    if x.dim() == 0 or x.shape[-1] != D:
        raise ValueError(f"x must have shape (..., {D}), as running_std has {D} features, got {tuple(x.shape)}")
    _check_options(options, state)
    _check_statistics(state, D, state_dtype, "x", x)


def check_state(state: State, options: Options) -> None:
    """Raise unless the scale can be computed from the state, where there is no batch."""
    D = _num_features(state)
    std = state.running_std
    if std.dtype is not torch.float32 and std.dtype is not torch.float64:
        raise TypeError(f"running_std must be float32 or float64, got {std.dtype}")
    _check_options(options, state)
    _check_statistics(state, D, std.dtype, "running_std", std)


def check_tangents(state: State) -> None:
    """Raise if a statistic carries a tangent. For use outside of the operators: PyTorch hides tangents inside."""
    for name in with_tangents(State._fields, state):
        raise ValueError(f"{name} must not carry a forward-mode tangent: training overwrites this statistic")


def check_negative_bit(state: State) -> None:
    """Raise if a statistic to be written is the negative of its memory. PyTorch cannot have an operator write to one.

    For use outside of the operators, which get a copy. A compiler cannot look at the bit.
    """
    if torch.compiler.is_compiling():
        return
    for name, tensor in zip(State._fields, state, strict=True):
        if tensor is not None and tensor.is_neg():
            raise ValueError(f"{name} must not have the negative bit (is_neg()): use resolve_neg()")


def check_rows(x: Tensor) -> None:
    """Raise unless ``x`` is (N, D), as an operator takes it."""
    _check_dense("x", x)
    if x.dim() != 2:
        raise ValueError(f"x must have shape (N, D), got {tuple(x.shape)}")


def check_gradient(dout: Tensor, x: Tensor, state: State) -> None:
    """Raise unless ``dout`` is a gradient for ``x``, and the state what a forward returned: with a scale."""
    _check_dense("dout", dout)
    _check_dense("scale", state.stored_scale)
    if dout.shape != x.shape:
        raise ValueError(f"dout must have the shape of x, {tuple(x.shape)}, got {tuple(dout.shape)}")
    if dout.dtype != x.dtype:
        raise TypeError(f"dout must have the dtype of x, {x.dtype}, got {dout.dtype}")
    if dout.device != x.device:
        raise ValueError(f"dout must be on the device of x, {x.device}, got {dout.device}")


def _num_features(state: State) -> int:
    std = state.running_std
    _check_dense("running_std", std)
    if std.dim() != 1 or std.shape[0] == 0:
        raise ValueError(
            f"running_std must have shape (num_features,), num_features at least 1, got {tuple(std.shape)}"
        )
    return std.shape[0]


def _check_options(options: Options, state: State) -> None:
    momentum, eps, beta, bias_correction = options
    check_hyperparameters(momentum, eps, beta)
    if bias_correction and state.num_batches_tracked is None:
        raise ValueError("bias_correction=True needs num_batches_tracked, the () int64 tensor that counts updates")


def _check_statistics(state: State, D: int, dtype: torch.dtype, source: str, given: Tensor) -> None:
    """Raise unless the statistics are of D features, of ``dtype`` and on the device of ``given``, called ``source``."""
    cov, std, scale, count = state
    device = given.device
    _check_statistic("running_cov", cov, (D, D), dtype, device, source, given)
    _check_statistic("running_std", std, (D,), dtype, device, source, given)
    if scale is not None:
        _check_statistic("scale", scale, (D,), dtype, device, source, given)
    if count is not None:
        _check_statistic("num_batches_tracked", count, (), torch.int64, device, source, given)


def _check_statistic(
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    source: str,
    given: Tensor,
) -> None:
    if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
        _check_dense(name, tensor)
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    if tensor.dtype is not dtype:
        because = "" if dtype is torch.int64 else f" for {source} in {given.dtype}"
        in_double = source == "x" and given.dtype is torch.float64
        hint = ": module.double() makes the statistics float64" if in_double else ""
        raise TypeError(f"{name} must be {dtype}{because}, got {tensor.dtype}{hint}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on the device of {source}, {device}, got {tensor.device}")
    if tensor.requires_grad:
        raise ValueError(f"{name} must not require grad: it is a statistic that training overwrites")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")


def _check_dense(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} must be dense (layout torch.strided), got layout {tensor.layout}: use to_dense()")
