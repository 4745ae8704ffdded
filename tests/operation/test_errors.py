"""Every error names the argument, says what was expected and what came, and leaves the state as it was."""

import math

import pytest
import torch
from helpers import assert_untouched, batch, warm

from isobn_kernels import IsoBN, backends, isobn
from isobn_kernels.backends.cpu import CpuBackend
from isobn_kernels.state import Where

F16, F32, F64 = torch.float16, torch.float32, torch.float64
X = torch.ones(17, 7)
STATE = warm(7)

# name: (changed arguments, exception, words that the message must hold: argument, expectation, what came)
BAD_ARGUMENTS = {
    "momentum below 0": ({"momentum": -0.1}, ValueError, ["momentum", "[0, 1]", "-0.1"]),
    "momentum above 1": ({"momentum": 1.5}, ValueError, ["momentum", "[0, 1]", "1.5"]),
    "momentum NaN": ({"momentum": math.nan}, ValueError, ["momentum", "[0, 1]", "nan"]),
    "momentum None": ({"momentum": None}, TypeError, ["momentum", "float", "NoneType"]),
    "momentum tensor": ({"momentum": torch.tensor(0.1)}, TypeError, ["momentum", "float", "Tensor"]),
    "eps 0": ({"eps": 0.0}, ValueError, ["eps", "above 0", "0.0"]),
    "eps below 0": ({"eps": -1e-3}, ValueError, ["eps", "above 0", "-0.001"]),
    "eps NaN": ({"eps": math.nan}, ValueError, ["eps", "above 0", "nan"]),
    "eps infinite": ({"eps": math.inf}, ValueError, ["eps", "finite", "inf"]),
    "eps text": ({"eps": "1e-3"}, TypeError, ["eps", "float", "str"]),
    "beta below 0": ({"beta": -0.5}, ValueError, ["beta", "0 or above", "-0.5"]),
    "beta NaN": ({"beta": math.nan}, ValueError, ["beta", "0 or above", "nan"]),
    "beta infinite": ({"beta": math.inf}, ValueError, ["beta", "finite", "inf"]),
    "beta None": ({"beta": None}, TypeError, ["beta", "float", "NoneType"]),
    "group text": ({"process_group": "gloo"}, TypeError, ["process_group", "ProcessGroup", "group.WORLD", "str"]),
    "group of others": (
        {"process_group": -100},
        TypeError,
        ["process_group", "ProcessGroup", "int", "does not belong"],
    ),
}

BAD_TENSORS = {
    "x list": ({"x": [1.0] * 7}, TypeError, ["x", "Tensor", "list"]),
    "x of 8 features": ({"x": torch.ones(17, 8)}, ValueError, ["x", "(..., 7)", "(17, 8)"]),
    "x of no dimension": ({"x": torch.tensor(1.0)}, ValueError, ["x", "(..., 7)", "()"]),
    "x integer": ({"x": X.long()}, TypeError, ["x", "float16, bfloat16, float32 or float64", "torch.int64"]),
    "x complex": ({"x": X.cfloat()}, TypeError, ["x", "float32", "torch.complex64"]),
    "x float64, state float32": ({"x": X.double()}, TypeError, ["running_cov", "torch.float64", "torch.float32"]),
    "x on meta": ({"x": X.to("meta")}, ValueError, ["running_cov", "meta", "cpu"]),
    "cov None": ({"running_cov": None}, TypeError, ["running_cov", "Tensor", "NoneType"]),
    "cov of 8 features": ({"running_cov": torch.eye(8)}, ValueError, ["running_cov", "(7, 7)", "(8, 8)"]),
    "cov not square": ({"running_cov": torch.ones(7, 8)}, ValueError, ["running_cov", "(7, 7)", "(7, 8)"]),
    "cov float16": ({"running_cov": torch.eye(7, dtype=F16)}, TypeError, ["running_cov", "torch.float32", "float16"]),
    "cov float64": ({"running_cov": torch.eye(7, dtype=F64)}, TypeError, ["running_cov", "torch.float32", "float64"]),
    "cov on meta": ({"running_cov": torch.eye(7, device="meta")}, ValueError, ["running_cov", "cpu", "meta"]),
    "cov not contiguous": (
        {"running_cov": torch.eye(14)[::2, ::2]},
        ValueError,
        ["running_cov", "contiguous", "(28, 2)"],
    ),
    "std None": ({"running_std": None}, TypeError, ["running_std", "Tensor", "NoneType"]),
    "std a matrix": ({"running_std": torch.ones(7, 1)}, ValueError, ["running_std", "(num_features,)", "(7, 1)"]),
    "std empty": ({"running_std": torch.ones(0)}, ValueError, ["running_std", "at least 1", "(0,)"]),
    "std bfloat16": (
        {"running_std": torch.ones(7, dtype=torch.bfloat16)},
        TypeError,
        ["running_std", "torch.float32", "bfloat16"],
    ),
    "std on meta": ({"running_std": torch.ones(7, device="meta")}, ValueError, ["running_std", "cpu", "meta"]),
    "std not contiguous": ({"running_std": torch.ones(14)[::2]}, ValueError, ["running_std", "contiguous", "(2,)"]),
    "scale of 8 features": ({"scale": torch.ones(8)}, ValueError, ["scale", "(7,)", "(8,)"]),
    "scale float64": ({"scale": torch.ones(7, dtype=F64)}, TypeError, ["scale", "torch.float32", "float64"]),
    "scale on meta": ({"scale": torch.ones(7, device="meta")}, ValueError, ["scale", "cpu", "meta"]),
    "scale expanded": ({"scale": torch.ones(1).expand(7)}, ValueError, ["scale", "contiguous", "(0,)"]),
    "count float": ({"num_batches_tracked": torch.tensor(1.0)}, TypeError, ["num_batches_tracked", "int64", "float32"]),
    "count int32": (
        {"num_batches_tracked": torch.tensor(1, dtype=torch.int32)},
        TypeError,
        ["num_batches_tracked", "int64", "int32"],
    ),
    "count a vector": ({"num_batches_tracked": torch.tensor([1])}, ValueError, ["num_batches_tracked", "()", "(1,)"]),
    "no count to correct by": (
        {"num_batches_tracked": None, "bias_correction": True},
        ValueError,
        ["bias_correction", "num_batches_tracked"],
    ),
}


