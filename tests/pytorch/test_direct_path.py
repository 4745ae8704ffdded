"""The rule that lets a call skip the dispatcher: when it says no, and that the values are right then too."""

import pytest
import torch
from helpers import State, assert_same_state, batch, fresh, same_bits, train, upstream, warm
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from isobn_kernels import IsoBN, _torch_internals, isobn

BOTH_MODES = pytest.mark.parametrize("stop_gradient", [True, False], ids=["default", "through statistics"])
JIT_IS_DEPRECATED = pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning"
)


def answer_inside(run):
    """What `_is_plain` says of the tensor that ``run`` passes to its argument, a function of a tensor."""
    answers = []

    def ask(x):
        answers.append(_torch_internals.is_plain(x))
        return x * 2

    run(ask)
    assert answers
    return any(answers)


X = torch.ones(3, 4)


def is_plain_under(mode):
    def run(f):
        with mode:
            f(X)

    return run


def fake(f):
    with torch._subclasses.FakeTensorMode() as mode:
        inside = mode.from_tensor(X)
    f(inside)


def dual(f):
    with forward_ad.dual_level():
        f(forward_ad.make_dual(X, X))


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


class FunctionRecorder(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


NOT_PLAIN = {
    "subclass": lambda f: f(X.as_subclass(Subclass)),
    "parameter": lambda f: f(torch.nn.Parameter(X)),
    "sparse": lambda f: f(X.to_sparse()),
    "meta": lambda f: f(X.to("meta")),
    "fake": fake,
    "neg view": lambda f: f(X._neg_view()),
    "zero tensor": lambda f: f(torch._efficientzerotensor((3, 4))),
    "dual": dual,
    "functorch grad": lambda f: torch.func.grad(lambda x: f(x).sum())(X),
    "functorch jvp": lambda f: torch.func.jvp(f, (X,), (X,)),
    "functorch vmap": lambda f: torch.vmap(f)(X),
    "functorch functionalize": lambda f: torch.func.functionalize(f)(X),
    "dispatch mode": is_plain_under(Recorder()),
    "function mode": is_plain_under(FunctionRecorder()),
    "default device": is_plain_under(torch.device("meta")),
    "jit trace": lambda f: torch.jit.trace(f, X, check_trace=False),
    "make_fx": lambda f: make_fx(f, tracing_mode="real")(X),
    "make_fx symbolic": lambda f: make_fx(f, tracing_mode="symbolic")(X),
}


@JIT_IS_DEPRECATED
@pytest.mark.parametrize("run", NOT_PLAIN.values(), ids=NOT_PLAIN.keys())
def test_direct_path_is_not_taken(run):
    assert answer_inside(run) is False


class AsksTheGuard(torch.nn.Module):
    def forward(self, x):
        return x * 2 if _torch_internals.is_plain(x) else x * 3


def test_direct_path_is_not_taken_when_compiling():
    assert torch.equal(torch.compile(AsksTheGuard(), fullgraph=True, backend="eager")(X), X * 3)


@pytest.mark.parametrize("strict", [True, False])
def test_direct_path_is_not_taken_when_exporting(strict):
    program = torch.export.export(AsksTheGuard(), (X,), strict=strict)
    assert torch.equal(program.module()(X), X * 3)


def test_direct_path_is_taken():
    """A guard that always says no would pass the tests above, and cost every call several microseconds."""
    assert _torch_internals.is_plain(X)
    assert _torch_internals.is_plain(X.T)
    assert _torch_internals.is_plain(X[:, ::2])
    assert _torch_internals.is_plain(X.clone().requires_grad_())
    assert _torch_internals.is_plain(torch.empty(0, 4))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert _torch_internals.is_plain(X)
    with torch.inference_mode():
        assert _torch_internals.is_plain(torch.ones(2))


# ---- Right values off the direct path ----


@pytest.fixture
def step(case):
    """(x, what a plain training step gives for it, the state after it, a state to start from)."""
    x, state = batch(17, 7, device=case.device), warm(7, device=case.device)
    after = state.clone()
    return x, train(x, after, case), after, state


def test_neg_view(case, step):
    x, expected, after, state = step
    view = torch._neg_view(-x)
    assert view.is_neg()
    assert same_bits(train(view, state, case), expected)
    assert_same_state(state, after)


@BOTH_MODES
@pytest.mark.parametrize("name", ["running_cov", "running_std", "scale"])
def test_statistic_with_the_negative_bit(case, name, stop_gradient):
    """Its values are not what lies at its address: no step writes there; where it is only read, the values count."""
    x, plain = batch(17, 7, device=case.device), warm(7, device=case.device)
    state = plain.clone()
    setattr(state, name, torch._neg_view(-getattr(plain, name)))
    operator = torch.ops.isobn_kernels.train_forward
    for step in (
        lambda: train(x, state, case, stop_gradient=stop_gradient),
        lambda: operator(x, *state.tensors.values(), 0.05, 1e-3, 0.5, False, case.backend),
    ):
        with pytest.raises(ValueError, match=f"{name} must not have the negative bit.*resolve_neg"):
            step()
        assert_same_state(State(*(t.resolve_neg() for t in state.tensors.values())), plain)
    for scale in ("scale", "computed"):
        found = []
        for s in (plain, state):
            stored = s.scale if scale == "scale" else None
            found.append(isobn(x, s.running_cov, s.running_std, scale=stored, backend=case.backend))
        assert same_bits(*found)


def test_statistics_of_one_feature_with_the_negative_bit(case):
    """The imaginary part of a conjugate, whose stride of 2 does not count where there is one element."""
    x, plain = batch(17, 1, device=case.device), warm(1, device=case.device)
    conjugate = [torch.complex(torch.zeros_like(t), -t).conj() for t in (plain.running_cov, plain.running_std)]
    cov, std = (c.imag for c in conjugate)
    assert cov.is_neg()
    assert cov.is_contiguous()
    with pytest.raises(ValueError, match="running_cov must not have the negative bit"):
        isobn(x, cov, std, training=True, backend=case.backend)
    expected = isobn(x, plain.running_cov, plain.running_std, backend=case.backend)
    assert same_bits(isobn(x, cov, std, backend=case.backend), expected)


@pytest.mark.parametrize("name", ["running_cov", "running_std", "scale", "num_batches_tracked"])
def test_statistic_that_is_a_zero_tensor(case, name):
    """Zeros without memory, contiguous for one element. They cannot be written to; where only read, they are zeros."""
    x, state = batch(17, 1, device=case.device), warm(1, device=case.device)
    kept = getattr(state, name)
    zeros = torch._efficientzerotensor(kept.shape, dtype=kept.dtype, device=kept.device)
    setattr(state, name, zeros)
    before = {key: t.clone() for key, t in state.tensors.items() if key != name}
    with pytest.raises(RuntimeError, match="ZeroTensor"):
        train(x, state, case)
    assert all(same_bits(getattr(state, key), t) for key, t in before.items())
    found = []
    for zero in (zeros, torch.zeros_like(kept)):
        setattr(state, name, zero)
        statistics = {key: t for key, t in state.tensors.items() if key != "scale"}
        found.append(isobn(x, **statistics, bias_correction=True, backend=case.backend))
    assert same_bits(*found)


def test_neg_view_in_the_backward(case):
    state = warm(7, device=case.device)
    for stop_gradient in (True, False):
        found = []
        for dout in (upstream(17, 7, device=case.device), torch._neg_view(-upstream(17, 7, device=case.device))):
            x = batch(17, 7, device=case.device).requires_grad_()
            out = train(x, state.clone(), case, stop_gradient=stop_gradient)
            found.append(torch.autograd.grad(out, x, dout)[0].resolve_neg())
        assert same_bits(*found)


def test_zero_tensor(case):
    state, x = fresh(7, device=case.device), torch._efficientzerotensor((17, 7), device=case.device)
    out = train(x, state, case)
    assert not out.any()
    assert not state.running_std.any()
    assert (state.scale == 1).all()


def test_zero_gradient(case):
    state = warm(7, device=case.device)
    for stop_gradient in (True, False):
        x = batch(17, 7, device=case.device).requires_grad_()
        out = train(x, state, case, stop_gradient=stop_gradient)
        (dx,) = torch.autograd.grad(out, x, torch._efficientzerotensor((17, 7), device=case.device))
        assert not dx.any()


def test_subclass(case, step):
    x, expected, after, state = step
    out = train(x.as_subclass(Subclass), state, case)
    assert same_bits(out.as_subclass(torch.Tensor), expected)
    assert_same_state(state, after)


def test_parameter(case, step):
    """An input that is itself learned."""
    x, expected, after, state = step
    assert same_bits(train(torch.nn.Parameter(x), state, case), expected)
    assert_same_state(state, after)


def test_fake_tensors(case):
    with torch._subclasses.FakeTensorMode():
        state = fresh(7, device=case.device)
        out = train(torch.empty(2, 3, 7, device=case.device, dtype=torch.float16), state, case)
        assert isinstance(out, torch._subclasses.FakeTensor)
        assert out.shape == (2, 3, 7)
        assert out.dtype == torch.float16
        assert out.device.type == case.device


@BOTH_MODES
def test_meta_tensors(stop_gradient):
    state = fresh(7, device="meta")
    x = torch.empty(2, 3, 7, device="meta", requires_grad=True)
    out = isobn(x, **state.tensors, training=True, stop_gradient=stop_gradient)
    out.sum().backward()
    assert out.shape == x.grad.shape == x.shape
    assert out.is_meta
    assert x.grad.is_meta


def test_dispatch_mode_sees_the_op(case, step):
    x, expected, after, state = step
    with Recorder() as mode:
        out = train(x, state, case)
    assert any("isobn_kernels.train_forward" in name for name in mode.seen)
    assert same_bits(out, expected)
    assert_same_state(state, after)


def test_function_mode(case, step):
    x, expected, after, state = step
    with FunctionRecorder():
        out = train(x, state, case)
    assert same_bits(out, expected)
    assert_same_state(state, after)


def test_default_device_and_dtype_do_not_matter(case, step):
    """Whatever a backend allocates goes where x is, in the dtype it needs."""
    x, expected, after, state = step
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("meta"):
            x_leaf = x.clone().requires_grad_()
            out = train(x_leaf, state, case, stop_gradient=False)
            (dx,) = torch.autograd.grad(out, x_leaf, x)
            evaluated = isobn(x, state.running_cov, state.running_std, backend=case.backend)
    finally:
        torch.set_default_dtype(dtype)
    assert same_bits(out, expected)
    assert_same_state(state, after)
    assert dx.device == evaluated.device == x.device


@BOTH_MODES
def test_functorch_grad(case, stop_gradient):
    dout, x = upstream(17, 7, device=case.device), batch(17, 7, device=case.device)
    plain, transformed = warm(7, device=case.device), warm(7, device=case.device)
    leaf = x.clone().requires_grad_()
    train(leaf, plain, case, stop_gradient=stop_gradient).mul(dout).sum().backward()
    f = torch.func.grad(lambda x: train(x, transformed, case, stop_gradient=stop_gradient).mul(dout).sum())
    assert same_bits(f(x), leaf.grad)
    assert_same_state(transformed, plain)


def test_functorch_evaluation(case):
    state = warm(7, device=case.device)
    xs = batch(15, 7, device=case.device).view(3, 5, 7)

    def f(x):
        return isobn(x, state.running_cov, state.running_std, scale=state.scale, backend=case.backend)

    assert same_bits(torch.vmap(f)(xs), f(xs))
    out, tangent = torch.func.jvp(f, (xs,), (torch.ones_like(xs),))
    assert same_bits(out, f(xs))
    assert same_bits(tangent, f(torch.ones_like(xs)))


def test_second_derivative_by_functorch(case):
    """Forward over reverse, with the scale constant: the Hessian of ``sum(out^3)`` is ``6 x scale^3``, diagonal."""
    state = warm(7, device=case.device)
    x, v = batch(17, 7, device=case.device), upstream(17, 7, device=case.device)
    gradient = torch.func.grad(lambda x: train(x, state, case, momentum=0.0).pow(3).sum())
    _, product = torch.func.jvp(gradient, (x,), (v,))
    expected = 6 * x.double() * state.scale.double().pow(3) * v.double()
    # At most eight products are rounded on the way.
    torch.testing.assert_close(product.double(), expected, rtol=8.01 * 2.0**-24, atol=0)


@pytest.mark.parametrize("N", [1, 17])
def test_forward_mode_training(case, N):
    """The tangent is multiplied by the scale, and none of it runs into the statistics."""
    plain, dual = warm(7, device=case.device), warm(7, device=case.device)
    x, tangent = batch(N, 7, device=case.device), upstream(N, 7, device=case.device)
    expected = train(x, plain, case)
    with forward_ad.dual_level():
        out, out_tangent = forward_ad.unpack_dual(train(forward_ad.make_dual(x, tangent), dual, case))
        for name, tensor in dual.tensors.items():
            assert forward_ad.unpack_dual(tensor).tangent is None, name
    assert same_bits(out, expected)
    assert same_bits(out_tangent, tangent * plain.scale)
    assert_same_state(dual, plain)


def test_forward_mode_through_the_statistics_is_refused(case):
    """No rule exists for it, and a tangent that vanished would be a wrong result."""
    x, tangent = batch(17, 7, device=case.device), upstream(17, 7, device=case.device)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError):
        train(forward_ad.make_dual(x, tangent), warm(7, device=case.device), case, stop_gradient=False)


@JIT_IS_DEPRECATED
def test_jit_trace(case):
    x, state = batch(17, 7, device=case.device), warm(7, device=case.device)
    traced = torch.jit.trace(lambda x: train(x, state.clone(), case), x, check_trace=False)
    assert "isobn_kernels::train_forward" in str(traced.graph)
    layer = IsoBN(7, backend=case.backend, device=case.device)
    layer(x)
    traced = torch.jit.trace(layer.eval(), x)
    assert "isobn_kernels::" not in str(traced.graph)
    assert same_bits(traced(x[:5]), layer(x[:5]))


def test_make_fx(case, step):
    x, expected, after, state = step

    def f(x, running_cov, running_std, scale, count):
        return train(x, State(running_cov, running_std, scale, count), case)

    graph = make_fx(f, tracing_mode="symbolic")(x, *state.clone().tensors.values())
    assert "isobn_kernels.train_forward" in graph.code
    assert same_bits(graph(x, *state.tensors.values()), expected)
    assert_same_state(state, after)
