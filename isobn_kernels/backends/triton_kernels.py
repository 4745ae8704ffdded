"""The Triton kernels behind `isobn_kernels.backends.triton`; the symbols are those of `isobn_kernels.reference`.

The D features are cut into T tiles of BLOCK. A pair of tiles (i <= j) of the covariance is the work of one program: it
centres its two panels of the batch, multiplies them, updates the tile, correlates, and writes both halves and the sums
of R^2 along its rows and columns. The sums go to `partial`, whose row q holds what tile q adds to each feature; they
are added in one fixed order, so no result depends on the order in which programs ran.

What the kernels of one call leave to each other is one workspace of float32 rows of WIDTH = T * BLOCK numbers:

    partial   T rows           sums of R^2
    features  8 rows           sigma, 1/w, C_ii / w, t; for the backward also gamma, mean, s, g
    energies  1 row            each tile's part of E, of E' and, for the backward, of dr: T numbers each
    sums      `chunks` rows    what a chunk of rows of x - x_0 adds up to
    products  2 `chunks` rows  the same of y^2 and of dout x, for the backward

Blocks of rows are on the grid's first axis, the only one that may exceed 65,535. Integers that vary from batch to batch
(N) are not specialised; D is, and so are strides. Padding beyond D and N is zero everywhere: it has 1 / sigma = 0 and
adds nothing to any sum.
"""

import triton
import triton.language as tl

_MAX = tl.constexpr(3.402823466e38)


# ---- Equations, on blocks ----


@triton.jit
def _finite(a):
    return tl.abs(a) <= _MAX


@triton.jit
def _reciprocal(sigma):
    inv = tl.where(sigma > 0, 1.0 / tl.where(sigma > 0, sigma, 1.0), 0.0)
    return tl.where(_finite(inv), inv, 0.0)


@triton.jit
def _correlation(C, inv_i, inv_j):
    """(5) before the clamp, of blocks that broadcast.

    Inf * 0, where 1/sigma_j := 0 and the first product overflowed, is the 0 that was meant.
    """
    r = C * inv_i * inv_j
    return tl.where(r == r, r, 0.0)


@triton.jit
def _clamp(r):
    return tl.minimum(tl.maximum(r, -1.0), 1.0)


@triton.jit
def _power(u, exponent):
    return tl.exp2(exponent * tl.log2(u))


@triton.jit
def _correction_weight(t, momentum):
    """``1 - (1-m)^t`` in float64: in float32 the difference would lose what the correction is for."""
    keep = 1.0 - tl.cast(momentum, tl.float64)
    keep_t = tl.exp(t.to(tl.float64) * tl.log(tl.where(keep > 0, keep, 1.0)))
    w = 1.0 - tl.where((keep > 0) | (t == 0), keep_t, 0.0)
    return tl.where(w == 0, 1.0, w).to(tl.float32)


# ---- Pieces of the workspace, of the batch and of the covariance ----


@triton.jit
def _features(work_ptr, T: tl.constexpr, WIDTH: tl.constexpr):
    return work_ptr + T * WIDTH


@triton.jit
def _energies(work_ptr, T: tl.constexpr, WIDTH: tl.constexpr):
    return work_ptr + (T + 8) * WIDTH


@triton.jit
def _sums(work_ptr, T: tl.constexpr, WIDTH: tl.constexpr):
    return work_ptr + (T + 9) * WIDTH


@triton.jit
def _pair(T: tl.constexpr):
    """This program's pair of tiles. Rows r and T-1-r of the upper triangle have T+1 pairs together: one grid row."""
    r = tl.program_id(0)
    c = tl.program_id(1)
    first = c < T - r
    i = tl.where(first, r, T - 1 - r)
    j = tl.where(first, r + c, c - 1)
    return i, j, first | (2 * r + 1 < T)


@triton.jit
def _load_rows(x_ptr, rows, cols, N, row_stride, col_stride, D: tl.constexpr):
    mask = (rows < N)[:, None] & (cols < D)[None, :]
    at = rows.to(tl.int64)[:, None] * row_stride + cols.to(tl.int64)[None, :] * col_stride
    return tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_first(x_ptr, cols, col_stride, D: tl.constexpr):
    return tl.load(x_ptr + cols.to(tl.int64) * col_stride, mask=cols < D, other=0.0).to(tl.float32)


