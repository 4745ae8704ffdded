"""Properties that hold for any input, over examples that hypothesis chooses; the same ones in every run."""

import math

import numpy as np
import oracle
import pytest
import torch
from cases import REFERENCE
from helpers import (
    DTYPES,
    assert_finite,
    assert_symmetric,
    fresh,
    same_bits,
    state_dtype,
    to_numpy,
    train,
    train_with_gradient,
    upstream,
    warm,
)
from hypothesis import assume, given
from hypothesis import strategies as st
from tolerance import BOUNDS, SLACK, errors, named

from isobn_kernels import backends, isobn

fp16, bf16, fp32, fp64 = DTYPES

# Largest magnitude of a feature and of its mean in deviations; 16-bit inputs carry 3 or 2 digits, float16 to 65504.
RANGE = {fp16: (1e-2, 1e2, 10), bf16: (1e-6, 1e6, 10), fp32: (1e-6, 1e6, 1e4), fp64: (1e-6, 1e6, 1e4)}


@st.composite
def batches(draw, min_rows=2, max_rows=40, max_features=40, dtypes=DTYPES):
    """(N, D) of any scale per feature, any mean, some features constant or repeated; rounded to a dtype."""
    dtype = draw(st.sampled_from(dtypes))
    N, D = draw(st.integers(min_rows, max_rows)), draw(st.integers(1, max_features))
    smallest, largest, furthest = RANGE[dtype]
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    exponents = draw(st.tuples(*[st.floats(math.log10(smallest), math.log10(largest))] * 2))
    deviation = 10 ** rng.uniform(min(exponents), max(exponents), D)
    offset = draw(st.floats(0, furthest)) * rng.choice([-1, 1], D)
    z = rng.standard_normal((N, D))
    if draw(st.booleans()):
        z[:, rng.integers(D)] = z[:, 0]  # fully correlated
    if draw(st.booleans()):
        z[:, rng.integers(D)] = 0.0  # constant
    return torch.tensor(deviation * (z + offset)).to(dtype)


def numbers():
    return st.fixed_dictionaries(
        {
            "momentum": st.just(0.0) | st.floats(1e-3, 1),
            "eps": st.floats(-6, 1).map(lambda e: 10**e),
            "beta": st.floats(0, 1),
            "bias_correction": st.booleans(),
        }
    )


def assume_taken(x, case):
    """An example that the backend does not take, as float64 on GPU kernels, does not count."""
    assume(backends.load(case.backend).unsupported_reason(x.to(case.device)) is None)


def errors_of(x, case, options):
    """Of two steps from the initial state; the measures of tolerance.py."""
    state, expected = fresh(x.shape[1], x.dtype, case.device), oracle.fresh_state(x.shape[1])
    for part in (x, x.flip(0) * 0.5):
        out = train(part.to(case.device), state, case, **options)
        true, expected = oracle.train_step(to_numpy(part), expected, **options)
    return errors(named(state, out=out), named(expected, out=true))


@given(x=batches(), options=numbers())
def test_any_batch_is_as_close_as_the_tolerance_asks(case, x, options):
    assume_taken(x, case)
    reference = errors_of(x, REFERENCE, options)
    if case is not REFERENCE:
        slack = SLACK[state_dtype(x.dtype)]
        for measure, error in errors_of(x, case, options).items():
            assert error <= 2 * reference[measure] + slack, measure


@given(x=batches(dtypes=(fp32, fp64)), options=numbers())
def test_reference_is_within_its_bounds(x, options):
    bounds = BOUNDS["float64" if x.dtype == fp64 else "float32"]
    for measure, error in errors_of(x, REFERENCE, options).items():
        assert error <= bounds[measure], measure


@given(x=batches(), stop_gradient=st.booleans(), options=numbers())
def test_everything_stays_finite_and_symmetric(case, x, stop_gradient, options):
    assume_taken(x, case)
    x = x.to(case.device)
    state = fresh(x.shape[1], x.dtype, case.device)
    dout = upstream(*x.shape, dtype=x.dtype, device=case.device)
    if x.dtype == fp16:
        x = x * 0.01  # the scale is at most eps^-beta = 1e3 here; the output is to fit
        options = {**options, "eps": max(options["eps"], 1e-3), "beta": min(options["beta"], 0.5)}
    _, dx = train_with_gradient(x, dout, state, case, stop_gradient=stop_gradient, **options)
    assert_finite(state)
    assert_symmetric(state.running_cov)
    assert (state.scale > 0).all()
    assert (state.running_std >= 0).all()
    assert (state.running_cov.diagonal() >= 0).all()
    assert not dx.isnan().any()


