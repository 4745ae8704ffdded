"""The Triton kernels of the gradient through the statistics (stop_gradient=False)."""

import triton
import triton.language as tl

from isobn_kernels.backends.triton.blocks import (
    DEVIATION,
    DR,
    DSCALE,
    E_PRIME,
    GAMMA,
    INV_W,
    MEAN,
    SHRINKAGE,
    VARIANCE,
    E,
    centred,
    chunk_rows,
    correlation,
    deviation,
    energies,
    is_updated,
    load_feature,
    load_first,
    load_rows,
    load_sigma,
    power,
    reciprocal,
    store_feature,
    sum_gamma,
    sum_of_chunks,
    sum_of_tiles,
)


@triton.jit(do_not_specialize=["N", "chunks", "rows_per_chunk"])
def column_products(
    x_ptr,  # (N, D)
    dout_ptr,  # (N, D)
    work_ptr,  # the workspace: reads sums, writes products
    N,
    row_stride,
    col_stride,
    dout_row_stride,
    dout_col_stride,
    chunks,
    rows_per_chunk,
    D: tl.constexpr,
    T: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid: (T, chunks)."""
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    chunk = tl.program_id(1)
    first = load_first(x_ptr, cols, col_stride, D)
    sums_ptr = chunk_rows(work_ptr, T, WIDTH)
    mean = sum_of_chunks(sums_ptr, cols, chunks, WIDTH) / N
    squares = tl.zeros_like(first)
    g = tl.zeros_like(first)
    n = chunk * rows_per_chunk
    stop = tl.minimum(n + rows_per_chunk, N)
    while n < stop:
        rows = n + tl.arange(0, BLOCK_N)
        y = centred(x_ptr, rows, cols, first, mean, stop, row_stride, col_stride, D)
        squares += tl.sum(y * y, axis=0)
        x = load_rows(x_ptr, rows, cols, stop, row_stride, col_stride, D)
        g += tl.sum(x * load_rows(dout_ptr, rows, cols, stop, dout_row_stride, dout_col_stride, D), axis=0)
        n += BLOCK_N
    products_ptr = sums_ptr + chunks * WIDTH
    tl.store(products_ptr + chunk * WIDTH + cols, squares)
    tl.store(products_ptr + (chunks + chunk) * WIDTH + cols, g)


@triton.jit(do_not_specialize=["N", "chunks"])
def backward_features(
    work_ptr,  # the workspace: reads all but energies; writes the other rows of features, and energies
    N,
    chunks,
    eps,
    beta,
    D: tl.constexpr,
    T: tl.constexpr,
    T_POW2: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All that the gradient needs of each feature. Grid: (T,)."""
    tile = tl.program_id(0)
    cols = tile * BLOCK + tl.arange(0, BLOCK)
    sums_ptr = chunk_rows(work_ptr, T, WIDTH)
    squares_ptr = sums_ptr + chunks * WIDTH
    C_ii = load_feature(work_ptr, VARIANCE, cols, T, WIDTH)
    gamma = sum_gamma(work_ptr, cols, D, T, T_POW2, WIDTH)
    t = power(gamma * load_sigma(work_ptr, cols, T, WIDTH) + eps, -beta)
    g = sum_of_chunks(squares_ptr + chunks * WIDTH, cols, chunks, WIDTH)
    s = deviation(sum_of_chunks(squares_ptr, cols, chunks, WIDTH), N)
    store_feature(work_ptr, SHRINKAGE, cols, t, T, WIDTH)
    store_feature(work_ptr, GAMMA, cols, gamma, T, WIDTH)
    store_feature(work_ptr, MEAN, cols, sum_of_chunks(sums_ptr, cols, chunks, WIDTH) / N, T, WIDTH)
    store_feature(work_ptr, DEVIATION, cols, s, T, WIDTH)
    store_feature(work_ptr, DSCALE, cols, g, T, WIDTH)
    tl.store(energies(work_ptr, E, T, WIDTH) + tile, tl.sum(C_ii, axis=0))
    tl.store(energies(work_ptr, E_PRIME, T, WIDTH) + tile, tl.sum(C_ii * t * t, axis=0))
    tl.store(energies(work_ptr, DR, T, WIDTH) + tile, tl.sum(tl.where(cols < D, g * t, 0.0), axis=0))


@triton.jit
def feature_gradients(work_ptr, cols, energy, energy_prime, dr, eps, beta, T: tl.constexpr, WIDTH: tl.constexpr):
    """1/sigma, dgamma, 2 (dE + dE' t^2) and du gamma of some features."""
    sigma = load_sigma(work_ptr, cols, T, WIDTH)
    C_ii = load_feature(work_ptr, VARIANCE, cols, T, WIDTH)
    t = load_feature(work_ptr, SHRINKAGE, cols, T, WIDTH)
    gamma = load_feature(work_ptr, GAMMA, cols, T, WIDTH)
    g = load_feature(work_ptr, DSCALE, cols, T, WIDTH)
    varies = energy != 0  # else the scale is the constant 1
    r = tl.where(varies, tl.sqrt_rn(energy / (energy_prime + eps)), 0.0)
    dr = tl.where(varies, dr, 0.0)
    dE = dr * r / (2 * tl.where(varies, energy, 1.0))
    dE_prime = -dr * r / (2 * (energy_prime + eps))
    dt = tl.where(varies, g, 0.0) * r + 2 * dE_prime * C_ii * t
    # The powers of a constant feature may overflow, and are multiplied by 0.
    du = tl.where(sigma > 0, -beta * dt * power(gamma * sigma + eps, -beta - 1), 0.0)
    t = tl.where(sigma > 0, t, 0.0)
    return reciprocal(sigma), du * sigma, 2 * (dE + dE_prime * t * t), du * gamma


@triton.jit(do_not_specialize=["N"])
def gradient(
    dout_ptr,  # (N, D)
    x_ptr,  # (N, D)
    cov_ptr,  # (D, D), as the forward left it: symmetric
    scale_ptr,  # (D,)
    work_ptr,  # the workspace: reads features and energies
    dx_ptr,  # (N, D), contiguous
    N,
    row_stride,
    col_stride,
    dout_row_stride,
    dout_col_stride,
    momentum,
    eps,
    beta,
    D: tl.constexpr,
    T: tl.constexpr,
    T_POW2: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dx on a block; G + G^T is made tile by tile from C and never stored. Grid: (blocks of rows, T)."""
    j = tl.program_id(1)
    cols_j = j * BLOCK + tl.arange(0, BLOCK)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    energy = sum_of_tiles(work_ptr, E, T, T_POW2, WIDTH)
    energy_prime = sum_of_tiles(work_ptr, E_PRIME, T, T_POW2, WIDTH)
    dr = sum_of_tiles(work_ptr, DR, T, T_POW2, WIDTH)
    inv_j, dgamma_j, diagonal_j, du_gamma_j = feature_gradients(
        work_ptr, cols_j, energy, energy_prime, dr, eps, beta, T, WIDTH
    )
    h = du_gamma_j
    Z = tl.zeros((BLOCK_N, BLOCK), tl.float32)
    for i in range(T):
        cols_i = i * BLOCK + tl.arange(0, BLOCK)
        inv_i, dgamma_i, _, _ = feature_gradients(work_ptr, cols_i, energy, energy_prime, dr, eps, beta, T, WIDTH)
        inside = (cols_i < D)[:, None] & (cols_j < D)[None, :]
        C = tl.load(cov_ptr + cols_i.to(tl.int64)[:, None] * D + cols_j[None, :], mask=inside, other=0.0)
        inv_row, inv_col = inv_i[:, None], inv_j[None, :]
        # In the order of the upper triangle: |R_ij| < 1 is decided once for i and j.
        above = cols_i[:, None] <= cols_j[None, :]
        C_over_w = C * load_feature(work_ptr, INV_W, cols_i, T, WIDTH)[:, None]
        R = correlation(C_over_w, tl.where(above, inv_row, inv_col), tl.where(above, inv_col, inv_row))
        dR = tl.where(tl.abs(R) < 1, 2.0 / D * (dgamma_i[:, None] + dgamma_j[None, :]) * R, 0.0)
        h -= tl.sum(dR * R, axis=0) * inv_j
        M = correlation(dR, inv_row, inv_col)
        M += tl.where(cols_i[:, None] == cols_j[None, :], diagonal_j[None, :], 0.0)
        y_i = updated_rows(x_ptr, work_ptr, rows, cols_i, N, row_stride, col_stride, D, T, WIDTH)
        Z += tl.dot(y_i, M, input_precision=PRECISION)
    s_j = load_feature(work_ptr, DEVIATION, cols_j, T, WIDTH)
    updated = is_updated(s_j)
    h_over_s = tl.where(updated & (s_j > 0), h / tl.where(s_j > 0, s_j, 1.0), 0.0)
    y_j = updated_rows(x_ptr, work_ptr, rows, cols_j, N, row_stride, col_stride, D, T, WIDTH)
    gain = momentum * load_feature(work_ptr, INV_W, cols_j, T, WIDTH) / N
    through_statistics = tl.where(updated[None, :], gain[None, :] * (Z + y_j * h_over_s[None, :]), 0.0)
    dout = load_rows(dout_ptr, rows, cols_j, N, dout_row_stride, dout_col_stride, D)
    scale = tl.load(scale_ptr + cols_j, mask=cols_j < D, other=0.0)
    inside = (rows < N)[:, None] & (cols_j < D)[None, :]
    at = rows.to(tl.int64)[:, None] * D + cols_j[None, :]
    tl.store(dx_ptr + at, (dout * scale[None, :] + through_statistics).to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def updated_rows(
    x_ptr, work_ptr, rows, cols, N, row_stride, col_stride, D: tl.constexpr, T: tl.constexpr, WIDTH: tl.constexpr
):
    """Rows of y, 0 where the feature was skipped."""
    first = load_first(x_ptr, cols, col_stride, D)
    mean = load_feature(work_ptr, MEAN, cols, T, WIDTH)
    s = load_feature(work_ptr, DEVIATION, cols, T, WIDTH)
    y = centred(x_ptr, rows, cols, first, mean, N, row_stride, col_stride, D)
    return tl.where(is_updated(s)[None, :], y, 0.0)
