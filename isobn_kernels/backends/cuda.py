"""The CUDA C++ kernels for NVIDIA GPUs (csrc/cuda): a training step is one cooperative launch.

They are for batches of up to 128 rows and 2048 features, where launches and not arithmetic take the time: each block of
threads keeps its rows of the covariance in shared memory, and all blocks must fit on the GPU at once (where they do
not, a step is two ordinary launches). Larger ones are left to other backends.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isobn_kernels.backends.native import NativeBackend

# The handle of the caller's stream, by the index of the device: without torch.cuda.current_stream's objects, which take
# microseconds. PyTorch built without CUDA has none.
_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0)


class CudaBackend(NativeBackend):
    """The kernels of `isobn_kernels._cuda`."""

    name = "cuda"
    device_type = "cuda"

    def __init__(self, extension: Any, missing: str | None = None) -> None:
        super().__init__(extension, missing)
        self._tried: set[int] = set()  # GPUs that a kernel ran on; a failure may pass, as when memory is short

    def unavailable_reason(self) -> str | None:
        """Why this backend cannot run here, or None.

        Trying a device initialises CUDA. It is left to `unsupported_reason` unless something else has initialised it.
        """
        return self.missing or self._machine_reason or (self._devices_reason() if torch.cuda.is_initialized() else None)

    @cached_property
    def _machine_reason(self) -> str | None:
        return self.machine_reason()

    def machine_reason(self) -> str | None:
        """Why no GPU of this machine can run these kernels, or None."""
        if not torch.cuda.is_available():
            return f"there is no GPU that torch can use; {self._built()}"
        driver, runtime = self.extension.driver_version(), self.extension.runtime_version()
        if driver == 0:
            return f"there is no NVIDIA driver; {self._built()}"
        if driver // 1000 < runtime // 1000:
            return (
                f"the driver is too old: it supports CUDA {_version(driver)}, and {self._built()} of CUDA "
                f"{_version(runtime)}. Update the driver, or build with an older nvcc"
            )
        return None

    def _devices_reason(self) -> str | None:
        # A launch makes a context (half a GB), which a GPU that this process never uses must not get. Of several GPUs
        # `unsupported_reason` tries the one that the tensor is on.
        return self.device_reason(0) if torch.cuda.device_count() == 1 else None

    def device_reason(self, device: int) -> str | None:
        """Why a GPU cannot run these kernels, or None. Tries one that does nothing, once, and waits for it."""
        if device in self._tried:
            return None
        failure: str = self.extension.probe(device)
        if not failure:
            self._tried.add(device)
            return None
        major, minor = torch.cuda.get_device_capability(device)
        name = torch.cuda.get_device_name(device)
        return f"a kernel does not run on cuda:{device}, {name} of sm_{major}{minor}; {self._built()}: {failure}"

    def _built(self) -> str:
        return "this build has code for " + self.extension.build_info()["targets"]

    def unsupported_reason(self, x: Tensor) -> str | None:
        if x.device.type != self.device_type:
            return f"x is on {x.device} and it takes GPU tensors"
        if x.dtype == torch.float64:
            return "x is float64 and it takes float16, bfloat16 and float32: use the backend 'reference'"
        most = self.extension.MAX_FEATURES
        if x.shape[-1] > most:
            return f"x has {x.shape[-1]} features and it takes at most {most}: use 'triton' or 'reference'"
        most = self.extension.MAX_ROWS
        if x.dim() == 2 and x.shape[0] > most:
            return f"x has {x.shape[0]} rows and it takes at most {most}: use the backend 'triton' or 'reference'"
        return self.device_reason(x.get_device())

    def processor(self, x: Tensor) -> tuple[int, ...]:
        device = x.get_device()
        return device, _stream(device)

    def _workspace(self, function: int, N: int, D: int, x: Tensor) -> Tensor:
        return torch.empty(self.extension.workspace_bytes(function, D), dtype=torch.uint8, device=x.device)


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def create() -> CudaBackend:
    """The backend of this process."""
    return CudaBackend(*_load())


def _load() -> tuple[Any, str | None]:
    """The extension, or the reason why there is none."""
    try:
        from isobn_kernels import _cuda
    except ImportError as error:
        package = Path(__file__).parent.parent
        source = package.parent if (package.parent / "setup.py").exists() else "FOLDER"
        return None, (
            f"its extension is not here ({error}). It is built where nvcc (CUDA 12 or later) is on the PATH: "
            f"pip install --force-reinstall --no-deps {source}"
        )
    return _cuda, None
