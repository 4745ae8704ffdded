"""What PyTorch asks of every module in `torch.nn`, asked of IsoBN: on each backend, with each option, in both modes."""

import copy
import io
import pickle

import oracle
import pytest
import torch
from cases import CASES, REFERENCE, skip_unless_available
from helpers import State, batch, fresh, same_bits, upstream, warm
from tolerance import assert_right, named
from torch import nn

from isobn_kernels import IsoBN

D = 7
BUFFERS = {
    "running_cov": ((D, D), torch.float32),
    "running_std": ((D,), torch.float32),
    "scale": ((D,), torch.float32),
    "num_batches_tracked": ((), torch.int64),
}
OPTIONS = [
    {},
    {"bias_correction": True},
    {"stop_gradient": False},
    {"eps": 1e-2, "momentum": 0.3, "beta": 0.4, "bias_correction": True, "stop_gradient": False},
]
by_options = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ", ".join(o) or "default")
by_mode = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that PyTorch can use")


@pytest.fixture(params=[case for case in CASES if case.isa in (None, "baseline")], ids=lambda case: case.name)
def case(request):
    """One instruction set of the CPU kernels: nothing here depends on it."""
    skip_unless_available(request.param)
    with request.param.selected():
        yield request.param


def new(case, **options):
    return IsoBN(D, backend=case.backend, device=case.device, **options)


def used(case, training=True, dtype=torch.float32, **options):
    """A layer that has seen something."""
    layer = new(case, **options).to(dtype)
    layer.load_state_dict(warm(D, dtype, case.device).tensors)
    return layer.train(training)


def state_of(layer):
    return State(*layer.buffers())


def run(layer, x, dout):
    """(out, dx)."""
    x = x.detach().requires_grad_()
    out = layer(x)
    return out.detach(), *torch.autograd.grad(out, x, dout)


def assert_same_layer(a, b):
    """Everything that a user can see of the two is equal, the bits of the state included."""
    assert type(a) is type(b)
    assert repr(a) == repr(b)
    assert a.training == b.training
    assert list(a.state_dict()) == list(b.state_dict()) == list(BUFFERS)
    for name, tensor in a.state_dict().items():
        assert same_bits(tensor, b.state_dict()[name]), name


def assert_works_alike(a, b, case):
    """Also when used; ``a`` and ``b`` may not share anything."""
    for step in range(2):
        x, dout = (f(9, D, step, device=case.device) for f in (batch, upstream))
        for found, expected in zip(run(a, x, dout), run(b, x, dout), strict=True):
            assert same_bits(found, expected)
    assert_same_layer(a, b)


# ---- Construction ----


@by_options
def test_buffers_and_no_parameters(case, options):
    layer = new(case, **options)
    assert list(layer.parameters()) == []
    assert list(layer.children()) == []
    found = {name: (tuple(b.shape), b.dtype) for name, b in layer.named_buffers()}
    assert found == BUFFERS
    assert list(found) == list(layer.state_dict()), "a buffer that is not saved"
    assert not any(buffer.requires_grad for buffer in layer.buffers())
    assert not any(buffer.is_inference() for buffer in layer.buffers())
    assert layer.training


def test_construction_draws_no_random_numbers(case):
    before = torch.get_rng_state()
    new(case)
    assert torch.equal(torch.get_rng_state(), before)


@by_options
@pytest.mark.parametrize("form", ["argument", "string", "context", "default device"])
def test_device_at_construction(case, options, form):
    """As the argument, as a context, and as the default: all buffers are there. The meta device has no memory."""
    layers = {
        "argument": lambda: IsoBN(D, device=torch.device("meta"), **options),
        "string": lambda: IsoBN(D, device="meta", **options),
    }
    if form == "context":
        with torch.device("meta"):
            layer = IsoBN(D, **options)
    elif form == "default device":
        torch.set_default_device("meta")
        try:
            layer = IsoBN(D, **options)
        finally:
            torch.set_default_device(None)
    else:
        layer = layers[form]()
    assert all(buffer.is_meta for buffer in layer.buffers())
    assert {name: (tuple(b.shape), b.dtype) for name, b in layer.named_buffers()} == BUFFERS
    assert repr(layer) == repr(IsoBN(D, **options))


def test_argument_device_goes_before_the_context(case):
    with torch.device("meta"):
        assert not any(buffer.is_meta for buffer in new(case).buffers())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_there_is_no_dtype_to_choose(dtype):
    """The statistics are float32 at construction, whatever the default; ``.double()`` is the way to float64."""
    with pytest.raises(TypeError, match="dtype"):
        IsoBN(D, dtype=dtype)


