"""The Triton kernels of a training step, and of a scale."""

import triton
import triton.language as tl

from isobn_kernels.backends.triton.blocks import (
    E_PRIME,
    INV_W,
    SHRINKAGE,
    SIGMA,
    VARIANCE,
    E,
    centred,
    chunk_rows,
    correlation,
    deviation,
    energies,
    feature_row,
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

# ---- Equations and panels, on blocks ----


@triton.jit
def clamp(r):
    return tl.minimum(tl.maximum(r, -1.0), 1.0)


@triton.jit
def correction_weight(updates, momentum):
    """``1 - (1-m)^updates`` in float64: in float32 the difference would lose what the correction is for."""
    keep = 1.0 - tl.cast(momentum, tl.float64)
    power_of_keep = tl.exp(updates.to(tl.float64) * tl.log(tl.where(keep > 0, keep, 1.0)))
    w = 1.0 - tl.where((keep > 0) | (updates == 0), power_of_keep, 0.0)
    return tl.where(w == 0, 1.0, w).to(tl.float32)


@triton.jit
def pair_of_tiles(T: tl.constexpr):
    """This program's pair of tiles. Rows r and T-1-r of the upper triangle have T+1 pairs together: one grid row."""
    r = tl.program_id(0)
    c = tl.program_id(1)
    first = c < T - r
    i = tl.where(first, r, T - 1 - r)
    j = tl.where(first, r + c, c - 1)
    return i, j, first | (2 * r + 1 < T)


@triton.jit
def centred_panel(x_ptr, cols, N, row_stride, col_stride, D: tl.constexpr, BLOCK_N: tl.constexpr):
    """(1) and (2) of a batch that fits one block: y (BLOCK_N, BLOCK) and s, both 0 where s is not finite."""
    rows = tl.arange(0, BLOCK_N)
    first = load_first(x_ptr, cols, col_stride, D)
    z = load_rows(x_ptr, rows, cols, N, row_stride, col_stride, D) - first[None, :]
    z = tl.where((rows < N)[:, None], z, 0.0)
    y = tl.where((rows < N)[:, None], z - (tl.sum(z, axis=0) / N)[None, :], 0.0)
    s = deviation(tl.sum(y * y, axis=0), N)
    return tl.where(is_updated(s)[None, :], y, 0.0), s


@triton.jit
def panel_mean(x_ptr, cols, first, N, row_stride, col_stride, D: tl.constexpr, BLOCK_N: tl.constexpr):
    """mean_n(x - x_0)"""
    zero = tl.zeros_like(first)
    total = tl.zeros_like(first)
    n = 0
    while n < N:
        rows = n + tl.arange(0, BLOCK_N)
        total += tl.sum(centred(x_ptr, rows, cols, first, zero, N, row_stride, col_stride, D), axis=0)
        n += BLOCK_N
    return total / N


@triton.jit
def correlate(C, sigma_i, sigma_j, w, i, j, cols_i, cols_j, work_ptr, T: tl.constexpr, WIDTH: tl.constexpr):
    """(5) on a pair of tiles, its sums of R^2 along rows and columns; on the diagonal also what (7)-(9) need."""
    R = clamp(correlation(C / w, reciprocal(sigma_i / w)[:, None], reciprocal(sigma_j / w)[None, :]))
    square = R * R
    tl.store(work_ptr + j * WIDTH + cols_i, tl.sum(square, axis=1))
    if i != j:
        tl.store(work_ptr + i * WIDTH + cols_j, tl.sum(square, axis=0))
    else:
        diagonal = tl.sum(tl.where(cols_i[:, None] == cols_j[None, :], C, 0.0), axis=1)
        store_feature(work_ptr, SIGMA, cols_i, sigma_i, T, WIDTH)
        store_feature(work_ptr, INV_W, cols_i, tl.zeros_like(sigma_i) + 1.0 / w, T, WIDTH)
        store_feature(work_ptr, VARIANCE, cols_i, diagonal / w, T, WIDTH)


# ---- Kernels ----


@triton.jit(do_not_specialize=["N", "rows_per_chunk"])
def column_sums(
    x_ptr,  # (N, D)
    work_ptr,  # the workspace: writes sums
    N,
    row_stride,
    col_stride,
    rows_per_chunk,
    D: tl.constexpr,
    T: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sums over a chunk of rows of x - x_0. Grid: (T, chunks)."""
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    start = tl.program_id(1) * rows_per_chunk
    first = load_first(x_ptr, cols, col_stride, D)
    zero = tl.zeros_like(first)
    total = tl.zeros_like(first)
    n = start
    stop = tl.minimum(start + rows_per_chunk, N)
    while n < stop:
        rows = n + tl.arange(0, BLOCK_N)
        total += tl.sum(centred(x_ptr, rows, cols, first, zero, stop, row_stride, col_stride, D), axis=0)
        n += BLOCK_N
    tl.store(chunk_rows(work_ptr, T, WIDTH) + tl.program_id(1) * WIDTH + cols, total)


@triton.jit(do_not_specialize=["N", "chunks", "rows_per_chunk"])
def update_pairs(
    x_ptr,  # (N, D)
    cov_ptr,  # (D, D), updated
    std_ptr,  # (D,), read only: the new one goes to the workspace, as other programs still read this one
    count_ptr,  # (), the number of updates before this step; read only where BIAS_CORRECTION
    work_ptr,  # the workspace: writes partial and three rows of features; reads sums where SUMMED
    N,
    row_stride,
    col_stride,
    chunks,
    rows_per_chunk,
    momentum,
    D: tl.constexpr,
    T: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WHOLE: tl.constexpr,
    SUMMED: tl.constexpr,
    BIAS_CORRECTION: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(1)-(5) on a pair of tiles. Grid: (ceil(T / 2), T + 1).

    WHOLE: N is at most BLOCK_N. SUMMED: column_sums ran before; else each program sums the columns of its own panels.
    """
    i, j, used = pair_of_tiles(T)
    if used:
        cols_i = i * BLOCK + tl.arange(0, BLOCK)
        cols_j = j * BLOCK + tl.arange(0, BLOCK)
        if WHOLE:
            y_i, s_i = centred_panel(x_ptr, cols_i, N, row_stride, col_stride, D, BLOCK_N)
            y_j, s_j = centred_panel(x_ptr, cols_j, N, row_stride, col_stride, D, BLOCK_N)
            B = tl.dot(tl.trans(y_i), y_j, input_precision=PRECISION) / N
        else:
            first_i = load_first(x_ptr, cols_i, col_stride, D)
            first_j = load_first(x_ptr, cols_j, col_stride, D)
            if not SUMMED:
                mean_i = panel_mean(x_ptr, cols_i, first_i, N, row_stride, col_stride, D, BLOCK_N)
                mean_j = panel_mean(x_ptr, cols_j, first_j, N, row_stride, col_stride, D, BLOCK_N)
            else:
                mean_i = sum_of_chunks(chunk_rows(work_ptr, T, WIDTH), cols_i, chunks, WIDTH) / N
                mean_j = sum_of_chunks(chunk_rows(work_ptr, T, WIDTH), cols_j, chunks, WIDTH) / N
            B = tl.zeros((BLOCK, BLOCK), tl.float32)
            square_i = tl.zeros((BLOCK,), tl.float32)
            square_j = tl.zeros((BLOCK,), tl.float32)
            start = 0
            while start < N:  # chunk by chunk: in one chain of N additions the error would grow with N
                B_chunk = tl.zeros((BLOCK, BLOCK), tl.float32)
                chunk_i = tl.zeros((BLOCK,), tl.float32)
                chunk_j = tl.zeros((BLOCK,), tl.float32)
                n = start
                start += rows_per_chunk
                while n < tl.minimum(start, N):
                    rows = n + tl.arange(0, BLOCK_N)
                    y_i = centred(x_ptr, rows, cols_i, first_i, mean_i, N, row_stride, col_stride, D)
                    y_j = centred(x_ptr, rows, cols_j, first_j, mean_j, N, row_stride, col_stride, D)
                    chunk_i += tl.sum(y_i * y_i, axis=0)
                    chunk_j += tl.sum(y_j * y_j, axis=0)
                    B_chunk += tl.dot(tl.trans(y_i), y_j, input_precision=PRECISION)
                    n += BLOCK_N
                B += B_chunk
                square_i += chunk_i
                square_j += chunk_j
            B = B / N
            s_i = deviation(square_i, N)
            s_j = deviation(square_j, N)

        # (4). A feature that is skipped keeps its bits.
        keep = 1.0 - momentum
        old_i = tl.load(std_ptr + cols_i, mask=cols_i < D, other=0.0)
        old_j = tl.load(std_ptr + cols_j, mask=cols_j < D, other=0.0)
        sigma_i = tl.where(is_updated(s_i), keep * old_i + momentum * s_i, old_i)
        sigma_j = tl.where(is_updated(s_j), keep * old_j + momentum * s_j, old_j)
        inside = (cols_i < D)[:, None] & (cols_j < D)[None, :]
        at = cols_i.to(tl.int64)[:, None] * D + cols_j[None, :]
        old = tl.load(cov_ptr + at, mask=inside, other=0.0)
        upper = cols_i[:, None] <= cols_j[None, :]
        if i == j:
            old = tl.where(upper, old, tl.trans(old))
        C = tl.where(is_updated(s_i)[:, None] & is_updated(s_j)[None, :], keep * old + momentum * B, old)
        if i == j:  # a product on tensor cores need not be symmetric to the bit
            C = tl.where(upper, C, tl.trans(C))
        tl.store(cov_ptr + at, C, mask=inside)
        if i != j:
            mirrored = cols_j.to(tl.int64)[:, None] * D + cols_i[None, :]
            tl.store(cov_ptr + mirrored, tl.trans(C), mask=(cols_j < D)[:, None] & (cols_i < D)[None, :])

        w = 1.0
        if BIAS_CORRECTION:
            w = correction_weight(tl.load(count_ptr) + 1, momentum)
        correlate(C, sigma_i, sigma_j, w, i, j, cols_i, cols_j, work_ptr, T, WIDTH)


@triton.jit
def inspect_pairs(
    cov_ptr,  # (D, D)
    std_ptr,  # (D,)
    count_ptr,  # (), the number of updates; read only where BIAS_CORRECTION
    work_ptr,  # the workspace: writes partial and three rows of features
    momentum,
    D: tl.constexpr,
    T: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BIAS_CORRECTION: tl.constexpr,
):
    """(5) on a pair of tiles of the statistics as they are. Grid: (ceil(T / 2), T + 1)."""
    i, j, used = pair_of_tiles(T)
    if used:
        cols_i = i * BLOCK + tl.arange(0, BLOCK)
        cols_j = j * BLOCK + tl.arange(0, BLOCK)
        sigma_i = tl.load(std_ptr + cols_i, mask=cols_i < D, other=0.0)
        sigma_j = tl.load(std_ptr + cols_j, mask=cols_j < D, other=0.0)
        inside = (cols_i < D)[:, None] & (cols_j < D)[None, :]
        C = tl.load(cov_ptr + cols_i.to(tl.int64)[:, None] * D + cols_j[None, :], mask=inside, other=0.0)
        if i == j:
            C = tl.where(cols_i[:, None] <= cols_j[None, :], C, tl.trans(C))
        w = 1.0
        if BIAS_CORRECTION:
            w = correction_weight(tl.load(count_ptr), momentum)
        correlate(C, sigma_i, sigma_j, w, i, j, cols_i, cols_j, work_ptr, T, WIDTH)


@triton.jit
def shrink(
    work_ptr,  # the workspace: reads partial and three rows of features; writes t and energies
    eps,
    beta,
    D: tl.constexpr,
    T: tl.constexpr,
    T_POW2: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(6)-(8) on one tile of features. Grid: (T,)."""
    tile = tl.program_id(0)
    cols = tile * BLOCK + tl.arange(0, BLOCK)
    C_ii = load_feature(work_ptr, VARIANCE, cols, T, WIDTH)
    gamma = sum_gamma(work_ptr, cols, D, T, T_POW2, WIDTH)
    t = power(gamma * load_sigma(work_ptr, cols, T, WIDTH) + eps, -beta)
    store_feature(work_ptr, SHRINKAGE, cols, t, T, WIDTH)
    tl.store(energies(work_ptr, E, T, WIDTH) + tile, tl.sum(C_ii, axis=0))
    tl.store(energies(work_ptr, E_PRIME, T, WIDTH) + tile, tl.sum(C_ii * t * t, axis=0))


@triton.jit(do_not_specialize=["N"])
def finish(
    x_ptr,  # (N, D), or None: the scale only, from statistics that stay as they are
    out_ptr,  # (N, D), contiguous
    saved_scale_ptr,  # (D,)
    scale_ptr,  # (D,), the buffer; None with x
    std_ptr,  # (D,), the buffer; None with x
    count_ptr,  # (), the number of updates, or None
    work_ptr,  # the workspace: reads partial and features; where not FUSED, features and energies
    N,
    row_stride,
    col_stride,
    eps,
    beta,
    D: tl.constexpr,
    T: tl.constexpr,
    T_POW2: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    FUSED: tl.constexpr,
):
    """(9) and (10) on a block of the output. Grid: (blocks of rows, T).

    FUSED: each program computes (6)-(8) of all features, CHUNK at a time, which saves a launch where D is small.
    """
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if FUSED:
        energy = 0.0
        energy_prime = 0.0
        for start in range(0, WIDTH, CHUNK):
            all_cols = start + tl.arange(0, CHUNK)
            inside = all_cols < WIDTH
            sigma = tl.load(feature_row(work_ptr, SIGMA, T, WIDTH) + all_cols, mask=inside, other=0.0)
            sigma *= tl.load(feature_row(work_ptr, INV_W, T, WIDTH) + all_cols, mask=inside, other=0.0)
            C_ii = tl.load(feature_row(work_ptr, VARIANCE, T, WIDTH) + all_cols, mask=inside, other=0.0)
            t = power(sum_gamma(work_ptr, all_cols, D, T, T_POW2, WIDTH) * sigma + eps, -beta)
            energy += tl.sum(C_ii, axis=0)
            energy_prime += tl.sum(C_ii * t * t, axis=0)
        gamma = sum_gamma(work_ptr, cols, D, T, T_POW2, WIDTH)
        t = power(gamma * load_sigma(work_ptr, cols, T, WIDTH) + eps, -beta)
    else:
        energy = sum_of_tiles(work_ptr, E, T, T_POW2, WIDTH)
        energy_prime = sum_of_tiles(work_ptr, E_PRIME, T, T_POW2, WIDTH)
        t = load_feature(work_ptr, SHRINKAGE, cols, T, WIDTH)
    scale = tl.where(energy == 0, 1.0, t * tl.sqrt_rn(energy / (energy_prime + eps)))
    if tl.program_id(0) == 0:
        tl.store(saved_scale_ptr + cols, scale, mask=cols < D)
    if x_ptr is not None:
        if tl.program_id(0) == 0:
            tl.store(scale_ptr + cols, scale, mask=cols < D)
            tl.store(std_ptr + cols, load_feature(work_ptr, SIGMA, cols, T, WIDTH), mask=cols < D)
            if count_ptr is not None:  # noqa: SIM102 (the first is decided when compiling, the second when running)
                if tl.program_id(1) == 0:
                    tl.store(count_ptr, tl.load(count_ptr) + 1)
        rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        scale_block(x_ptr, out_ptr, rows, cols, scale, N, row_stride, col_stride, D)


@triton.jit
def scale_block(x_ptr, out_ptr, rows, cols, scale, N, row_stride, col_stride, D: tl.constexpr):
    """(10)"""
    x = load_rows(x_ptr, rows, cols, N, row_stride, col_stride, D)
    inside = (rows < N)[:, None] & (cols < D)[None, :]
    at = rows.to(tl.int64)[:, None] * D + cols[None, :]
    tl.store(out_ptr + at, (x * scale[None, :]).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N"])
def scale_rows(
    x_ptr,  # (N, D)
    scale_ptr,  # (D,)
    out_ptr,  # (N, D), contiguous
    N,
    row_stride,
    col_stride,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(10) alone: evaluation, and the whole backward of the default mode. Grid: (blocks of rows, of features)."""
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    scale = tl.load(scale_ptr + cols, mask=cols < D, other=0.0)
    scale_block(x_ptr, out_ptr, rows, cols, scale, N, row_stride, col_stride, D)