@triton.jit
def _centred(x_ptr, rows, cols, first, mean, N, row_stride, col_stride, D: tl.constexpr):
    """(1): rows of y; a feature that is not finite gives zeros or NaN, which the caller drops."""
    z = _load_rows(x_ptr, rows, cols, N, row_stride, col_stride, D) - first[None, :] - mean[None, :]
    return tl.where((rows < N)[:, None], z, 0.0)


@triton.jit
def _panel(x_ptr, cols, N, row_stride, col_stride, D: tl.constexpr, BLOCK_N: tl.constexpr):
    """(1) and (2) of a batch that fits one block: y (BLOCK_N, BLOCK) and s, both 0 where s is not finite."""
    rows = tl.arange(0, BLOCK_N)
    first = _load_first(x_ptr, cols, col_stride, D)
    z = _load_rows(x_ptr, rows, cols, N, row_stride, col_stride, D) - first[None, :]
    z = tl.where((rows < N)[:, None], z, 0.0)
    y = tl.where((rows < N)[:, None], z - (tl.sum(z, axis=0) / N)[None, :], 0.0)
    s = tl.sqrt_rn(tl.sum(y * y, axis=0) / N)
    return tl.where(_finite(s)[None, :], y, 0.0), s


@triton.jit
def _panel_mean(x_ptr, cols, first, N, row_stride, col_stride, D: tl.constexpr, BLOCK_N: tl.constexpr):
    """mean_n(x - x_0)"""
    zero = tl.zeros_like(first)
    total = tl.zeros_like(first)
    n = 0
    while n < N:
        rows = n + tl.arange(0, BLOCK_N)
        total += tl.sum(_centred(x_ptr, rows, cols, first, zero, N, row_stride, col_stride, D), axis=0)
        n += BLOCK_N
    return total / N


@triton.jit
def _mean(sums_ptr, cols, N, chunks, WIDTH: tl.constexpr):
    """mean_n(x - x_0) from the sums of each chunk of rows."""
    total = tl.zeros_like(cols).to(tl.float32)
    chunk = 0
    while chunk < chunks:
        total += tl.load(sums_ptr + chunk * WIDTH + cols)
        chunk += 1
    return total / N


@triton.jit
def _gamma(work_ptr, cols, D: tl.constexpr, T: tl.constexpr, T_POW2: tl.constexpr, WIDTH: tl.constexpr):
    """(6)"""
    q = tl.arange(0, T_POW2)
    inside = (q < T)[:, None] & (cols < WIDTH)[None, :]
    return tl.sum(tl.load(work_ptr + q[:, None] * WIDTH + cols[None, :], mask=inside, other=0.0), axis=0) / D


@triton.jit
def _total(work_ptr, which: tl.constexpr, T: tl.constexpr, T_POW2: tl.constexpr, WIDTH: tl.constexpr):
    """E, E' or dr, as `which` is 0, 1 or 2."""
    q = tl.arange(0, T_POW2)
    return tl.sum(tl.load(_energies(work_ptr, T, WIDTH) + which * T + q, mask=q < T, other=0.0), axis=0)


@triton.jit
def _correlate(C, sigma_i, sigma_j, w, i, j, cols_i, cols_j, work_ptr, T: tl.constexpr, WIDTH: tl.constexpr):
    """(5) on a pair of tiles, its sums of R^2 along rows and columns; on the diagonal also what (7)-(9) need."""
    R = _clamp(_correlation(C / w, _reciprocal(sigma_i / w)[:, None], _reciprocal(sigma_j / w)[None, :]))
    square = R * R
    tl.store(work_ptr + j * WIDTH + cols_i, tl.sum(square, axis=1))
    if i != j:
        tl.store(work_ptr + i * WIDTH + cols_j, tl.sum(square, axis=0))
    else:
        diagonal = tl.sum(tl.where(cols_i[:, None] == cols_j[None, :], C, 0.0), axis=1)
        features_ptr = _features(work_ptr, T, WIDTH)
        tl.store(features_ptr + cols_i, sigma_i)
        tl.store(features_ptr + WIDTH + cols_i, tl.zeros_like(sigma_i) + 1.0 / w)
        tl.store(features_ptr + 2 * WIDTH + cols_i, diagonal / w)


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
    first = _load_first(x_ptr, cols, col_stride, D)
    zero = tl.zeros_like(first)
    total = tl.zeros_like(first)
    n = start
    stop = tl.minimum(start + rows_per_chunk, N)
    while n < stop:
        rows = n + tl.arange(0, BLOCK_N)
        total += tl.sum(_centred(x_ptr, rows, cols, first, zero, stop, row_stride, col_stride, D), axis=0)
        n += BLOCK_N
    tl.store(_sums(work_ptr, T, WIDTH) + tl.program_id(1) * WIDTH + cols, total)


