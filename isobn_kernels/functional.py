"""`isobn`: argument checks -> autograd.Function -> registered op -> backend."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # torch.compiler.disable would import the compiler here and now
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from isobn_kernels import backends, distributed

# Up to so many elements, on a CPU, the default mode leaves its output and backward to plain PyTorch, as it does under a
# function transform: a Python autograd Function costs more than the multiplication it saves (32x768: 194 -> 175 us).
_SMALL = 1 << 17

_STATE_DTYPE = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}


def isobn(
    x: Tensor,
    running_cov: Tensor,
    running_std: Tensor,
    *,
    training: bool = False,
    momentum: float = 0.05,
    eps: float = 1e-3,
    beta: float = 0.5,
    backend: str = "auto",
    scale: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    bias_correction: bool = False,
    stop_gradient: bool = True,
    process_group: Any = None,
) -> Tensor:
    """Isotropic batch normalization, in the manner of `torch.nn.functional.batch_norm`.

    In training the statistics are updated in place with the batch and ``x`` is multiplied by the scale that the
    updated statistics call for. In evaluation ``x`` is multiplied by ``scale`` or, where that is None, by the scale
    computed from the statistics as they are. A training batch of fewer than two rows updates nothing, and neither
    does a forward that runs inside a backward pass (activation checkpointing repeats the forward there); both
    evaluate instead.

    Args:
        x: (..., num_features), float16, bfloat16, float32 or float64; any strides.
        running_cov: (num_features, num_features) moving average of the batch covariance; float32, or float64 for
            float64 ``x``. Contiguous. Its upper triangle is authoritative; an update writes both.
        running_std: (num_features,) moving average of the batch deviation; dtype of ``running_cov``.
        training: update the statistics with this batch.
        momentum: weight of the batch in the moving averages, in [0, 1].
        eps: added before the power and to the scaled variance; above 0.
        beta: strength of the correction; 0 is none, 0.5 is the paper's.
        backend: "auto", or a name from `available_backends`.
        scale: (num_features,) buffer that training writes and evaluation applies; dtype of ``running_cov``.
        num_batches_tracked: () int64 counter of updates, incremented in training.
        bias_correction: divide the statistics by ``1 - (1 - momentum) ** num_batches_tracked``, as Adam does.
        stop_gradient: treat the scale as a constant in the backward, as the paper does. With False, gradients flow
            through the batch statistics too; that backward is differentiable once.
        process_group: a `torch.distributed.ProcessGroup`: statistics over the rows of all its ranks, by two
            all-reduces a training step. Every rank must take part in each, one with an empty batch too; with
            ``stop_gradient=False`` in each backward as well. None is this process alone.

    Returns:
        A tensor of the shape and dtype of ``x``.

    Raises:
        TypeError: a dtype is not one of the above, or dtypes do not go together.
        ValueError: a shape, device, layout or number is not as above. The statistics are untouched.
        RuntimeError: ``backend`` names one that cannot run here or cannot take ``x``; `torch.vmap` maps over a
            training step; or ``process_group`` has been destroyed.
        NotImplementedError: ``stop_gradient=False`` in forward-mode differentiation.

    Example:
        >>> import torch
        >>> from isobn_kernels import isobn
        >>> running_cov, running_std = torch.zeros(8, 8), torch.zeros(8)
        >>> x = torch.randn(32, 8)
        >>> isobn(x, running_cov, running_std, training=True).shape
        torch.Size([32, 8])
        >>> torch.allclose(running_std, 0.05 * x.std(0, correction=0))
        True

    Source: equations (1)-(10) of `isobn_kernels.reference`; Zhou, Lin and Ren, https://arxiv.org/abs/2005.02178.
    """
    _check_hyperparameters(momentum, eps, beta)
    backends.check_name(backend)
    _check_tensors(x, running_cov, running_std, scale, num_batches_tracked)
    if bias_correction and num_batches_tracked is None:
        raise ValueError("bias_correction=True needs num_batches_tracked, the () int64 tensor that counts updates")
    if process_group is not None:
        distributed.check_group(process_group)

    if not training:
        if scale is None:
            scale = _compute_scale(
                running_cov, running_std, num_batches_tracked, momentum, eps, beta, bias_correction, backend
            )
        elif torch.is_grad_enabled() and x.requires_grad:
            scale = scale.clone()  # the backward needs it, and a later training step overwrites the buffer
        return (x * scale).to(x.dtype)

    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    args = (running_cov, running_std, scale, num_batches_tracked, momentum, eps, beta, bias_correction, backend)
    if process_group is not None:
        out = _train_across_ranks(rows, args, process_group, stop_gradient)
        return out if x.dim() == 2 else out.view(x.shape)
    transformed = _is_transformed()
    needs_grad = transformed or (torch.is_grad_enabled() and x.requires_grad)
    if needs_grad and not stop_gradient:
        if transformed:
            _refuse_transforms_without_a_rule(rows)
        function = _TransformedThroughStatistics if transformed else _TrainThroughStatistics
        out = function.apply(rows, *args)[0]
    elif transformed or (needs_grad and _is_small(x)):
        out = (rows * _train_forward(rows.detach(), *args)[1]).to(x.dtype).contiguous()
    elif needs_grad:
        out = _Train.apply(rows, args)
    else:
        out = _train_forward(rows, *args)[0]
    return out if x.dim() == 2 else out.view(x.shape)


def _train_across_ranks(x: Tensor, args: tuple[Any, ...], group: Any, stop_gradient: bool) -> Tensor:
    if not torch.compiler.is_compiling():
        distributed.check_alive(group)
    args = (*args, group.group_name)
    if stop_gradient or not (_is_transformed() or (torch.is_grad_enabled() and x.requires_grad)):
        scale = torch.ops.isobn_kernels.train_forward_across_ranks(x.detach(), *args)
        return (x * scale).to(x.dtype).contiguous()
    if _is_transformed():
        _refuse_transforms_without_a_rule(x)
    return _AcrossRanksThroughStatistics.apply(x, *args)[0]


class _Train(torch.autograd.Function):
    """The default: ``dx = dout * scale``.

    Without `setup_context` and with one tuple for all but x: measured on a CPU, that is 6 instead of 29 us a call.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, args: tuple[Any, ...]) -> Tensor:
        out, saved_scale = _train_forward(x, *args)
        ctx.save_for_backward(saved_scale)
        ctx.backend = args[-1]
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
        (saved_scale,) = ctx.saved_tensors
        return _apply_scale(dout, saved_scale, ctx.backend), None


