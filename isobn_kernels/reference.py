"""Isotropic batch normalization in plain PyTorch: the equations, once, for people to read.

The four functions of a backend come first; every other backend computes the same ones, faster. The numbers in the
comments are those of the list below, the symbols are those of the code.

=========================  =============================================================================
``x`` (N, D)               a batch of N embeddings of D features
``C`` (D, D)               ``running_cov``, the moving average of the batch covariance
``sigma`` (D,)             ``running_std``, the moving average of the batch deviation
``scale`` (D,)             what ``x`` is multiplied by
``m``, ``eps``, ``beta``   momentum, stabiliser, strength of the correction
=========================  =============================================================================

A training step::

    (1) y        = (x - x_0) - mean_n(x - x_0)          x_0 is row 0: a constant feature gives y = 0 exactly
    (2) s_j      = sqrt(mean_n y_nj^2)
    (3) B        = y^T y / N
    (4) C       <- (1-m) C + m B ;  sigma <- (1-m) sigma + m s
    (5) R_ij     = clamp(C_ij / (sigma_i sigma_j), -1, 1)         with 1/0 := 0
    (6) gamma_i  = mean_j R_ij^2
    (7) t_i      = (gamma_i sigma_i + eps)^(-beta)
    (8) E        = sum_i C_ii ;  E' = sum_i C_ii t_i^2
    (9) scale_i  = t_i sqrt(E / (E' + eps))             scale = 1 where E == 0
    (10) out     = x * scale

A feature whose ``s_j`` is not finite (NaN or Inf in the batch) is skipped: it keeps its statistics. With
``bias_correction`` C and sigma are divided by ``w = 1 - (1-m)^num_batches_tracked`` before (5), as Adam does.
``scale`` is a constant for autograd unless ``stop_gradient=False``, for which ``train_backward`` is the gradient.

Source: Zhou, Lin and Ren, "IsoBN: Fine-Tuning BERT with Isotropic Batch Normalization", AAAI 2021,
https://arxiv.org/abs/2005.02178.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from isobn_kernels.state import Options, State

# Rows of the batch in one matrix product: a longer one, of few columns, adds up inaccurately in some BLAS libraries.
_ROWS = 4096


def train_forward(x: Tensor, state: State, options: Options) -> tuple[Tensor, Tensor]:
    """One training step on ``x`` (N, D) with N >= 2: equations (1)-(10).

    Updates the three statistics and the step counter in place; returns ``(out, scale)``, both fresh tensors.
    """
    running_cov, running_std, scale, num_batches_tracked = state
    momentum, eps, beta, bias_correction = options
    with exact_float32_matmul(x):
        y, s = centre(x.to(running_cov.dtype))
        B = gram(y) / y.shape[0]  # (3)
    C, sigma = moving_averages(running_cov, running_std, B, s, momentum)
    w = correction_weight(None if num_batches_tracked is None else num_batches_tracked + 1, momentum, bias_correction)
    saved_scale = scale_of(C / w, sigma / w, eps, beta)
    out = apply_scale(x, saved_scale)
    # Compute everything first, then write: if anything raises, the state is unchanged.
    running_cov.copy_(C)
    running_std.copy_(sigma)
    if scale is not None:
        scale.copy_(saved_scale)
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    return out, saved_scale


def compute_scale(state: State, options: Options) -> Tensor:
    """The scale (D,) that the statistics call for: equations (5)-(9)."""
    running_cov, running_std, _, num_batches_tracked = state
    momentum, eps, beta, bias_correction = options
    w = correction_weight(num_batches_tracked, momentum, bias_correction)
    return scale_of(symmetric(running_cov) / w, running_std / w, eps, beta)


def apply_scale(x: Tensor, scale: Tensor) -> Tensor:
    """(10): ``x * scale`` computed in the dtype of ``scale``, rounded once to that of ``x``; contiguous."""
    return (x * scale).to(x.dtype).contiguous()


def train_backward(dout: Tensor, x: Tensor, state: State, options: Options) -> Tensor:
    """Gradient of a training step with ``stop_gradient=False``: through ``scale`` and the statistics it came from.

    ``running_cov``, ``running_std`` and ``num_batches_tracked`` are copies taken right after the forward's update.
    """
    dtype = state.running_cov.dtype
    g = (dout.to(dtype) * x.to(dtype)).sum(dim=0)
    y, s = centre(x.to(dtype))
    through = through_statistics(g, y, s, x.shape[0], state, options)
    return (dout.to(dtype) * state.stored_scale + through).to(x.dtype).contiguous()


def through_statistics(g: Tensor, y: Tensor, s: Tensor, N: int | Tensor, state: State, options: Options) -> Tensor:
    """The part of ``train_backward`` that flows through the batch statistics, for the rows of ``y``.

    ``g``, ``s`` and ``N`` are those of the whole batch: the gradient that reaches ``scale``, deviations and rows.
    """
    running_cov, running_std, _, num_batches_tracked = state
    momentum, eps, beta, bias_correction = options
    D = y.shape[1]
    w = correction_weight(num_batches_tracked, momentum, bias_correction)
    C, sigma = symmetric(running_cov) / w, running_std / w
    inv = reciprocal(sigma)
    # Symmetric to the bit: whether |R_ij| < 1 is decided once for i and j. At 1 the two terms of an entry cancel, and
    # only if both are there or neither.
    unclamped = symmetric(correlation(C, sigma))
    R = unclamped.clamp(-1, 1)
    gamma = R.square().mean(dim=1)
    u = gamma * sigma + eps
    t = u**-beta
    t_squared = shrinkage_of_variance(t, C)
    E, E_prime = C.diagonal().sum(), (C.diagonal() * t_squared).sum()
    r = (E / (E_prime + eps)).sqrt()

    # Scale is the constant 1 where E == 0: no gradient flows through it.
    g = torch.where(E == 0, 0.0, g)
    dr = (g * t).sum()
    dE = torch.where(E == 0, 0.0, dr * r / (2 * E))
    dE_prime = -dr * r / (2 * (E_prime + eps))
    dt = g * r + 2 * dE_prime * C.diagonal() * t
    du = torch.where(sigma > 0, -beta * dt * u ** (-beta - 1), 0.0)  # else it overflows, and is multiplied by 0
    dgamma = du * sigma

    # dR_ij + dR_ji, and with it G + G^T: C_ij reaches the loss through gamma_i and through gamma_j.
    dR = torch.where(unclamped.abs() < 1, (2 / D) * (dgamma[:, None] + dgamma) * R, 0.0)
    G = dR * inv[:, None] * inv + torch.diag(2 * (dE + dE_prime * t_squared))
    h = du * gamma - (dR * R).sum(dim=1) * inv

    # A feature that this batch did not update passes no gradient to the batch.
    updated = s.isfinite()
    y = torch.where(updated, y, 0.0)
    h_over_s = torch.where(updated & (s > 0), h / s, 0.0)
    with exact_float32_matmul(y):
        dstatistics = torch.where(updated, y @ G + y * h_over_s, 0.0)
    return (momentum / (w * N)) * dstatistics


def scale_of(C: Tensor, sigma: Tensor, eps: float, beta: float) -> Tensor:
    """(5)-(9) for a symmetric C."""
    gamma = correlation(C, sigma).clamp(-1, 1).square().mean(dim=1)  # (6)
    t = (gamma * sigma + eps) ** -beta  # (7)
    E, E_prime = C.diagonal().sum(), (C.diagonal() * shrinkage_of_variance(t, C)).sum()  # (8)
    return torch.where(E == 0, torch.ones_like(t), t * (E / (E_prime + eps)).sqrt())  # (9)


def shrinkage_of_variance(t: Tensor, C: Tensor) -> Tensor:
    """``t^2``, and 0 for a feature without variance: there it may overflow, and Inf * 0 would be NaN."""
    return torch.where(C.diagonal() == 0, 0.0, t.square())


def centre(x: Tensor) -> tuple[Tensor, Tensor]:
    """(1) and (2): the centred batch (N, D) and its deviations (D,).

    Row 0 goes first, so that a constant feature gives exactly 0 and a mean far above the deviation costs no accuracy.
    """
    z = x - x[:1]
    y = z - z.mean(dim=0)
    return y, y.square().mean(dim=0).sqrt()


def gram(y: Tensor) -> Tensor:
    """``y^T y`` (D, D): (3) before the division by N."""
    return cast(Tensor, sum(rows.T @ rows for rows in y.split(_ROWS)))


def moving_averages(
    running_cov: Tensor, running_std: Tensor, B: Tensor, s: Tensor, momentum: float
) -> tuple[Tensor, Tensor]:
    """(4): C and sigma with the batch's B and s, both fresh. A feature whose ``s_j`` is not finite is skipped."""
    updated = s.isfinite()
    C = (1 - momentum) * running_cov + momentum * B
    C = torch.where(updated, torch.where(updated[:, None], C, running_cov), running_cov)
    sigma = torch.where(updated, (1 - momentum) * running_std + momentum * s, running_std)
    return symmetric(C), sigma


