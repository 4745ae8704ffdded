"""The layer: its state, and what happens to it in moves, copies, checkpoints and by hand."""

import copy
import importlib
import pickle
import warnings

import oracle
import pytest
import torch
from helpers import HALF_DTYPES, State, batch, python, same_bits, warm
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
    """Built without memory, given some: as new."""
    layer = IsoBN(7, backend=case.backend, device="meta")
    assert all(buffer.is_meta for buffer in layer.buffers())
    layer.to_empty(device=case.device)
    assert is_initial(layer)
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 7), IsoBN(7))
    assert model[1].running_cov.is_meta
    assert model.half()[1].running_cov.is_meta  # still without memory
    assert is_initial(model.to_empty(device=case.device)[1])
    assert is_initial(nn.utils.skip_init(IsoBN, 7, device=case.device))


def test_meta_device_where_some_statistics_are_loaded_before(case, layer):
    """`to_empty` drops what was loaded, as it drops weights; nothing is left as it was found."""
    other = IsoBN(7, backend=case.backend, device="meta")
    other.load_state_dict({"running_cov": layer.running_cov.clone()}, strict=False, assign=True)
    assert is_initial(other.to_empty(device=case.device))


def test_reset_parameters_initialises_as_torch_modules_do(case, layer):
    """The recipes of FSDP2 and others: memory, then `reset_parameters` of every module that has it."""
    model = nn.Sequential(nn.Linear(6, 7), nn.Sequential(layer, nn.Linear(7, 2))).to_empty(device=case.device)
    for buffer in layer.buffers():
        buffer.fill_(7)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert is_initial(layer)
    # Every layer of torch.nn with buffers has the method; so has this one.
    assert callable(nn.BatchNorm1d(7).reset_parameters)


ROUTES = {
    "load_state_dict": lambda layer, half: layer.load_state_dict(half, strict=False, assign=True),
    "assignment": lambda layer, half: [setattr(layer, name, tensor) for name, tensor in half.items()],
    "data": lambda layer, half: [setattr(getattr(layer, name), "data", tensor) for name, tensor in half.items()],
    "_buffers": lambda layer, half: layer._buffers.update(half),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("route", ROUTES)
def test_statistics_of_half_precision_are_taken_up_in_float32(case, layer, route, dtype, training):
    """Each route past `.half()`: float32 again at the next forward, from the rounded values, said once."""
    half = {name: buffer.to(dtype) for name, buffer in layer.named_buffers() if buffer.is_floating_point()}
    expected = copy.deepcopy(layer)
    for name, tensor in half.items():
        getattr(expected, name).copy_(tensor)
    ROUTES[route](layer, half)
    held = list(layer.buffers())
    layer.train(training)
    expected.train(training)
    x = batch(17, 7, 9, device=case.device)
    with pytest.warns(UserWarning, match=rf"had become {dtype}.*MixedPrecision"):
        out = layer(x)
    assert same_bits(out, expected(x))
    assert_same_buffers(layer, expected)
    assert all(a is b for a, b in zip(held, layer.buffers(), strict=True))  # DDP may hold them
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same_bits(layer(x), expected(x))


@pytest.mark.parametrize("name", ["running_cov", "running_std", "scale"])
def test_one_statistic_of_half_precision(case, layer, name):
    expected = copy.deepcopy(layer)
    getattr(expected, name).copy_(getattr(layer, name).bfloat16())
    setattr(layer, name, getattr(layer, name).bfloat16())
    x = batch(17, 7, 9, device=case.device)
    with pytest.warns(UserWarning, match=rf"\({name}\) had become torch.bfloat16"):
        assert same_bits(layer(x), expected(x))
    assert_same_buffers(layer, expected)


def test_new_statistics_of_half_precision_have_lost_nothing(case):
    """Which is what FSDP in mixed precision does to a new model."""
    layer, expected = (IsoBN(7, backend=case.backend, device=case.device) for _ in range(2))
    for buffer in (layer.running_cov, layer.running_std, layer.scale):
        buffer.data = buffer.bfloat16()
    x = batch(17, 7, dtype=torch.bfloat16, device=case.device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = layer(x)
    assert same_bits(out, expected(x))
    assert_same_buffers(layer, expected)


def test_statistics_that_float16_cannot_hold_are_refused(case, layer):
    layer.running_cov.mul_(1e6)
    layer.running_cov.data = layer.running_cov.half()
    before = copy.deepcopy(layer)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"running_cov of IsoBN has become torch.float16 and holds Inf .*FSDP"):
            layer(batch(17, 7, device=case.device))
        assert_same_buffers(layer, before)


def test_half_precision_in_inference_mode_and_in_functional_call(case, layer):
    x = batch(17, 7, 9, device=case.device)
    half = {name: b.bfloat16() if b.is_floating_point() else b.clone() for name, b in layer.named_buffers()}
    expected = copy.deepcopy(layer)
    expected.load_state_dict(half)
    given = {name: tensor.clone() for name, tensor in half.items()}
    with pytest.warns(UserWarning, match="had become"):
        out = torch.func.functional_call(layer, given, (x,))
    layer.load_state_dict(half, assign=True)
    with torch.inference_mode(), pytest.warns(UserWarning, match="had become"):
        assert same_bits(layer(x), out)
    assert same_bits(out, expected(x))
    assert_same_buffers(layer, expected)
    assert all(same_bits(given[name], buffer) for name, buffer in expected.named_buffers())
    assert same_bits(layer(x.clone().requires_grad_()).detach(), expected(x))


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


# ---- torch.fx ----


class Calls(nn.Module):
    """Twice, once by keyword, and nested."""

    def __init__(self, layer):
        super().__init__()
        self.inner = nn.ModuleDict({"norm": layer})

    def forward(self, x):
        return self.inner["norm"](x=self.inner["norm"](x).tanh())


def nodes(traced):
    return [(node.op, str(node.target)) for node in traced.graph.nodes if node.op not in ("placeholder", "output")]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_symbolic_trace_gives_one_node(case, layer, training):
    """As batch norm does: the layer itself, which goes on in the mode and with the statistics of the traced model."""
    model = nn.Sequential(nn.Linear(6, 7), layer, nn.Linear(7, 2)).to(case.device).train(training)
    plain = nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7), nn.Linear(7, 2)).train(training)
    eager = copy.deepcopy(model)
    traced = torch.fx.symbolic_trace(model)
    assert nodes(traced) == nodes(torch.fx.symbolic_trace(plain))
    assert traced.get_submodule("1") is layer
    x = torch.ones(3, 6, device=case.device)
    for mode in (training, not training):
        assert same_bits(traced.train(mode)(x), eager.train(mode)(x))
    assert_same_buffers(layer, eager[1])
    for again in (pickle.loads(pickle.dumps(traced)), copy.deepcopy(traced), torch.fx.symbolic_trace(traced)):
        assert same_bits(again.eval()(x), eager.eval()(x))
    assert same_bits(torch.fx.Transformer(traced).transform()(x), eager(x))


