"""What the published code leaves undefined: a test or a few for each case that this package defines."""

import math
from dataclasses import replace

import oracle
import pytest
import torch
from helpers import (
    DTYPES,
    HALF_DTYPES,
    assert_finite,
    assert_same_state,
    assert_symmetric,
    assert_untouched,
    batch,
    fresh,
    same_bits,
    to_numpy,
    train,
    train_with_gradient,
    upstream,
    warm,
)
from tolerance import BOUNDS, SLACK, scale_rightly, train_rightly

from isobn_kernels import IsoBN, isobn

BOTH_MODES = pytest.mark.parametrize("stop_gradient", [True, False], ids=["default", "through statistics"])


# ---- Before any training step ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_evaluation_before_any_training_step_is_the_identity(case, dtype):
    x = batch(17, 7, dtype=dtype, device=case.device)
    state = fresh(7, dtype, case.device)
    for scale in (state.scale, None):
        out = isobn(x, state.running_cov, state.running_std, scale=scale, backend=case.backend)
        assert same_bits(out, x)


def test_evaluation_of_a_new_module_is_the_identity(case):
    x = batch(17, 7, device=case.device)
    assert same_bits(IsoBN(7, backend=case.backend, device=case.device).eval()(x), x)


# ---- Constant features ----


@pytest.mark.parametrize("N", [2, 17, 300])
@pytest.mark.parametrize("value", [0.0, 0.1, -3.7, 1e6])
def test_constant_feature(case, N, value):
    """Its statistics are 0 to the last bit, its t is the limit eps^-beta, and the others do not notice."""
    D, j, eps, beta = 7, 3, 1e-3, 0.5
    state, expected = fresh(D, device=case.device), oracle.fresh_state(D)
    for step in range(3):
        x = batch(N, D, step, device=case.device)
        x[:, j] = value
        train_rightly(x, state, case, eps=eps, beta=beta)
        _, expected = oracle.train_step(to_numpy(x), expected)
    assert not state.running_cov[j].any()
    assert not state.running_cov[:, j].any()
    assert state.running_std[j] == 0

    # What the rule allows the scale of any backend.
    close = 2 * BOUNDS["edge cases"]["scale"] + SLACK[torch.float32]
    t = to_numpy(state.scale)[j] / math.sqrt(expected.C.trace() / _scaled_variance(expected, eps, beta))
    assert t == pytest.approx(eps**-beta, rel=close)


def _scaled_variance(state, eps, beta):
    gamma = (oracle.correlation(state.C, state.sigma).clip(-1, 1) ** 2).mean(1)
    return (state.C.diagonal() * (gamma * state.sigma + eps) ** (-2 * beta)).sum() + eps


def test_feature_that_stops_varying(case):
    """Its statistics decay; nothing else happens."""
    state = warm(7, device=case.device)
    for step in range(20):
        x = batch(17, 7, step, device=case.device)
        x[:, 2] = 0.3
        train_rightly(x, state, case)


# ---- E == 0 ----


@BOTH_MODES
@pytest.mark.parametrize("N", [2, 17, 300])
def test_no_variance_at_all_gives_scale_1(case, N, stop_gradient):
    x = batch(1, 7, device=case.device).repeat(N, 1)
    dout = upstream(N, 7, device=case.device)
    state = fresh(7, device=case.device)
    out, dx = train_with_gradient(x, dout, state, case, stop_gradient=stop_gradient)
    assert same_bits(out, x)
    assert same_bits(dx, dout)
    assert same_bits(state.scale, torch.ones_like(state.scale))
    assert not state.running_cov.any()
    assert not state.running_std.any()
    assert state.num_batches_tracked == 1


# ---- N = 0 and N = 1 ----


@BOTH_MODES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_rows(case, dtype, stop_gradient):
    """Empty output, state untouched, backward works."""
    state = warm(7, dtype, case.device)
    before = state.clone()
    x = torch.empty(0, 7, dtype=dtype, device=case.device)
    out, dx = train_with_gradient(x, torch.empty_like(x), state, case, stop_gradient=stop_gradient)
    assert out.shape == dx.shape == (0, 7)
    assert out.dtype == dx.dtype == dtype
    assert_untouched(state, before)


@BOTH_MODES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias_correction", [False, True])
def test_one_row(case, dtype, stop_gradient, bias_correction):
    """State untouched; ``out = x * stored scale``, and not the scale that the statistics call for."""
    state = warm(7, dtype, case.device)
    state.scale.copy_(torch.linspace(0.5, 2, 7))
    before = state.clone()
    x, dout = (f(1, 7, dtype=dtype, device=case.device) for f in (batch, upstream))
    options = {"stop_gradient": stop_gradient, "bias_correction": bias_correction}
    out, dx = train_with_gradient(x, dout, state, case, **options)
    assert same_bits(out, (x * before.scale).to(dtype))
    assert same_bits(dx, (dout * before.scale).to(dtype))
    assert_untouched(state, before)


