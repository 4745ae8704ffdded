// The inner loops of the CPU backend: one table of functions per instruction set and state type.
//
// The D features are cut into panels of P; the centred batch is kept panel by panel, (N, P) each, zero-padded, so that
// a tile of the covariance needs two panels that lie densely in cache whatever D is.
#pragma once

#include "../types.h"

namespace isobn::cpu {

constexpr int P = 64;

// One tile (i, j) of the covariance, i <= j: rows i0.. of height hi, columns j0.. of width wj.
template <class S>
struct Tile {
  S* C;  // (D, D)
  int64_t D;
  int64_t i0, j0;
  int hi, wj;
  const S* y_i;  // centred panels (N, P)
  const S* y_j;
  int64_t N;
  S keep, gain;               // C <- keep C + gain sum_n y_i y_j
  const uint8_t* updated_i;   // per feature: is_updated(s_i); null where every feature is
  const uint8_t* updated_j;
  const S* inv_i;             // 1 / sigma; inv_i also carries 1 / w
  const S* inv_j;
  S* row_sums;                // sum over this tile's columns of R_ij^2, (P,)
  S* col_sums;                // the same over its rows; null on the diagonal, where row_sums say it all
  S* diagonal;                // C_ii, (P,), written on the diagonal
  bool stream;                // write the lower half past the caches: C is larger than they are
  S* scratch;                 // 2 P P
};

// The tiles (i, j), j >= i, for statistics across ranks. A packed matrix is its upper triangle, row by row.
template <class S>
struct RowOfTiles {
  S* C;  // (D, D)
  S* packed;
  int64_t D;
  int64_t i0;
  int hi;
  S keep, gain;               // C <- keep C + gain packed
  const uint8_t* updated;     // per feature, padded to panels like all that follow; null where every feature is
  const S* row_inv;           // 1 / sigma / w
  const S* inv;               // 1 / sigma
  S* partial;                 // (panels, padded): sums of R_ij^2 over panel j, for each i
  int64_t padded;
  S* diagonal;                // C_ii
  bool stream;                // write the lower half past the caches
  S* scratch;                 // 2 P P
};

// Panel j of the gradient for stop_gradient=False.
template <class S>
struct GradientPanel {
  const S* C;  // (D, D), bit-symmetric
  int64_t D, N;
  int64_t j0;
  int wj;
  const S* y;         // all centred panels
  const S* row_inv;   // 1 / sigma_i / w, padded to panels, like all that follow
  const S* inv;       // 1 / sigma_i
  const S* dgamma;
  const S* diag;      // dE + dE' t_i^2, twice
  const S* du_gamma;
  const S* s;
  const uint8_t* updated;
  const S* scale;
  S pair_gain;        // 2 / D
  S gain;             // m / (w N)
  Strided dout;
  void* dx;           // contiguous (N, D), at this panel's first column
  S* scratch;         // P P + rows_per_chunk P
};

constexpr int rows_per_chunk = 256;

template <class S>
struct Kernels {
  // Of a Strided, `data` is the first element of the panel's columns.
  // (1), (2): centres one panel of x, returns whether all are updated; the column of one that is not is zeroed.
  bool (*centre)(const Strided& x, int64_t N, int width, S* y, S* s);
  // (3)-(6) on one tile; `inspect` reads C as it is.
  void (*update)(const Tile<S>& tile);
  void (*inspect)(const Tile<S>& tile);
  // (10) on one panel; out is contiguous (rows, D).
  void (*apply)(const Strided& x, int64_t rows, int width, const S* scale, void* out, int64_t D);
  // sum_n dout_nj x_nj for one panel.
  void (*dot)(const Strided& dout, const Strided& x, int64_t N, int width, S* g);
  void (*gradient)(const GradientPanel<S>& panel);
  // Statistics across ranks. A float64 value is the sum of two halves, which have a sum and a mean each; others have
  // no low half. Sums of columns of a panel; and the panel minus the mean.
  void (*column_sums)(const Strided& x, int64_t N, int width, double* high, double* low);
  void (*centre_about)(const Strided& x, int64_t N, int width, const double* high, const double* low, S* y);
  // (3) on one tile, before the division by N; `gram` is packed.
  void (*gram)(const Tile<S>& tile, S* gram);
  // (4)-(6) on a row of tiles: `packed` holds the sums of all ranks and becomes the new C. C is only read.
  void (*next)(const RowOfTiles<S>& tiles);
  // C = packed, both halves.
  void (*store)(const RowOfTiles<S>& tiles);
};

template <class S>
struct KernelsOf {
  static const Kernels<S> baseline;
#if defined(__x86_64__)
  static const Kernels<S> avx2;
  static const Kernels<S> avx512;
#endif
};

}  // namespace isobn::cpu