@given(x=batches(dtypes=(fp32, fp64)))
def test_deviation_never_exceeds_the_root_of_the_variance(case, x):
    """``sigma_i^2 <= C_ii``, up to rounding: twice the error of sigma and once that of C, for any backend."""
    assume_taken(x, case)
    state = fresh(x.shape[1], x.dtype, case.device)
    for part in (x, x * 3, x * 0.1):
        train(part.to(case.device), state, case)
    variance, bounds = state.running_cov.diagonal(), BOUNDS["float64" if x.dtype == fp64 else "float32"]
    rounding = 2 * (2 * bounds["sigma"] + bounds["C"]) + 3 * SLACK[x.dtype]
    assert (state.running_std.square() <= variance * (1 + rounding)).all()


@given(x=batches(dtypes=(fp64,)), data=st.data())
def test_order_of_rows_and_features_does_not_matter(case, x, data):
    """A permutation of the features permutes the result; one of the rows changes nothing but rounding."""
    N, D = x.shape
    rows = data.draw(st.permutations(range(N)))
    features = data.draw(st.permutations(range(D)))
    plain, permuted = (fresh(D, fp64, case.device) for _ in range(2))
    out = train(x.to(case.device), plain, case)
    out_permuted = train(x[rows][:, features].to(case.device), permuted, case)
    # Each scale is off by as much as the tolerance allows, and an element of the output by two roundings more.
    rounding = 2 * (2 * BOUNDS["float64"]["scale"] + SLACK[fp64])
    torch.testing.assert_close(permuted.scale, plain.scale[features], rtol=rounding, atol=0)
    torch.testing.assert_close(out_permuted, out[rows][:, features], rtol=rounding + 2 * 2.0**-53, atol=0)


@given(x=batches(dtypes=(fp64,)), power=st.integers(-20, 20))
def test_deviations_scale_with_the_input(case, x, power):
    """Multiplied by a power of two, C and sigma follow exactly: no absolute constant is in (1)-(4)."""
    factor = 2.0**power
    small, large = (fresh(x.shape[1], fp64, case.device) for _ in range(2))
    train(x.to(case.device), small, case)
    train((x * factor).to(case.device), large, case)
    assert same_bits(large.running_cov, small.running_cov * factor**2)
    assert same_bits(large.running_std, small.running_std * factor)


@given(x=batches(min_rows=0, max_rows=1))
def test_fewer_than_two_rows_leave_the_state(case, x):
    assume_taken(x, case)
    state = warm(x.shape[1], x.dtype, case.device)
    before = state.clone()
    out = train(x.to(case.device), state, case)
    assert same_bits(out, (x.to(case.device) * before.scale).to(x.dtype))
    for name, tensor in state.tensors.items():
        assert same_bits(tensor, before.tensors[name])


@given(x=batches(), options=numbers())
def test_evaluation_repeats_the_last_training_step(case, x, options):
    assume_taken(x, case)
    """``x * scale`` with the stored scale is what that step returned, for the same x."""
    x = x.to(case.device)
    state = fresh(x.shape[1], x.dtype, case.device)
    out = train(x, state, case, **options)
    buffers = state.running_cov, state.running_std
    assert same_bits(isobn(x, *buffers, scale=state.scale, backend=case.backend, **options_of(options, state)), out)


def options_of(options, state):
    return {**options, "num_batches_tracked": state.num_batches_tracked}


@pytest.mark.full
@given(x=batches(max_rows=300, max_features=300), options=numbers())
def test_any_larger_batch_is_as_close_as_the_tolerance_asks(kernel_case, x, options):
    assume_taken(x, kernel_case)
    reference, slack = errors_of(x, REFERENCE, options), SLACK[state_dtype(x.dtype)]
    for measure, error in errors_of(x, kernel_case, options).items():
        assert error <= 2 * reference[measure] + slack, measure
