"""The layer: its state, and what happens to it in moves, copies, checkpoints and by hand."""

import copy
import pickle

import oracle
import pytest
import torch
from helpers import HALF_DTYPES, State, batch, same_bits, warm
from tolerance import BOUNDS, assert_right, scale_rightly, train_rightly
from torch import nn

from isobn_kernels import IsoBN, isobn

BUFFERS = ["running_cov", "running_std", "scale", "num_batches_tracked"]


@pytest.fixture
def layer(case):
    """Three steps old."""
    layer = IsoBN(7, backend=case.backend, device=case.device)
    for step in range(3):
        layer(batch(17, 7, step, device=case.device))
    return layer


def assert_same_buffers(a, b):
    assert [name for name, _ in a.named_buffers()] == BUFFERS
    for name in BUFFERS:
        assert same_bits(getattr(a, name), getattr(b, name)), name


def is_initial(layer):
    zero = not layer.running_cov.any() and not layer.running_std.any() and not layer.num_batches_tracked.any()
    return zero and bool((layer.scale == 1).all())


# ---- State and steps ----


def test_initial_state(case):
    layer = IsoBN(7, backend=case.backend, device=case.device)
    assert layer.training
    assert is_initial(layer)
    assert list(layer.parameters()) == []


def test_module_is_the_functional_form_on_its_buffers(case):
    layer = IsoBN(7, 1e-2, 0.2, 0.4, bias_correction=True, backend=case.backend, device=case.device)
    twin = copy.deepcopy(layer)
    for step in range(3):
        x = batch(17, 7, step, device=case.device)
        expected = isobn(
            x,
            twin.running_cov,
            twin.running_std,
            training=True,
            momentum=0.2,
            eps=1e-2,
            beta=0.4,
            backend=case.backend,
            scale=twin.scale,
            num_batches_tracked=twin.num_batches_tracked,
            bias_correction=True,
        )
        assert same_bits(layer(x), expected)
        assert_same_buffers(layer, twin)


def test_evaluation_applies_the_stored_scale_and_changes_nothing(case, layer):
    before = copy.deepcopy(layer)
    x = batch(17, 7, 9, device=case.device)
    assert same_bits(layer.eval()(x), x * before.scale)
    assert_same_buffers(layer, before)
    assert not same_bits(layer.train()(x), x * before.scale)
    assert layer.num_batches_tracked == 4


def test_counter_counts_updates_only(case):
    layer = IsoBN(7, backend=case.backend, device=case.device)
    for N, counted in ((17, 1), (1, 1), (0, 1), (2, 2), (300, 3)):
        layer(batch(N, 7, device=case.device))
        assert layer.num_batches_tracked == counted
    layer.eval()(batch(17, 7, device=case.device))
    assert layer.num_batches_tracked == 3


def test_buffers_keep_their_addresses(case, layer):
    """What a CUDA graph or a raw pointer held elsewhere relies on."""
    before = [buffer.data_ptr() for buffer in layer.buffers()]
    layer(batch(17, 7, device=case.device))
    layer(batch(1, 7, device=case.device))
    layer.eval()(batch(17, 7, device=case.device))
    layer.refresh_scale()
    layer.reset_running_stats()
    layer.load_state_dict(copy.deepcopy(layer.state_dict()))
    layer.load_published_statistics(torch.eye(7), torch.ones(7))
    assert [buffer.data_ptr() for buffer in layer.buffers()] == before


def test_output_is_not_a_buffer(case, layer):
    """Nothing that a caller gets is overwritten by the next step."""
    x = batch(17, 7, device=case.device)
    out = layer(x)
    kept = out.clone()
    layer(batch(17, 7, 5, device=case.device))
    assert same_bits(out, kept)


def test_reset_running_stats(layer):
    layer.reset_running_stats()
    assert is_initial(layer)


def test_inference_mode(case, layer):
    """Training of the statistics works there too, on ordinary buffers and on ones born inside."""
    twin = copy.deepcopy(layer)
    x = batch(17, 7, 9, device=case.device)
    expected = twin(x)
    with torch.inference_mode():
        assert same_bits(layer(x), expected)
        inside = IsoBN(7, backend=case.backend, device=case.device)
        inside(x)
        inside(x)
        assert inside.num_batches_tracked == 2
        assert same_bits(inside.eval()(x), x * inside.scale)
    assert_same_buffers(layer, twin)
    x = x.clone().requires_grad_()
    layer(x).sum().backward()
    assert same_bits(x.grad, layer.scale.expand(17, 7))


# ---- Checkpoints and copies ----


def test_state_dict_round_trip(case, layer, tmp_path):
    assert list(layer.state_dict()) == BUFFERS
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    loaded = IsoBN(7, backend=case.backend, device=case.device)
    loaded.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    assert_same_buffers(loaded, layer)
    x = batch(17, 7, 9, device=case.device)
    assert same_bits(loaded(x), layer(x))
    assert_same_buffers(loaded, layer)


def test_state_dict_of_another_width_is_refused(case, layer):
    other = IsoBN(8, backend=case.backend, device=case.device)
    with pytest.raises(RuntimeError, match="size mismatch for running_cov"):
        other.load_state_dict(layer.state_dict())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies(case, layer, duplicate):
    twin = duplicate(layer)
    assert repr(twin) == repr(layer)
    assert_same_buffers(twin, layer)
    x = batch(17, 7, 9, device=case.device)
    before = duplicate(layer)
    out = layer(x)
    assert_same_buffers(twin, before)  # nothing is shared
    assert same_bits(twin(x), out)
    assert_same_buffers(twin, layer)


# ---- Dtypes and devices ----


