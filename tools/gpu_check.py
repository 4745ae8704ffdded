"""Builds, tests and times the project on a machine with a GPU and no network.

    python -m tools.gpu_check OUTDIR

Builds the extensions in place for the GPU that is there; runs the tests marked gpu, the conformance suite on the GPU
and, where it is installed, compute-sanitizer on short steps; times all providers on CUDA and a step of a whole model.
Writes to OUTDIR, which is created:

  summary.txt  machine, versions, commit and the outcome of every stage; also printed
  STAGE.log    what a stage printed
  results.csv  the table of the benchmarks, and speedup_cuda.svg and scaling_cuda.svg, drawn from it

A stage that fails or takes longer than its limit does not stop the next one; all limits together are ten minutes.
Needs torch, pytest, numpy, setuptools and pybind11; the benchmark of a model also transformers, the plots matplotlib.
GIT_COMMIT names the commit where this is not a git checkout.

Of this command only what needs no GPU has ever run.

Exit status: 0; 1 if a stage failed; 2 without a GPU.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks import parser_for, results

# A test of a backend that cannot run is skipped, and skipped tests are green.
BACKENDS = """
from isobn_kernels import available_backends
missing = {"cuda", "triton"} - set(available_backends())
raise SystemExit(f"cannot run: {missing}; python -m isobn_kernels info says why" if missing else 0)
"""
# What the sanitizers watch: steps of all block sizes, forward and backward.
STEPS = """
import torch
from isobn_kernels import IsoBN
for N, D, backend in [(2, 65, "triton"), (17, 65, "triton"), (130, 600, "triton"),
                      (2, 65, "cuda"), (17, 384, "cuda"), (128, 100, "cuda"), (5, 2048, "cuda")]:
    layer = IsoBN(D, backend=backend, stop_gradient=False, bias_correction=True, device="cuda").train()
    x = torch.randn(N, D, device="cuda", requires_grad=True)
    layer(x).square().sum().backward()
    layer.refresh_scale()
torch.cuda.synchronize()
"""
SUITE = [f"tests/operation/test_{name}.py" for name in ("conformance", "edge_cases", "gradients", "layouts")]
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
SHAPES = ("32x768", "256x768", "4096x1024", "64x4096")


def stages(out: Path) -> dict[str, tuple[int, list[str]]]:
    """For each its limit in seconds and its command."""
    python, pytest = [sys.executable], [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    table = str(out / "results.csv")
    bench = [*python, "-m", "benchmarks"]
    found = {
        "build": (70, [*python, "setup.py", "build_ext", "--inplace"]),
        "backends": (30, [*python, "-c", BACKENDS]),
        "gpu-tests": (110, [*pytest, "-m", "gpu", "tests/kernels/test_gpu.py"]),
        "cuda-suite": (40, [*pytest, *SUITE, "-k", "cuda-gpu"]),
        # Without 16-bit types: each width, dtype and stride is compiled, for some seconds.
        "triton-suite": (80, [*pytest, *SUITE, "-k", "triton-gpu and not float16 and not bfloat16"]),
        "bench": (100, [*bench, "run", "--device", "cuda", "--seconds", "1", "--output", table, "--shapes", *SHAPES]),
        "model": (40, [*bench, "model", "--device", "cuda", "--seconds", "10", "--output", table]),
        "plot": (20, [*bench, "plot", "--table", table]),
    }
    if shutil.which("compute-sanitizer"):
        for tool in SANITIZERS:
            uncached = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1"]  # or it does not see where a tensor ends
            watched = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *python, "-c", STEPS]
            found[tool] = (22, [*uncached, *watched])
    return found


def run(command: list[str], limit: int, log: Path) -> str:
    """Runs it with its output in ``log``, and says how it ended."""
    with log.open("w") as file:
        try:
            done = subprocess.run(command, cwd=results.ROOT, timeout=limit, stdout=file, stderr=subprocess.STDOUT)
        except subprocess.TimeoutExpired:
            return f"FAILED: stopped after {limit} s"
    return f"FAILED: exit status {done.returncode}" if done.returncode else "ok"


def main(argv: list[str] | None = None) -> int:
    parser = parser_for("python -m tools.gpu_check", __doc__)
    parser.add_argument("out", metavar="OUTDIR", type=Path)
    out = parser.parse_args(argv).out.resolve()
    if not torch.cuda.is_available():
        print("gpu_check needs a GPU, and did nothing: PyTorch finds no CUDA device here", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    os.environ["ISOBN_CUDA_ARCHS"] = "{}{}".format(*torch.cuda.get_device_capability())
    failed = False
    with (out / "summary.txt").open("w") as summary:

        def say(text: str) -> None:
            print(text, flush=True)
            print(text, file=summary, flush=True)

        for name, (limit, command) in stages(out).items():
            began, log = time.monotonic(), out / f"{name}.log"
            outcome = run(command, limit, log)
            failed |= outcome != "ok"
            say(f"{name:12} {outcome:30} {time.monotonic() - began:5.0f} s")
            shown = 100 if name == "bench" else 1 if outcome == "ok" else 20
            for line in log.read_text(errors="replace").splitlines()[-shown:]:
                say(f"    {line[:200]}")
        for key, value in results.environment("cuda").items():  # after the build: it loads the extension
            say(f"{key}: {value}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
