"""The gradients of a training step: through the scale as a constant, or through the statistics it came from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from isobn_kernels import _operators, backends
from isobn_kernels._checks import check_negative_bit, check_tangents
from isobn_kernels._torch_internals import disable_dynamo, is_plain, library, register_autograd, with_tangents
from isobn_kernels.state import Options, State, Where

_NO_FORWARD_MODE = (
    "stop_gradient=False has no forward-mode derivative: use reverse mode (torch.func.vjp, backward), "
    "or stop_gradient=True"
)

# What a Function below calls for its forward: one of `_operators`, directly or as a registered operator.
Forward = Callable[[Tensor, State, Options, Where], tuple[Tensor, ...]]

# Of the five arguments of `Function.apply`.
Gradients: TypeAlias = "tuple[Tensor | None, None, None, None, None]"


class Operator(Protocol):
    """A registered training step."""

    def __call__(self, x: Tensor, /, *rest: _operators.Flat) -> tuple[Tensor, ...]: ...


class _Context(FunctionCtx):
    """What a Function below keeps between its forward and its backward."""

    saved_tensors: tuple[Tensor, ...]
    options: Options
    where: Where


class Train(torch.autograd.Function):
    """The default: ``dx = dout * scale``. Without `setup_context`, which costs 20 us a call."""

    @staticmethod
    def forward(
        ctx: _Context, x: Tensor, step: Forward, state: State, options: Options, where: Where
    ) -> tuple[Tensor, Tensor]:
        out, scale = step(x, state, options, where)
        ctx.mark_non_differentiable(scale)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(scale)
        ctx.where = Where(where.backend)  # the product needs no other rank
        return out, scale

    @staticmethod
    def backward(ctx: _Context, dout: Tensor | None, _: None) -> Gradients:
        if dout is None:
            return None, None, None, None, None
        (scale,) = ctx.saved_tensors
        if torch.is_grad_enabled() or not is_plain(dout):  # to be differentiated again, or fused by a compiler
            dx = (dout * scale).to(dout.dtype)
        else:
            dx = backends.select(ctx.where, dout).apply_scale(dout, scale)
        return dx, None, None, None, None


class TrainThroughStatistics(torch.autograd.Function):
    """``stop_gradient=False``: the backward also needs x, and the statistics as this forward left them."""

    vmap = staticmethod(_operators.refuse_vmap)

    @staticmethod
    def forward(x: Tensor, step: Forward, state: State, options: Options, where: Where) -> tuple[Tensor, ...]:
        return step(x, state, options, where)

    @staticmethod
    def setup_context(
        ctx: _Context, inputs: tuple[Tensor, Forward, State, Options, Where], output: tuple[Tensor, ...]
    ) -> None:
        x, _, _, ctx.options, ctx.where = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *output[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, dout: Tensor | None, *_: None) -> Gradients:
        x, *copy = ctx.saved_tensors
        if dout is None:  # nothing depends on this rank's output, and the other ranks wait for its sums
            dout = torch.zeros_like(x)
        if is_plain(dout, x):
            dx = _operators.train_backward(dout, x, State(*copy), ctx.options, ctx.where)
        else:
            dx = torch.ops.isobn_kernels.train_backward(dout, x, *copy, *ctx.options, *ctx.where)
        return dx, None, None, None, None


class TransformedThroughStatistics(TrainThroughStatistics):
    """The same under `torch.func`: hidden from Dynamo, whose partial compilation autograd would reject."""

    forward = staticmethod(disable_dynamo(TrainThroughStatistics.forward))
    backward = staticmethod(disable_dynamo(TrainThroughStatistics.backward))


_LIBRARY = library("isobn_kernels", "gradients")


def _differentiate(name: str, function: type[torch.autograd.Function]) -> None:
    """Give the operator called ``name`` the gradient of ``function``."""

    def rule(below: Operator, x: Tensor, *rest: _operators.Flat) -> tuple[Tensor, ...]:
        if x is None:
            return below(x, *rest)  # which refuses it
        state, options, where = _operators.bundled(*rest)
        check_tangents(state)
        check_negative_bit(state)
        if with_tangents(("x",), (x,)):
            raise NotImplementedError(_NO_FORWARD_MODE)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return below(x, *rest)

        def step(x: Tensor, state: State, options: Options, where: Where) -> tuple[Tensor, ...]:
            return below(x, *state, *options, *where)

        outputs: tuple[Tensor, ...] = function.apply(x, step, state, options, where)
        return outputs

    register_autograd(_LIBRARY, name, rule)


_differentiate("train_forward", Train)
_differentiate("train_forward_through_statistics", TrainThroughStatistics)


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
    def setup_context(ctx: _Context, inputs: tuple[Tensor], output: Tensor) -> None: ...

    @staticmethod
    def jvp(ctx: _Context, *_: object) -> None:
        raise NotImplementedError(_NO_FORWARD_MODE)