@triton.jit(do_not_specialize=["N", "chunks", "rows_per_chunk"])
def update_pairs(
    x_ptr,  # (N, D)
    cov_ptr,  # (D, D), updated
    std_ptr,  # (D,), read only: the new one goes to the workspace, as other programs still read this one
    count_ptr,  # (), t before this step; read only where BIAS_CORRECTION
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
    i, j, used = _pair(T)
    if used:
        cols_i = i * BLOCK + tl.arange(0, BLOCK)
        cols_j = j * BLOCK + tl.arange(0, BLOCK)
        if WHOLE:
            y_i, s_i = _panel(x_ptr, cols_i, N, row_stride, col_stride, D, BLOCK_N)
            y_j, s_j = _panel(x_ptr, cols_j, N, row_stride, col_stride, D, BLOCK_N)
            B = tl.dot(tl.trans(y_i), y_j, input_precision=PRECISION) / N
        else:
            first_i = _load_first(x_ptr, cols_i, col_stride, D)
            first_j = _load_first(x_ptr, cols_j, col_stride, D)
            if not SUMMED:
                mean_i = _panel_mean(x_ptr, cols_i, first_i, N, row_stride, col_stride, D, BLOCK_N)
                mean_j = _panel_mean(x_ptr, cols_j, first_j, N, row_stride, col_stride, D, BLOCK_N)
            else:
                mean_i = _mean(_sums(work_ptr, T, WIDTH), cols_i, N, chunks, WIDTH)
                mean_j = _mean(_sums(work_ptr, T, WIDTH), cols_j, N, chunks, WIDTH)
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
                    y_i = _centred(x_ptr, rows, cols_i, first_i, mean_i, N, row_stride, col_stride, D)
                    y_j = _centred(x_ptr, rows, cols_j, first_j, mean_j, N, row_stride, col_stride, D)
                    chunk_i += tl.sum(y_i * y_i, axis=0)
                    chunk_j += tl.sum(y_j * y_j, axis=0)
                    B_chunk += tl.dot(tl.trans(y_i), y_j, input_precision=PRECISION)
                    n += BLOCK_N
                B += B_chunk
                square_i += chunk_i
                square_j += chunk_j
            B = B / N
            s_i = tl.sqrt_rn(square_i / N)
            s_j = tl.sqrt_rn(square_j / N)

        # (4). A feature that this batch leaves out keeps its bits.
        keep = 1.0 - momentum
        old_i = tl.load(std_ptr + cols_i, mask=cols_i < D, other=0.0)
        old_j = tl.load(std_ptr + cols_j, mask=cols_j < D, other=0.0)
        sigma_i = tl.where(_finite(s_i), keep * old_i + momentum * s_i, old_i)
        sigma_j = tl.where(_finite(s_j), keep * old_j + momentum * s_j, old_j)
        inside = (cols_i < D)[:, None] & (cols_j < D)[None, :]
        at = cols_i.to(tl.int64)[:, None] * D + cols_j[None, :]
        old = tl.load(cov_ptr + at, mask=inside, other=0.0)
        upper = cols_i[:, None] <= cols_j[None, :]
        if i == j:
            old = tl.where(upper, old, tl.trans(old))
        C = tl.where(_finite(s_i)[:, None] & _finite(s_j)[None, :], keep * old + momentum * B, old)
        if i == j:  # a product on tensor cores need not be symmetric to the bit
            C = tl.where(upper, C, tl.trans(C))
        tl.store(cov_ptr + at, C, mask=inside)
        if i != j:
            mirrored = cols_j.to(tl.int64)[:, None] * D + cols_i[None, :]
            tl.store(cov_ptr + mirrored, tl.trans(C), mask=(cols_j < D)[:, None] & (cols_i < D)[None, :])

        w = 1.0
        if BIAS_CORRECTION:
            w = _correction_weight(tl.load(count_ptr) + 1, momentum)
        _correlate(C, sigma_i, sigma_j, w, i, j, cols_i, cols_j, work_ptr, T, WIDTH)


@triton.jit
def inspect_pairs(
    cov_ptr,  # (D, D)
    std_ptr,  # (D,)
    count_ptr,  # (), t; read only where BIAS_CORRECTION
    work_ptr,  # the workspace: writes partial and three rows of features
    momentum,
    D: tl.constexpr,
    T: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BIAS_CORRECTION: tl.constexpr,
):
    """(5) on a pair of tiles of the statistics as they are. Grid: (ceil(T / 2), T + 1)."""
    i, j, used = _pair(T)
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
            w = _correction_weight(tl.load(count_ptr), momentum)
        _correlate(C, sigma_i, sigma_j, w, i, j, cols_i, cols_j, work_ptr, T, WIDTH)


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
    features_ptr = _features(work_ptr, T, WIDTH)
    energies_ptr = _energies(work_ptr, T, WIDTH)
    sigma = tl.load(features_ptr + cols) * tl.load(features_ptr + WIDTH + cols)
    C_ii = tl.load(features_ptr + 2 * WIDTH + cols)
    t = _power(_gamma(work_ptr, cols, D, T, T_POW2, WIDTH) * sigma + eps, -beta)
    tl.store(features_ptr + 3 * WIDTH + cols, t)
    tl.store(energies_ptr + tile, tl.sum(C_ii, axis=0))
    tl.store(energies_ptr + T + tile, tl.sum(C_ii * t * t, axis=0))


@triton.jit(do_not_specialize=["N"])
def finish(
    x_ptr,  # (N, D), or None: the scale only, from statistics that stay as they are
    out_ptr,  # (N, D), contiguous
    saved_scale_ptr,  # (D,)
    scale_ptr,  # (D,), the buffer; None with x
    std_ptr,  # (D,), the buffer; None with x
    count_ptr,  # (), t, or None
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
    features_ptr = _features(work_ptr, T, WIDTH)
    if FUSED:
        E = 0.0
        E_prime = 0.0
        for start in range(0, WIDTH, CHUNK):
            all_cols = start + tl.arange(0, CHUNK)
            inside = all_cols < WIDTH
            sigma = tl.load(features_ptr + all_cols, mask=inside, other=0.0)
            sigma *= tl.load(features_ptr + WIDTH + all_cols, mask=inside, other=0.0)
            C_ii = tl.load(features_ptr + 2 * WIDTH + all_cols, mask=inside, other=0.0)
            t = _power(_gamma(work_ptr, all_cols, D, T, T_POW2, WIDTH) * sigma + eps, -beta)
            E += tl.sum(C_ii, axis=0)
            E_prime += tl.sum(C_ii * t * t, axis=0)
        sigma = tl.load(features_ptr + cols) * tl.load(features_ptr + WIDTH + cols)
        t = _power(_gamma(work_ptr, cols, D, T, T_POW2, WIDTH) * sigma + eps, -beta)
    else:
        E = _total(work_ptr, 0, T, T_POW2, WIDTH)
        E_prime = _total(work_ptr, 1, T, T_POW2, WIDTH)
        t = tl.load(features_ptr + 3 * WIDTH + cols)
    scale = tl.where(E == 0, 1.0, t * tl.sqrt_rn(E / (E_prime + eps)))
    if tl.program_id(0) == 0:
        tl.store(saved_scale_ptr + cols, scale, mask=cols < D)
    if x_ptr is not None:
        if tl.program_id(0) == 0:
            tl.store(scale_ptr + cols, scale, mask=cols < D)
            tl.store(std_ptr + cols, tl.load(features_ptr + cols), mask=cols < D)
            if count_ptr is not None:  # noqa: SIM102 (the first is decided when compiling, the second when running)
                if tl.program_id(1) == 0:
                    tl.store(count_ptr, tl.load(count_ptr) + 1)
        rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        _scale_block(x_ptr, out_ptr, rows, cols, scale, N, row_stride, col_stride, D)


@triton.jit
def _scale_block(x_ptr, out_ptr, rows, cols, scale, N, row_stride, col_stride, D: tl.constexpr):
    """(10)"""
    x = _load_rows(x_ptr, rows, cols, N, row_stride, col_stride, D)
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
    _scale_block(x_ptr, out_ptr, rows, cols, scale, N, row_stride, col_stride, D)


# ---- Backward of stop_gradient=False ----


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
    first = _load_first(x_ptr, cols, col_stride, D)
    sums_ptr = _sums(work_ptr, T, WIDTH)
    mean = _mean(sums_ptr, cols, N, chunks, WIDTH)
    squares = tl.zeros_like(first)
    g = tl.zeros_like(first)
    n = chunk * rows_per_chunk
    stop = tl.minimum(n + rows_per_chunk, N)
    while n < stop:
        rows = n + tl.arange(0, BLOCK_N)
        y = _centred(x_ptr, rows, cols, first, mean, stop, row_stride, col_stride, D)
        squares += tl.sum(y * y, axis=0)
        x = _load_rows(x_ptr, rows, cols, stop, row_stride, col_stride, D)
        g += tl.sum(x * _load_rows(dout_ptr, rows, cols, stop, dout_row_stride, dout_col_stride, D), axis=0)
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
    features_ptr = _features(work_ptr, T, WIDTH)
    energies_ptr = _energies(work_ptr, T, WIDTH)
    sums_ptr = _sums(work_ptr, T, WIDTH)
    products_ptr = sums_ptr + chunks * WIDTH
    sigma = tl.load(features_ptr + cols) * tl.load(features_ptr + WIDTH + cols)
    C_ii = tl.load(features_ptr + 2 * WIDTH + cols)
    gamma = _gamma(work_ptr, cols, D, T, T_POW2, WIDTH)
    t = _power(gamma * sigma + eps, -beta)
    g = _mean(products_ptr + chunks * WIDTH, cols, 1, chunks, WIDTH)
    tl.store(features_ptr + 3 * WIDTH + cols, t)
    tl.store(features_ptr + 4 * WIDTH + cols, gamma)
    tl.store(features_ptr + 5 * WIDTH + cols, _mean(sums_ptr, cols, N, chunks, WIDTH))
    tl.store(features_ptr + 6 * WIDTH + cols, tl.sqrt_rn(_mean(products_ptr, cols, N, chunks, WIDTH)))
    tl.store(features_ptr + 7 * WIDTH + cols, g)
    tl.store(energies_ptr + tile, tl.sum(C_ii, axis=0))
    tl.store(energies_ptr + T + tile, tl.sum(C_ii * t * t, axis=0))
    tl.store(energies_ptr + 2 * T + tile, tl.sum(tl.where(cols < D, g * t, 0.0), axis=0))


@triton.jit
def _feature_gradients(features_ptr, cols, E, E_prime, dr, eps, beta, WIDTH: tl.constexpr):
    """1/sigma, dgamma, 2 (dE + dE' t^2) and du gamma of some features."""
    sigma = tl.load(features_ptr + cols) * tl.load(features_ptr + WIDTH + cols)
    C_ii = tl.load(features_ptr + 2 * WIDTH + cols)
    t = tl.load(features_ptr + 3 * WIDTH + cols)
    gamma = tl.load(features_ptr + 4 * WIDTH + cols)
    g = tl.load(features_ptr + 7 * WIDTH + cols)
    varies = E != 0  # else the scale is 1 whatever the batch
    r = tl.where(varies, tl.sqrt_rn(E / (E_prime + eps)), 0.0)
    dr = tl.where(varies, dr, 0.0)
    dE = dr * r / (2 * tl.where(varies, E, 1.0))
    dE_prime = -dr * r / (2 * (E_prime + eps))
    dt = tl.where(varies, g, 0.0) * r + 2 * dE_prime * C_ii * t
    # Of a constant feature both powers may overflow, and are multiplied by 0.
    du = tl.where(sigma > 0, -beta * dt * _power(gamma * sigma + eps, -beta - 1), 0.0)
    t = tl.where(sigma > 0, t, 0.0)
    return _reciprocal(sigma), du * sigma, 2 * (dE + dE_prime * t * t), du * gamma


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
    features_ptr = _features(work_ptr, T, WIDTH)
    E = _total(work_ptr, 0, T, T_POW2, WIDTH)
    E_prime = _total(work_ptr, 1, T, T_POW2, WIDTH)
    dr = _total(work_ptr, 2, T, T_POW2, WIDTH)
    inv_j, dgamma_j, diagonal_j, du_gamma_j = _feature_gradients(features_ptr, cols_j, E, E_prime, dr, eps, beta, WIDTH)
    h = du_gamma_j
    Z = tl.zeros((BLOCK_N, BLOCK), tl.float32)
    for i in range(T):
        cols_i = i * BLOCK + tl.arange(0, BLOCK)
        inv_i, dgamma_i, _, _ = _feature_gradients(features_ptr, cols_i, E, E_prime, dr, eps, beta, WIDTH)
        inside = (cols_i < D)[:, None] & (cols_j < D)[None, :]
        C = tl.load(cov_ptr + cols_i.to(tl.int64)[:, None] * D + cols_j[None, :], mask=inside, other=0.0)
        inv_row, inv_col = inv_i[:, None], inv_j[None, :]
        # In the order of the upper triangle: |R_ij| < 1 is decided once for i and j.
        above = cols_i[:, None] <= cols_j[None, :]
        C_over_w = C * tl.load(features_ptr + WIDTH + cols_i)[:, None]
        R = _correlation(C_over_w, tl.where(above, inv_row, inv_col), tl.where(above, inv_col, inv_row))
        dR = tl.where(tl.abs(R) < 1, 2.0 / D * (dgamma_i[:, None] + dgamma_j[None, :]) * R, 0.0)
        h -= tl.sum(dR * R, axis=0) * inv_j
        M = _correlation(dR, inv_row, inv_col)
        M += tl.where(cols_i[:, None] == cols_j[None, :], diagonal_j[None, :], 0.0)
        y_i = _seen_rows(x_ptr, features_ptr, rows, cols_i, N, row_stride, col_stride, D, WIDTH)
        Z += tl.dot(y_i, M, input_precision=PRECISION)
    s_j = tl.load(features_ptr + 6 * WIDTH + cols_j)
    seen = _finite(s_j)
    h_over_s = tl.where(seen & (s_j > 0), h / tl.where(s_j > 0, s_j, 1.0), 0.0)
    y_j = _seen_rows(x_ptr, features_ptr, rows, cols_j, N, row_stride, col_stride, D, WIDTH)
    gain = momentum * tl.load(features_ptr + WIDTH + cols_j) / N
    through_statistics = tl.where(seen[None, :], gain[None, :] * (Z + y_j * h_over_s[None, :]), 0.0)
    dout = _load_rows(dout_ptr, rows, cols_j, N, dout_row_stride, dout_col_stride, D)
    scale = tl.load(scale_ptr + cols_j, mask=cols_j < D, other=0.0)
    inside = (rows < N)[:, None] & (cols_j < D)[None, :]
    at = rows.to(tl.int64)[:, None] * D + cols_j[None, :]
    tl.store(dx_ptr + at, (dout * scale[None, :] + through_statistics).to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _seen_rows(x_ptr, features_ptr, rows, cols, N, row_stride, col_stride, D: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of y, 0 where the feature was skipped."""
    first = _load_first(x_ptr, cols, col_stride, D)
    mean = tl.load(features_ptr + 5 * WIDTH + cols)
    s = tl.load(features_ptr + 6 * WIDTH + cols)
    y = _centred(x_ptr, rows, cols, first, mean, N, row_stride, col_stride, D)
    return tl.where(_finite(s)[None, :], y, 0.0)