def test_skip_init(case):
    """`torch.nn.utils.skip_init` builds without initialising; a state dict then fills the layer."""
    layer = nn.utils.skip_init(IsoBN, D, backend=case.backend, device=case.device)
    layer.load_state_dict(used(case).state_dict())
    assert_works_alike(layer, used(case), case)


# ---- Forward and backward ----


@by_mode
@by_options
@pytest.mark.parametrize("shape", [(9, D), (D,), (1, D), (3, 2, D), (2, 1, 3, D)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_forward_keeps_shape_dtype_and_device(case, options, shape, dtype, training):
    rows = torch.Size(shape[:-1]).numel()
    x = batch(rows, D, dtype=dtype, device=case.device).view(shape).requires_grad_()
    out = used(case, training, **options)(x)
    assert (out.shape, out.dtype, out.device) == (x.shape, x.dtype, x.device)
    assert out.data_ptr() != x.data_ptr(), "no module of torch.nn returns its input unasked"
    out.sum().backward()
    assert (x.grad.shape, x.grad.dtype, x.grad.device) == (x.shape, x.dtype, x.device)


@by_mode
@by_options
@pytest.mark.parametrize("shape", [(0, D), (0, 3, D), (3, 0, D)], ids=str)
def test_no_rows(case, options, shape, training):
    layer = used(case, training, **options)
    before = state_of(layer).clone()
    x = torch.empty(shape, device=case.device, requires_grad=True)
    out = layer(x)
    out.sum().backward()
    assert out.shape == x.grad.shape == shape
    for name, tensor in state_of(layer).tensors.items():
        assert same_bits(tensor, before.tensors[name]), name


@by_options
def test_meta_forward(options):
    for training in (True, False):
        layer = IsoBN(D, device="meta", **options).train(training)
        x = torch.empty(3, 2, D, device="meta", requires_grad=True)
        layer(x).sum().backward()
        assert x.grad.is_meta
        assert x.grad.shape == x.shape


def spread(t):
    """The same values, every second element of a larger tensor."""
    return torch.full((t.shape[0], 2 * t.shape[1]), float("nan"), dtype=t.dtype, device=t.device)[:, ::2].copy_(t)


@by_mode
@by_options
@pytest.mark.parametrize("which", ["x", "gradient", "both"])
@pytest.mark.parametrize("view", [spread, lambda t: t.T.contiguous().T], ids=["spread", "transposed"])
def test_non_contiguous(case, options, which, view, training):
    """The input and the gradient may lie in memory as they like: to the bit, or for plain PyTorch as right."""
    x, dout = (f(9, D, device=case.device) for f in (batch, upstream))
    x_view, dout_view = (view(t) if which in (name, "both") else t for name, t in (("x", x), ("gradient", dout)))
    plain, viewed = (used(case, training, **options) for _ in range(2))
    out, dx = run(plain, x, dout)
    out_view, dx_view = run(viewed, x_view, dout_view)
    if case is REFERENCE or case.name == "triton-gpu":
        numbers = {**options}
        exact = oracle.Layer(D, numbers.pop("stop_gradient", True), warm(D).oracle(), **numbers).train(training)
        truth = run(exact, x.cpu().double(), dout.cpu().double())
        found, reference = (
            named(state_of(layer), out=out, dx=dx) for layer, out, dx in ((viewed, out_view, dx_view), (plain, out, dx))
        )
        assert_right(found, reference, named(exact.state, out=truth[0], dx=truth[1]))
        return
    assert same_bits(out_view, out)
    assert same_bits(dx_view, dx)
    assert_same_layer(viewed, plain)


@by_mode
@by_options
def test_grad(case, options, training):
    """Against finite differences in float64, from the same state each time.

    In training with ``stop_gradient=True`` the gradient is not that of the forward, on purpose: the scale is taken for
    a constant. With momentum 0 it is one.
    """
    if training and options.get("stop_gradient", True):
        options = {**options, "momentum": 0.0}
    layer = used(case, training, torch.float64, **options)
    x = batch(5, D, dtype=torch.float64, device=case.device).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: copy.deepcopy(layer)(x), x)


@by_options
@pytest.mark.parametrize("how", ["evaluation", "training"])
def test_gradgrad(case, options, how):
    """In evaluation always. In training in the default mode, whose gradient is linear in dout; the other says no."""
    layer = used(case, how == "training", torch.float64, **{**options, "momentum": 0.0})
    x = batch(5, D, dtype=torch.float64, device=case.device).requires_grad_()
    if how == "training" and not options.get("stop_gradient", True):
        (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            dx.sum().backward()
        return
    assert torch.autograd.gradgradcheck(lambda x: copy.deepcopy(layer)(x), x)


@by_options
def test_training_and_evaluation_differ(case, options):
    layer = used(case, **options)
    x = batch(9, D, device=case.device)
    before = state_of(layer).clone()
    evaluated = layer.eval()(x)
    for name, tensor in state_of(layer).tensors.items():
        assert same_bits(tensor, before.tensors[name]), f"evaluation changed {name}"
    assert layer.train() is layer
    assert not same_bits(layer(x), evaluated)
    assert layer.num_batches_tracked == before.num_batches_tracked + 1
    assert layer.train(False) is layer
    assert not layer.training
    assert nn.Sequential(layer).train()[0].training


@by_mode
@by_options
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_forward_without_gradients(case, options, context, training):
    plain, under = (used(case, training, **options) for _ in range(2))
    x = batch(9, D, device=case.device)
    expected = plain(x.requires_grad_())
    with context():
        out = under(x)
    assert not out.requires_grad
    assert same_bits(out, expected.detach())
    assert_works_alike(under, plain, case)


@by_options
def test_hooks_see_the_forward_and_the_backward(case, options):
    layer, seen = used(case, **options), []
    layer.register_forward_pre_hook(lambda module, args: seen.append("before"))
    layer.register_forward_hook(lambda module, args, out: seen.append("after"))
    layer.register_full_backward_hook(lambda module, dx, dout: seen.append((dx[0].shape, dout[0].shape)))
    x = batch(9, D, device=case.device).requires_grad_()
    layer(x).sum().backward()
    assert seen == ["before", "after", (x.shape, x.shape)]


def test_parallel_copies_and_module_functions(case):
    """What `nn.Module` offers to all its children, with nothing to do here."""
    layer = used(case)
    before = copy.deepcopy(layer)
    layer.zero_grad()
    layer.requires_grad_(False)
    layer.apply(lambda module: None)
    assert layer.float() is layer
    assert_same_layer(layer, before)
    assert layer.get_buffer("scale") is layer.scale


# ---- Copies, files ----


@by_mode
@by_options
@pytest.mark.parametrize("how", ["pickle", "torch.save", "deepcopy"])
def test_pickle_and_deepcopy(case, options, how, training):
    """A layer like the first, on storage of its own, that goes on as the first does."""
    layer = used(case, training, **options)
    if how == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    elif how == "torch.save":
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = copy.deepcopy(layer)
    assert_same_layer(other, layer)
    for name, buffer in layer.named_buffers():
        assert other.get_buffer(name).data_ptr() != buffer.data_ptr(), name
    assert_works_alike(other, layer, case)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_every_pickle_protocol(case, protocol):
    layer = used(case)
    assert_same_layer(pickle.loads(pickle.dumps(layer, protocol)), layer)


@by_options
def test_save_and_load(case, options):
    layer, other = used(case, **options), new(case, **options)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    loaded = other.load_state_dict(torch.load(file, weights_only=True))
    assert (loaded.missing_keys, loaded.unexpected_keys) == ([], [])
    assert_works_alike(other, layer, case)


@by_options
def test_load_by_assignment(case, options):
    layer = used(case, **options)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    other = IsoBN(D, backend=case.backend, device="meta", **options)
    other.load_state_dict(state, assign=True)
    assert other.scale.data_ptr() == state["scale"].data_ptr()
    assert_works_alike(other, layer, case)


@pytest.mark.parametrize("name", BUFFERS)
def test_loading_says_what_is_missing_or_does_not_fit(case, name):
    layer, state = used(case), used(case).state_dict()
    before = copy.deepcopy(layer)
    del state[name]
    with pytest.raises(RuntimeError, match=f"Missing key.*{name}"), pytest.warns(UserWarning, match="checkpoint lacks"):
        layer.load_state_dict(state)
    with pytest.raises(RuntimeError, match=f"size mismatch for {name}"):
        layer.load_state_dict({**layer.state_dict(), name: torch.zeros(3, 5)})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*weight"):
        layer.load_state_dict({**layer.state_dict(), "weight": torch.zeros(D)})
    assert_same_layer(layer, before)


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        (["scale"], r"lacks the scale.*refresh_scale\(\)"),
        (["num_batches_tracked"], r'lacks the number of updates.*state_dict\["1.num_batches_tracked"\]'),
        (["running_cov", "scale"], r"lacks running_cov, scale.*reset_running_stats\(\)"),
    ],
)
def test_loading_a_part_says_what_to_do(missing, words):
    net = nn.Sequential(nn.Linear(D, D), IsoBN(D))
    state = {name: tensor for name, tensor in net.state_dict().items() if name.removeprefix("1.") not in missing}
    with (
        pytest.raises(RuntimeError, match="Missing key"),
        pytest.warns(UserWarning, match=f"IsoBN '1': the checkpoint {words}"),
    ):
        net.load_state_dict(state)
    with pytest.warns(UserWarning, match=f"IsoBN '1': the checkpoint {words}"):
        loaded = net.load_state_dict(state, strict=False)
    assert loaded.missing_keys == [f"1.{name}" for name in missing]


