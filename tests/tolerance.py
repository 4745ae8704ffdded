"""How close is right.

Each result is compared with the float64 oracle on the same rounded input, by one number a step:

    C              max_ij |dC_ij| / sqrt(C_ii C_jj)
    sigma, scale   max_j  |d_j| / |value_j|
    out, dx        max_j (max_n |d_nj| / max_n |value_nj|)

Where the denominator is 0 the value must be exact. The reference has an absolute bound, `BOUNDS`. Every other backend
may have twice the error of the reference on the same input, plus `SLACK`.

The same rule serves 16-bit outputs. There the error is mostly the rounding of the output, at most half a unit in the
last place, and a value that two backends round to different sides lies in the middle between them: both are then half
a unit off, up to their float32 difference. So the rounding adds nothing that the reference's own error does not show.
"""

import numpy as np
import torch

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
}

# What "+ 1e-6" means in float32 (8 units in the last place), carried over to float64.
SLACK = {torch.float32: 1e-6, torch.float64: 1e-6 * 2.0**-29}


def relative(value, truth, axis=None):
    """max |value - truth| / |truth|, each maximum over ``axis`` first; exactness asked for where truth is 0."""
    error, size = np.abs(value - truth), np.abs(truth)
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
