"""What the Triton kernels share: equations on blocks, and the pieces of the workspace, the batch and the covariance.

The symbols are those of `isobn_kernels.reference`. The D features are cut into T tiles of BLOCK. A pair of tiles
(i <= j) of the covariance is the work of one program: it centres its two panels of the batch, multiplies them, updates
the tile, correlates, and writes both halves and the sums of R^2 along its rows and columns. The sums go to `partial`,
whose row q holds what tile q adds to each feature. They are added in one fixed order: no result depends on the order in
which programs ran.

What the kernels of one call leave to each other is one workspace of float32 rows of WIDTH = T * BLOCK numbers:

    partial   T rows           sums of R^2
    features  FEATURE_ROWS     SIGMA to SHRINKAGE; for the backward also GAMMA to DSCALE
    energies  1 row            each tile's part of E, of E_PRIME and, for the backward, of DR: T numbers each
    sums      `chunks` rows    what a chunk of rows of x - x_0 adds up to
    products  2 `chunks` rows  the same of y^2 and of dout x, for the backward

Blocks of rows are on the grid's first axis, the only one that may exceed 65,535. Integers that vary from batch to batch
(N) are not specialised; D is, and so are strides. Padding beyond D and N is zero everywhere: it has 1 / sigma = 0 and
adds nothing to any sum.
"""

import triton
import triton.language as tl

from isobn_kernels.backends.triton import config

LARGEST = tl.constexpr(3.402823466e38)

# Rows of features.
SIGMA = tl.constexpr(0)
INV_W = tl.constexpr(1)
VARIANCE = tl.constexpr(2)  # C_ii / w
SHRINKAGE = tl.constexpr(3)  # t of (7)
GAMMA = tl.constexpr(4)
MEAN = tl.constexpr(5)  # of x - x_0
DEVIATION = tl.constexpr(6)  # s
DSCALE = tl.constexpr(7)  # g, the gradient that reaches the scale
FEATURE_ROWS = tl.constexpr(config.FEATURE_ROWS)

# Energies.
E = tl.constexpr(0)
E_PRIME = tl.constexpr(1)
DR = tl.constexpr(2)


# ---- Equations, on blocks ----


@triton.jit
def deviation(squares, N):
    """(2) from the sums of y^2; as in csrc/formulas.h a sum within 1 % of the largest number counts as infinite."""
    return tl.where(squares < 0.99 * LARGEST, tl.sqrt_rn(squares / N), float("inf"))


@triton.jit
def is_updated(s):
    """Whether the batch updates a feature, and may pass a gradient: only if its s of (2) is finite."""
    return s <= LARGEST


@triton.jit
def reciprocal(sigma):
    inv = tl.where(sigma > 0, 1.0 / tl.where(sigma > 0, sigma, 1.0), 0.0)
    return tl.where(inv <= LARGEST, inv, 0.0)


@triton.jit
def correlation(C, inv_i, inv_j):
    """(5) before the clamp, of blocks that broadcast.

    Inf * 0, where 1/sigma_j := 0 and the first product overflowed, is the 0 that was meant.
    """
    r = C * inv_i * inv_j
    return tl.where(r == r, r, 0.0)


@triton.jit
def power(u, exponent):
    return tl.exp2(exponent * tl.log2(u))


# ---- Pieces of the workspace, of the batch and of the covariance ----


@triton.jit
def feature_row(work_ptr, row: tl.constexpr, T: tl.constexpr, WIDTH: tl.constexpr):
    """One of the rows of features: SIGMA and so on."""
    return work_ptr + (T + row) * WIDTH


@triton.jit
def energies(work_ptr, which: tl.constexpr, T: tl.constexpr, WIDTH: tl.constexpr):
    """Each tile's part of one of the sums E, E_PRIME and DR."""
    return work_ptr + (T + FEATURE_ROWS) * WIDTH + which * T


@triton.jit
def chunk_rows(work_ptr, T: tl.constexpr, WIDTH: tl.constexpr):
    """The first row of what chunks of the batch add up to: sums, then products."""
    return work_ptr + (T + FEATURE_ROWS + 1) * WIDTH


@triton.jit
def load_feature(work_ptr, row: tl.constexpr, cols, T: tl.constexpr, WIDTH: tl.constexpr):
    return tl.load(feature_row(work_ptr, row, T, WIDTH) + cols)


@triton.jit
def store_feature(work_ptr, row: tl.constexpr, cols, value, T: tl.constexpr, WIDTH: tl.constexpr):
    tl.store(feature_row(work_ptr, row, T, WIDTH) + cols, value)


@triton.jit
def load_sigma(work_ptr, cols, T: tl.constexpr, WIDTH: tl.constexpr):
    """sigma / w"""
    return load_feature(work_ptr, SIGMA, cols, T, WIDTH) * load_feature(work_ptr, INV_W, cols, T, WIDTH)


@triton.jit
def load_rows(x_ptr, rows, cols, N, row_stride, col_stride, D: tl.constexpr):
    mask = (rows < N)[:, None] & (cols < D)[None, :]
    at = rows.to(tl.int64)[:, None] * row_stride + cols.to(tl.int64)[None, :] * col_stride
    return tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_first(x_ptr, cols, col_stride, D: tl.constexpr):
    return tl.load(x_ptr + cols.to(tl.int64) * col_stride, mask=cols < D, other=0.0).to(tl.float32)


@triton.jit
def centred(x_ptr, rows, cols, first, mean, N, row_stride, col_stride, D: tl.constexpr):
    """(1): rows of y; a feature that is not finite gives zeros or NaN, which the caller drops."""
    z = load_rows(x_ptr, rows, cols, N, row_stride, col_stride, D) - first[None, :] - mean[None, :]
    return tl.where((rows < N)[:, None], z, 0.0)


@triton.jit
def sum_of_chunks(sums_ptr, cols, chunks, WIDTH: tl.constexpr):
    """The sum over all rows of the batch, from those of each chunk."""
    total = tl.zeros_like(cols).to(tl.float32)
    chunk = 0
    while chunk < chunks:
        total += tl.load(sums_ptr + chunk * WIDTH + cols)
        chunk += 1
    return total


@triton.jit
def sum_gamma(work_ptr, cols, D: tl.constexpr, T: tl.constexpr, T_POW2: tl.constexpr, WIDTH: tl.constexpr):
    """(6)"""
    q = tl.arange(0, T_POW2)
    inside = (q < T)[:, None] & (cols < WIDTH)[None, :]
    return tl.sum(tl.load(work_ptr + q[:, None] * WIDTH + cols[None, :], mask=inside, other=0.0), axis=0) / D


@triton.jit
def sum_of_tiles(work_ptr, which: tl.constexpr, T: tl.constexpr, T_POW2: tl.constexpr, WIDTH: tl.constexpr):
    """One of the sums E, E_PRIME and DR."""
    q = tl.arange(0, T_POW2)
    return tl.sum(tl.load(energies(work_ptr, which, T, WIDTH) + q, mask=q < T, other=0.0), axis=0)