@pytest.mark.filterwarnings("error")
def test_loading_a_model_without_isobn_or_a_whole_one_is_quiet():
    net, encoder = nn.Sequential(nn.Linear(D, D), IsoBN(D)), nn.Sequential(nn.Linear(D, D))
    assert net.load_state_dict(encoder.state_dict(), strict=False).missing_keys == [f"1.{name}" for name in BUFFERS]
    net.load_state_dict(net.state_dict())


def test_loading_without_the_scale(case):
    """What the words tell one to do works."""
    expected, layer = used(case), new(case)
    expected.refresh_scale()
    state = expected.state_dict()
    del state["scale"]
    with pytest.warns(UserWarning, match="refresh_scale"):
        layer.load_state_dict(state, strict=False)
    layer.refresh_scale()
    assert same_bits(layer.scale, expected.scale)


def test_loading_the_published_code():
    layer, state = IsoBN(D), {"cov": torch.eye(D), "std": torch.ones(D)}
    with (
        pytest.raises(RuntimeError, match=r"Unexpected key.*cov.*std"),
        pytest.warns(UserWarning, match=r'holds "cov" and "std".*load_published_statistics\(cov, std\)'),
    ):
        layer.load_state_dict(state)
    layer.load_published_statistics(state.pop("cov"), state.pop("std"))
    assert (layer.scale != 1).all()