def symmetric(C: Tensor) -> Tensor:
    """``C`` with its lower triangle taken from the upper one, which is authoritative."""
    return C.triu() + C.triu(1).T


def reciprocal(sigma: Tensor) -> Tensor:
    """``1 / sigma`` with ``1 / 0 := 0``, also where 1 / sigma overflows."""
    inv = 1 / sigma
    return torch.where(inv.isfinite(), inv, 0.0)


def correlation(C: Tensor, sigma: Tensor) -> Tensor:
    """(5) before the clamp. Where 1/sigma_j := 0 and the first product overflowed, Inf * 0 is the 0 that was meant."""
    inv = reciprocal(sigma)
    return (C * inv[:, None] * inv).nan_to_num(nan=0.0)


def correction_weight(num_batches_tracked: Tensor | None, momentum: float, bias_correction: bool) -> Tensor | float:
    """``w``, or 1 where it is 0 or no correction is asked for. Stays on the device."""
    if not bias_correction or num_batches_tracked is None:
        return 1.0
    w = 1 - torch.pow(1 - momentum, num_batches_tracked.double())
    return torch.where(w == 0, 1.0, w)


# ---- Statistics across ranks: the sums of one rank, and the state after the sums of all ----


def column_sums(x: Tensor) -> Tensor:
    """The rows of ``x``, and the sums of its columns: those of each of its `halves`. In float64.

    The sum of a constant feature is exact. Its mean and ``y = 0`` are then exact too, as in (1): the ranks know no
    common row 0.
    """
    rows = torch.full((1,), x.shape[0], dtype=torch.float64, device=x.device)
    return torch.cat([rows, *(half.sum(0) for half in halves(x))])