@pytest.mark.parametrize("N", [0, 1])
def test_one_row_or_none_without_a_stored_scale_uses_the_statistics(case, N):
    state = warm(7, device=case.device)
    x = batch(N, 7, device=case.device)
    out = isobn(x, state.running_cov, state.running_std, training=True, backend=case.backend)
    assert same_bits(out, x * scale_rightly(state, case))


# ---- NaN and Inf ----


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("row", [0, 1, -1])
@pytest.mark.parametrize("N", [2, 17, 300])
# The first and last column and one inside a vector; and such that of two tiles of features only one has any.
@pytest.mark.parametrize("bad", [[0, 5, 66], [5], [66]], ids=str)
def test_feature_with_nan_or_inf_is_skipped(case, N, row, value, bad):
    """Row j, column j and sigma_j keep their bits; all else is as the oracle has it, and finite."""
    D = 67
    state = warm(D, device=case.device)
    before = state.clone()
    x = batch(N, D, device=case.device)
    x[row, bad] = value
    out, _ = train_rightly(x, state, case)
    for j in bad:
        assert same_bits(state.running_cov[j], before.running_cov[j])
        assert same_bits(state.running_cov[:, j], before.running_cov[:, j])
        assert same_bits(state.running_std[j], before.running_std[j])
    assert_finite(state)
    assert_symmetric(state.running_cov)
    assert state.num_batches_tracked == before.num_batches_tracked + 1
    assert same_bits(out.isfinite(), x.isfinite()), "only the elements that came in as NaN or Inf may go out so"
    assert same_bits(out.isnan(), x.isnan())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_batch_of_nothing_but_nan_or_inf(case, value):
    state = warm(7, device=case.device)
    before = state.clone()
    out, _ = train_rightly(torch.full((17, 7), value, device=case.device), state, case)
    assert same_bits(out.isnan() if math.isnan(value) else out.isinf(), torch.ones_like(out, dtype=torch.bool))
    assert same_bits(state.running_cov, before.running_cov)
    assert same_bits(state.running_std, before.running_std)
    assert state.num_batches_tracked == before.num_batches_tracked + 1


def test_state_stays_finite_whatever_comes_in(case):
    state = fresh(7, device=case.device)
    generator = torch.Generator().manual_seed(0)
    for step in range(60):
        x = batch(17, 7, step)
        x[torch.rand(17, 7, generator=generator) < 0.05] = (math.nan, math.inf, -math.inf)[step % 3]
        train(x.to(case.device), state, case)
        assert_finite(state)
        assert_symmetric(state.running_cov)
    assert state.running_std.all(), "with one element in 20 lost, every feature still learns something"


def test_deviation_that_overflows_is_skipped(case):
    """Finite input whose squares are not: ``s_j`` is infinite in float32."""
    state = warm(7, device=case.device)
    before = state.clone()
    x = batch(17, 7, device=case.device)
    x[:, 4] *= 1e25
    train_rightly(x, state, case, largest=torch.finfo(torch.float32).max)
    assert same_bits(state.running_cov[4], before.running_cov[4])


@pytest.mark.parametrize(("part", "skipped"), [(0.98, False), (0.995, True)])
def test_kernels_skip_a_feature_whose_squares_nearly_overflow(kernel_case, part, skipped):
    """At the same sum of squares on every kernel: products of two such features must not overflow either."""
    state = warm(7, device=kernel_case.device)
    before = state.clone()
    x = batch(2, 7, device=kernel_case.device)
    x[:, 4] = math.sqrt(part / 2) * math.sqrt(torch.finfo(torch.float32).max) * torch.tensor([1, -1])
    x[:, 5] = x[:, 4]
    train(x, state, kernel_case)
    assert same_bits(state.running_std[4:6], before.running_std[4:6]) == skipped
    assert_finite(replace(state, scale=torch.ones(7)))  # E itself may overflow


def test_differences_that_overflow(case):
    """Both ends of float32 in one feature: ``x - x_0`` is infinite though x is not."""
    state = warm(7, device=case.device)
    before = state.clone()
    x = batch(17, 7, device=case.device)
    x[::2, 4], x[1::2, 4] = 3e38, -3e38
    train(x, state, case)
    assert same_bits(state.running_cov[4], before.running_cov[4])
    assert_finite(state)


@pytest.mark.parametrize("magnitude", [1e-30, 1e-22, 1e-10, 1e10, 1e18])
def test_state_and_scale_are_finite_for_any_magnitude(case, magnitude):
    state = fresh(7, device=case.device)
    for step in range(5):
        out = train(batch(17, 7, step, device=case.device) * magnitude, state, case)
        assert out.isfinite().all()
        assert_finite(state)
        assert (state.scale > 0).all()


