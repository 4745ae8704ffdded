"""Builds `isobn_kernels._C` where there is a C++ compiler, and `isobn_kernels._cuda` where there is nvcc too.

Without them the install is pure Python and works. csrc/ includes no torch header: the build needs setuptools and
pybind11, and takes seconds, or a minute with nvcc. ``ISOBN_CUDA_ARCHS`` narrows the GPUs that it is for: "90", "80,90".
"""

import datetime
import os
import platform
import re
import shutil
import subprocess
import time
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError
from setuptools.modified import newer_group

# No -ffast-math: the order of every sum is fixed by the source. The -fno- flags change no value.
# -fstrict-overflow: Python's own flags ask for -fwrapv, which costs 10 % of the kernel at 32x768.
CXX_FLAGS = [
    *["-O3", "-fopenmp", "-fstrict-overflow", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"],
    *["-Wall", "-Wextra"],
]

# The same inner loops for each instruction set; the one to use is chosen at run time.
INSTRUCTION_SETS = {"csrc/cpu/baseline.cpp": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    INSTRUCTION_SETS["csrc/cpu/avx2.cpp"] = ["-mavx2", "-mfma", "-mf16c"]
    INSTRUCTION_SETS["csrc/cpu/avx512.cpp"] = [
        *["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"],
        "-mprefer-vector-width=512",
    ]

HEADERS = glob("csrc/*.h")

# The GPUs that there is machine code for, as far as nvcc knows them; others take the PTX of the first or the last.
CUDA_ARCHS = [80, 86, 89, 90, 100, 120]
NVCC_FLAGS = ["-O3", "-std=c++17", "--threads", "0", "-Xcompiler", "-fPIC,-fvisibility=hidden"]


def cuda_archs(nvcc):
    """The architectures to build for: numbers, ascending."""
    asked = os.environ.get("ISOBN_CUDA_ARCHS", "")
    if not asked:
        known = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout
        return [arch for arch in CUDA_ARCHS if f"compute_{arch}" in known.split()]
    if not re.fullmatch(r"\d+([,; ]+\d+)*", asked):
        raise CompileError(f'ISOBN_CUDA_ARCHS must be numbers such as "90" or "80,90", got {asked!r}')
    return sorted(map(int, re.findall(r"\d+", asked)))


def cuda_metadata(nvcc, archs):
    """What `python -m isobn_kernels info` tells of the build, as macros."""
    version = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    commit = os.environ.get("GIT_COMMIT", "unknown")
    if Path(".git").exists() and shutil.which("git"):
        describe = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        commit = subprocess.run(describe, check=False, capture_output=True, text=True).stdout.strip() or commit
    seconds = os.environ.get("SOURCE_DATE_EPOCH")
    ptx = " and ".join(f"compute_{arch}" for arch in sorted({archs[0], archs[-1]}))
    day = datetime.datetime.fromtimestamp(float(seconds or time.time()), datetime.timezone.utc)
    values = {
        "NVCC": re.search(r"release .*V([\d.]+)", version).group(1),
        "TARGETS": ", ".join(f"sm_{arch}" for arch in archs) + f" and PTX of {ptx}",
        "BUILT": day.strftime("%Y-%m-%d"),
        "COMMIT": commit,
    }
    return [(f"ISOBN_{name}", f'"{value}"') for name, value in values.items()]


class BuildExtensions(build_ext):
    """Compiles what setuptools has no place for: flags for single files, and CUDA."""

    def build_extensions(self):
        if shutil.which("nvcc") is None:
            self.extensions = [ext for ext in self.extensions if not ext.name.endswith("._cuda")]
            self.warn("nvcc is not on the PATH: isobn_kernels._cuda, the kernels for NVIDIA GPUs, is not built")
        super().build_extensions()

    def build_extension(self, ext):
        if ext.name.endswith("._cuda"):
            self.build_cuda(ext)
            return
        for source, flags in INSTRUCTION_SETS.items():
            ext.extra_objects += self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                include_dirs=ext.include_dirs,
                extra_postargs=[*ext.extra_compile_args, *flags],
                depends=ext.depends,
            )
        super().build_extension(ext)

    def build_cuda(self, ext):
        """nvcc compiles the kernels and links: it knows where its own libraries are."""
        nvcc = shutil.which("nvcc")
        try:
            archs = cuda_archs(nvcc)
            macros = cuda_metadata(nvcc, archs)
        except (OSError, subprocess.CalledProcessError, AttributeError) as error:
            raise CompileError(f"nvcc cannot be asked what it is: {error}") from error
        kernels = Path(self.build_temp) / f"kernels-{'-'.join(map(str, archs))}.o"
        kernels.parent.mkdir(parents=True, exist_ok=True)
        if self.force or newer_group(["csrc/cuda/cuda.cu", *ext.depends], kernels):
            targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
            targets += [f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in sorted({archs[0], archs[-1]})]
            self.spawn([nvcc, *NVCC_FLAGS, *targets, "-c", "csrc/cuda/cuda.cu", "-o", str(kernels)])
        bindings = self.compiler.compile(
            ext.sources,
            output_dir=self.build_temp,
            include_dirs=ext.include_dirs,
            macros=macros,
            extra_postargs=ext.extra_compile_args,
        )
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.spawn([nvcc, "-shared", "-cudart", "static", str(kernels), *bindings, "-o", str(target)])


setup(
    ext_modules=[
        Pybind11Extension(
            "isobn_kernels._C",
            ["csrc/bindings.cpp", "csrc/cpu/cpu.cpp"],
            depends=[*HEADERS, *glob("csrc/cpu/*.h"), *glob("csrc/cpu/*.inl")],
            cxx_std=17,
            extra_compile_args=CXX_FLAGS,
            extra_link_args=["-fopenmp"],
            optional=True,  # a failed build is reported and leaves the pure-Python install
        ),
        Pybind11Extension(
            "isobn_kernels._cuda",
            ["csrc/cuda/bindings.cpp"],
            depends=[*HEADERS, *glob("csrc/cuda/*.h"), *glob("csrc/cuda/*.cuh")],
            cxx_std=17,
            extra_compile_args=["-O2", "-Wall", "-Wextra"],
            optional=True,
        ),
    ],
    cmdclass={"build_ext": BuildExtensions},
)