def halves(x: Tensor) -> list[Tensor]:
    """Float64 terms that add up to ``x``, of so few digits that the sum of equal rows is exact."""
    if x.dtype is not torch.float64:
        return [x.double()]
    high = (x.view(torch.int64) & (-1 << 27)).view(torch.float64)
    return [high, x - high]


def centre_about(x: Tensor, sums: Tensor, dtype: torch.dtype) -> Tensor:
    """(1) with the mean of all ranks, of which ``sums`` are the `column_sums`."""
    parts = halves(x)
    means = (sums[1:] / sums[0]).view(len(parts), -1)
    return cast(Tensor, sum(part - mean for part, mean in zip(parts, means, strict=True))).to(dtype)


def centred_gram(x: Tensor, sums: Tensor, dtype: torch.dtype) -> Tensor:
    """(3) before the division by N, for the rows of this rank: the upper triangle (D (D + 1) / 2,), row by row."""
    with exact_float32_matmul(x):
        products = gram(centre_about(x, sums, dtype))
    i, j = torch.triu_indices(*products.shape, device=x.device)
    return products[i, j]


def from_upper_triangle(packed: Tensor, D: int) -> Tensor:
    """The symmetric matrix (D, D) of an upper triangle that lies row by row."""
    i = torch.arange(D, device=packed.device)
    row, column = torch.minimum(i[:, None], i), torch.maximum(i[:, None], i)
    return packed[row * D - row * (row + 1) // 2 + column]


def deviations(squares: Tensor, rows: Tensor) -> Tensor:
    """(2) from sums of squares. Infinite, and so skipped, where a product of two such features may overflow too."""
    largest, exact = 0.99 * torch.finfo(squares.dtype).max, squares.double()
    return torch.where(exact < largest, (exact / rows).sqrt(), torch.inf).to(squares.dtype)


def next_statistics(gram: Tensor, rows: Tensor, state: State, momentum: float) -> tuple[Tensor, Tensor]:
    """(2)-(4): C and sigma after a step with the `centred_gram` of all ranks; with fewer than two rows as they are.

    Each product and each sum of C is rounded once, by every backend, so that all ranks get the same bits.
    """
    products = from_upper_triangle(gram, state.running_std.shape[0])
    s = deviations(products.diagonal(), rows)
    updated = s.isfinite() & (rows >= 2)
    running_cov = symmetric(state.running_cov)
    gain = torch.full_like(rows, momentum) / rows  # a number / a tensor is a product with the reciprocal, rounded twice
    C = (1 - momentum) * running_cov + gain.to(gram.dtype) * products
    C = torch.where(updated[:, None] & updated, C, running_cov)
    sigma = torch.where(updated, (1 - momentum) * state.running_std + momentum * s, state.running_std)
    return C, sigma


@contextlib.contextmanager
def exact_float32_matmul(x: Tensor) -> Iterator[None]:
    """Matrix products inside are IEEE float32: no autocast, no TF32, no bf16 passes, whatever the user chose."""
    matmul = torch.backends.cuda.matmul if x.is_cuda else torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    chosen = matmul.fp32_precision
    reduced = chosen not in ("none", "ieee")
    if reduced:
        matmul.fp32_precision = "ieee"
    try:
        with torch.autocast(x.device.type, enabled=False):
            yield
    finally:
        if reduced:
            matmul.fp32_precision = chosen
