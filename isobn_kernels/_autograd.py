"""The gradients: through the scale as a constant, or through the statistics it came from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from isobn_kernels import _operators, backends
from isobn_kernels._torch_internals import disable_dynamo, is_plain
from isobn_kernels.state import Options, State


class Train(torch.autograd.Function):
    """The default: ``dx = dout * scale``. Without `setup_context`, which costs 20 us a call."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, state: State, options: Options, where: tuple[str, str]) -> Tensor:
        out, scale = _operators.train_forward(x, *state, *options, *where)
        ctx.save_for_backward(scale)
        ctx.backend = where[0]
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None, None]:
        (scale,) = ctx.saved_tensors
        if torch.is_grad_enabled() or not is_plain(dout):  # to be differentiated again, or fused by a compiler
            return (dout * scale).to(dout.dtype), None, None, None
        return backends.select(ctx.backend, dout).apply_scale(dout, scale), None, None, None


class TrainThroughStatistics(torch.autograd.Function):
    """``stop_gradient=False``: the backward also needs x, and the statistics as this forward left them."""

    vmap = staticmethod(_operators.refuse_vmap)

    @staticmethod
    def forward(x: Tensor, state: State, options: Options, where: tuple[str, str]) -> tuple[Tensor | None, ...]:
        out, scale = _operators.train_forward(x, *state, *options, *where)
        count = None if state.num_batches_tracked is None else state.num_batches_tracked.clone()
        return out, state.running_cov.clone(), state.running_std.clone(), scale, count

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, _, *ctx.rest = inputs
        ctx.mark_non_differentiable(*(copy for copy in output[1:] if copy is not None))
        ctx.save_for_backward(x, *output[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, *_: Any) -> tuple[Tensor, None, None, None]:
        x, *state = ctx.saved_tensors
        options, where = ctx.rest
        return _operators.train_backward(dout, x, *state, *options, *where), None, None, None


class TransformedThroughStatistics(TrainThroughStatistics):
    """The same under `torch.func`: hidden from Dynamo, whose partial compilation autograd would reject."""

    forward = staticmethod(disable_dynamo(TrainThroughStatistics.forward))
    backward = staticmethod(disable_dynamo(TrainThroughStatistics.backward))


def refuse_transforms_without_a_rule(x: Tensor) -> None:
    """Raise before anything is written. `TrainThroughStatistics.jvp` would be too late: it runs after the forward."""
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            "torch.compile of a torch.func transform with stop_gradient=False is not supported: "
            "call it uncompiled, or put the layer into evaluation mode"
        )
    _ForwardModeRefused.apply(x)


class _ForwardModeRefused(torch.autograd.Function):
    vmap = staticmethod(_operators.refuse_vmap)

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.new_empty(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None: ...

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        raise NotImplementedError(
            "stop_gradient=False has no forward-mode derivative: use reverse mode (torch.func.vjp, backward), "
            "or stop_gradient=True"
        )