def test_symbolic_trace_of_several_calls(case, layer):
    model, eager = Calls(layer).eval(), Calls(copy.deepcopy(layer)).eval()
    traced = torch.fx.symbolic_trace(model)
    assert [op for op, _ in nodes(traced)] == ["call_module", "call_method", "call_module"]
    x = batch(5, 7, device=case.device)
    assert same_bits(traced(x), eager(x))


def test_symbolic_trace_of_the_layer_alone(case, layer):
    """One call of the function, as of `torch.nn.functional.batch_norm` for a batch norm alone."""
    traced = torch.fx.symbolic_trace(layer.eval())
    assert nodes(traced)[-1][0] == "call_function"
    x = batch(5, 7, device=case.device)
    assert same_bits(traced(x), layer(x))


def test_symbolic_trace_of_a_layer_with_hooks(case, layer):
    """What a hook does is recorded, once."""
    layer.register_forward_hook(lambda module, args, out: out + 1)
    layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    model = nn.Sequential(layer, nn.Tanh()).eval()
    x = batch(5, 7, device=case.device)
    assert same_bits(torch.fx.symbolic_trace(model)(x), model(x))


def test_graph_quantization_leaves_the_layer_alone(layer):
    quantize_fx = pytest.importorskip("torch.ao.quantization.quantize_fx", reason="needs torch.ao.quantization")
    from torch.ao.quantization import get_default_qconfig_mapping

    torch.use_deterministic_algorithms(False)  # quantized kernels have no such version
    model = nn.Sequential(nn.Linear(6, 7), layer, nn.Linear(7, 2)).eval()
    x = torch.randn(8, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this quantization moves to torchao
        prepared = quantize_fx.prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping(), (x,))
        prepared(x)
        quantized = quantize_fx.convert_fx(prepared)
    assert isinstance(quantized.get_submodule("1"), IsoBN)
    torch.testing.assert_close(quantized(x), model(x), atol=0.1, rtol=0.1)


# ---- Imported again ----


def test_reload_and_import_anew():
    """As in a notebook: `importlib.reload` of every module, and a second import after the first was forgotten."""
    code = """
import importlib, pkgutil, sys, torch, warnings
import isobn_kernels
warnings.filterwarnings("error", message=".*[Oo]verrid")  # of a kernel that was not taken away

def check(layer, compiled):
    x = torch.randn(16, 8, requires_grad=True)
    before = layer.num_batches_tracked.item()
    layer(x).sum().backward()
    compiled(x).sum().backward()
    torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    assert layer.num_batches_tracked == before + 3
    isobn_kernels.fold_isobn(torch.nn.Sequential(isobn_kernels.IsoBN(8), torch.nn.Linear(8, 2)))
    try:
        torch.vmap(layer)(torch.randn(3, 16, 8))
    except RuntimeError as error:
        assert "not supported" in str(error)
    else:
        raise AssertionError("torch.vmap was not refused")

def new():
    layer = isobn_kernels.IsoBN(8)
    return layer, torch.compile(layer, backend="aot_eager", fullgraph=True)

layers = [new()]
check(*layers[0])
for module in pkgutil.walk_packages(isobn_kernels.__path__, "isobn_kernels."):
    if module.name in sys.modules:
        importlib.reload(sys.modules[module.name])
        check(*layers[0])
importlib.reload(isobn_kernels)
for _ in range(2):
    layers.append(new())
    for name in [name for name in sys.modules if name.partition(".")[0] == "isobn_kernels"]:
        del sys.modules[name]
    import isobn_kernels
layers.append(new())
for layer in layers:
    check(*layer)
print(len(layers))
"""
    assert python(code) == "4"


def test_public_names_after_reload():
    import isobn_kernels

    before = dict(vars(isobn_kernels))
    again = importlib.reload(isobn_kernels)
    assert all(getattr(again, name) is before[name] for name in again.__all__)
