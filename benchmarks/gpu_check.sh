#!/usr/bin/env bash
# Builds, tests and times the project on a machine with a GPU and no network; see usage below.
# Of this script only the CPU stages have ever run: the GPU stages are unproven.
set -u

usage() {
    cat <<'TEXT'
usage: benchmarks/gpu_check.sh OUTDIR

Builds the extension in place, runs the tests marked gpu, the conformance suite on the GPU
and compute-sanitizer on short steps, times the kernels on CUDA and on the CPU, and writes
to OUTDIR, which is created:

  summary.txt      one page: machine, commit, outcome of every stage, tables (also printed)
  environment.txt  versions, nvidia-smi
  build.log  gpu_tests.log  sanitizers.log
  bench_cuda.txt  bench_cuda.json  bench_cpu.txt

A stage that fails or takes too long does not stop the next one; all together end within
nine minutes. Without a GPU, its stages say so and the others run. Nothing is downloaded.

PYTHON      the interpreter, default python3; needs torch, pytest, setuptools, pybind11
GIT_COMMIT  the commit to name in the results, where this is not a git checkout

Exit status: 0; 1 if a stage failed; 2 if OUTDIR is missing or cannot be created.
TEXT
}

if [ $# -ne 1 ] || [ "$1" = -h ] || [ "$1" = --help ]; then
    usage
    [ $# -eq 1 ]
    exit $(($? * 2))
fi

mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd) || exit 2
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit 2
cd "$root" || exit 2
python=${PYTHON:-python3}
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
GIT_COMMIT=$(git describe --always --dirty --abbrev=40 '--exclude=*' 2>/dev/null || echo "${GIT_COMMIT:-unknown}")
export GIT_COMMIT
summary=$out/summary.txt
failed=0

say() { printf '%s\n' "$*" >>"$summary"; }

# stage NAME SECONDS FILE COMMAND...: runs it with a limit, output at the end of FILE, outcome to the summary.
stage() {
    local name=$1 limit=$2 file=$out/$3 began=$SECONDS status outcome
    shift 3
    timeout --kill-after=5 "$limit" "$@" >>"$file" 2>&1
    status=$?
    case $status in
        0) outcome=ok ;;
        124 | 137) outcome="FAILED: stopped after $limit s" ;;
        *) outcome="FAILED: exit status $status" ;;
    esac
    [ "$status" -eq 0 ] || failed=1
    if [ "$(wc -c <"$file")" -gt 8000000 ]; then
        tail -c 8000000 "$file" >"$file.tail" && mv "$file.tail" "$file"
    fi
    say "$(printf '%-12s %-36s %4d s' "$name" "$outcome" $((SECONDS - began)))"
    return "$status"
}

# last FILE LINES: the end of a log, in the summary.
last() { tail -n "$2" "$out/$1" | cut -c 1-200 | sed 's/^/    /' >>"$summary"; }

# table FILE: the first table of a benchmark, in the summary.
table() { sed -n '/^shape /,/^$/p;/^BUSY/p;/WRONG\|failed:/p' "$out/$1" | head -n 30 >>"$summary"; }

# shellcheck disable=SC2329 # `stage` invokes it, in a bash of its own
describe_machine() {
    uname -srm
    "$python" - <<'PYTHON'
import importlib.metadata
import platform

print("python", platform.python_version())
for name in ("torch", "triton", "numpy", "transformers", "pytest", "hypothesis", "pybind11", "setuptools"):
    try:
        print(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        print(name, "missing")
PYTHON
    nvcc --version 2>/dev/null | grep release || echo "nvcc missing"
    if command -v nvidia-smi >/dev/null; then
        nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
        nvidia-smi
    else
        echo "nvidia-smi missing"
    fi
    return 0
}
export python
export -f describe_machine

# What the sanitizers watch: a few steps of all block sizes, forward and backward.
steps='
SHAPES = [(2, 65, "triton"), (17, 65, "triton"), (130, 600, "triton"), (2, 65, "cuda"), (17, 384, "cuda"), (128, 100, "cuda")]
import torch
from isobn_kernels import IsoBN
for N, D, backend in SHAPES:
    layer = IsoBN(D, backend=backend, stop_gradient=False, bias_correction=True, device="cuda").train()
    x = torch.randn(N, D, device="cuda", requires_grad=True)
    layer(x).square().sum().backward()
    layer.refresh_scale()
torch.cuda.synchronize()
'

# Why no GPU stage can run, or nothing.
missing_gpu() {
    if ! timeout 20 nvidia-smi -L >/dev/null 2>&1; then
        echo "no GPU: nvidia-smi finds none"
    elif ! timeout 40 "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' >/dev/null 2>&1; then
        echo "no GPU: PyTorch cannot use the one that nvidia-smi finds"
    fi
}

printf '%s\n' "IsoBN kernels, commit $GIT_COMMIT, $(date -u +%Y-%m-%dT%H:%MZ)" >"$summary"

stage environment 20 environment.txt bash -c describe_machine
sed -n '/^[+]--\|^... ... /q;p' "$out/environment.txt" | head -n 14 | sed 's/^/    /' >>"$summary"

# For the GPU that is here only, which is quicker.
ISOBN_CUDA_ARCHS=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | tr -d . | sort -nu | paste -sd, -)
export ISOBN_CUDA_ARCHS
stage build 60 build.log "$python" setup.py build_ext --inplace || last build.log 5

no_gpu=$(missing_gpu)
if [ -n "$no_gpu" ]; then
    for name in "gpu tests" "cuda suite" "triton suite" sanitizers "bench cuda"; do say "$(printf '%-12s %s' "$name" "$no_gpu")"; done
else
    stage "gpu tests" 120 gpu_tests.log "$python" -m pytest -q -p no:cacheprovider -m gpu tests/test_gpu.py
    last gpu_tests.log 1
    suite="tests/test_conformance.py tests/test_edge_cases.py tests/test_gradients.py tests/test_layouts.py"
    # shellcheck disable=SC2086 # a list of files
    stage "cuda suite" 40 gpu_tests.log "$python" -m pytest -q -p no:cacheprovider $suite -k cuda-gpu
    last gpu_tests.log 1
    # Without 16-bit types: each width, dtype and stride is compiled, for some seconds.
    # shellcheck disable=SC2086
    stage "triton suite" 90 gpu_tests.log "$python" -m pytest -q -p no:cacheprovider $suite \
        -k "triton-gpu and not float16 and not bfloat16"
    last gpu_tests.log 1
    if command -v compute-sanitizer >/dev/null; then
        for tool in memcheck racecheck initcheck synccheck; do
            PYTORCH_NO_CUDA_MEMORY_CACHING=1 stage "$tool" 18 sanitizers.log compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" -c "$steps"
            last sanitizers.log 1
        done
    else
        say "$(printf '%-12s %s' sanitizers "compute-sanitizer is missing")"
    fi
    stage "bench cuda" 80 bench_cuda.txt "$python" benchmarks/bench_op.py --device cuda --seconds 2 \
        --shapes 32x768 32x4096 64x4096 4096x1024 --compile-shapes 32x768 --output "$out/bench_cuda.json" || last bench_cuda.txt 2
    table bench_cuda.txt
fi

stage "bench cpu" 30 bench_cpu.txt "$python" benchmarks/bench_op.py --device cpu --seconds 2 \
    --shapes 32x384 32x768 --compile-shapes || last bench_cpu.txt 2
table bench_cpu.txt

cat "$summary"
exit "$failed"
