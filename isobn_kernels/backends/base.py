"""What a backend is: another, faster way to compute the functions of `isobn_kernels.reference`."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from isobn_kernels.state import Options, State


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
