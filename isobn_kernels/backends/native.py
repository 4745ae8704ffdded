"""What the two compiled backends share: `isobn_kernels.backends.cpu` and `isobn_kernels.backends.cuda`.

Their extensions take addresses, sizes and strides; the stubs `_C.pyi` and `_cuda.pyi` name the arguments. They are
passed by position here: by name a call of `train_forward` takes 3.5 us in place of 2.5.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from isobn_kernels.backends.base import Backend
from isobn_kernels.state import Options, State


def note_writes(state: State) -> None:
    """Tell autograd of writes it did not see: it refuses a backward that saved one of these tensors."""
    torch.autograd.graph.increment_version([t for t in state if t is not None and not t.is_inference()])


class NativeBackend(Backend):
    """The four functions by those of ``extension``; where there is none, ``missing`` says why."""

    def __init__(self, extension: Any, missing: str | None = None) -> None:
        self.extension, self.missing = extension, missing
        numbers: dict[str, int] = {} if extension is None else extension.DTYPES
        self.dtypes = {getattr(torch, name): number for name, number in numbers.items()}

    def unavailable_reason(self) -> str | None:
        return self.missing

    @abstractmethod
    def processor(self, x: Tensor) -> tuple[int, ...]:
        """Threads, or a device and a stream: the arguments of every function that say what it runs on."""

    @abstractmethod
    def _workspace(self, function: int, N: int, D: int, x: Tensor) -> Tensor:
        """The memory that a function of the extension needs besides its results."""

    def train_forward(self, x: Tensor, state: State, options: Options) -> tuple[Tensor, Tensor]:
        N, D = x.shape
        scale = torch.empty_like(state.running_std) if state.scale is None else state.scale
        out = torch.empty((N, D), dtype=x.dtype, device=x.device)
        saved_scale = torch.empty_like(scale)
        workspace = self._workspace(self.extension.TRAIN_FORWARD, N, D, x)
        self.extension.train_forward(
            x.data_ptr(),
            self.dtypes[x.dtype],
            *x.stride(),
            N,
            D,
            *addresses(state),
            scale.data_ptr(),
            saved_scale.data_ptr(),
            out.data_ptr(),
            *options,
            *self.processor(x),
            workspace.data_ptr(),
        )
        note_writes(state)
        return out, saved_scale

    def compute_scale(self, state: State, options: Options) -> Tensor:
        scale = torch.empty_like(state.running_std)
        (D,) = scale.shape
        workspace = self._workspace(self.extension.COMPUTE_SCALE, 0, D, scale)
        self.extension.compute_scale(
            self.dtypes[scale.dtype],
            D,
            *addresses(state),
            scale.data_ptr(),
            *options,
            *self.processor(scale),
            workspace.data_ptr(),
        )
        return scale

    def apply_scale(self, x: Tensor, scale: Tensor) -> Tensor:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if x.shape[0] > 0:
            self.extension.apply_scale(
                x.data_ptr(),
                self.dtypes[x.dtype],
                *x.stride(),
                *x.shape,
                scale.data_ptr(),
                out.data_ptr(),
                *self.processor(x),
            )
        return out

    def train_backward(self, dout: Tensor, x: Tensor, state: State, options: Options) -> Tensor:
        N, D = x.shape
        dx = torch.empty((N, D), dtype=x.dtype, device=x.device)
        workspace = self._workspace(self.extension.TRAIN_BACKWARD, N, D, x)
        self.extension.train_backward(
            dout.data_ptr(),
            *dout.stride(),
            x.data_ptr(),
            self.dtypes[x.dtype],
            *x.stride(),
            N,
            D,
            *addresses(state),
            state.stored_scale.data_ptr(),
            dx.data_ptr(),
            *options,
            *self.processor(x),
            workspace.data_ptr(),
        )
        return dx


def addresses(state: State) -> tuple[int, int, int]:
    """running_cov, running_std and num_batches_tracked, where 0 stands for None."""
    count = state.num_batches_tracked
    return state.running_cov.data_ptr(), state.running_std.data_ptr(), 0 if count is None else count.data_ptr()
