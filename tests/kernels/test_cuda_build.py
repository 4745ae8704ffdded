"""What the CUDA kernels compile to for every target, without a GPU: no spills, bounded resources, wide accesses."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")

ROOT = Path(__file__).parents[2]
TARGETS = [80, 86, 89, 90, 100, 120]  # CUDA_ARCHS in setup.py
# The most registers of a thread, on any target. 128 are what 512 threads of a step, the most there are, leave to each.
LIMITS = {"step": 128, "apply": 32, "backward_rows": 64, "backward_features": 64, "gradient": 64, "probe_kernel": 16}
INSTANCES = {"step": 8, "apply": 6, "backward_rows": 3, "backward_features": 1, "gradient": 3, "probe_kernel": 1}
STATIC_SHARED = 0  # it is dynamic; cuda.cu asserts the most that a launch asks for


def compiled(arch, folder):
    """(kernel, template arguments): registers, spilled bytes, shared bytes; and {kernel: its PTX}."""
    flags = ["-O3", "-std=c++17", "-cubin", f"-arch=sm_{arch}", "-Xptxas", "-v", "--keep", "--keep-dir", str(folder)]
    done = subprocess.run(
        ["nvcc", *flags, "-o", str(folder / "cuda.cubin"), "csrc/cuda/cuda.cu"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    names = r"Compiling entry function '(\w+)' for"
    usage = r".*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)"
    found = {}
    for name, stores, loads, registers, rest in re.findall(names + usage, done.stderr, re.DOTALL):
        shared = re.search(r"(\d+) bytes smem", rest)
        found[name] = (int(registers), int(stores) + int(loads), int(shared.group(1)) if shared else 0)
    (ptx,) = folder.glob("*.ptx")
    bodies = dict(re.findall(r"\.entry (\w+)\((.*?)^}", ptx.read_text(), re.DOTALL | re.MULTILINE))
    return found, bodies


def kernel_of(mangled):
    (kernel,) = [name for name in LIMITS if re.match(rf"_ZN5isobn4cuda{len(name)}{name}[IE]", mangled)]
    return kernel


@pytest.mark.parametrize("arch", TARGETS)
def test_resources(arch, tmp_path):
    found, bodies = compiled(arch, tmp_path)
    counts = dict.fromkeys(LIMITS, 0)
    for mangled, (registers, spilled, shared) in found.items():
        kernel = kernel_of(mangled)
        counts[kernel] += 1
        assert spilled == 0, mangled
        assert registers <= LIMITS[kernel], (mangled, registers)
        assert shared == STATIC_SHARED, mangled
    assert counts == INSTANCES

    # Kernels for aligned rows: C, sigma and a float32 batch in 128 bits, a batch of a 16-bit type in 64.
    wide = {}
    for mangled, body in bodies.items():
        accesses = re.findall(r"\b(ld|st)\.(?:global\.)?v4\.[bfu](16|32)", body)
        wide[mangled] = {kind: accesses.count(kind) for kind in set(accesses)}
    checked = 0
    for mangled, found in wide.items():
        template = re.search(r"I(f|6__half|13__nv_bfloat16)Lb1E(Lb\dE)?", mangled)
        if template is None:
            continue
        checked += 1
        element = "32" if template.group(1) == "f" else "16"
        if kernel_of(mangled) == "apply":
            assert found["ld", element] >= 1, mangled
            assert found["st", element] >= 1, mangled
        else:
            assert found["ld", "32"] >= 8 + 8 + 1, mangled  # C along rows and down columns, sigma
        if template.group(2) == "Lb1E":  # the training step
            assert found["ld", element] >= 2 + 8, mangled  # x: its first row, eight at a time
            assert found["st", "32"] >= 8 + 1, mangled  # rows of C: put aside, written
            assert found["st", element] >= 1, mangled  # out
    assert checked == 4 + 3


def test_the_targets_are_those_of_the_build():
    source = (ROOT / "setup.py").read_text()
    assert f"CUDA_ARCHS = {TARGETS}" in source