@pytest.mark.parametrize(
    "cast",
    [nn.Module.half, nn.Module.bfloat16, *(lambda m, d=d: m.to(d) for d in HALF_DTYPES)],
    ids=["half", "bfloat16", "to(float16)", "to(bfloat16)"],
)
def test_half_precision_leaves_the_statistics_alone(case, layer, cast):
    model = nn.Sequential(nn.Linear(6, 7), layer)
    before = copy.deepcopy(layer)
    cast(model)
    assert model[0].weight.dtype in HALF_DTYPES
    assert_same_buffers(layer, before)
    x = torch.ones(3, 6, dtype=model[0].weight.dtype)
    assert model(x).dtype == x.dtype


def test_half_precision_on_another_device_as_well(layer):
    moved = copy.deepcopy(layer).to("meta", torch.float16)
    assert moved.running_cov.is_meta
    assert moved.running_cov.dtype == torch.float32
    assert moved.num_batches_tracked.dtype == torch.int64


def test_double_and_back(case, layer):
    before = copy.deepcopy(layer)
    layer.double()
    assert [buffer.dtype for buffer in layer.buffers()] == [torch.float64] * 3 + [torch.int64]
    out = layer.eval()(batch(17, 7, dtype=torch.float64, device=case.device))
    assert out.dtype == torch.float64
    layer.float()
    assert_same_buffers(layer, before)


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16])
def test_double_then_half_gives_float32(layer, cast):
    before = copy.deepcopy(layer)
    cast(layer.double())
    assert_same_buffers(layer, before)


def test_training_in_double(case, layer):
    layer.double()
    state = State(*layer.buffers()).clone()
    x = batch(17, 7, 9, torch.float64, case.device)
    out, _ = train_rightly(x, state, case, bounds=BOUNDS["float64"])
    assert same_bits(layer(x), out)
    for name, tensor in state.tensors.items():
        assert same_bits(getattr(layer, name), tensor), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_default_dtype_at_construction_does_not_matter(case, dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        layer = IsoBN(7, backend=case.backend, device=case.device)
        out = layer(batch(17, 7, dtype=torch.bfloat16, device=case.device))
    finally:
        torch.set_default_dtype(before)
    assert [buffer.dtype for buffer in layer.buffers()] == [torch.float32] * 3 + [torch.int64]
    assert out.dtype == torch.bfloat16


def test_meta_device(case):
    """Built without memory, given some, reset: as new."""
    layer = IsoBN(7, backend=case.backend, device="meta")
    assert all(buffer.is_meta for buffer in layer.buffers())
    layer.to_empty(device=case.device)
    layer.reset_running_stats()
    assert is_initial(layer)
    with torch.device("meta"):
        assert IsoBN(7).running_cov.is_meta


def test_reset_and_refresh_leave_no_trace_in_autograd(layer):
    layer.refresh_scale()
    layer.reset_running_stats()
    assert not any(buffer.requires_grad for buffer in layer.buffers())


# ---- Statistics by hand ----


@pytest.mark.parametrize("bias_correction", [False, True])
def test_refresh_scale(case, bias_correction):
    layer = IsoBN(7, 1e-2, 0.2, 0.4, bias_correction=bias_correction, backend=case.backend, device=case.device)
    state = warm(7, device=case.device)
    layer.load_state_dict(state.tensors)
    layer.scale.fill_(3)
    layer.refresh_scale()
    options = {"momentum": 0.2, "eps": 1e-2, "beta": 0.4, "bias_correction": bias_correction}
    expected = scale_rightly(state, case, num_batches_tracked=state.num_batches_tracked, **options)
    assert same_bits(layer.scale, expected)
    for name in ("running_cov", "running_std", "num_batches_tracked"):
        assert same_bits(getattr(layer, name), state.tensors[name])


def test_refresh_scale_gives_the_scale_of_the_last_step(layer):
    """As near to the oracle: there is one rounding of the statistics between the two."""
    before, state = layer.scale.clone(), State(*layer.buffers()).oracle()
    layer.refresh_scale()
    expected = oracle.compute_scale(state.C, state.sigma)
    assert_right({"scale": layer.scale}, {"scale": before}, {"scale": expected})


def test_load_published_statistics(case, layer):
    state = warm(7, device=case.device)
    layer.load_published_statistics(state.running_cov, state.running_std)
    assert same_bits(layer.running_cov, state.running_cov)
    assert same_bits(layer.running_std, state.running_std)
    assert same_bits(layer.scale, scale_rightly(state, case))
    assert layer.num_batches_tracked == 3


@pytest.mark.parametrize(
    ("cov", "std", "message"),
    [
        (torch.eye(6), torch.ones(7), r"cov must have shape \(7, 7\), got \(6, 6\)"),
        (torch.eye(7), torch.ones(7, 1), r"std must have shape \(7,\), got \(7, 1\)"),
        (torch.eye(7), torch.full((7,), float("nan")), "std must be finite, got NaN or Inf"),
        (torch.full((7, 7), float("inf")), torch.ones(7), "cov must be finite, got NaN or Inf"),
    ],
    ids=["cov shape", "std shape", "std NaN", "cov Inf"],
)
def test_load_published_statistics_refuses(layer, cov, std, message):
    before = copy.deepcopy(layer)
    with pytest.raises(ValueError, match=message):
        layer.load_published_statistics(cov, std)
    assert_same_buffers(layer, before)


# ---- In words ----


def test_repr():
    assert repr(IsoBN(7)) == "IsoBN(7, eps=0.001, momentum=0.05, beta=0.5)"
    changed = IsoBN(7, 0.01, 0.1, 0.4, bias_correction=True, stop_gradient=False, backend="reference")
    expected = "eps=0.01, momentum=0.1, beta=0.4, bias_correction=True, stop_gradient=False, backend='reference'"
    assert repr(changed) == f"IsoBN(7, {expected})"
