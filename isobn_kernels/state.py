"""The bundles that travel together from `isobn` down to a backend."""

from __future__ import annotations

from typing import NamedTuple, cast

from torch import Tensor


class State(NamedTuple):
    """The statistics of one IsoBN layer. A training step updates all four in place."""

    running_cov: Tensor  # (D, D)
    running_std: Tensor  # (D,)
    scale: Tensor | None  # (D,), what evaluation multiplies by
    num_batches_tracked: Tensor | None  # (), int64

    @property
    def stored_scale(self) -> Tensor:
        """``scale`` where it cannot be None: in the copy that a training step makes for its backward."""
        return cast(Tensor, self.scale)


class Options(NamedTuple):
    """The numbers of the equations."""

    momentum: float = 0.05
    eps: float = 1e-3
    beta: float = 0.5
    bias_correction: bool = False


class Where(NamedTuple):
    """Who computes a step, and over which rows."""

    backend: str  # "auto", or the name of a backend
    group: str = ""  # the name of a process group; empty for the rows of this process alone
