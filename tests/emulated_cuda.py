"""The CUDA kernels on the host: builds csrc/cuda with tests/emulation in place of CUDA, and puts it into the backend.

``ISOBN_TEST_CUDA=emulated`` makes it a case of `cases.CASES`. The build (some 10 s) is kept, by the content of its
sources, in ``build/`` under the repository.
"""

import ctypes
import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = [ROOT / "csrc/cuda/cuda.cu", ROOT / "csrc/cuda/bindings.cpp", ROOT / "tests/emulation/emulation.cpp"]
BUILT_FROM = [
    *(path for folder in ("csrc/cuda", "tests/emulation") for path in sorted((ROOT / folder).iterdir())),
    ROOT / "csrc/formulas.h",
    Path(__file__),
]
SELECTED = os.environ.get("ISOBN_TEST_CUDA") == "emulated"
FLAGS = ["-O2", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-march=native"]
SANITIZE = ["-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
NAMES = {"NVCC": "none", "TARGETS": "emulation", "BUILT": "for tests", "COMMIT": "unknown"}


def missing():
    """What this machine lacks to build it, in words, or None."""
    if shutil.which("g++") is None:
        return "cuda-emulated: g++ is not installed"
    if importlib.util.find_spec("pybind11") is None:
        return "cuda-emulated: pybind11 is not installed"
    return None


def build(sanitize=False, sources=ROOT, folder=None):
    """The path of the extension, built from ``sources`` unless that was done before."""
    import pybind11

    flags = FLAGS + (SANITIZE if sanitize else [])
    digest = hashlib.sha256(repr((flags, sys.version, pybind11.__version__)).encode())
    for path in BUILT_FROM:
        digest.update((sources / path.relative_to(ROOT)).read_bytes())
    folder = folder or ROOT / "build"
    target = folder / f"emulated-{digest.hexdigest()[:16]}" / ("_cuda" + sysconfig.get_config_var("EXT_SUFFIX"))
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            objects, running = [], []
            common = ["g++", *flags, "-c", "-Wall", "-Wno-unknown-pragmas"]
            common += [f'-DISOBN_{key}="{value}"' for key, value in NAMES.items()]
            for path in (sources / "tests/emulation", pybind11.get_include(), sysconfig.get_path("include")):
                common += ["-isystem" if "include" in str(path) else "-I", str(path)]
            for source in SOURCES:
                source = sources / source.relative_to(ROOT)
                objects.append(str(target.parent / f"{source.stem}.o"))
                running.append(subprocess.Popen([*common, "-x", "c++", str(source), "-o", objects[-1]]))
            if sum(process.wait() != 0 for process in running):
                raise RuntimeError("the emulated CUDA kernels do not compile; the compiler's words are above")
            part = target.with_suffix(".part")
            subprocess.run(["g++", *flags, "-shared", *objects, "-o", str(part)], check=True)
            part.rename(target)
    return target


def load(path):
    """The module, and the emulator's own functions."""
    name = f"emulated_{hashlib.sha256(str(path).encode()).hexdigest()}._cuda"  # pybind11 keeps modules by their names
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    emulator = ctypes.CDLL(str(path))
    emulator.isobn_emulation_device.argtypes = [*[ctypes.c_int] * 3, *[ctypes.c_size_t] * 2]
    return module, emulator


def install(path):
    """The backend "cuda" takes CPU tensors, and runs on the emulator at ``path``. Returns the emulator's functions."""
    from isobn_kernels.backends import cuda

    cuda._cuda, emulator = load(path)
    cuda._REASON, cuda._DEVICE_TYPE = None, "cpu"
    cuda._machine_reason = lambda: None
    cuda._stream = lambda device: 0
    cuda._tried.clear()
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