# ---- Mean far larger than deviation ----


@BOTH_MODES
def test_saturated_tanh(case, stop_gradient):
    """Mean 0.99, deviation 0.01: relative accuracy of the statistics as for any other batch."""
    state = fresh(65, device=case.device)
    for step in range(5):
        x = torch.tanh(2.6 + 0.5 * batch(33, 65, step, offset=0)).to(case.device)
        train_rightly(x, state, case, stop_gradient=stop_gradient)


# ---- 16-bit input and what the user set around it ----


@BOTH_MODES
@pytest.mark.parametrize("dtype", [*HALF_DTYPES, torch.float32], ids=str)
def test_autocast_changes_no_bit(case, dtype, stop_gradient):
    x, dout = (f(17, 65, dtype=dtype, device=case.device) for f in (batch, upstream))
    plain, under = fresh(65, device=case.device), fresh(65, device=case.device)
    out, dx = train_with_gradient(x, dout, plain, case, stop_gradient=stop_gradient)
    with torch.autocast(case.device, dtype=torch.bfloat16):
        out_under, dx_under = train_with_gradient(x, dout, under, case, stop_gradient=stop_gradient)
        evaluated = isobn(x, under.running_cov, under.running_std, backend=case.backend)
    assert same_bits(out_under, out)
    assert same_bits(dx_under, dx)
    assert_same_state(under, plain)
    assert evaluated.dtype == dtype


def matmul_settings():
    parts = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul
    return torch.get_float32_matmul_precision(), *(part.fp32_precision for part in parts)


@BOTH_MODES
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_float32_matmul_precision_changes_no_bit(case, precision, stop_gradient):
    x, dout = batch(64, 384, device=case.device), upstream(64, 384, device=case.device)
    plain, under = fresh(384, device=case.device), fresh(384, device=case.device)
    out, dx = train_with_gradient(x, dout, plain, case, stop_gradient=stop_gradient)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        chosen = matmul_settings()
        out_under, dx_under = train_with_gradient(x, dout, under, case, stop_gradient=stop_gradient)
        assert matmul_settings() == chosen, "the choice of the user is to be left as it was"
    finally:
        torch.set_float32_matmul_precision(before)
    assert same_bits(out_under, out)
    assert same_bits(dx_under, dx)
    assert_same_state(under, plain)


def test_float16_output_may_overflow_when_rounded(case):
    """The arithmetic does not overflow; only the rounding of the output to the dtype of x does."""
    state = fresh(2, torch.float16, case.device)
    x = torch.tensor([[6e4, 1.0], [-6e4, 2.0]], dtype=torch.float16, device=case.device)
    out = train(x, state, case, eps=1e-8)
    assert_finite(state)
    expected = (x.float() * state.scale).to(torch.float16)
    assert same_bits(out, expected)


# ---- Statistics at the edge of float32 ----


@pytest.mark.parametrize("sigma", [0.0, 1e-45, 1e-40, 1e-38])
def test_deviation_decayed_to_nothing_with_covariance_left(case, sigma):
    state = warm(7, device=case.device)
    state.running_std[2] = sigma
    if sigma == 0:
        scale_rightly(state, case)
    scale = isobn(torch.ones(1, 7, device=case.device), state.running_cov, state.running_std, backend=case.backend)
    assert scale.isfinite().all()
    x = batch(17, 7, device=case.device)
    x[:, 2] = 1.0
    for stop_gradient in (True, False):
        after = state.clone()
        out, dx = train_with_gradient(x, x, after, case, stop_gradient=stop_gradient)
        assert out.isfinite().all()
        assert dx.isfinite().all()
        assert_finite(after)


@pytest.mark.parametrize("bias_correction", [False, True])
def test_momentum_0_learns_nothing_but_counts(case, bias_correction):
    state = warm(7, device=case.device)
    before = state.clone()
    # 1 - (1 - 0)^t is 0: no correction.
    train_rightly(batch(17, 7, device=case.device), state, case, momentum=0.0, bias_correction=bias_correction)
    assert same_bits(state.running_cov, before.running_cov)
    assert same_bits(state.running_std, before.running_std)
    assert state.num_batches_tracked == before.num_batches_tracked + 1


def test_no_correction_before_the_first_update(case):
    """Statistics loaded by hand, a counter at 0: ``w == 0``, so that they are taken as they are."""
    state = warm(7, device=case.device)
    state.num_batches_tracked.zero_()
    scale_rightly(state, case, num_batches_tracked=state.num_batches_tracked, bias_correction=True)


