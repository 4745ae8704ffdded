"""How close is right.

Each result is compared with the float64 oracle on the same rounded input, by one number a step:

    C              max_ij |dC_ij| / sqrt(C_ii C_jj)
    sigma, scale   max_j  |d_j| / |value_j|
    out, dx        max_j (max_n |d_nj| / max_n |value_nj|)

Where the denominator is 0 or not finite the value must be exact. The reference has an absolute bound, `BOUNDS`. Every
other backend may have twice the error of the reference on the same input, plus `SLACK`. The same holds for two ways to
compute one thing, such as a compiled step and an eager one: each is compared with float64, never with the other under a
fixed number, because compilers, libraries and processors round differently.

The same rule serves 16-bit outputs. There the error is mostly the rounding of the output, at most half a unit in the
last place, and a value that two backends round to different sides lies in the middle between them: both are then half
a unit off, up to their float32 difference. So the rounding adds nothing that the reference's own error does not show.
"""

import numpy as np
import oracle
import torch
from cases import REFERENCE
from helpers import state_dtype, to_numpy, train, train_with_gradient

from isobn_kernels import isobn

# The largest error of a result rounded to 16 bits: half a unit in the last place, and the float32 error before it.
_ROUNDED = {
    name: {"out": half_ulp + 1e-6, "dx": half_ulp + 1e-6, "dx through statistics": half_ulp + 1e-5}
    for name, half_ulp in (("float16", 2.0**-11), ("bfloat16", 2.0**-8))
}

# Bounds on the error of the reference, per class of input and measure: 2 to 4 times the largest error observed in
# test_conformance.py, the full product included (x86-64, torch 2.13), which the comments give.
BOUNDS = {
    "float32": {
        "C": 1.5e-6,  # 5.9e-7
        "sigma": 1e-6,  # 3.4e-7
        "scale": 1e-6,  # 3.7e-7
        "out": 1e-6,  # 4.0e-7
        "dx": 1e-6,  # 3.7e-7
        "dx through statistics": 4e-6,  # 1.5e-6
    },
    "60 steps": {
        "C": 1.5e-6,  # 5.9e-7
        "sigma": 1.5e-6,  # 5.7e-7
        "scale": 8e-7,  # 2.8e-7
        "out": 8e-7,  # 2.9e-7
        "dx": 8e-7,  # 3.0e-7
        "dx through statistics": 8e-7,  # 2.4e-7
    },
    "mean 1e4 deviations": {
        "C": 1.2e-6,  # 4.7e-7
        "sigma": 1.2e-6,  # 4.4e-7
        "scale": 6e-7,  # 2.3e-7
        "out": 8e-7,  # 2.8e-7
        "dx": 6e-7,  # 2.4e-7
        "dx through statistics": 4e-6,  # 1.4e-6
    },
    "float16": {
        "C": 2e-6,  # 7.1e-7
        "sigma": 1.5e-6,  # 5.2e-7
        "scale": 1e-6,  # 3.0e-7
        **_ROUNDED["float16"],
    },
    "bfloat16": {
        "C": 2e-6,  # 7.5e-7
        "sigma": 1.5e-6,  # 5.2e-7
        "scale": 1e-6,  # 3.8e-7
        **_ROUNDED["bfloat16"],
    },
    "float64": {
        "C": 1e-14,  # 3.1e-15
        "sigma": 5e-15,  # 1.5e-15
        "scale": 2e-15,  # 7.5e-16
        "out": 2e-15,  # 8.4e-16
        "dx": 2e-15,  # 8.0e-16
        "dx through statistics": 1e-14,  # 3.5e-15
    },
    # Constant, skipped and saturated features, in float32.
    "edge cases": {
        **dict.fromkeys(("C", "sigma", "scale", "out", "dx"), 2e-6),
        "dx through statistics": 1e-5,
    },
}

# What "+ 1e-6" means in float32 (8 units in the last place), carried over to float64.
SLACK = {torch.float32: 1e-6, torch.float64: 1e-6 * 2.0**-29}


def relative(value, truth, axis=None):
    """max |value - truth| / |truth|, each maximum over ``axis`` first. Where truth is 0 or not finite: exactness."""
    finite = np.isfinite(truth)
    with np.errstate(invalid="ignore"):
        odd = np.where((value == truth) | (np.isnan(value) & np.isnan(truth)), 0.0, np.inf)
        error, size = np.where(finite, np.abs(value - truth), odd), np.where(finite, np.abs(truth), 0.0)
    if axis is not None:
        error, size = error.max(axis, initial=0), size.max(axis, initial=0)
    return _ratio(error, size)