def check_refused(call, exception, words, state):
    before = state.clone()
    with pytest.raises(exception) as caught:
        call()
    message = str(caught.value)
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"
    assert_untouched(state, before)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", [*BAD_ARGUMENTS, *BAD_TENSORS])
def test_functional_refuses(name, training):
    changed, exception, words = (BAD_ARGUMENTS | BAD_TENSORS)[name]
    arguments = {"x": X, **STATE.tensors, **changed}
    check_refused(lambda: isobn(training=training, **arguments), exception, words, STATE)


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_constructor_refuses(name):
    changed, exception, words = BAD_ARGUMENTS[name]
    check_refused(lambda: IsoBN(7, **changed), exception, words, STATE)


@pytest.mark.parametrize(
    ("num_features", "exception", "words"),
    [
        (0, ValueError, ["num_features", "at least 1", "0"]),
        (-3, ValueError, ["num_features", "at least 1", "-3"]),
        (7.0, TypeError, ["num_features", "int", "float"]),
        (True, TypeError, ["num_features", "int", "bool"]),
        (None, TypeError, ["num_features", "int", "NoneType"]),
    ],
)
def test_constructor_refuses_num_features(num_features, exception, words):
    check_refused(lambda: IsoBN(num_features), exception, words, STATE)


@pytest.mark.parametrize(
    ("name", "tensor", "exception", "words"),
    [
        ("running_cov", torch.eye(7, dtype=F64), TypeError, "must be torch.float32 for running_std in torch.float32"),
        ("running_std", torch.ones(7, dtype=F64), TypeError, "must be torch.float64 for running_std in torch.float64"),
        ("running_cov", torch.eye(7, device="meta"), ValueError, "must be on the device of running_std, cpu, got meta"),
        ("scale", torch.ones(8), ValueError, "must have shape (7,), got (8,)"),
    ],
)
def test_refresh_scale_refuses(name, tensor, exception, words):
    """There is no batch: the words are about the statistics."""
    layer = IsoBN(7)
    layer.load_state_dict(STATE.tensors)
    layer._buffers[name] = tensor
    with pytest.raises(exception) as caught:
        layer.refresh_scale()
    assert words in str(caught.value)
    assert " x" not in str(caught.value)
    assert "module.double()" not in str(caught.value)


def test_convert_sync_isobn_refuses():
    model = torch.nn.Sequential(IsoBN(7))
    with pytest.raises(RuntimeError, match="init_process_group first"):
        IsoBN.convert_sync_isobn(model)
    with pytest.raises(TypeError, match=r"process_group must be .* got list"):
        IsoBN.convert_sync_isobn(model, [0, 1])
    assert model[0].process_group is None


