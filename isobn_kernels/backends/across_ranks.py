"""Statistics across ranks: a training step on the rows of all ranks of a `torch.distributed` group.

The equations are those of `isobn_kernels.reference`; only its sums over rows go through all-reduces here. Their shapes
do not depend on N and nothing depends on a value that the host would have to read, so that every rank makes the same
calls, one without rows too. After them every rank holds the same numbers and does the same with them: the state stays
bit-identical.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from isobn_kernels import reference
from isobn_kernels._torch_internals import group_named
from isobn_kernels.backends.base import Backend
from isobn_kernels.state import Options, State


def check_group(process_group: Any) -> None:
    """Raise unless ``process_group`` is a group of ranks."""
    _check_available()
    if not isinstance(process_group, dist.ProcessGroup):
        # What new_group gives to a rank that is not in the group: a number.
        is_outside = isinstance(process_group, int) and process_group == dist.GroupMember.NON_GROUP_MEMBER
        outside = ": this rank does not belong to the group" if is_outside else ""
        raise TypeError(
            "process_group must be a torch.distributed.ProcessGroup, such as torch.distributed.group.WORLD, or None, "
            f"got {type(process_group).__name__}{outside}"
        )


def check_alive(process_group: dist.ProcessGroup) -> None:
    """Raise where ``process_group`` has been destroyed: a call on what is left of it may answer, or hang."""
    try:
        dist.get_backend(process_group)
    except ValueError as error:
        raise RuntimeError(
            "process_group has been destroyed: set it to a group that init_process_group or new_group has made since, "
            "or to None"
        ) from error


def name_of(process_group: dist.ProcessGroup | None) -> str:
    """The name under which an operator takes the group; empty for none."""
    if process_group is None:
        return ""
    if not torch.compiler.is_compiling():
        check_alive(process_group)
    return process_group.group_name


def world() -> dist.ProcessGroup:
    """The group of all ranks."""
    _check_available()
    if dist.group.WORLD is None:
        raise RuntimeError("there is no process group yet: call torch.distributed.init_process_group first")
    return dist.group.WORLD


def _check_available() -> None:
    if not dist.is_available():
        raise RuntimeError("process_group needs torch.distributed, which this build of PyTorch lacks")


class AcrossRanks(Backend):
    """A backend on the rows of all ranks of a group: two all-reduces around the equations, the scale by ``backend``."""

    def __init__(self, backend: Backend, group_name: str) -> None:
        self.name, self.backend, self.group = backend.name, backend, group_named(group_name)

    def compute_scale(self, state: State, options: Options) -> Tensor:
        return self.backend.compute_scale(state, options)

    def apply_scale(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.backend.apply_scale(x, scale)

    def too_few_rows(self, x: Tensor) -> bool:
        return False  # the ranks find out together, in `train_forward`

    def train_forward(self, x: Tensor, state: State, options: Options) -> tuple[Tensor, Tensor]:
        """Equations (1)-(10). With fewer than two rows in all, the state is untouched and the stored scale applied."""
        running_cov, running_std, scale, num_batches_tracked = state
        n, y = _centre(x, running_cov.dtype, self.group)
        with reference.exact_float32_matmul(x):
            products = reference.gram(y)
        B = _sum_over_ranks(products, self.group) / n  # (3)
        s = B.diagonal().sqrt()  # (2)
        varies = n >= 2
        C, sigma = reference.moving_averages(running_cov, running_std, B, s, options.momentum)
        C, sigma = torch.where(varies, C, running_cov), torch.where(varies, sigma, running_std)
        count = None if num_batches_tracked is None else num_batches_tracked + varies
        saved_scale = self.backend.compute_scale(State(C, sigma, None, count), options)
        if scale is not None:
            saved_scale = torch.where(varies, saved_scale, scale)
        out = reference.apply_scale(x, saved_scale)
        # Compute everything first, then write: if anything raises, the state is unchanged.
        running_cov.copy_(C)
        running_std.copy_(sigma)
        if scale is not None:
            scale.copy_(saved_scale)
        if num_batches_tracked is not None:
            num_batches_tracked.add_(varies)
        return out, saved_scale

    def train_backward(self, dout: Tensor, x: Tensor, state: State, options: Options) -> Tensor:
        """The gradient of the sum of the ranks' losses.

        The batch's mean and deviations are summed again rather than kept by the forward: one that is repeated inside
        a backward pass does not have them.
        """
        dtype = state.running_cov.dtype
        n, y = _centre(x, dtype, self.group)
        sums = torch.stack([(dout.to(dtype) * x.to(dtype)).sum(0), y.square().sum(0)])
        g, squares = _sum_over_ranks(sums, self.group)
        through = reference.through_statistics(g, y, (squares / n).sqrt(), n, state, options)
        return (dout.to(dtype) * state.stored_scale + torch.where(n >= 2, through, 0.0)).to(x.dtype).contiguous()


def _centre(x: Tensor, dtype: torch.dtype, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """(1): rows of all ranks, a () tensor, and this rank's rows of ``y`` in ``dtype``.

    In float64 the sum of a constant feature of lower precision is exact, so that its ``y`` is exactly 0, as in
    `reference.centre`; there is no row 0 that all ranks know.
    """
    parts = [x.double()]
    if x.dtype is torch.float64:
        # The same for float64: a number is the sum of two of half the digits.
        high = (x.view(torch.int64) & (-1 << 27)).view(torch.float64)
        parts = [high, x - high]
    rows = torch.full((1,), x.shape[0], dtype=torch.float64, device=x.device)
    total = _sum_over_ranks(torch.cat([rows, *(part.sum(0) for part in parts)]), group)
    n, means = total[0], (total[1:] / total[0]).view(len(parts), -1)
    y = sum(part - mean for part, mean in zip(parts, means, strict=True))
    return n, cast(Tensor, y).to(dtype)


def _sum_over_ranks(fresh: Tensor, group: dist.ProcessGroup) -> Tensor:
    dist.all_reduce(fresh, group=group)
    return fresh
