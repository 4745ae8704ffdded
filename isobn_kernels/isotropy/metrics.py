"""Three measures of isotropy of an embedding matrix ``x`` (N, D): N sentences, D features.

All are computed in float64 from the centred matrix ``y = x - mean_n(x)`` and its covariance ``C = y^T y / N``. The
first two change when features are scaled; correlations do not, so IsoBN itself leaves the third as it is.

``x`` is a tensor of any dtype and device (it may require grad), a NumPy array, such as the result of
``SentenceTransformer.encode``, or a list of rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from isobn_kernels import reference


def explained_variance(x: Any) -> Tensor:
    """Share of the variance in the k directions of largest variance, for each k.

    ``EV_k = (lambda_1 + ... + lambda_k) / (lambda_1 + ... + lambda_D)``, where ``lambda_1 >= lambda_2 >= ...`` are
    the eigenvalues of C, that is, the squared singular values of the centred matrix. An isotropic embedding has
    ``EV_k = k / D``.

    Args:
        x: (N, D) tensor, NumPy array or list of rows; N at least 2.

    Returns:
        (D,) float64, ``EV_k`` at ``k - 1``; rises to 1.

    Raises:
        TypeError: ``x`` does not hold real numbers.
        ValueError: ``x`` has another shape, or holds NaN or Inf, or all rows are equal.

    Example:
        >>> import torch
        >>> from isobn_kernels.isotropy import explained_variance
        >>> explained_variance(torch.tensor([[3.0, 1.0], [3.0, -1.0], [-3.0, 1.0], [-3.0, -1.0]])).tolist()
        [0.9, 1.0]

    Source: Zhou, Lin and Ren, https://arxiv.org/abs/2005.02178, who report k = 1, 2 and 3.
    """
    C, sigma = _statistics(x)
    if not sigma.any():
        raise ValueError("x has no variance to explain: all its rows are equal")
    eigenvalues = torch.linalg.eigvalsh(C).flip(0).clamp_min(0)
    return eigenvalues.cumsum(0) / eigenvalues.sum()


def deviation_spread(x: Any) -> float:
    """How unequal the deviations of the features are: their coefficient of variation.

    With ``sigma_j = sqrt(C_jj)``: the deviation (divisor D) of ``sigma`` over its mean. 0 where all features vary
    alike; unchanged when the whole matrix is multiplied by a number.

    Args:
        x: (N, D) tensor, NumPy array or list of rows; N at least 2.

    Raises:
        TypeError: ``x`` does not hold real numbers.
        ValueError: ``x`` has another shape, or holds NaN or Inf, or all rows are equal.

    Example:
        >>> import torch
        >>> from isobn_kernels.isotropy import deviation_spread
        >>> deviation_spread(torch.tensor([[3.0, 1.0], [-3.0, -1.0]]))
        0.5
    """
    _, sigma = _statistics(x)
    if not sigma.any():
        raise ValueError("x has no deviations to compare: all its rows are equal")
    return float(sigma.std(correction=0) / sigma.mean())


def mean_absolute_correlation(x: Any) -> float:
    """Mean of ``|R_ij|`` over ``i != j``, with ``R_ij = C_ij / (sigma_i sigma_j)``, and 0 for a constant feature.

    Args:
        x: (N, D) tensor, NumPy array or list of rows; N and D at least 2.

    Raises:
        TypeError: ``x`` does not hold real numbers.
        ValueError: ``x`` has another shape, or holds NaN or Inf.

    Example:
        >>> import torch
        >>> from isobn_kernels.isotropy import mean_absolute_correlation
        >>> mean_absolute_correlation(torch.tensor([[3.0, 1.0], [-3.0, -1.0]]))
        1.0
    """
    R = correlation(x)
    D = R.shape[0]
    if D < 2:
        raise ValueError("x must have at least 2 features to correlate, got 1")
    return float((R.abs().sum() - R.diagonal().abs().sum()) / (D * (D - 1)))


def correlation(x: Any) -> Tensor:
    """The matrix R (D, D) of `mean_absolute_correlation`, float64."""
    return reference.correlation(*_statistics(x)).clamp(-1, 1)


def measure(x: Any) -> dict[str, float]:
    """The figures that ``python -m isobn_kernels finetune`` reports.

    Args:
        x: (N, D) tensor, NumPy array or list of rows; N at least 2, D at least 3.

    Returns:
        ``EV_1``, ``EV_2`` and ``EV_3`` of `explained_variance`, ``deviation_spread`` and
        ``mean_absolute_correlation``.

    Raises:
        TypeError, ValueError: as the three functions.

    Example:
        >>> import torch
        >>> from isobn_kernels.isotropy import measure
        >>> list(measure(torch.randn(20, 4)))
        ['EV_1', 'EV_2', 'EV_3', 'deviation_spread', 'mean_absolute_correlation']
    """
    x = as_matrix(x)
    explained = explained_variance(x)
    if len(explained) < 3:
        raise ValueError(f"x must have at least 3 features for EV_3, got {len(explained)}")
    return {
        **{f"EV_{k}": float(explained[k - 1]) for k in (1, 2, 3)},
        "deviation_spread": deviation_spread(x),
        "mean_absolute_correlation": mean_absolute_correlation(x),
    }


def as_matrix(x: Any) -> Tensor:
    """``x`` in float64 without gradient, on the device where it is; what is not a tensor, on the CPU.

    Raises:
        TypeError: ``x`` does not hold real numbers.
        ValueError: it is not of shape (N, D) with N at least 2, or holds NaN or Inf.
    """
    if not isinstance(x, Tensor):
        x = _tensor_of(x)
    if x.is_complex():
        raise TypeError(f"x must hold real numbers, got {x.dtype}")
    x = x.detach().to_dense().double()
    if x.dim() != 2 or x.shape[0] < 2 or x.shape[1] < 1:
        raise ValueError(f"x must have shape (N, D) with N at least 2, got {tuple(x.shape)}")
    if not x.isfinite().all():
        raise ValueError("x must be finite, got NaN or Inf")
    return x


def _tensor_of(x: Any) -> Tensor:
    if hasattr(x, "__array__"):  # of NumPy, or of a library that gives one, such as pandas
        import numpy as np

        array = np.asarray(x)
        if array.dtype.kind not in "biuf":
            raise TypeError(f"x must hold real numbers, got dtype {array.dtype}")
        return torch.from_numpy(array.astype(np.float64, order="C"))  # a copy: x may be read-only or big-endian
    try:
        rows = [_row_of(row) for row in x]
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"x must be a tensor, a NumPy array or a list of rows of real numbers, got {type(x).__name__}"
        ) from error
    lengths = {tuple(row.shape) for row in rows}
    if len(lengths) > 1:
        raise ValueError(f"x must have rows of one length, got shapes {sorted(lengths)}")
    return torch.stack(rows) if rows else torch.empty(0, 0)


def _row_of(row: Any) -> Tensor:
    if isinstance(row, Tensor):
        return row
    return _tensor_of(row) if hasattr(row, "__array__") else torch.tensor(row, dtype=torch.float64)


def _statistics(x: Any) -> tuple[Tensor, Tensor]:
    """Covariance (D, D) and deviations (D,) of the rows, float64."""
    y, sigma = reference.centre(as_matrix(x))
    return y.T @ y / y.shape[0], sigma
