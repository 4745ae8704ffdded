"""`isobn`, the functional form: checks its arguments and chooses the way a step is differentiated."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from isobn_kernels import _autograd, _operators, backends
from isobn_kernels._checks import check_arguments, check_negative_bit, check_tangents
from isobn_kernels._torch_internals import is_plain, is_transformed
from isobn_kernels.backends import across_ranks
from isobn_kernels.state import Options, State, Where

# CPU batches of at most this many elements leave product and backward to PyTorch: a Python autograd Function costs more
# than the pass over the batch that it saves (32x768: 194 us with it, 175 us without).
_SMALL = 1 << 17


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
    process_group: dist.ProcessGroup | None = None,
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
    state = State(running_cov, running_std, scale, num_batches_tracked)
    options = Options(momentum, eps, beta, bias_correction)
    backends.check_name(backend)
    check_arguments(x, state, options)
    check_tangents(state)
    if process_group is not None:
        across_ranks.check_group(process_group)
    if not training:
        return _evaluate(x, state, options, backend)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    out = _train(rows, state, options, Where(backend, across_ranks.name_of(process_group)), stop_gradient)
    return out if x.dim() == 2 else out.view(x.shape)


def _evaluate(x: Tensor, state: State, options: Options, backend: str) -> Tensor:
    scale = state.scale
    if scale is None:
        scale = compute_scale(state, options, Where(backend))
    elif torch.is_grad_enabled() and x.requires_grad:
        # The backward needs it, and a later training step overwrites the buffer. AOTAutograd drops a clone and reads
        # the buffer again; it cannot look into an operator. An exported program keeps the clone.
        compiled = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
        scale = torch.ops.isobn_kernels.copy(scale) if compiled else scale.clone()
    return _product(x, scale)


def _product(x: Tensor, scale: Tensor) -> Tensor:
    """(10), differentiable by whatever is active."""
    out = x * scale
    return out if out.dtype is x.dtype else out.to(x.dtype)


def compute_scale(state: State, options: Options, where: Where) -> Tensor:
    """The scale (D,) that the statistics call for; the arguments are checked."""
    if is_plain(*state):
        return _operators.compute_scale(state, options, where)
    scale: Tensor = torch.ops.isobn_kernels.compute_scale(
        state.running_cov, state.running_std, state.num_batches_tracked, *options, *where
    )
    return scale


def _train(x: Tensor, state: State, options: Options, where: Where, stop_gradient: bool) -> Tensor:
    if not is_plain(x, *state):
        return _train_seen(x, state, options, where, stop_gradient)
    if not (torch.is_grad_enabled() and x.requires_grad):
        return _operators.train_forward(x, state, options, where)[0]
    if not stop_gradient:
        step = _operators.train_forward_through_statistics
        return _autograd.TrainThroughStatistics.apply(x, step, state, options, where)[0]
    if x.device.type == "cpu" and x.numel() <= _SMALL:
        scale = _operators.train_forward(x.detach(), state, options, where)[1]
        return _product(x, scale).contiguous()
    return _autograd.Train.apply(x, _operators.train_forward, state, options, where)[0]


def _train_seen(x: Tensor, state: State, options: Options, where: Where, stop_gradient: bool) -> Tensor:
    """A training step that a compiler, tracer, mode or transform has to see, or on tensors other than plain memory."""
    check_negative_bit(state)
    operators = torch.ops.isobn_kernels
    if not is_transformed():
        # Also if x does not require grad: a captured call may be differentiated later.
        operator = operators.train_forward if stop_gradient else operators.train_forward_through_statistics
        return operator(x, *state, *options, *where)[0]
    if stop_gradient:
        scale = operators.train_forward(x.detach(), *state, *options, *where)[1]
        return _product(x, scale).contiguous()
    _autograd.refuse_transforms_without_a_rule(x)
    step = _operators.train_forward_through_statistics
    return _autograd.TransformedThroughStatistics.apply(x, step, state, options, where)[0]
