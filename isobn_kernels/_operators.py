"""What a call does, and the registered operators through which compilers, exporters, tracers and modes see it.

In eager mode the functions of this file are called directly, with arguments that `isobn` has checked. The operators
check theirs: `torch.ops.isobn_kernels` is open to everyone, and a kernel trusts every address. The gradients of the two
training steps belong to the operators (`isobn_kernels._autograd` registers them), so that any graph that holds an
operator is differentiable.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn, ParamSpec, TypeAlias, TypeVar, cast

import torch
from torch import Tensor

from isobn_kernels import backends
from isobn_kernels._checks import check_arguments, check_gradient, check_rows, check_state
from isobn_kernels._torch_internals import define, disable_dynamo, is_recomputation, library
from isobn_kernels.state import Options, State, Where

# ---- What a call does ----


def train_forward(x: Tensor, state: State, options: Options, where: Where) -> tuple[Tensor, Tensor]:
    """One training step: ``(out, scale)``, both fresh tensors."""
    chosen = backends.select(where, x)
    if is_recomputation() or chosen.too_few_rows(x):  # neither is an update
        scale = chosen.compute_scale(state, options) if state.scale is None else state.scale
        return chosen.apply_scale(x, scale), scale.clone()
    return chosen.train_forward(x, state, options)


def train_forward_through_statistics(
    x: Tensor, state: State, options: Options, where: Where
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One training step: ``out``, and a copy of the state as the step left it, which `train_backward` needs.

    The copy is an output of the operator. Made outside, a compiler may move it behind the next step, which overwrites
    the state.
    """
    out, scale = train_forward(x, state, options, where)
    count = state.num_batches_tracked
    count = torch.zeros((), dtype=torch.int64, device=x.device) if count is None else count.clone()
    return out, state.running_cov.clone(), state.running_std.clone(), scale, count


def train_backward(dout: Tensor, x: Tensor, state: State, options: Options, where: Where) -> Tensor:
    """The gradient of the step with ``stop_gradient=False`` that returned ``state``."""
    chosen = backends.select(where, x)
    if chosen.too_few_rows(x):
        return chosen.apply_scale(dout, state.stored_scale)
    return chosen.train_backward(dout, x, state, options)


def compute_scale(state: State, options: Options, where: Where) -> Tensor:
    """The scale (D,) that the statistics call for."""
    return backends.select(where, state.running_std).compute_scale(state, options)


# ---- The operators: the same with checks, and with State, Options and Where as single arguments ----

_LIBRARY = library("isobn_kernels", "functions")
_STATE = "Tensor(a!) running_cov, Tensor(b!) running_std, Tensor(c!)? scale, Tensor(d!)? num_batches_tracked"
# The backward writes to nothing. Inductor believes that it does, and keeps the call on a rank without rows: there the
# result is empty, and a call whose result is not used is removed, all-reduces included.
_COPY = "Tensor running_cov, Tensor running_std, Tensor scale, Tensor(a!)? num_batches_tracked"
_REST = 'float momentum, float eps, float beta, bool bias_correction, str backend, str group=""'


