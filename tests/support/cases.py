"""The backends under test. A new backend is one line of `CASES`; every test then runs on it."""

import contextlib
import os
from typing import NamedTuple

import emulated_cuda
import pytest
import torch

from isobn_kernels import backends, functional

_ISA_NAMES = {"baseline": "the baseline instructions", "avx2": "AVX2 and FMA", "avx512": "AVX-512"}


class Case(NamedTuple):
    """A backend, the device its tensors live on and, for the CPU kernels, the instruction set to run them with.

    A case that is ``large`` takes, whatever the batch, the path that large batches take through autograd.
    """

    name: str
    backend: str
    device: str = "cpu"
    isa: str | None = None
    large: bool = False

    def missing(self):
        """What this machine lacks to run the case, in words, or None."""
        reason = backends.load(self.backend).unavailable_reason()
        if reason is not None:
            return f"{self.name}: {reason}"
        if self.isa is not None and self.isa not in kernels().instruction_sets():
            return f"{self.name}: this processor lacks {_ISA_NAMES[self.isa]}"
        return None

    @contextlib.contextmanager
    def selected(self):
        """The case's instruction set and path are in use inside; those before it afterwards."""
        small, before = functional._SMALL, self.isa and kernels().instruction_set()
        if self.large:
            functional._SMALL = -1
        if self.isa:
            kernels().set_instruction_set(self.isa)
            assert kernels().instruction_set() == self.isa
        try:
            yield self
        finally:
            functional._SMALL = small
            if self.isa:
                kernels().set_instruction_set(before)


CASES = [
    Case("reference", "reference", large=True),
    Case("cpu-baseline", "cpu", isa="baseline"),
    Case("cpu-avx2", "cpu", isa="avx2", large=True),
    Case("cpu-avx512", "cpu", isa="avx512"),
]
# The GPU kernels, interpreted or emulated, each in a session of its own: it is chosen before the first import.
if os.environ.get("TRITON_INTERPRET") == "1":
    CASES.append(Case("triton-interpreted", "triton", large=True))
elif emulated_cuda.SELECTED:
    CASES.append(Case("cuda-emulated", "cuda", large=True))
elif torch.cuda.is_available():
    CASES += [Case(f"{name}-gpu", name, device="cuda", large=True) for name in ("triton", "cuda")]
REFERENCE = CASES[0]


def kernels():
    """The compiled extension; only where the cpu backend is available."""
    from isobn_kernels import _C

    return _C


def skip_unless_available(case):
    if reason := case.missing():
        pytest.skip(reason)
