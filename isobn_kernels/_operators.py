"""The operators that torch.compile, export, tracers and dispatch modes see; in eager mode they are plain calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from isobn_kernels import backends
from isobn_kernels._torch_internals import disable_dynamo, is_plain, is_recomputation, libraries
from isobn_kernels.state import Options, State

_DEFINITIONS, _LIBRARY = libraries("isobn_kernels")
_OPTIONS = "float momentum, float eps, float beta, bool bias_correction, str backend, str group"


def refuse_vmap(*_: Any) -> None:
    raise RuntimeError(
        "torch.vmap over a training step of IsoBN is not supported: the step updates statistics in place. "
        "Put the layer into evaluation mode (layer.eval(), or training=False), or write a loop in place of torch.vmap"
    )


def _operator(signature: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as an operator. What comes back skips the dispatcher where nothing needs it."""
    name = signature.partition("(")[0]

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        if not hasattr(torch.ops.isobn_kernels, name):
            _DEFINITIONS.define(signature)
        # Where torch.compile falls back to eager it still compiles the functions called inside, and must not.
        _LIBRARY.impl(name, disable_dynamo(function), "CompositeExplicitAutograd")
        torch.library.register_fake(f"isobn_kernels::{name}", fake, lib=_LIBRARY)
        registered = getattr(torch.ops.isobn_kernels, name)

        def call(first: Tensor, second: Tensor, *args: Any) -> Any:
            if torch.compiler.is_compiling() or not (is_plain(first) and is_plain(second)):
                return registered(first, second, *args)
            return function(first, second, *args)

        return call

    return register


@_operator(
    "train_forward(Tensor x, Tensor(a!) running_cov, Tensor(b!) running_std, Tensor(c!)? scale, "
    f"Tensor(d!)? num_batches_tracked, {_OPTIONS}) -> (Tensor, Tensor)",
    fake=lambda x, cov, std, *_: (x.new_empty(x.shape), std.new_empty(std.shape)),
)
def train_forward(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    state, options, (backend, group) = State(*args[:4]), Options(*args[4:8]), args[8:]
    chosen = backends.select(backend, x, group)
    if is_recomputation() or chosen.too_few_rows(x):  # neither is an update
        scale = chosen.compute_scale(state, options) if state.scale is None else state.scale
        return chosen.apply_scale(x, scale), scale.clone()
    return chosen.train_forward(x, state, options)


@_operator(
    "train_backward(Tensor dout, Tensor x, Tensor running_cov, Tensor running_std, Tensor scale, "
    f"Tensor? num_batches_tracked, {_OPTIONS}) -> Tensor",
    fake=lambda dout, x, *_: x.new_empty(x.shape),
)
def train_backward(dout: Tensor, x: Tensor, *args: Any) -> Tensor:
    state, options, (backend, group) = State(*args[:4]), Options(*args[4:8]), args[8:]
    chosen = backends.select(backend, x, group)
    if chosen.too_few_rows(x):
        return chosen.apply_scale(dout, state.scale)
    return chosen.train_backward(dout, x, state, options)


@_operator(
    f"compute_scale(Tensor running_cov, Tensor running_std, Tensor? num_batches_tracked, {_OPTIONS}) -> Tensor",
    fake=lambda cov, std, *_: std.new_empty(std.shape),
)
def compute_scale(running_cov: Tensor, running_std: Tensor, count: Tensor | None, *args: Any) -> Tensor:
    state, options, (backend, group) = State(running_cov, running_std, None, count), Options(*args[:4]), args[4:]
    return backends.select(backend, running_std, group).compute_scale(state, options)


torch.library.register_vmap("isobn_kernels::train_forward", refuse_vmap, lib=_LIBRARY)
