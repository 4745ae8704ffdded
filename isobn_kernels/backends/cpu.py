"""The C++ kernels for the CPU (csrc/cpu): one fused pass, AVX-512, AVX2 or baseline chosen at run time.

They use the threads of `torch.set_num_threads`, release the GIL and give the same bits at any number of threads. The
environment variable ``ISOBN_CPU_ISA`` ("baseline", "avx2", "avx512"; read at import) forces an instruction set.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isobn_kernels.backends.base import NextState
from isobn_kernels.backends.native import NativeBackend, addresses, note_writes
from isobn_kernels.state import Options, State


class CpuBackend(NativeBackend):
    """The kernels of `isobn_kernels._C`."""

    name = "cpu"

    def unsupported_reason(self, x: Tensor) -> str | None:
        return None if x.device.type == "cpu" else f"x is on {x.device} and it takes CPU tensors only"

    def apply_scale(self, x: Tensor, scale: Tensor) -> Tensor:
        if x.dtype == scale.dtype:  # nothing to convert: PyTorch's product is twice as fast (4096x768: 0.7, not 1.3 ms)
            return (x * scale).contiguous()
        return super().apply_scale(x, scale)

    def column_sums(self, x: Tensor) -> Tensor:
        N, D = x.shape
        sums = torch.empty(1 + (2 if x.dtype is torch.float64 else 1) * D, dtype=torch.float64)
        self.extension.column_sums(
            x.data_ptr(),
            self.dtypes[x.dtype],
            *x.stride(),
            N,
            D,
            sums.data_ptr(),
            *self.processor(x),
        )
        return sums

    def centred_gram(self, x: Tensor, sums: Tensor, dtype: torch.dtype) -> Tensor:
        N, D = x.shape
        gram = torch.empty(D * (D + 1) // 2, dtype=dtype)
        workspace = self._workspace(self.extension.TRAIN_FORWARD, N, D, x)
        self.extension.centred_gram(
            x.data_ptr(),
            self.dtypes[x.dtype],
            *x.stride(),
            N,
            D,
            sums.data_ptr(),
            gram.data_ptr(),
            *self.processor(x),
            workspace.data_ptr(),
        )
        return gram

    def next_state(self, gram: Tensor, sums: Tensor, state: State, options: Options) -> NextState:
        """The covariance is its upper triangle here, in the memory of ``gram``."""
        (D,) = state.running_std.shape
        scale_and_std = torch.empty((2, D), dtype=gram.dtype)
        workspace = self._workspace(self.extension.TRAIN_FORWARD, 0, D, gram)
        self.extension.next_state(
            self.dtypes[gram.dtype],
            D,
            sums.data_ptr(),
            *addresses(state),
            0 if state.scale is None else state.scale.data_ptr(),
            gram.data_ptr(),
            scale_and_std.data_ptr(),
            *options,
            *self.processor(gram),
            workspace.data_ptr(),
        )
        return NextState(gram, scale_and_std)

    def write_state(self, state: State, after: NextState, sums: Tensor) -> None:
        self.extension.write_state(
            self.dtypes[state.running_std.dtype],
            state.running_std.shape[0],
            sums.data_ptr(),
            after.covariance.data_ptr(),
            after.scale_and_std.data_ptr(),
            *addresses(state),
            0 if state.scale is None else state.scale.data_ptr(),
            *self.processor(sums),
        )
        note_writes(state)

    def processor(self, x: Tensor) -> tuple[int, ...]:
        return (torch.get_num_threads(),)

    def _workspace(self, function: int, N: int, D: int, x: Tensor) -> Tensor:
        size = self.extension.workspace_bytes(function, self.dtypes[x.dtype], N, D, torch.get_num_threads())
        return torch.empty(size, dtype=torch.uint8)


def create() -> CpuBackend:
    """The backend of this process."""
    return CpuBackend(*_load())


def _load() -> tuple[Any, str | None]:
    """The extension, or the reason why there is none. torch comes first: the extension shares its OpenMP threads."""
    try:
        from isobn_kernels import _C
    except ImportError as error:
        package = Path(__file__).parent.parent
        if (package.parent / "setup.py").exists():
            remedy = f"This is a source folder, {package.parent}: run pip install -e . in it"
        else:
            remedy = "Reinstall the package from source: pip install --force-reinstall --no-deps FOLDER"
        return None, (
            f"its C++ extension is not here ({error}). {remedy}. "
            "It needs a C++ compiler with OpenMP and Python's headers (Debian: apt install g++ python3-dev)"
        )
    forced = os.environ.get("ISOBN_CPU_ISA")
    if forced:
        try:
            _C.set_instruction_set(forced)
        except ValueError as error:
            reason = f"the environment variable ISOBN_CPU_ISA cannot be followed: {error}"
            warnings.warn(f"the backend 'cpu' is off: {reason}", stacklevel=2)
            return None, reason
    return _C, None
