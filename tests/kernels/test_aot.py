"""What the Triton kernels compile to for five GPUs, without one: no spills, bounded resources, 128-bit accesses."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: pip install triton"
)

ROOT = Path(__file__).parents[2]
DTYPES = ("torch.float32", "torch.float16", "torch.bfloat16")
TARGETS = ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"]
# The most that a launch of each kernel may take on any target: registers of a thread, bytes of shared memory a block.
# A quarter or so above what benchmarks/results/aot.txt shows; 255 registers are all there are on NVIDIA's GPUs.
LIMITS = {
    "update_pairs": (255, 24_576),
    "inspect_pairs": (128, 20_480),
    "finish": (128, 10_240),
    "column_sums": (64, 4_096),
    "column_products": (112, 4_096),
    "backward_features": (64, 4_096),
    "gradient": (255, 32_768),
    "scale_rows": (80, 4_096),
}

# A whole batch and one in chunks: every kernel is launched. All rows of the table on both paths take minutes.
BOTH_PATHS = [(32, 768), (256, 768)]
ALL_ROWS = [(16, 384), (16, 768), (32, 384), (32, 768), (128, 384), (128, 768), (256, 384), (256, 768)]

# In a process of its own: an interpreted session compiles nothing.
CODE = """
import dataclasses, json, sys
from tools import aot
found = []
for function, _, _, dtype, launch in aot.launches(json.loads(sys.argv[2])):
    if str(dtype) not in sys.argv[3:]:
        continue
    compiled = dataclasses.asdict(aot.compile_launch(launch, sys.argv[1]))
    constants = {key: value for key, value in launch.arguments.items() if key.isupper() and key != "N"}
    shape = {"itemsize": dtype.itemsize, "warps": launch.options.get("num_warps", 4), "function": function}
    found.append(shape | compiled | constants | {"dtype": str(dtype)})
print(json.dumps(found))
"""


def run(code, *arguments):
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-c", code, *arguments]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout)


def wide(kernel, rows, columns, itemsize):
    """Accesses of 128 bits that each thread makes to such a block, if all are."""
    threads = kernel["warps"] * (64 if kernel["target"].startswith("gfx") else 32)
    return rows * columns * itemsize // (16 * threads)


def accesses_in_128_bits(kernel):
    """The fewest loads and stores that must be so wide: of tiles of the covariance, rows of x and of the output."""
    rows = wide(kernel, kernel.get("BLOCK_N", 0), kernel["BLOCK"], kernel["itemsize"])
    tile = wide(kernel, kernel["BLOCK"], kernel["BLOCK"], 4)
    if kernel["target"] == "gfx942" and kernel["itemsize"] == 2:
        rows = 0  # in 64 bits: wide ones would need so many rows a thread that its mask registers spill
    # Two panels, once or for their mean as well. `finish` is there with rows and, for a scale alone, without.
    panels = 2 if kernel.get("WHOLE") or kernel.get("SUMMED") else 4
    return {
        "update_pairs": (panels * rows + tile, 2 * tile),
        "inspect_pairs": (tile, 0),
        "column_sums": (rows, 0),
        "column_products": (2 * rows, 0),
        "gradient": (3 * rows + tile, rows),
        "scale_rows": (rows, rows),
        "finish": (rows, rows) if kernel["function"] == "train_forward" else (0, 0),
    }.get(kernel["kernel"], (0, 0))


def check(target, shapes, dtypes):
    compiled = run(CODE, target, json.dumps(shapes), *dtypes)
    assert [kernel for kernel in compiled if kernel["spills"]] == []
    for kernel in compiled:
        registers, shared = LIMITS[kernel["kernel"]]
        assert kernel["registers"] <= registers, kernel
        assert kernel["shared"] <= shared, kernel
        loads, stores = accesses_in_128_bits(kernel)
        assert kernel["wide_loads"] >= loads, kernel
        assert kernel["wide_stores"] >= stores, kernel
    assert {kernel["kernel"] for kernel in compiled} == set(LIMITS)
    assert {(kernel["kernel"], kernel["dtype"]) for kernel in compiled} >= {
        (name, dtype) for name in ("update_pairs", "gradient") for dtype in dtypes
    }


# One test for each target, as compiling takes most of its time.
@pytest.mark.parametrize("target", TARGETS)
def test_no_spills_bounded_resources_wide_accesses(target):
    check(target, BOTH_PATHS, ("torch.float32", "torch.bfloat16"))


@pytest.mark.full
@pytest.mark.parametrize("target", TARGETS)
def test_no_spills_bounded_resources_wide_accesses_full_product(target):
    check(target, ALL_ROWS, DTYPES)


def test_number_of_launches():
    """Two for a training step up to N = 128 and D = 2048, three above one of them, four above both; two for a scale."""
    sys.path.insert(0, str(ROOT))
    from tools import aot

    def kernels(N, D):
        found = aot.record(N, D, torch.float32)
        return {function: [launch.kernel for launch in launches] for function, launches in found.items()}

    assert kernels(128, 2048)["train_forward"] == ["update_pairs", "finish"]
    assert kernels(129, 2048)["train_forward"] == ["column_sums", "update_pairs", "finish"]
    assert kernels(128, 2049)["train_forward"] == ["update_pairs", "shrink", "finish"]
    assert kernels(129, 2049)["train_forward"] == ["column_sums", "update_pairs", "shrink", "finish"]
    for shape in ((32, 768), (256, 2049)):
        assert kernels(*shape)["compute_scale"] == ["inspect_pairs", "finish"]
        assert kernels(*shape)["apply_scale"] == ["scale_rows"]


# What the JIT looks a binary up by, for a GPU that is not there.
KEYS = """
import json, sys
import torch
from tools import aot
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
from isobn_kernels.backends.triton import kernels

backend = make_backend(GPUTarget("cuda", 90, 32))
keys = []
for N in json.loads(sys.argv[1]):
    found = []
    for launches in aot.record(N, 384, torch.bfloat16).values():
        for launch in launches:
            kernel = getattr(kernels, launch.kernel)
            bind = create_function_from_signature(kernel.signature, kernel.params, backend)
            found.append((launch.kernel, str(bind(**launch.arguments)[1]), str(launch.options)))
    keys.append(found)
print(json.dumps(keys))
"""


@pytest.mark.parametrize(
    "sizes", [(2, 3, 15, 16), (17, 31, 32), (33, 48, 64, 128), (129, 160, 1000, 4096, 70_000)], ids=str
)
def test_one_binary_for_all_batch_sizes_of_a_class(sizes):
    first, *others = run(KEYS, json.dumps(sizes))
    assert len(first) >= 8
    for other in others:
        assert other == first
