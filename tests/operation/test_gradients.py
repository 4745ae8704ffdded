"""Gradients: exact in the default mode, through the statistics against autograd and finite differences."""

import math

import numpy as np
import oracle
import pytest
import torch
from helpers import (
    DTYPES,
    assert_same_state,
    batch,
    fresh,
    same_bits,
    to_numpy,
    train,
    train_with_gradient,
    upstream,
    warm,
)
from tolerance import assert_right, relative, train_rightly
from torch import nn
from torch.utils.checkpoint import checkpoint

from isobn_kernels import IsoBN, isobn

BOTH_MODES = pytest.mark.parametrize("stop_gradient", [True, False], ids=["default", "through statistics"])


# ---- The default mode: scale is a constant ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_default_gradient_is_exactly_dout_times_scale(case, dtype):
    for N, D in ((2, 1), (17, 65), (300, 7)):
        x, dout = (f(N, D, dtype=dtype, device=case.device) for f in (batch, upstream))
        state = fresh(D, dtype, case.device)
        _, dx = train_with_gradient(x, dout, state, case)
        assert same_bits(dx, (dout * state.scale).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stored", [True, False])
def test_evaluation_gradient_is_exactly_dout_times_scale(case, dtype, stored):
    state = warm(7, dtype, case.device)
    x, dout = (f(17, 7, dtype=dtype, device=case.device) for f in (batch, upstream))
    x.requires_grad_()
    scale = state.scale if stored else None
    out = isobn(x, state.running_cov, state.running_std, scale=scale, backend=case.backend)
    (dx,) = torch.autograd.grad(out, x, dout)
    if not stored:
        scale = isobn(torch.ones_like(state.scale), state.running_cov, state.running_std, backend=case.backend)
    assert same_bits(dx, (dout * scale).to(dtype))


def test_no_gradient_reaches_the_statistics(case):
    state = warm(7, device=case.device)
    out = train(batch(17, 7, device=case.device).requires_grad_(), state, case)
    assert out.requires_grad
    for name, tensor in state.tensors.items():
        assert not tensor.requires_grad, name
    assert not train(batch(17, 7, device=case.device), state, case).requires_grad
    with torch.no_grad():
        assert not train(batch(17, 7, device=case.device).requires_grad_(), state, case).requires_grad


# ---- Finite differences, in float64 ----


def frozen(state, case, **options):
    """`isobn` as a function of x alone: each call starts from a copy of the statistics."""

    def f(x):
        return isobn(x, **state.clone().tensors, backend=case.backend, **options)

    return f


def double_batch(N=5, D=4):
    return batch(N, D, dtype=torch.float64).requires_grad_()


def test_gradcheck_of_evaluation(case):
    state = warm(4, torch.float64)
    assert torch.autograd.gradcheck(frozen(state, case), double_batch())
    buffers = state.running_cov, state.running_std
    assert torch.autograd.gradcheck(lambda x: isobn(x, *buffers, backend=case.backend), double_batch())


def test_gradcheck_and_gradgradcheck_of_the_default_mode(case):
    """With momentum 0 the statistics stay, so that the scale is the constant that this mode takes it for."""
    f = frozen(warm(4, torch.float64), case, training=True, momentum=0.0)
    assert torch.autograd.gradcheck(f, double_batch())
    assert torch.autograd.gradgradcheck(f, double_batch())


def test_default_mode_is_linear_for_a_second_derivative(case):
    """The gradient of ``|dx|^2`` with respect to dout: ``2 dout scale^2``."""
    state = fresh(7, device=case.device)
    x = batch(17, 7, device=case.device).requires_grad_()
    dout = upstream(17, 7, device=case.device).requires_grad_()
    out = train(x, state, case)
    (dx,) = torch.autograd.grad(out, x, dout, create_graph=True)
    (second,) = torch.autograd.grad(dx.square().sum(), dout)
    # Two products are rounded: dout * scale, and its double times scale; the one expected is exact in float64.
    expected = 2 * dout.detach().double() * state.scale.double().square()
    torch.testing.assert_close(second.double(), expected, rtol=2.01 * 2.0**-24, atol=0)


@pytest.mark.parametrize(
    "options",
    [{}, {"bias_correction": True}, {"momentum": 0.3}, {"momentum": 1.0}, {"beta": 0.0}, {"beta": 1.0}, {"eps": 0.1}],
    ids=str,
)
@pytest.mark.parametrize("start", [fresh, warm], ids=["fresh", "warm"])
@pytest.mark.parametrize("shape", [(5, 4), (2, 3), (7, 1)], ids=str)
def test_gradcheck_through_the_statistics(case, options, start, shape):
    if shape[0] == 2 and start is fresh:
        shape = (3, 3)  # two rows alone are fully correlated: the clamp has a kink exactly there
    state = start(shape[1], torch.float64)
    x = double_batch(*shape)
    f = frozen(state, case, training=True, stop_gradient=False, **options)
    assert torch.autograd.gradcheck(f, x)


def test_double_backward_through_the_statistics_raises(case):
    state = warm(4, torch.float64)
    x = double_batch()
    out = train(x, state, case, stop_gradient=False)
    (dx,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


# ---- Through the statistics, features that take no part ----


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("N", [2, 17, 300])
def test_constant_feature_through_the_statistics(case, N, trained):
    D, j = 7, 3
    state = (warm if trained else fresh)(D, device=case.device)
    x, dout = batch(N, D, device=case.device), upstream(N, D, device=case.device)
    x[:, j] = 0.7
    _, dx = train_rightly(x, state, case, dout, stop_gradient=False)
    if not trained:  # trained, it still has a correlation with the others, and moving it would change that
        assert same_bits(dx[:, j], dout[:, j] * state.scale[j])


@pytest.mark.parametrize("N", [2, 17, 300])
def test_skipped_feature_through_the_statistics(case, N):
    """Feature j overflows in float32. It passes no gradient through the statistics, but others feel its scale."""
    D, j = 7, 3
    state = warm(D, device=case.device)
    x, dout = batch(N, D, device=case.device), upstream(N, D, device=case.device)
    x[:, j] *= 1e25
    dout[:, j] *= 1e-25
    largest = torch.finfo(torch.float32).max
    _, dx = train_rightly(x, state, case, dout, stop_gradient=False, largest=largest)
    assert same_bits(dx[:, j], dout[:, j] * state.scale[j])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_feature_with_nan_or_inf_through_the_statistics(case, value):
    """Its own gradient is the direct term; the others' are NaN by the chain rule, as every scale depends on all g."""
    state = warm(7, device=case.device)
    before = state.oracle()
    x, dout = batch(17, 7, device=case.device), upstream(17, 7, device=case.device)
    x[5, 3] = value
    _, dx = train_with_gradient(x, dout, state, case, stop_gradient=False)
    expected = oracle.gradient(to_numpy(x), to_numpy(dout), before)
    assert same_bits(dx[:, 3], dout[:, 3] * state.scale[3])
    assert same_bits(dx.isfinite(), torch.from_numpy(expected).isfinite())


def nearly_equal(seed, D=4):
    """Three rows of features of which two are correlated to 1 but for some units of float32, and the gradient jumps."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((3, D))
    x[:, 1] = rng.choice([-1, 1]) * x[:, 0] * rng.uniform(0.5, 2) + 10 ** rng.uniform(-4, -3) * rng.standard_normal(3)
    return torch.tensor(x, dtype=torch.float32)


def test_a_correlation_is_above_1_or_below_it_for_both_features(case):
    """Whether R_ij is 1 may depend on rounding, and is decided once: the gradients of i and j are of the same side."""
    seen = 0
    for seed in range(400):
        x, dout = nearly_equal(seed), upstream(3, 4, seed)
        before = oracle.fresh_state(4)
        _, after = oracle.train_step(to_numpy(x), before, momentum=1.0)
        below = 1 - np.abs(oracle.correlation(after.C, after.sigma))
        numbers = {"x": to_numpy(x), "dout": to_numpy(dout), "state": before, "momentum": 1.0}
        # Of a feature with itself the gradient is 0 on either side.
        sides = [oracle.gradient(**numbers, open=below > limit) for limit in (1e-6, -1e-6)]
        jump = relative(sides[0], sides[1], axis=0)
        if jump < 1e-4:
            continue
        seen += 1
        state = fresh(4, device=case.device)
        x, dout = x.to(case.device), dout.to(case.device)
        _, dx = train_with_gradient(x, dout, state, case, stop_gradient=False, momentum=1.0)
        nearest = min(relative(to_numpy(dx), side, axis=0) for side in sides)
        assert nearest < 0.1 * jump, f"seed {seed}: {nearest:.1e} from the nearer side, which are {jump:.1e} apart"
    assert seen > 50


# ---- What backward keeps ----


def saved_shapes(case, **options):
    saved = []
    state, x = warm(7, device=case.device), batch(17, 7, device=case.device).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        train(x, state, case, **options)
    return sorted(saved)


def test_default_mode_saves_the_scale_only(case):
    """Neither x nor the covariance stays in memory for the backward."""
    assert saved_shapes(case) == [(7,)]
    assert (7, 7) in saved_shapes(case, stop_gradient=False)


@BOTH_MODES
def test_two_forwards_before_one_backward(case, stop_gradient):
    """The first gradient is that of the first scale, though the buffers have moved on."""
    layer = IsoBN(7, stop_gradient=stop_gradient, backend=case.backend, device=case.device).train()
    alone = IsoBN(7, stop_gradient=stop_gradient, backend=case.backend, device=case.device).train()
    first, second = (batch(17, 7, seed, device=case.device).requires_grad_() for seed in (0, 1))
    copy = first.detach().clone().requires_grad_()
    alone(copy).square().sum().backward()
    (layer(first).square().sum() + layer(second).square().sum()).backward()
    assert same_bits(first.grad, copy.grad)


def test_training_step_between_evaluation_and_its_backward(case):
    layer = IsoBN(7, backend=case.backend, device=case.device)
    layer(batch(17, 7, device=case.device))
    scale = layer.scale.clone()
    x = batch(17, 7, 1, device=case.device).requires_grad_()
    out = layer.eval()(x)
    layer.train()(batch(17, 7, 2, device=case.device))
    assert not same_bits(layer.scale, scale)
    out.sum().backward()
    assert same_bits(x.grad, scale.expand(17, 7))


@pytest.mark.parametrize("name", ["running_cov", "running_std", "scale"])
def test_update_tells_autograd(case, name):
    """A buffer that someone's graph has saved, overwritten by a training step: backward refuses."""
    state = warm(7, device=case.device)
    buffer = state.tensors[name]
    weight = torch.ones_like(buffer, requires_grad=True)
    loss = (weight * buffer).sum()
    train(batch(17, 7, device=case.device), state, case)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_update_counts_a_version_of_the_counter(case):
    """An integer takes no part in a graph: the version is all there is to see."""
    state = warm(7, device=case.device)
    before = state.num_batches_tracked._version
    train(batch(17, 7, device=case.device), state, case)
    assert state.num_batches_tracked._version > before


@BOTH_MODES
def test_x_modified_after_the_forward(case, stop_gradient):
    """The default backward does not need x; the other one does, and says so."""
    state = warm(7, device=case.device)
    x = batch(17, 7, device=case.device).requires_grad_()
    h = x * 1
    out = train(h, state, case, stop_gradient=stop_gradient)
    h.detach().zero_()
    if stop_gradient:
        out.sum().backward()
        assert same_bits(x.grad, state.scale.expand(17, 7))
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


# ---- Activation checkpointing ----


class Net(nn.Module):
    def __init__(self, case, stop_gradient):
        super().__init__()
        self.first = nn.Linear(6, 7)
        self.norm = IsoBN(7, stop_gradient=stop_gradient, backend=case.backend)
        self.last = nn.Linear(7, 2)

    def forward(self, x):
        return self.last(self.norm(torch.tanh(self.first(x))))


@BOTH_MODES
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("N", [1, 17])
def test_activation_checkpointing(case, use_reentrant, stop_gradient, N):
    """The recomputation in the backward pass updates nothing and gives the gradients of the plain run."""
    torch.manual_seed(0)
    nets = [Net(case, stop_gradient).to(case.device) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    for step in range(3):
        inputs = [batch(N, 6, step, device=case.device).requires_grad_() for _ in nets]
        plain = nets[0](inputs[0])
        recomputed = checkpoint(nets[1], inputs[1], use_reentrant=use_reentrant)
        assert same_bits(recomputed, plain)
        for net, out in zip(nets, (plain, recomputed), strict=True):
            net.zero_grad()
            out.square().sum().backward()
        assert same_bits(inputs[1].grad, inputs[0].grad)
        for (name, p), q in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
            assert same_bits(q.grad, p.grad), name
        for (name, p), q in zip(nets[0].named_buffers(), nets[1].buffers(), strict=True):
            assert same_bits(q, p), name
        assert nets[1].norm.num_batches_tracked == (step + 1 if N > 1 else 0)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_activation_checkpointing_of_the_functional_form(case, use_reentrant):
    """Without a stored scale, the recomputation takes it from the statistics that the first run left.

    That may round otherwise than the scale of the first run; each is as right as the other.
    """
    states = [warm(7, device=case.device) for _ in range(2)]
    inputs = [batch(17, 7, device=case.device).requires_grad_() for _ in states]

    def run(x, state):
        return isobn(x, state.running_cov, state.running_std, training=True, backend=case.backend).square()

    run(inputs[0], states[0]).sum().backward()
    x = to_numpy(inputs[1])
    _, after = oracle.train_step(x, states[1].oracle())
    checkpoint(run, inputs[1], states[1], use_reentrant=use_reentrant).sum().backward()
    assert_right({"dx": inputs[1].grad}, {"dx": inputs[0].grad}, {"dx": 2 * x * after.scale**2})
    assert_same_state(states[1], states[0])
