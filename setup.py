"""Builds `isobn_kernels._C` where there is a C++ compiler; without one the install is pure Python and works.

csrc/ includes no torch header: the build needs setuptools and pybind11, and takes seconds.
"""

import platform

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

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


class BuildWithInstructionSets(build_ext):
    """Compiles the inner loops with flags of their own, which setuptools has no place for."""

    def build_extension(self, ext):
        for source, flags in INSTRUCTION_SETS.items():
            ext.extra_objects += self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                include_dirs=ext.include_dirs,
                extra_postargs=[*ext.extra_compile_args, *flags],
                depends=ext.depends,
            )
        super().build_extension(ext)


setup(
    ext_modules=[
        Pybind11Extension(
            "isobn_kernels._C",
            ["csrc/bindings.cpp", "csrc/cpu/cpu.cpp"],
            depends=["csrc/formulas.h", "csrc/cpu/cpu.h", "csrc/cpu/kernels.h", "csrc/cpu/kernels.inl"],
            cxx_std=17,
            extra_compile_args=CXX_FLAGS,
            extra_link_args=["-fopenmp"],
            optional=True,  # a failed build is reported and leaves the pure-Python install
        )
    ],
    cmdclass={"build_ext": BuildWithInstructionSets},
)
