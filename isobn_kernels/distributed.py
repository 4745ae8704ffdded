"""A training step whose statistics are those of the batches of all ranks of a `torch.distributed` group.

Two all-reduces, whose sizes do not depend on the batch, so that ranks with uneven batches, or none, always match:

    (n, sum of x)         then the mean over all ranks is known, and every rank centres its rows with it
    y^T y                 (3), whose diagonal is the square of (2)

n stays on the device: which of its rules applies to a batch (nothing is updated below two rows) is decided there. All
ranks end with the same bits, because each computes the same from what was reduced. The equations are those of
`isobn_kernels.reference`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd.function import once_differentiable

from isobn_kernels import backends, reference


def train(rows: Tensor, args: tuple[Any, ...], process_group: Any, stop_gradient: bool) -> Tensor:
    """``isobn(rows, training=True)`` over the ranks of a group; ``args`` as for the op ``train_forward``."""
    args = (*args, process_group.group_name)
    if stop_gradient:
        scale = torch.ops.isobn_kernels.synced_forward(rows.detach(), *args)[0]
        return (rows * scale).to(rows.dtype).contiguous()
    return _ThroughStatistics.apply(rows, *args)[0]


def check_group(process_group: Any) -> None:
    """Raise unless ``process_group`` is None, or a group of `torch.distributed` that this process is a member of."""
    if process_group is None:
        return
    if not dist.is_available() or not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            "process_group must be a torch.distributed.ProcessGroup that this process belongs to, such as "
            f"torch.distributed.group.WORLD after init_process_group(), or None; got {type(process_group).__name__}"
        )


def world() -> Any:
    """The group of all ranks."""
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "there is no process group: call torch.distributed.init_process_group() first, or start the program with "
            "a launcher that does"
        )
    return dist.group.WORLD


class _ThroughStatistics(torch.autograd.Function):
    """``stop_gradient=False``: as in one process on all rows, with the sum of the ranks' losses."""

    @staticmethod
    def forward(rows: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
        running_cov, running_std, _, num_batches_tracked = args[:4]
        scale, sums, s = torch.ops.isobn_kernels.synced_forward(rows, *args)
        count = None if num_batches_tracked is None else num_batches_tracked.clone()
        out = (rows * scale).to(rows.dtype).contiguous()
        return out, running_cov.clone(), running_std.clone(), scale, count, sums, s

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*(tensor for tensor in output[1:] if tensor is not None))
        ctx.save_for_backward(inputs[0], *output[1:])
        ctx.options = inputs[5:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        dx = torch.ops.isobn_kernels.synced_backward(dout, *ctx.saved_tensors, *ctx.options)
        return dx, *[None] * 10


# ---- Registered ops, as in `isobn_kernels.functional`: one node to the compiler, which does not look inside ----

_LIBRARY = torch.library.Library("isobn_kernels", "FRAGMENT")
_OPTIONS = "float momentum, float eps, float beta, bool bias_correction, str backend, str group"
_LIBRARY.define(
    "synced_forward(Tensor x, Tensor(a!) running_cov, Tensor(b!) running_std, Tensor(c!)? scale, "
    f"Tensor(d!)? num_batches_tracked, {_OPTIONS}) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "synced_backward(Tensor dout, Tensor x, Tensor running_cov, Tensor running_std, Tensor scale, "
    f"Tensor? num_batches_tracked, Tensor sums, Tensor s, {_OPTIONS}) -> Tensor"
)


def _forward_here(
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
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The scale of this step, and what its backward needs of the batch: ``(n, sum of x)`` and s, over all ranks."""
    options = (momentum, eps, beta, bias_correction)
    chosen = backends.select(backend, running_std)
    # A recomputation: the first run did the update, and other ranks may not be recomputing.
    if torch._C._current_graph_task_id() != -1:
        if scale is None:
            scale = chosen.compute_scale(running_cov, running_std, num_batches_tracked, *options)
        return scale.clone(), *_no_update(x, running_std)

    ranks = _ranks(group)
    dtype = running_cov.dtype
    parts = _parts(x)
    sums = torch.cat([parts[0].new_full((1,), x.shape[0]), *(part.sum(dim=0) for part in parts)])
    dist.all_reduce(sums, group=ranks)
    n = sums[0]
    with reference.exact_float32_matmul(x):
        B = reference.gram(_centred(parts, sums).to(dtype))
    dist.all_reduce(B, group=ranks)
    B = B / n
    s = B.diagonal().sqrt()
    updated = n >= 2
    C, sigma = reference.updated_statistics(running_cov, running_std, B, s, momentum)
    C = torch.where(updated, C, running_cov)
    sigma = torch.where(updated, sigma, running_std)
    count = None if num_batches_tracked is None else num_batches_tracked + updated
    saved_scale = chosen.compute_scale(C, sigma, count, *options)
    if scale is not None:
        saved_scale = torch.where(updated, saved_scale, scale)
    # Nothing is written before all of it is there: an error leaves the state as it was.
    running_cov.copy_(C)
    running_std.copy_(sigma)
    if scale is not None:
        scale.copy_(saved_scale)
    if num_batches_tracked is not None:
        num_batches_tracked.add_(updated)
    return saved_scale, sums, s


def _backward_here(
    dout: Tensor,
    x: Tensor,
    running_cov: Tensor,
    running_std: Tensor,
    scale: Tensor,
    num_batches_tracked: Tensor | None,
    sums: Tensor,
    s: Tensor,
    momentum: float,
    eps: float,
    beta: float,
    bias_correction: bool,
    backend: str,
    group: str,
) -> Tensor:
    dtype = running_cov.dtype
    g = (dout.to(dtype) * x.to(dtype)).sum(dim=0)
    dist.all_reduce(g, group=_ranks(group))
    n = sums[0]
    y = _centred(_parts(x), sums).to(dtype)
    state = (running_cov, running_std, scale, num_batches_tracked)
    dx = reference.gradient(dout, g, y, s, n, *state, momentum, eps, beta, bias_correction)
    return torch.where(n >= 2, dx, reference.apply_scale(dout, scale))


_LIBRARY.impl("synced_forward", _disable_dynamo(_forward_here), "CompositeExplicitAutograd")
_LIBRARY.impl("synced_backward", _disable_dynamo(_backward_here), "CompositeExplicitAutograd")


@torch.library.register_fake("isobn_kernels::synced_forward", lib=_LIBRARY)
def _(x: Tensor, running_cov: Tensor, running_std: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return running_std.new_empty(running_std.shape), *_no_update(x, running_std)


@torch.library.register_fake("isobn_kernels::synced_backward", lib=_LIBRARY)
def _(dout: Tensor, *_: Any) -> Tensor:
    return dout.new_empty(dout.shape)


def _ranks(group: str) -> Any:
    # An operator takes no group, only its name.
    try:
        return dist.distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type]
    except RuntimeError as error:
        raise RuntimeError(
            f"process_group {group!r} was destroyed: after a new init_process_group(), give the layers a new one with "
            "IsoBN.convert_sync_isobn(model)"
        ) from error


def _no_update(x: Tensor, running_std: Tensor) -> tuple[Tensor, Tensor]:
    """``sums`` and ``s`` of no rows at all."""
    D = running_std.shape[0]
    return x.new_zeros(1 + D * (2 if x.dtype is torch.float64 else 1), dtype=torch.float64), torch.zeros_like(
        running_std
    )


def _parts(x: Tensor) -> list[Tensor]:
    """Float64 tensors that add up to ``x``, of so few bits that their sums over the rows are exact where x is constant.

    So a constant feature has a mean of exactly its value, and y = 0, which (5) relies on. (One process has x_0 to
    subtract; ranks would have to agree on it first.)
    """
    if x.dtype is not torch.float64:
        return [x.double()]
    high = x.float().double()
    return [high, x - high]


def _centred(parts: list[Tensor], sums: Tensor) -> Tensor:
    """(1) with the mean over all ranks."""
    means = (sums[1:] / sums[0]).view(len(parts), -1)
    return sum((part - mean for part, mean in zip(parts[1:], means[1:], strict=True)), start=parts[0] - means[0])