def test_momentum_1_forgets_everything(case):
    x = batch(17, 7, device=case.device)
    states = fresh(7, device=case.device), warm(7, device=case.device)
    for state in states:
        train(x, state, case, momentum=1.0)
    assert same_bits(states[0].running_cov, states[1].running_cov)
    assert same_bits(states[0].running_std, states[1].running_std)
    assert same_bits(states[0].scale, states[1].scale)


@pytest.mark.parametrize("eps", [1e-3, 3e-6, 1.1e-8])
def test_beta_that_float32_does_not_hold(case, eps):
    """(7) with beta as it is given: rounded to float32 first, the power of a small eps would be off by many units."""
    state = fresh(7, device=case.device)
    for beta in (0.5 + 2**-25, 1 + 2**-24, 2 + 2**-23):  # half a unit of float32 above
        if case.backend in ("triton", "cuda"):  # there the numbers of the equations are float32
            beta = torch.tensor(beta).item()
        x = batch(17, 7, device=case.device)
        x[:, 3] = 0.7
        train_rightly(x, state, case, eps=eps, beta=beta)


@BOTH_MODES
@pytest.mark.parametrize(("eps", "beta"), [(1e-8, 2.5), (1e-20, 1.0), (1e-30, 0.5)])
def test_a_power_whose_square_overflows(case, eps, beta, stop_gradient):
    """The limit eps^-beta of a constant feature fits float32. Its square and its derivative do not, and count for 0."""
    state = fresh(7, device=case.device)
    x, dout = batch(17, 7, device=case.device), upstream(17, 7, device=case.device)
    x[:, 3] = 0.7
    dout[:, 3] = 0
    train_rightly(x, state, case, dout, eps=eps, beta=beta, stop_gradient=stop_gradient)
    assert_finite(state)


def test_beta_0_scales_all_features_alike(case):
    state = fresh(7, device=case.device)
    train(batch(17, 7, device=case.device), state, case, beta=0.0)
    assert same_bits(state.scale, state.scale[:1].expand(7))


# ---- Symmetry ----


@pytest.mark.parametrize("N", [2, 17, 300])
@pytest.mark.parametrize("D", [1, 7, 65, 130, 384])
def test_running_cov_is_bit_symmetric_after_every_update(case, N, D):
    state = fresh(D, device=case.device)
    for step in range(3):
        train(batch(N, D, step, device=case.device), state, case)
        assert_symmetric(state.running_cov)


@pytest.mark.parametrize("D", [7, 65, 200])
@pytest.mark.parametrize("options", [{}, {"stop_gradient": False}, {"bias_correction": True}], ids=str)
def test_only_the_upper_triangle_is_read(case, D, options):
    """NaN below the diagonal: every result keeps its bits, and an update writes the lower triangle anew."""
    x, dout = batch(17, D, device=case.device), upstream(17, D, device=case.device)
    x[3, 2] = math.nan  # also for a skipped feature
    dout[:, 2] = 0
    clean = warm(D, device=case.device)
    edited = clean.clone()
    edited.running_cov[torch.tril_indices(D, D, -1).unbind()] = math.nan
    scales = [
        isobn(torch.ones(1, D, device=case.device), s.running_cov, s.running_std, backend=case.backend)
        for s in (clean, edited)
    ]
    assert same_bits(*scales)
    results = [train_with_gradient(x, dout, s, case, **options) for s in (clean, edited)]
    assert same_bits(results[0][0], results[1][0])
    assert same_bits(results[0][1], results[1][1])
    assert_same_state(edited, clean)
    assert_symmetric(edited.running_cov)
    assert_finite(edited)


@pytest.mark.parametrize("N", [2, 256, 1030])
def test_state_is_finite_where_a_sum_of_squares_is_not(case, N):
    """Deviations near the root of the largest float32: sums over the batch leave its range before the means do."""
    state = warm(7, device=case.device)
    for size in (1e17, 1e18, 1.4e18, 1e19, 1.8e19):
        x = batch(N, 7, device=case.device)
        x[:, [0, 5]] = size
        x[::2, [0, 5]] = -size
        train(x, state, case)
        assert_finite(replace(state, scale=torch.ones(7)))  # E itself may overflow
    train(batch(N, 7, device=case.device), state, case)
    assert_finite(replace(state, scale=torch.ones(7)))


@pytest.mark.parametrize("name", ["scale", "num_batches_tracked", "running_cov"])
def test_state_that_is_no_tensor(case, name):
    state = warm(7, device=case.device)
    with pytest.raises(TypeError, match=f"{name} must be a torch.Tensor, got float"):
        isobn(batch(17, 7, device=case.device), **(state.tensors | {name: 1.0}), training=True, backend=case.backend)


@pytest.mark.parametrize("trained", [True, False])
def test_result_is_contiguous(case, trained):
    x = batch(17, 7, device=case.device).T.contiguous().T.requires_grad_(trained)
    assert train(x, warm(7, device=case.device), case).is_contiguous()
