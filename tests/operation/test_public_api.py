"""Names, signatures and buffers that others rely on, and what an import does not do."""

import importlib.metadata
import inspect
import re
from pathlib import Path

import pytest
import torch
from helpers import python

import isobn_kernels
from isobn_kernels import IsoBN, available_backends, backends, isobn


def parameters(function):
    """{name: default}, and the names that must be given by keyword."""
    found = inspect.signature(function).parameters
    keyword_only = [name for name, p in found.items() if p.kind is p.KEYWORD_ONLY]
    return {name: p.default for name, p in found.items()}, keyword_only


REQUIRED = inspect.Parameter.empty


def test_public_names():
    assert sorted(isobn_kernels.__all__) == ["IsoBN", "available_backends", "fold_isobn", "isobn"]


def test_version():
    assert isobn_kernels.__version__ == importlib.metadata.version("isobn_kernels")
    assert type(IsoBN._version) is int


def test_signature_of_the_module():
    defaults, keyword_only = parameters(IsoBN)
    assert defaults == {
        "num_features": REQUIRED,
        "eps": 1e-3,
        "momentum": 0.05,
        "beta": 0.5,
        "bias_correction": False,
        "stop_gradient": True,
        "process_group": None,
        "backend": "auto",
        "device": None,
    }
    assert list(defaults)[:4] == ["num_features", "eps", "momentum", "beta"]
    assert keyword_only == ["bias_correction", "stop_gradient", "process_group", "backend", "device"]


def test_signature_of_the_function():
    defaults, keyword_only = parameters(isobn)
    assert defaults == {
        "x": REQUIRED,
        "running_cov": REQUIRED,
        "running_std": REQUIRED,
        "training": False,
        "momentum": 0.05,
        "eps": 1e-3,
        "beta": 0.5,
        "backend": "auto",
        "scale": None,
        "num_batches_tracked": None,
        "bias_correction": False,
        "stop_gradient": True,
        "process_group": None,
    }
    assert keyword_only == list(defaults)[3:]
    assert parameters(available_backends) == ({}, [])


def test_buffers():
    buffers = {name: (tuple(buffer.shape), buffer.dtype) for name, buffer in IsoBN(7).named_buffers()}
    assert buffers == {
        "running_cov": ((7, 7), torch.float32),
        "running_std": ((7,), torch.float32),
        "scale": ((7,), torch.float32),
        "num_batches_tracked": ((), torch.int64),
    }
    assert list(IsoBN(7).state_dict()) == list(buffers)


def test_methods():
    for name in ("reset_running_stats", "refresh_scale", "load_published_statistics", "convert_sync_isobn"):
        assert callable(getattr(IsoBN, name))


def test_available_backends():
    names = available_backends()
    assert isinstance(names, tuple)
    assert set(names) <= {"reference", "cpu", "triton", "cuda"}
    assert names[-1] == "reference", "fastest first, and the reference always runs"
    for name in names:
        assert name == backends.load(name).name
        assert backends.load(name).unavailable_reason() is None
    for name in set(backends.NAMES) - set(names):
        assert backends.load(name).unavailable_reason()


def test_import_does_not_initialise_cuda_nor_load_what_is_optional():
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import isobn_kernels\n"
        "isobn_kernels.available_backends(), isobn_kernels.IsoBN(3)\n"
        "loaded = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(torch.cuda.is_initialized(), *loaded)"
    )
    initialised, *loaded = python(code).split()
    assert initialised == "False"
    assert not set(loaded) & {"numpy", "transformers", "sentence_transformers", "sklearn", "datasets", "matplotlib"}


def test_environment_variable_replaces_auto_and_nothing_else():
    code = (
        "import torch, isobn_kernels\n"
        "from isobn_kernels import backends\n"
        "from isobn_kernels.state import Where\n"
        "for name in ('auto', *isobn_kernels.available_backends()):\n"
        "    print(name, backends.select(Where(name), torch.ones(2, 3)).name)"
    )
    found = dict(line.split() for line in python(code, ISOBN_BACKEND="reference").splitlines())
    assert found == {"auto": "reference", **{name: name for name in available_backends()}}


@pytest.mark.parametrize("value", ["", "none of ours"])
def test_environment_variable_that_cannot_be_followed_changes_nothing(value):
    code = (
        "import torch\n"
        "from isobn_kernels import backends\n"
        "from isobn_kernels.state import Where\n"
        "print(backends.select(Where('auto'), torch.ones(2, 3)).name)"
    )
    assert python(code, ISOBN_BACKEND=value) == available_backends()[0]


def test_every_public_name_is_documented():
    methods = (IsoBN.refresh_scale, IsoBN.reset_running_stats, IsoBN.convert_sync_isobn)
    for function in (IsoBN, isobn, available_backends, *methods):
        assert inspect.getdoc(function)


def test_private_names_of_pytorch_are_in_one_file():
    """They may change in any release; each has its reason there."""
    package = Path(isobn_kernels.__file__).parent
    private = re.compile(r"\b(torch|dist|forward_ad|fx)(\.\w+)*\._[a-zA-Z]|from torch\S* import .*\b_[a-z]")
    found = {
        str(path.relative_to(package)) for path in package.rglob("*.py") if private.search(path.read_text("utf-8"))
    }
    assert found <= {"_torch_internals.py", "backends/cuda.py"}  # the latter: the stream of a GPU, in one place too
    assert "_torch_internals.py" in found