def _refuse_vmap(*_: Any) -> None:
    raise RuntimeError(
        "torch.vmap over a training step of IsoBN is not supported: the step updates statistics in place. "
        "Put the layer into evaluation mode (layer.eval(), or training=False), or write a loop in place of torch.vmap"
    )


class _TrainThroughStatistics(torch.autograd.Function):
    """``stop_gradient=False``: the backward also needs x and the statistics as this forward left them."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor | None, ...]:
        _, running_cov, running_std, _, num_batches_tracked = args[:5]
        out, saved_scale = _train_forward(*args)
        count = None if num_batches_tracked is None else num_batches_tracked.clone()
        return out, saved_scale, running_cov.clone(), running_std.clone(), count

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        copies = output[1:]
        ctx.mark_non_differentiable(*(copy for copy in copies if copy is not None))
        ctx.save_for_backward(inputs[0], *copies)
        ctx.options = inputs[5:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, scale, running_cov, running_std, count = ctx.saved_tensors
        if x.shape[0] < 2:
            dx = _apply_scale(dout, scale, ctx.options[-1])
        else:
            dx = _train_backward(dout, x, running_cov, running_std, scale, count, *ctx.options)
        return dx, *[None] * 9


def _refuse_transforms_without_a_rule(x: Tensor) -> None:
    """What `_TrainThroughStatistics` cannot do. It could not refuse ``jvp`` itself: that comes after its forward."""
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            "torch.compile of a torch.func transform with stop_gradient=False is not supported: "
            "call it uncompiled, or put the layer into evaluation mode"
        )
    _ForwardModeRefused.apply(x)


class _ForwardModeRefused(torch.autograd.Function):
    vmap = staticmethod(_refuse_vmap)

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


class _TransformedThroughStatistics(_TrainThroughStatistics):
    """The same under `torch.func`.

    Where torch.compile has given up on the transform it still compiles what is called inside, piece by piece: of
    these two it makes what autograd then refuses.
    """

    vmap = staticmethod(_refuse_vmap)
    forward = staticmethod(_disable_dynamo(_TrainThroughStatistics.forward))
    backward = staticmethod(_disable_dynamo(_TrainThroughStatistics.backward))


class _AcrossRanksThroughStatistics(torch.autograd.Function):
    """`_TrainThroughStatistics` for a process group."""

    vmap = staticmethod(_refuse_vmap)
    setup_context = staticmethod(_TrainThroughStatistics.setup_context)

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor | None, ...]:
        x, running_cov, running_std, _, num_batches_tracked = args[:5]
        scale = torch.ops.isobn_kernels.train_forward_across_ranks(*args)
        count = None if num_batches_tracked is None else num_batches_tracked.clone()
        return (x * scale).to(x.dtype).contiguous(), scale, running_cov.clone(), running_std.clone(), count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, scale, running_cov, running_std, count = ctx.saved_tensors
        statistics = (running_cov, running_std, scale, count)
        dx = torch.ops.isobn_kernels.train_backward_across_ranks(dout, x, *statistics, *ctx.options)
        return dx, *[None] * 10


# ---- Registered ops: what torch.compile, export, tracing and dispatch modes see ----

_LIBRARY = torch.library.Library("isobn_kernels", "DEF")
_OPTIONS = "float momentum, float eps, float beta, bool bias_correction, str backend"
_LIBRARY.define(
    "train_forward(Tensor x, Tensor(a!) running_cov, Tensor(b!) running_std, Tensor(c!)? scale, "
    f"Tensor(d!)? num_batches_tracked, {_OPTIONS}) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    f"compute_scale(Tensor running_cov, Tensor running_std, Tensor? num_batches_tracked, {_OPTIONS}) -> Tensor"
)
_LIBRARY.define(
    "train_backward(Tensor dout, Tensor x, Tensor running_cov, Tensor running_std, Tensor scale, "
    f"Tensor? num_batches_tracked, {_OPTIONS}) -> Tensor"
)

_LIBRARY.define(
    "train_forward_across_ranks(Tensor x, Tensor(a!) running_cov, Tensor(b!) running_std, Tensor(c!)? scale, "
    f"Tensor(d!)? num_batches_tracked, {_OPTIONS}, str group) -> Tensor"
)
_LIBRARY.define(
    "train_backward_across_ranks(Tensor dout, Tensor x, Tensor running_cov, Tensor running_std, Tensor scale, "
    f"Tensor? num_batches_tracked, {_OPTIONS}, str group) -> Tensor"
)


def _train_forward_here(
    x: Tensor,
    running_cov: Tensor,
    running_std: Tensor,
    scale: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float,
    eps: float,
    beta: float,
    bias_correction: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    chosen = backends.select(backend, x)
    options = (momentum, eps, beta, bias_correction)
    # One row has no variance. A forward inside a backward pass is a recomputation, whose first run did the update.
    if x.shape[0] < 2 or torch._C._current_graph_task_id() != -1:
        if scale is None:
            scale = chosen.compute_scale(running_cov, running_std, num_batches_tracked, *options)
        return chosen.apply_scale(x, scale), scale.clone()
    if scale is None:
        scale = torch.empty_like(running_std)
    return chosen.train_forward(x, running_cov, running_std, scale, num_batches_tracked, *options)


def _compute_scale_here(
    running_cov: Tensor, running_std: Tensor, num_batches_tracked: Tensor | None, *options: Any
) -> Tensor:
    *numbers, backend = options
    return backends.select(backend, running_std).compute_scale(running_cov, running_std, num_batches_tracked, *numbers)


def _train_backward_here(dout: Tensor, x: Tensor, *rest: Any) -> Tensor:
    *args, backend = rest
    return backends.select(backend, x).train_backward(dout, x, *args)


def _train_forward_across_ranks_here(
    x: Tensor, running_cov: Tensor, running_std: Tensor, scale: Tensor | None, count: Tensor | None, *options: Any
) -> Tensor:
    *numbers, backend, group = options
    if torch._C._current_graph_task_id() != -1:  # a recomputation, whose first run did the update
        if scale is not None:
            return scale.clone()
        return _compute_scale_here(running_cov, running_std, count, *numbers, backend)
    chosen = backends.select(backend, x)
    state = (running_cov, running_std, scale, count)
    return distributed.train_forward(x, *state, *numbers, backend=chosen, group=distributed.named(group))


def _train_backward_across_ranks_here(dout: Tensor, x: Tensor, *rest: Any) -> Tensor:
    *args, _, group = rest
    return distributed.train_backward(dout, x, *args, group=distributed.named(group))


# Where torch.compile has given up on a function it still compiles what is called inside: kernels are not for it.
_LIBRARY.impl("train_forward", _disable_dynamo(_train_forward_here), "CompositeExplicitAutograd")
_LIBRARY.impl("compute_scale", _disable_dynamo(_compute_scale_here), "CompositeExplicitAutograd")
_LIBRARY.impl("train_backward", _disable_dynamo(_train_backward_here), "CompositeExplicitAutograd")
for _name, _function in (
    ("train_forward_across_ranks", _train_forward_across_ranks_here),
    ("train_backward_across_ranks", _train_backward_across_ranks_here),
):
    _LIBRARY.impl(_name, _disable_dynamo(_function), "CompositeExplicitAutograd")


@torch.library.register_fake("isobn_kernels::train_forward", lib=_LIBRARY)
def _(x: Tensor, running_cov: Tensor, running_std: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), running_std.new_empty(running_std.shape)


@torch.library.register_fake("isobn_kernels::compute_scale", lib=_LIBRARY)
def _(running_cov: Tensor, running_std: Tensor, *_: Any) -> Tensor:
    return running_std.new_empty(running_std.shape)


@torch.library.register_fake("isobn_kernels::train_forward_across_ranks", lib=_LIBRARY)
def _(x: Tensor, running_cov: Tensor, running_std: Tensor, *_: Any) -> Tensor:
    return running_std.new_empty(running_std.shape)


@torch.library.register_fake("isobn_kernels::train_backward_across_ranks", lib=_LIBRARY)
@torch.library.register_fake("isobn_kernels::train_backward", lib=_LIBRARY)
def _(dout: Tensor, x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


torch.library.register_vmap("isobn_kernels::train_forward", _refuse_vmap, lib=_LIBRARY)
torch.library.register_vmap("isobn_kernels::train_forward_across_ranks", _refuse_vmap, lib=_LIBRARY)


def _train_forward(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    run = _train_forward_here if _is_plain(x) else torch.ops.isobn_kernels.train_forward
    return run(x, *args)


def _compute_scale(running_cov: Tensor, *args: Any) -> Tensor:
    run = _compute_scale_here if _is_plain(running_cov) else torch.ops.isobn_kernels.compute_scale
    return run(running_cov, *args)


def _train_backward(dout: Tensor, x: Tensor, *args: Any) -> Tensor:
    run = _train_backward_here if _is_plain(dout) and _is_plain(x) else torch.ops.isobn_kernels.train_backward
    return run(dout, x, *args)


def _apply_scale(dout: Tensor, scale: Tensor, backend: str) -> Tensor:
    # Plain PyTorch where the result may be differentiated again, or fused by a compiler.
    if torch.is_grad_enabled() or not _is_plain(dout):
        return (dout * scale).to(dout.dtype)
    return backends.select(backend, dout).apply_scale(dout, scale)


def _is_transformed() -> bool:
    """Whether a `torch.func` transform or forward-mode differentiation is under way, while compiling too.

    The compiler does not tell: to it, x.requires_grad is False under `torch.func.grad`.
    """
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def _is_small(x: Tensor) -> bool:
    # Not when compiling: the graph would be specialised to one side of the limit.
    return not torch.compiler.is_compiling() and x.device.type == "cpu" and x.numel() <= _SMALL


def _is_plain(x: Tensor) -> bool:
    """Whether a backend may be called on ``x`` directly: an ordinary tensor in memory, and nobody is watching.

    The dispatcher costs several microseconds a call. It is needed where something other than a kernel wants the
    call (a compiler, a tracer, a mode, a transform) or where the tensor's values are not what lies at its address.
    """
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and x.layout is torch.strided
        and not x.is_meta
        and torch._C._has_storage(x)
        and not x.is_neg()
        and not x._is_zerotensor()
        and not _is_transformed()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and torch._C._get_tracing_state() is None
    )


# ---- Argument checks ----


def _check_hyperparameters(momentum: float, eps: float, beta: float) -> None:
    for name, value in (("momentum", momentum), ("eps", eps), ("beta", beta)):
        if not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a float, got {type(value).__name__}")
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum must be in [0, 1], got {momentum}")
    if not 0 < eps < math.inf:
        raise ValueError(f"eps must be a finite number above 0, got {eps}")
    if not 0 <= beta < math.inf:
        raise ValueError(f"beta must be a finite number, 0 or above, got {beta}")


def _check_tensors(
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