def covariance_error(C, truth):
    diagonal = np.sqrt(np.diag(truth))
    return _ratio(np.abs(C - truth), np.outer(diagonal, diagonal))


def _ratio(error, size):
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(size > 0, error / size, np.where(error > 0, np.inf, 0.0))
    # NaN where the truth has none is an infinite error, not one that a maximum or a comparison may lose.
    return np.where(np.isnan(ratio), np.inf, ratio).max(initial=0.0)


def named(state, **more):
    """The statistics of a state, the oracle's or a backend's, and other results: by the names of the measures."""
    if not isinstance(state, oracle.State):
        state = oracle.State(*list(state.tensors.values())[:3], None)
    return {"C": state.C, "sigma": state.sigma, "scale": state.scale, **more}


def errors(found, truth):
    """{name: error} of results by name. Several results under one name, as a list, count with the largest error."""
    return {name: _error(name, found[name], true) for name, true in truth.items()}


def _error(name, value, truth):
    if isinstance(truth, (list, tuple)):
        return max(_error(name, v, t) for v, t in zip(value, truth, strict=True))
    value, truth = (np.atleast_1d(to_numpy(v) if isinstance(v, torch.Tensor) else v) for v in (value, truth))
    if name == "C":
        return covariance_error(value, truth)
    return relative(value, truth, axis=None if name in ("sigma", "scale") else 0)


def assert_right(found, reference, truth, bounds=None, dtype=torch.float32):
    """The rule of this file, for results by name; the reference is held to ``bounds``.

    Without bounds it must have one digit right: twice the error of a wrong result, or of one that is 0 in truth and
    rounding in float32, would allow everything.
    """
    far, fair = errors(found, truth), errors(reference, truth)
    too_large = []
    for name in truth:
        bound = 0.1 if bounds is None else bounds[name]
        for who, error, limit in (
            ("the reference's", fair[name], bound),
            ("the", far[name], 2 * fair[name] + SLACK[state_dtype(dtype)]),
        ):
            if not error <= limit:
                too_large.append(f"{who} {name} is off by {error:.2e}, limit {limit:.2e}")
    assert not too_large, "\n".join(too_large)


def train_rightly(x, state, case, dout=None, *, largest=np.inf, bounds=BOUNDS["edge cases"], **options):
    """One training step of ``case``, and of the reference and the oracle from the same state: held to the rule.

    Returns ``(out, dx)``, the latter None where no ``dout`` is given.
    """
    numbers = {name: value for name, value in options.items() if name != "stop_gradient"}
    reference, before = state.clone(), state.oracle()
    out, after = oracle.train_step(to_numpy(x), before, largest=largest, **numbers)
    truth, gradient = named(after, out=out), "dx"
    if dout is not None and not options.get("stop_gradient", True):
        gradient = "dx through statistics"
        truth[gradient] = oracle.gradient(to_numpy(x), to_numpy(dout), before, largest=largest, **numbers)
    elif dout is not None:
        truth[gradient] = to_numpy(dout) * after.scale

    def results(state, case):
        if dout is None:
            return named(state, out=train(x, state, case, **options))
        out, dx = train_with_gradient(x, dout, state, case, **options)
        return named(state, out=out, **{gradient: dx})

    found = results(state, case)
    assert_right(found, results(reference, REFERENCE), truth, bounds, x.dtype)
    return found["out"], found.get(gradient)


def scale_rightly(state, case, bounds=BOUNDS["edge cases"], **options):
    """The scale (D,) that the statistics call for, by ``case``: held to the rule as in `train_rightly`."""

    def scale(backend):
        ones = torch.ones_like(state.running_std)[None]
        return {"scale": isobn(ones, state.running_cov, state.running_std, backend=backend, **options)[0]}

    C, sigma, _, t = state.oracle()
    numbers = {name: value for name, value in options.items() if name != "num_batches_tracked"}
    found = scale(case.backend)
    assert_right(found, scale("reference"), {"scale": oracle.compute_scale(C, sigma, t, **numbers)}, bounds)
    return found["scale"]