def test_loading_another_width():
    with pytest.raises(RuntimeError, match=r"IsoBN: the checkpoint is of num_features=9, this layer of num_features=7"):
        IsoBN(7).load_state_dict(IsoBN(9).state_dict())


# ---- Moves ----


@by_options
@pytest.mark.parametrize("swap", [False, True], ids=["new tensors", "swapped tensors"])
def test_to_another_dtype_and_back(case, options, swap):
    """float64 holds the statistics exactly; half precision is for the model around them."""
    layer, before = used(case, **options), used(case, **options)
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        assert layer.to(torch.float64) is layer
        assert [buffer.dtype for buffer in layer.buffers()] == [torch.float64] * 3 + [torch.int64]
        for dtype in (torch.float16, torch.bfloat16):
            layer.to(dtype)
            assert_same_layer(layer, before)
        layer.double()
        layer.to(torch.float32)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert_works_alike(layer, before, case)


@by_options
def test_to_meta_and_to_empty(case, options):
    """On the meta device the values are lost, as PyTorch says. `to_empty` gives memory, and a state dict fills it."""
    layer, expected = used(case, **options), used(case, **options)
    assert all(buffer.is_meta for buffer in layer.to("meta").buffers())
    with pytest.raises(NotImplementedError, match="to_empty"):
        layer.to(case.device)
    assert layer.to_empty(device=case.device) is layer
    assert {name: (tuple(b.shape), b.dtype) for name, b in layer.named_buffers()} == BUFFERS
    assert not any(buffer.is_meta for buffer in layer.buffers())
    layer.load_state_dict(expected.state_dict())
    assert_works_alike(layer, expected, case)


def test_to_empty_of_the_surrounding_module_alone(case):
    model = nn.Sequential(new(case).to("meta"))
    model.to_empty(device=case.device, recurse=False)
    assert model[0].scale.is_meta
    model.to_empty(device=case.device)
    assert not model[0].scale.is_meta


@pytest.mark.gpu
@needs_gpu
@by_options
def test_to_a_gpu_and_back(options):
    layer = used(REFERENCE, **options)
    layer.cuda()
    assert all(buffer.is_cuda for buffer in layer.buffers())
    assert_same_layer(layer.cpu(), used(REFERENCE, **options))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason=f"needs 2 GPUs, {torch.cuda.device_count()} found")
