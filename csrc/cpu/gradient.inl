// The gradient for stop_gradient=False, one panel of columns. Included by kernels.inl.

namespace isobn::cpu {
namespace {

template <class X, class S>
void gradient_rows(const GradientPanel<S>& panel) {
  const int64_t D = panel.D, j0 = panel.j0;
  S* const M = panel.scratch;            // G + G^T, rows of panel i, columns of panel j
  S* const Z = panel.scratch + P * P;    // y (G + G^T)
  S h_over_s[P] = {};
  for (int64_t n0 = 0; n0 < panel.N; n0 += rows_per_chunk) {
    const int rows = int(panel.N - n0 < rows_per_chunk ? panel.N - n0 : rows_per_chunk);
    double dR_R[P] = {};
    for (int64_t i0 = 0; i0 < D; i0 += P) {
      const int height = int(D - i0 < P ? D - i0 : P);
      for (int i = 0; i < height; ++i) {
        const S* C = panel.C + (i0 + i) * D + j0;
        const S row_inv = panel.row_inv[i0 + i], inv_i = panel.inv[i0 + i], dgamma_i = panel.dgamma[i0 + i];
        S row[P];
        for (int j = 0; j < panel.wj; ++j) row[j] = C[j];
        for (int j = panel.wj; j < P; ++j) row[j] = S(0);
        for (int j = 0; j < P; ++j) {
          // In the order of the upper triangle: |R_ij| < 1 is decided once for i and j.
          const bool above = i0 + i <= j0 + j;
          const S R = correlation(row[j], above ? row_inv : panel.row_inv[j0 + j], above ? panel.inv[j0 + j] : inv_i);
          const S dR = R < S(1) && R > S(-1) ? panel.pair_gain * (dgamma_i + panel.dgamma[j0 + j]) * R : S(0);
          M[i * P + j] = correlation(dR, inv_i, panel.inv[j0 + j]);
          dR_R[j] += dR * R;
        }
        if (i0 == j0) M[i * P + i] += panel.diag[i0 + i];
      }
      product(panel.y + i0 * panel.N + n0 * P, int64_t(P), int64_t(1), rows, M, int64_t(height), Z, i0 > 0);
    }
    if (n0 == 0)
      for (int j = 0; j < P; ++j) {
        const S s = panel.s[j0 + j];
        const S h = panel.du_gamma[j0 + j] - S(dR_R[j]) * panel.inv[j0 + j];
        h_over_s[j] = panel.updated[j0 + j] && s > S(0) ? h / s : S(0);
      }
    for (int n = 0; n < rows; ++n) {
      S row[P];
      load_row(static_cast<const X*>(panel.dout.data) + (n0 + n) * panel.dout.row_stride, panel.dout.col_stride,
               panel.wj, row);
      const S* y = panel.y + j0 * panel.N + (n0 + n) * P;
      for (int j = 0; j < P; ++j) {
        const S through_statistics = panel.gain * (Z[n * P + j] + y[j] * h_over_s[j]);
        row[j] = row[j] * panel.scale[j0 + j] + (panel.updated[j0 + j] ? through_statistics : S(0));
      }
      store_row(row, panel.wj, static_cast<X*>(panel.dx) + (n0 + n) * D);
    }
  }
}

template <class S>
void gradient(const GradientPanel<S>& panel) {
  ISOBN_BY_DTYPE(gradient_rows, panel.dout.dtype, panel)
}

}  // namespace
}  // namespace isobn::cpu
