"""What a backend is: another, faster way to compute the functions of `isobn_kernels.reference`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from isobn_kernels import reference
from isobn_kernels.state import Options, State


class NextState(NamedTuple):
    """The state after a step across ranks, before it is written."""

    covariance: Tensor  # as `Backend.write_state` takes it
    scale_and_std: Tensor  # (2, D)


class Backend(ABC):
    """One way to compute a step. `isobn_kernels.reference` documents the four functions and their equations.

    The arguments are checked before they come here. ``x`` and ``dout`` are (N, D) with any strides.
    """

    name: str

    def unavailable_reason(self) -> str | None:
        """Why this backend cannot run here, or None."""
        return None

    def unsupported_reason(self, x: Tensor) -> str | None:
        """Why this backend cannot take ``x``, or None: the batch, or ``running_std`` (D,) for `compute_scale`."""
        return None

    def too_few_rows(self, x: Tensor) -> bool:
        """Whether a step on ``x`` evaluates and leaves the state as it is: one row has no variance."""
        return x.shape[0] < 2

    @abstractmethod
    def train_forward(self, x: Tensor, state: State, options: Options) -> tuple[Tensor, Tensor]:
        """One training step: ``(out, scale)``, both fresh tensors; updates ``state`` in place."""

    @abstractmethod
    def compute_scale(self, state: State, options: Options) -> Tensor:
        """The scale (D,) that the statistics call for."""

    @abstractmethod
    def apply_scale(self, x: Tensor, scale: Tensor) -> Tensor:
        """``x * scale`` in the dtype of ``x``, contiguous."""

    @abstractmethod
    def train_backward(self, dout: Tensor, x: Tensor, state: State, options: Options) -> Tensor:
        """The gradient of the training step that left ``state``, for ``stop_gradient=False``."""

    # ---- The parts of a step across ranks, which `isobn_kernels.backends.across_ranks` puts together ----

    def column_sums(self, x: Tensor) -> Tensor:
        """The rows of ``x`` and the sums of its columns: what the ranks add up first."""
        return reference.column_sums(x)

    def centred_gram(self, x: Tensor, sums: Tensor, dtype: torch.dtype) -> Tensor:
        """The upper triangle of the Gram matrix, centred with the mean of all ranks: what they add up next."""
        return reference.centred_gram(x, sums, dtype)

    def next_state(self, gram: Tensor, sums: Tensor, state: State, options: Options) -> NextState:
        """The state after a step with the sums of all ranks; ``state`` is only read, ``gram`` may be overwritten.

        The covariance has the bits of `reference.next_statistics`. With fewer than two rows the state is as before.
        """
        _, _, scale, num_batches_tracked = state
        rows = sums[0]
        varies = rows >= 2
        C, sigma = reference.next_statistics(gram, rows, state, options.momentum)
        count = None if num_batches_tracked is None else num_batches_tracked + varies
        next_scale = self.compute_scale(State(C, sigma, None, count), options)
        if scale is not None:
            next_scale = torch.where(varies, next_scale, scale)
        return NextState(C, torch.stack([next_scale, sigma]))

    def write_state(self, state: State, after: NextState, sums: Tensor) -> None:
        """Let ``state`` be what `next_state` made of it; with fewer than two rows it keeps its bits."""
        running_cov, running_std, scale, num_batches_tracked = state
        next_scale, sigma = after.scale_and_std
        varies = sums[0] >= 2
        running_cov.copy_(torch.where(varies, after.covariance, running_cov))
        running_std.copy_(torch.where(varies, sigma, running_std))
        if scale is not None:
            scale.copy_(torch.where(varies, next_scale, scale))
        if num_batches_tracked is not None:
            num_batches_tracked.add_(varies)