def test_process_group_that_is_gone():
    """Training says so and leaves the state alone; evaluation needs no group."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    layer = IsoBN(7, process_group=torch.distributed.group.WORLD)
    torch.distributed.destroy_process_group()
    layer.load_state_dict(STATE.tensors)
    state = type(STATE)(*layer.buffers())
    check_refused(lambda: layer(X), RuntimeError, ["process_group", "destroyed", "init_process_group"], state)
    assert layer.eval()(X).shape == X.shape


def test_pytorch_without_distributed(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    for call in (lambda: IsoBN(7, process_group="gloo"), lambda: IsoBN.convert_sync_isobn(IsoBN(7))):
        with pytest.raises(RuntimeError, match=r"process_group needs torch\.distributed"):
            call()
    IsoBN(7)(X)


def test_unknown_backend():
    words = ["backend", "auto", "reference", "cpu", "'fastest'"]
    check_refused(lambda: IsoBN(7, backend="fastest"), ValueError, words, STATE)
    for training in (True, False):
        for scale in (STATE.scale, None):
            arguments = {"x": X, **STATE.tensors, "scale": scale}
            check_refused(
                lambda a=arguments, t=training: isobn(training=t, backend="fastest", **a), ValueError, words, STATE
            )


def test_backend_that_cannot_run():
    """Asked for by name it says why, and what to do; "auto" does without it."""
    words = ["'cpu'", "its extension is missing", "install a compiler"]
    arguments = {"x": X, **STATE.tensors}
    with backends.replaced(CpuBackend(None, "its extension is missing: install a compiler")):
        check_refused(lambda: isobn(training=True, backend="cpu", **arguments), RuntimeError, words, STATE)
        check_refused(lambda: isobn(backend="cpu", **{**arguments, "scale": None}), RuntimeError, words, STATE)
        assert "cpu" not in backends.available_backends()
        assert backends.select(Where("auto"), X).name != "cpu"


def test_backend_that_cannot_take_the_tensor():
    class Picky(CpuBackend):
        def unsupported_reason(self, x):
            return f"x is on {x.device}"

    with backends.replaced(Picky(None)):
        arguments = {"x": X, "training": True, "backend": "cpu", **STATE.tensors}
        check_refused(lambda: isobn(**arguments), RuntimeError, ["'cpu'", "x is on cpu"], STATE)


@pytest.mark.parametrize(
    ("x", "exception", "words"),
    [
        (torch.ones(17, 8), ValueError, ["x", "(..., 7)", "(17, 8)"]),
        (X.double(), TypeError, ["running_cov", "torch.float64", "module.double()"]),
        (X.int(), TypeError, ["x", "float32", "torch.int32"]),
        (X.to("meta"), ValueError, ["running_cov", "meta", "cpu"]),
    ],
    ids=["features", "dtype", "integer", "device"],
)
@pytest.mark.parametrize("training", [True, False])
def test_module_refuses(case, x, exception, words, training):
    layer = IsoBN(7, backend=case.backend)
    layer.load_state_dict(STATE.tensors)
    layer.train(training)
    state = type(STATE)(*layer.buffers())
    check_refused(lambda: layer(x), exception, words, state)


def test_module_in_double_refuses_float32(case):
    layer = IsoBN(7, backend=case.backend).double()
    state = type(STATE)(*layer.buffers())
    check_refused(lambda: layer(X), TypeError, ["running_cov", "torch.float32", "torch.float64"], state)


@pytest.mark.parametrize("convert", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr, torch.Tensor.to_mkldnn])
@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning")
def test_input_that_is_not_strided(case, convert):
    x = convert(X)
    words = ["x", str(x.layout)]
    check_refused(
        lambda: isobn(x, **STATE.tensors, training=True, backend=case.backend), (TypeError, ValueError), words, STATE
    )


@pytest.mark.parametrize("name", ["running_cov", "running_std", "scale"])
def test_statistics_that_require_grad(case, name):
    """A backend that cannot write to such a tensor says so before it has written to another."""
    state = warm(7, device=case.device)
    before = state.clone()
    state.tensors[name].requires_grad_()
    try:
        isobn(batch(17, 7, device=case.device), **state.tensors, training=True, backend=case.backend)
    except (RuntimeError, ValueError):
        assert_untouched(state, before)
    else:
        assert state.num_batches_tracked == before.num_batches_tracked + 1
