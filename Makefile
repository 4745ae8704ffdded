# Everything runs in a virtual environment of its own; nothing is installed elsewhere.
#   make demo      fine-tune a small trained encoder with and without IsoBN, on the CPU, no hub needed
#   make test      the test suite;  make test-all  the full product of cases;  make lint  ruff and mypy
#   make bench     the benchmarks behind the README's figures; python -m benchmarks readme writes them there
# TORCH chooses the build to install where the environment has none (the default is 2.13.0),
# PYTHON the interpreter: make test PYTHON=python3.12 TORCH=torch==2.12.0
# CAPABILITY=avx2 or CAPABILITY=default runs the tests as on a processor without AVX-512, or without AVX2.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin

# What PyTorch and its compiler, oneDNN, MKL, NumPy and its OpenBLAS, and our kernels follow.
AVX512 = X86_V4 AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL AVX512_SPR
LIMITS_avx2 = ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 \
	OPENBLAS_CORETYPE=Haswell NPY_DISABLE_CPU_FEATURES="$(AVX512)" ISOBN_CPU_ISA=avx2
LIMITS_default = ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2 \
	OPENBLAS_CORETYPE=Nehalem NPY_DISABLE_CPU_FEATURES="X86_V3 AVX2 FMA3 $(AVX512)" ISOBN_CPU_ISA=baseline

# The Triton kernels in Triton's interpreter, on a process per core like the rest. What they compile to for five GPUs is
# among the other tests: the interpreter compiles nothing.
PYTEST = $(LIMITS_$(CAPABILITY)) $(BIN)/python -m pytest --numprocesses auto --durations 10
TEST_TRITON = TRITON_INTERPRET=1 $(PYTEST) -W ignore::RuntimeWarning -k "triton or traffic" \
	$(patsubst %,tests/operation/test_%.py,conformance edge_cases gradients layouts properties) \
	$(patsubst %,tests/pytorch/test_%.py,direct_path generic_module module op) \
	$(patsubst %,tests/kernels/test_%.py,traffic triton)
# The CUDA kernels on an emulator, which is built of tests/support/emulation once.
TEST_CUDA = ISOBN_TEST_CUDA=emulated $(PYTEST) -k cuda \
	$(patsubst %,tests/operation/test_%.py,conformance determinism edge_cases errors gradients layouts properties) \
	$(patsubst %,tests/pytorch/test_%.py,direct_path generic_module module op) \
	tests/distributed/test_across_ranks.py tests/kernels/test_cuda.py

.PHONY: demo test test-all lint bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	$(BIN)/python -m isobn_kernels demo

test: $(VENV)/.test
	$(PYTEST)
	$(TEST_TRITON)
	$(TEST_CUDA)

test-all: $(VENV)/.test
	$(PYTEST) --full
	$(TEST_TRITON) --full
	$(TEST_CUDA) --full

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.test
	$(BIN)/python -m benchmarks run --device cpu
	$(BIN)/python -m benchmarks model
	$(BIN)/python -m benchmarks plot

# Each extra of pyproject.toml, installed once and again when the build or the C++ changes.
$(VENV)/.%: pyproject.toml setup.py $(wildcard csrc/* csrc/*/*) | $(BIN)/python
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install --quiet --progress-bar off "$(TORCH)"
	$(BIN)/python -m pip install --quiet --progress-bar off --editable ".[$*]"
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "No virtual environment: on Debian, apt install python3-venv"; exit 1; }

clean:
	rm -rf $(VENV) build dist *.egg-info isobn_kernels/*.so runs
