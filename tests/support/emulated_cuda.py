"""The CUDA kernels on the host: csrc/cuda built with tests/support/emulation in place of CUDA, inside the backend.

``ISOBN_TEST_CUDA=emulated`` makes it a case of `cases.CASES`. The build (some 10 s) is kept, by the content of its
sources, in ``build/`` under the repository.
"""

import ctypes
import hashlib
import os
import shutil
import tempfile
from contextlib import contextmanager

import building
from building import ROOT

from isobn_kernels import backends
from isobn_kernels.backends.cuda import CudaBackend

FLAGS = ["-O2", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-march=native"]
FLAGS += ["-Wall", "-Wno-unknown-pragmas"]
NAMES = {"NVCC": "none", "TARGETS": "emulation", "BUILT": "for tests", "COMMIT": "unknown"}
SOURCES = ["csrc/cuda/cuda.cu", "csrc/cuda/bindings.cpp", "tests/support/emulation/emulation.cpp"]
BUILT_FROM = [
    *(
        path.relative_to(ROOT)
        for folder in ("csrc", "tests/support/emulation")
        for path in sorted((ROOT / folder).rglob("*.*"))
    ),
    "tests/support/building.py",
    "tests/support/emulated_cuda.py",
]
SELECTED = os.environ.get("ISOBN_TEST_CUDA") == "emulated"


def missing():
    """What this machine lacks to build it, in words, or None."""
    reason = building.missing()
    return reason and f"cuda-emulated: {reason}"


def build(sanitize=False, sources=ROOT, folder=None):
    """The path of the extension, built from a copy of the repository unless that was done before."""
    flags = FLAGS + [f'-DISOBN_{key}="{value}"' for key, value in NAMES.items()]
    flags += [f"-I{sources / 'tests/support/emulation'}", *(building.SANITIZE if sanitize else [])]
    return building.build("_cuda", dict.fromkeys(SOURCES, ()), flags, BUILT_FROM, sources, folder)


def load(path):
    """The module, and the emulator's own functions."""
    name = f"emulated_{hashlib.sha256(str(path).encode()).hexdigest()}._cuda"  # pybind11 keeps modules by their names
    module = building.load(path, name)
    emulator = ctypes.CDLL(str(path))
    emulator.isobn_emulation_device.argtypes = [*[ctypes.c_int] * 3, *[ctypes.c_size_t] * 2]
    return module, emulator


class EmulatedBackend(CudaBackend):
    """Takes CPU tensors."""

    device_type = "cpu"

    def machine_reason(self):
        return None

    def processor(self, x):
        return x.get_device(), 0


def install(path):
    """The backend "cuda" runs on the emulator at ``path``. Returns the emulator's functions."""
    extension, emulator = load(path)
    backends.register(EmulatedBackend(extension))
    return emulator


EMULATOR = install(build()) if SELECTED and missing() is None else None


@contextmanager
def descending():
    """Threads and blocks run last first."""
    EMULATOR.isobn_emulation_order(1)
    try:
        yield
    finally:
        EMULATOR.isobn_emulation_order(0)


@contextmanager
def another_device(folder, processors=132, cooperative=True, shared=232448, without_permission=48 << 10):
    """A GPU of so many processors, and so on: a copy of the module, which has planned nothing yet."""
    global EMULATOR
    before = EMULATOR
    copy = shutil.copy(build(), tempfile.mkdtemp(dir=folder))
    EMULATOR = install(copy)
    EMULATOR.isobn_emulation_device(processors, cooperative, 1, shared, without_permission)
    try:
        yield EMULATOR
    finally:
        install(build())
        EMULATOR = before
