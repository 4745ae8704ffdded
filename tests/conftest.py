import os
import re

import pytest
import torch
from cases import CASES, REFERENCE, skip_unless_available
from helpers import round_to_bfloat16_when_interpreting

try:  # a bare GPU machine runs the other tests without it
    import hypothesis
except ModuleNotFoundError:
    pass
else:
    # The same examples in every run, on every machine, and nothing left on disk.
    hypothesis.settings.register_profile(
        "isobn",
        derandomize=True,
        database=None,
        deadline=None,
        max_examples=30,
        # The fixtures of this suite choose a backend; they hold nothing that one example could leave to the next.
        suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
    )
    hypothesis.settings.load_profile("isobn")

# Inductor's cache does not know when the schema of an operator changes.
torch.compiler.config.force_disable_caches = True


# On a GPU, `poisoned_memory` below makes PyTorch refuse every matrix product unless this is set; read at the first one.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

if os.environ.get("TRITON_INTERPRET") == "1":
    round_to_bfloat16_when_interpreting()


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="also run the full product of cases")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--full"):
        return
    full = [item for item in items if "full" in item.keywords]
    config.hook.pytest_deselected(items=full)
    items[:] = [item for item in items if "full" not in item.keywords]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """A backend without float64, or with a limit on the batch, says so when asked; that is skipped, in its words."""
    try:
        return (yield)
    except Exception as error:  # opcheck raises its own around it
        if not re.search(r"but x (is float64|has \d+ (rows|features)) and it takes", str(error)):
            raise
        pytest.skip(str(error))


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request):
    """One backend after the other, each with its instruction set in use."""
    skip_unless_available(request.param)
    with request.param.selected():
        yield request.param


@pytest.fixture(params=[case for case in CASES if case is not REFERENCE], ids=lambda case: case.name)
def kernel_case(request):
    """The same without the reference, for what concerns kernels only."""
    skip_unless_available(request.param)
    with request.param.selected():
        yield request.param


@pytest.fixture(autouse=True)
def poisoned_memory():
    """`torch.empty` hands out NaN (integers: the largest) in every test: a value read before it is written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def threads():
    """Sets the number of threads. It is 1 unless a test asks: two threads on a busy machine wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)
