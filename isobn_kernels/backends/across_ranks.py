"""Statistics across ranks: a training step on the rows of all ranks of a `torch.distributed` group.

The sums over rows go through two all-reduces. Their shapes do not depend on N, and the host reads no value: every rank
makes the same calls, a rank without rows too. After them every rank holds the same sums. C follows from these with one
defined rounding for each operation. Sigma and the scale have roots, powers and sums, which libraries and processors
round differently: the first rank broadcasts its own. All ranks thus hold the same bits, whatever backend or processor
each of them has.
"""

from __future__ import annotations

from typing import Any

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


def across_ranks(backend: Backend, group_name: str) -> Backend:
    """``backend`` on the rows of all ranks of the group: itself where there is one rank."""
    group = group_named(group_name)
    return backend if dist.get_world_size(group) == 1 else AcrossRanks(backend, group)


class AcrossRanks(Backend):
    """A step on the rows of all ranks of a group: two all-reduces between the parts of the step by ``backend``."""

    def __init__(self, backend: Backend, group: dist.ProcessGroup) -> None:
        self.name, self.backend, self.group = backend.name, backend, group

    def compute_scale(self, state: State, options: Options) -> Tensor:
        return self.backend.compute_scale(state, options)

    def apply_scale(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.backend.apply_scale(x, scale)

    def too_few_rows(self, x: Tensor) -> bool:
        return False  # the ranks find out together, in `train_forward`

    def train_forward(self, x: Tensor, state: State, options: Options) -> tuple[Tensor, Tensor]:
        """Equations (1)-(10). With fewer than two rows in all, the state is untouched and the stored scale applied."""
        sums = self._sum(self.backend.column_sums(x))
        gram = self._sum(self.backend.centred_gram(x, sums, state.running_cov.dtype))
        after = self.backend.next_state(gram, sums, state, options)
        dist.broadcast(after.scale_and_std, group=self.group, group_src=0)
        scale = after.scale_and_std[0]
        out = self.backend.apply_scale(x, scale)
        # Compute everything first, then write: if anything raises, the state is unchanged.
        self.backend.write_state(state, after, sums)
        return out, scale

    def train_backward(self, dout: Tensor, x: Tensor, state: State, options: Options) -> Tensor:
        """The gradient of the sum of the ranks' losses.

        The batch's mean and deviations are summed again rather than kept by the forward: one that is repeated inside
        a backward pass does not have them.
        """
        dtype = state.running_cov.dtype
        sums = self._sum(self.backend.column_sums(x))
        rows = sums[0]
        y = reference.centre_about(x, sums, dtype)
        local = torch.stack([(dout.to(dtype) * x.to(dtype)).sum(0), y.square().sum(0)])
        g, squares = self._sum(local)
        through = reference.through_statistics(g, y, reference.deviations(squares, rows), rows, state, options)
        return (dout.to(dtype) * state.stored_scale + torch.where(rows >= 2, through, 0.0)).to(x.dtype).contiguous()

    def _sum(self, fresh: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        dist.all_reduce(fresh, group=self.group)
        return fresh