def test_between_two_gpus():
    layer, expected = used(REFERENCE).to("cuda:0"), used(REFERENCE).to("cuda:1")
    layer.to("cuda:1")
    assert {buffer.device for buffer in layer.buffers()} == {torch.device("cuda:1")}
    x = batch(9, D, device="cuda:1")
    assert same_bits(layer(x), expected(x))


@pytest.mark.gpu
@needs_gpu
@by_mode
@by_options
def test_the_gpu_is_as_right_as_the_cpu(options, training):
    numbers = {**options}
    exact = oracle.Layer(D, numbers.pop("stop_gradient", True), warm(D).oracle(), **numbers).train(training)
    x, dout = batch(9, D), upstream(9, D)
    results = []
    for layer, device in (
        (used(REFERENCE, training, **options).cuda(), "cuda"),
        (used(REFERENCE, training, **options), "cpu"),
    ):
        out, dx = run(layer, x.to(device), dout.to(device))
        results.append(named(state_of(layer), out=out, dx=dx))
    out, dx = run(exact, x.double(), dout.double())
    assert_right(*results, named(exact.state, out=out, dx=dx))


# ---- In words ----


@by_options
def test_repr_tells_the_options(case, options):
    text = repr(new(case, **options))
    assert text.startswith(f"IsoBN({D}, ")
    for name, value in options.items():
        assert f"{name}={value!r}" in text
    assert "IsoBN" in repr(nn.Sequential(new(case, **options)))


BAD_ARGUMENTS = {
    "no features": (lambda: IsoBN(0), ValueError, "num_features"),
    "negative features": (lambda: IsoBN(-3), ValueError, "num_features"),
    "features of a float": (lambda: IsoBN(7.0), TypeError, "num_features"),
    "features of a bool": (lambda: IsoBN(True), TypeError, "num_features"),
    "eps 0": (lambda: IsoBN(D, eps=0.0), ValueError, "eps"),
    "momentum above 1": (lambda: IsoBN(D, momentum=1.1), ValueError, "momentum"),
    "no momentum": (lambda: IsoBN(D, momentum=None), TypeError, "momentum"),
    "beta below 0": (lambda: IsoBN(D, beta=-0.1), ValueError, "beta"),
    "backend": (lambda: IsoBN(D, backend="gpu"), ValueError, "backend"),
    "process group": (lambda: IsoBN(D, process_group="world"), TypeError, "process_group"),
    "positional option": (lambda: IsoBN(D, 1e-3, 0.05, 0.5, True), TypeError, "positional"),
    "unknown option": (lambda: IsoBN(D, affine=True), TypeError, "affine"),
}


@pytest.mark.parametrize(("build", "error", "word"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_errors_of_arguments(build, error, word):
    with pytest.raises(error, match=word):
        build()


BAD_INPUTS = {
    "number": (1.0, TypeError, "x must be"),
    "array": ([[1.0] * D] * 3, TypeError, "x must be"),
    "scalar": (torch.tensor(1.0), ValueError, "x must"),
    "too wide": (torch.ones(3, D + 1), ValueError, "x must"),
    "too narrow": (torch.ones(3, D - 1), ValueError, "x must"),
    "features first": (torch.ones(D, 3), ValueError, "x must"),
    "integers": (torch.ones(3, D, dtype=torch.int64), TypeError, "x must"),
    "complex": (torch.ones(3, D, dtype=torch.complex64), TypeError, "x must"),
    "float64 for a float32 layer": (torch.ones(3, D, dtype=torch.float64), TypeError, "double"),
    "sparse": (torch.ones(3, D).to_sparse(), TypeError, "x must be dense"),
    "another device": (torch.ones(3, D, device="meta"), ValueError, "device of x"),
}


@by_mode
@pytest.mark.parametrize(("x", "error", "word"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_errors_of_inputs(case, x, error, word, training):
    layer = used(case, training)
    before = state_of(layer).clone()
    if isinstance(x, torch.Tensor) and not x.is_meta:
        x = x.to(case.device)
    with pytest.raises(error, match=word):
        layer(x)
    for name, tensor in state_of(layer).tensors.items():
        assert same_bits(tensor, before.tensors[name]), name


def test_a_new_layer_is_the_state_of_the_functional_form(case):
    layer = new(case)
    for name, tensor in fresh(D, device=case.device).tensors.items():
        assert same_bits(layer.get_buffer(name), tensor), name