# What the dispatcher passes, after the batch.
Flat: TypeAlias = "Tensor | float | bool | str | None"

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def _register(
    signature: str, check: Callable[_Arguments, None], fake: Callable[_Arguments, _Result]
) -> Callable[[Callable[_Arguments, _Result]], Callable[_Arguments, _Result]]:
    """Register a function as the operator of that signature, behind ``check`` of the same arguments."""
    name = signature.partition("(")[0]

    def checked(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
        def call(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
            check(*args, **kwargs)
            return function(*args, **kwargs)

        return call

    def register(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
        define("isobn_kernels", signature)
        # Where torch.compile falls back to eager it still compiles the functions called inside, and must not.
        _LIBRARY.impl(name, disable_dynamo(checked(function)), "CompositeExplicitAutograd")
        # Of tensors on different devices PyTorch may call the fake one only.
        torch.library.register_fake(f"isobn_kernels::{name}", checked(fake), lib=_LIBRARY)
        return function

    return register


def _check_step(x: Tensor, *rest: Flat) -> None:
    check_rows(x)
    state, options, _ = bundled(*rest)
    check_arguments(x, state, options)


def _check_backward(dout: Tensor, x: Tensor, *rest: Flat) -> None:
    _check_step(x, *rest)
    state, _, _ = bundled(*rest)
    check_gradient(dout, x, state)


def _check_scale(cov: Tensor, std: Tensor, count: Tensor | None, *rest: Flat) -> None:
    state, options, _ = bundled(cov, std, None, count, *rest)
    check_state(state, options)


def _like_step(x: Tensor, *rest: Flat) -> tuple[Tensor, Tensor]:
    state, _, _ = bundled(*rest)
    return x.new_empty(x.shape), state.running_std.new_empty(state.running_std.shape)


def _like_step_through_statistics(x: Tensor, *rest: Flat) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    out, scale = _like_step(x, *rest)
    (cov, std, _, _), _, _ = bundled(*rest)
    return out, cov.new_empty(cov.shape), std.new_empty(std.shape), scale, std.new_empty((), dtype=torch.int64)


def _like_gradient(dout: Tensor, x: Tensor, *rest: Flat) -> Tensor:
    return x.new_empty(x.shape)


def _like_scale(cov: Tensor, std: Tensor, count: Tensor | None, *rest: Flat) -> Tensor:
    return std.new_empty(std.shape)


@_register(f"train_forward(Tensor x, {_STATE}, {_REST}) -> (Tensor, Tensor)", _check_step, _like_step)
def _(x: Tensor, *rest: Flat) -> tuple[Tensor, Tensor]:
    return train_forward(x, *bundled(*rest))


@_register(
    f"train_forward_through_statistics(Tensor x, {_STATE}, {_REST}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _check_step,
    _like_step_through_statistics,
)
def _(x: Tensor, *rest: Flat) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return train_forward_through_statistics(x, *bundled(*rest))


@_register(f"train_backward(Tensor dout, Tensor x, {_COPY}, {_REST}) -> Tensor", _check_backward, _like_gradient)
def _(dout: Tensor, x: Tensor, *rest: Flat) -> Tensor:
    return train_backward(dout, x, *bundled(*rest))


@_register(
    f"compute_scale(Tensor running_cov, Tensor running_std, Tensor? num_batches_tracked, {_REST}) -> Tensor",
    _check_scale,
    _like_scale,
)
def _(cov: Tensor, std: Tensor, count: Tensor | None, *rest: Flat) -> Tensor:
    return compute_scale(*bundled(cov, std, None, count, *rest))


define("isobn_kernels", "copy(Tensor x) -> Tensor")
_LIBRARY.impl("copy", torch.clone, "CompositeExplicitAutograd")
torch.library.register_fake("isobn_kernels::copy", torch.empty_like, lib=_LIBRARY)


def bundled(*flat: Flat) -> tuple[State, Options, Where]:
    """The arguments of an operator after its batch, by name. The dispatcher has checked their types."""
    state = cast("tuple[Tensor, Tensor, Tensor | None, Tensor | None]", flat[:4])
    options = cast("tuple[float, float, float, bool]", flat[4:8])
    where = cast("tuple[str, str]", flat[8:])
    return State(*state), Options(*options), Where(*where)


def refuse_vmap(*_: object) -> NoReturn:
    raise RuntimeError(
        "torch.vmap over a training step of IsoBN is not supported: the step updates statistics in place. "
        "Put the layer into evaluation mode (layer.eval(), or training=False), or write a loop in place of torch.vmap"
    )


for _name in ("train_forward", "train_forward_through_statistics"):
    torch.library.register_vmap(f"isobn_kernels::{_name}", refuse_vmap, lib=_LIBRARY)
