#!/usr/bin/env bash
# Builds, tests and times the project on a machine with a GPU and no network; see usage below.
# Of this script only the CPU stages have ever run: the GPU stages are unproven.
set -u

usage() {
    cat <<'TEXT'
usage: benchmarks/gpu_check.sh OUTDIR

Builds the extension in place, runs the tests marked gpu, the conformance suite on the GPU
and compute-sanitizer on short steps, times all backends on CUDA and on the CPU and a step of
a whole model, profiles the main kernels, and writes to OUTDIR, which is created:

  summary.txt  one page: machine, commit, outcome of every stage, tables (also printed)
  machine.log  versions, nvidia-smi, the build
  tests.log    the tests and the sanitizers
  bench.log    what the benchmarks print; among it the launches of a step
  results.csv  their table
  speedup_DEVICE.svg  scaling_DEVICE.svg  drawn from it; DEVICE is cuda, or cpu without a GPU
  ncu.txt      Nsight Compute on the main kernels

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
total=525 # seconds for all stages

say() { printf '%s\n' "$*" >>"$summary"; }

# stage NAME SECONDS FILE COMMAND...: runs it with a limit, output at the end of FILE, outcome to the summary. The limit
# is shorter where less than that is left of the whole.
stage() {
    local name=$1 limit=$2 file=$out/$3 began=$SECONDS status outcome
    shift 3
    [ "$limit" -le $((total - SECONDS)) ] || limit=$((total - SECONDS))
    if [ "$limit" -lt 5 ]; then
        say "$(printf '%-12s %s' "$name" "FAILED: no time left")"
        failed=1
        return 1
    fi
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

# tables LINES: those of the last benchmark, in the summary.
tables() {
    sed -n "$((benched + 1)),\$p" "$out/bench.log" | sed -n '/^\(shape\|normaliser\) /,/^$/p;/^BUSY/p;/WRONG\|failed:/p' |
        cut -c 1-260 | head -n "$1" >>"$summary"
}

# bench NAME SECONDS LINES ARGUMENTS...: a benchmark, with so many lines of its tables in the summary.
bench() {
    local name=$1 limit=$2 lines=$3
    shift 3
    touch "$out/bench.log"
    benched=$(wc -l <"$out/bench.log")
    stage "$name" "$limit" bench.log "$python" -m benchmarks "$@" || last bench.log 2
    tables "$lines"
}

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

# Whether a backend can run here, or why not.
runs='
import sys
import torch
x = torch.ones(2, 3, device="cuda")
from isobn_kernels import backends
backend = backends.load(sys.argv[1])
reason = backend.unavailable_reason() or backend.unsupported_reason(x)
print(sys.argv[1], reason or "can run")
sys.exit(reason is not None)
'

# What the sanitizers watch: a few steps of all block sizes, forward and backward.
steps='
SHAPES = [(2, 65, "triton"), (17, 65, "triton"), (130, 600, "triton"), (2, 65, "cuda"), (17, 384, "cuda"), (128, 100, "cuda"), (5, 2048, "cuda")]
import torch
from isobn_kernels import IsoBN
for N, D, backend in SHAPES:
    layer = IsoBN(D, backend=backend, stop_gradient=False, bias_correction=True, device="cuda").train()
    x = torch.randn(N, D, device="cuda", requires_grad=True)
    layer(x).square().sum().backward()
    layer.refresh_scale()
torch.cuda.synchronize()
'

# What Nsight Compute looks at: a step of each backend, and in it our kernels by name, not those of plain PyTorch.
profiled="SHAPES = [(32, 768, \"triton\"), (32, 768, \"cuda\")]${steps#*]}"
kernels='^(step|apply|backward_rows|update_pairs|finish|gradient|scale_rows)$'

# Why no GPU stage can run, or nothing.
missing_gpu() {
    if ! timeout 20 nvidia-smi -L >/dev/null 2>&1; then
        echo "no GPU: nvidia-smi finds none"
    elif ! timeout 40 "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' >/dev/null 2>&1; then
        echo "no GPU: PyTorch cannot use the one that nvidia-smi finds"
    fi
}

printf '%s\n' "IsoBN kernels, commit $GIT_COMMIT, $(date -u +%Y-%m-%dT%H:%MZ)" >"$summary"

stage environment 20 machine.log bash -c describe_machine
sed -n '/^[+]--\|^... ... /q;p' "$out/machine.log" | head -n 14 | sed 's/^/    /' >>"$summary"

# For the GPU that is here only, which is quicker; without one, for one all the same.
found=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | tr -d . | sort -nu | paste -sd, -)
ISOBN_CUDA_ARCHS=${found:-${ISOBN_CUDA_ARCHS:-90}}
export ISOBN_CUDA_ARCHS
stage build 60 machine.log "$python" setup.py build_ext --inplace || last machine.log 5

device=cpu
no_gpu=$(missing_gpu)
if [ -n "$no_gpu" ]; then
    for name in "cuda runs" "triton runs" "gpu tests" "cuda suite" "triton suite" sanitizers "bench cuda" "model cuda" ncu; do
        say "$(printf '%-12s %s' "$name" "$no_gpu")"
    done
else
    device=cuda
    # Tests of a backend that cannot run are skipped, and a session of skipped tests is green: say so first.
    for backend in cuda triton; do
        stage "$backend runs" 60 tests.log "$python" -c "$runs" "$backend"
        last tests.log 1
    done
    stage "gpu tests" 110 tests.log "$python" -m pytest -q -p no:cacheprovider -m gpu tests/test_gpu.py
    last tests.log 1
    bench "bench cuda" 120 40 run --device cuda --quick --output "$out/results.csv"
    suite="tests/test_conformance.py tests/test_edge_cases.py tests/test_gradients.py tests/test_layouts.py"
    # shellcheck disable=SC2086 # a list of files
    stage "cuda suite" 40 tests.log "$python" -m pytest -q -p no:cacheprovider $suite -k cuda-gpu
    last tests.log 1
    # Without 16-bit types: each width, dtype and stride is compiled, for some seconds.
    # shellcheck disable=SC2086
    stage "triton suite" 80 tests.log "$python" -m pytest -q -p no:cacheprovider $suite \
        -k "triton-gpu and not float16 and not bfloat16"
    last tests.log 1
    if command -v compute-sanitizer >/dev/null; then
        for tool in memcheck racecheck initcheck synccheck; do
            PYTORCH_NO_CUDA_MEMORY_CACHING=1 stage "$tool" 25 tests.log compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" -c "$steps"
            last tests.log 1
        done
    else
        say "$(printf '%-12s %s' sanitizers "compute-sanitizer is missing")"
    fi
    if command -v ncu >/dev/null; then
        stage ncu 40 ncu.txt ncu --section SpeedOfLight --section LaunchStats --section Occupancy --launch-count 20 \
            --kernel-name "regex:$kernels" "$python" -c "$profiled"
    else
        say "$(printf '%-12s %s' ncu "ncu is missing")"
    fi
    bench "model cuda" 40 8 model --device cuda --seconds 10 --output "$out/results.csv"
fi

bench "bench cpu" 40 25 run --device cpu --shapes 32x384 32x768 --compile-shapes --seconds 2 --output "$out/results.csv"
stage plot 25 bench.log "$python" -m benchmarks plot --table "$out/results.csv" --device "$device" || last bench.log 2

cat "$summary"
exit "$failed"
