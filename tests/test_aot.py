"""What the Triton kernels compile to for five GPUs, without one: no spills, bounded resources, 128-bit accesses."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: pip install triton"
)

ROOT = Path(__file__).parents[1]
TARGETS = ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"]
# The most that any launch of the sizes people train with takes, per target: registers of a thread, bytes of a block.
MOST_REGISTERS = 255
MOST_SHARED = 40_000

# In a process of its own: an interpreted session compiles nothing.
CODE = """
import dataclasses, json, sys
import torch
sys.path.insert(0, "benchmarks")
import aot_report
found = []
for N, D in ((32, 384), (32, 768)):
    for function, launches in aot_report.record(N, D, torch.float32).items():
        for launch in launches:
            found.append(dataclasses.asdict(aot_report.compile_launch(launch, sys.argv[1])) | {"function": function})
print(json.dumps(found))
"""


@pytest.fixture(scope="module", params=TARGETS)
def compiled(request):
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-c", CODE, request.param]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout)


def test_no_spills(compiled):
    assert {kernel["kernel"]: kernel["spills"] for kernel in compiled if kernel["spills"]} == {}


def test_resources(compiled):
    assert max(kernel["registers"] for kernel in compiled) <= MOST_REGISTERS
    assert max(kernel["shared"] for kernel in compiled) <= MOST_SHARED


def test_covariance_and_rows_in_128_bits(compiled):
    """A tile of the covariance and the rows of x; single features and sums may be narrower."""
    for kernel in compiled:
        if kernel["kernel"] == "update_pairs":
            assert kernel["wide_loads"] >= 3, "two panels of x and a tile of C"
            assert kernel["wide_stores"] >= 2, "a tile of C and its mirror image"
        if kernel["kernel"] == "scale_rows":
            assert kernel["wide_loads"] >= 1
            assert kernel["wide_stores"] >= 1


def test_number_of_launches(compiled):
    """Two for a training step of this size, two for a scale, one to apply it."""
    launches = {}
    for kernel in compiled:
        launches.setdefault(kernel["function"], []).append(kernel["kernel"])
    assert launches["train_forward"] == ["update_pairs", "finish"] * 2
    assert launches["compute_scale"] == ["inspect_pairs", "finish"] * 2
    assert launches["apply_scale"] == ["scale_rows"] * 2
