"""What is particular to the C++ kernels for the CPU: instruction sets, how one is chosen, threads."""

import os

import pytest
import stubs
import torch
from cases import CASES, kernels
from helpers import batch, fresh, python, train_with_gradient, upstream
from tolerance import train_rightly

from isobn_kernels import backends
from isobn_kernels.state import Where

KNOWN = ("baseline", "avx2", "avx512")


@pytest.fixture
def extension():
    """The extension module, where it is built."""
    reason = backends.load("cpu").unavailable_reason()
    if reason is not None:
        pytest.skip(f"cpu: {reason}")
    return kernels()


USED = "from isobn_kernels import _C, backends; backends.load('cpu'); print(_C.instruction_set())"
REASON = "from isobn_kernels import backends; print(backends.load('cpu').unavailable_reason())"


def test_instruction_sets(extension):
    available = list(extension.instruction_sets())
    assert available[0] == "baseline"
    assert available == [name for name in KNOWN if name in available]
    assert extension.instruction_set() in available


def test_every_instruction_set_is_a_case():
    assert {case.isa for case in CASES if case.backend == "cpu"} == set(KNOWN)


def test_the_best_instruction_set_is_the_default(extension):
    environment = {"ISOBN_CPU_ISA": ""}
    assert python(USED, **environment) == list(extension.instruction_sets())[-1]


def test_set_instruction_set(extension):
    before = extension.instruction_set()
    try:
        for name in extension.instruction_sets():
            extension.set_instruction_set(name)
            assert extension.instruction_set() == name
        with pytest.raises(ValueError, match="sse9"):
            extension.set_instruction_set("sse9")
        assert extension.instruction_set() == name
    finally:
        extension.set_instruction_set(before)


def test_environment_variable_chooses(extension):
    for name in extension.instruction_sets():
        assert python(USED, ISOBN_CPU_ISA=name) == name


def test_environment_variable_that_cannot_be_followed(extension):
    """The backend is unavailable, says why, and "auto" does without it; nothing fails at import."""
    code = (
        "import torch, isobn_kernels\n"
        "x = torch.ones(2, 3)\n"
        "print(*isobn_kernels.available_backends())\n"
        "print(isobn_kernels.IsoBN(3)(x).sum().item())\n"
        "try: isobn_kernels.IsoBN(3, backend='cpu')(x)\n"
        "except RuntimeError as error: print(error)"
    )
    available, total, error = python(code, ISOBN_CPU_ISA="sse9").splitlines()
    assert "cpu" not in available.split()
    assert total == "6.0"
    for word in ("'cpu'", "ISOBN_CPU_ISA", "sse9"):
        assert word in error


def test_instruction_set_that_this_processor_lacks(extension):
    lacking = [name for name in KNOWN if name not in extension.instruction_sets()]
    if not lacking:
        pytest.skip("needs a processor without AVX2 or AVX-512: this one has both")
    for name in lacking:
        with pytest.raises(ValueError, match=name):
            extension.set_instruction_set(name)
        assert "ISOBN_CPU_ISA" in python(REASON, ISOBN_CPU_ISA=name)


def test_number_of_threads_is_left_alone(kernel_case, threads):
    threads(2)
    train_with_gradient(batch(17, 65), upstream(17, 65), fresh(65), kernel_case, stop_gradient=False)
    assert torch.get_num_threads() == 2


def test_no_second_pool_of_threads(extension):
    """The kernels run on the OpenMP threads that torch already has."""
    code = (
        "import os, torch, isobn_kernels\n"
        "torch.set_num_threads(3)\n"
        "a = torch.randn(400, 400); a @ a; (torch.randn(1000, 1000) + 1).exp()\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "isobn_kernels.IsoBN(300, backend='cpu')(torch.randn(64, 300))\n"
        "print(len(os.listdir('/proc/self/task')) - before)"
    )
    if not os.path.isdir("/proc/self/task"):
        pytest.skip("/proc: needed to count threads")
    assert python(code) == "0"


def test_auto_prefers_the_kernels(extension):
    assert backends.select(Where("auto"), torch.ones(2, 3)).name == "cpu"
    assert backends.select(Where("auto"), torch.ones(2, 3, device="meta")).name == "reference"


@pytest.mark.parametrize("isa", KNOWN)
def test_power_of_a_small_number(extension, isa):
    """A constant feature has the power eps^-beta. A beta rounded to float32 is off by |log eps| times its rounding."""
    if isa not in extension.instruction_sets():
        pytest.skip(f"this processor lacks {isa}")
    case = next(case for case in CASES if case.isa == isa)
    x = batch(54, 8)
    x[:, 3] = 0.7
    with case.selected():
        for beta in (0.3, 1.1, 2.1):
            train_rightly(x, fresh(8), case, eps=1.1e-8, beta=beta, bias_correction=True)


def test_the_stub_is_true(extension):
    assert stubs.contents_of(extension) == stubs.stub_of("_C")
