#include "cpu.h"

#include <omp.h>

#include <algorithm>
#include <stdexcept>

#include "../formulas.h"
#include "kernels.h"

namespace isobn::cpu {
namespace {

// ---- Instruction sets ----

enum class Set { baseline, avx2, avx512 };
const char* const set_names[] = {"baseline", "avx2", "avx512"};

bool runs_here(Set set) {
#if defined(__x86_64__)
  if (set == Set::avx2)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (set == Set::avx512)
    return runs_here(Set::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  return set == Set::baseline;
}

Set best_set() {
  return runs_here(Set::avx512) ? Set::avx512 : runs_here(Set::avx2) ? Set::avx2 : Set::baseline;
}

Set current_set = best_set();

template <class S>
const Kernels<S>& kernels() {
#if defined(__x86_64__)
  if (current_set == Set::avx512) return KernelsOf<S>::avx512;
  if (current_set == Set::avx2) return KernelsOf<S>::avx2;
#endif
  return KernelsOf<S>::baseline;
}

// ---- Panels and memory ----

int64_t panels(int64_t D) { return (D + P - 1) / P; }
int width(int64_t D, int64_t panel) { return int(std::min<int64_t>(P, D - panel * P)); }

Strided panel_of(const Strided& x, int64_t panel) {
  const int64_t offset = panel * P * x.col_stride * int64_t(item_size(x.dtype));
  return {static_cast<const char*>(x.data) + offset, x.dtype, x.row_stride, x.col_stride};
}

char* panel_of(void* out, DType dtype, int64_t panel) {
  return static_cast<char*>(out) + panel * P * int64_t(item_size(dtype));
}

// Hands out 64-byte aligned pieces of a workspace; with no workspace it only adds up what they take.
class Arena {
 public:
  explicit Arena(void* base) : base_((reinterpret_cast<uintptr_t>(base) + 63) / 64 * 64), counting_(base == nullptr) {}
  template <class T>
  T* take(int64_t count) {
    const uintptr_t at = base_ + used_;
    used_ += (size_t(count) * sizeof(T) + 63) / 64 * 64;
    return counting_ ? nullptr : reinterpret_cast<T*>(at);
  }
  size_t bytes() const { return used_ + 64; }

 private:
  uintptr_t base_;
  size_t used_ = 0;
  bool counting_;
};

// Per-feature vectors are padded to whole panels; padding has y = 0 and 1 / sigma = 0, and so adds nothing to any sum.
template <class S>
struct Workspace {
  int64_t padded;
  S *sigma, *inv, *row_inv;     // sigma / w, 1 / that, and 1 / that / w for use with the uncorrected C
  S *partial;                   // (panels, padded): sums of R_ij^2 over panel j, for each i
  S *t, *gamma, *diagonal;      // (7), (6), C_ii
  double* energies;             // (panels, 2): each panel's part of E and E'
  S *y, *s;                     // (panels, N, P) and (padded,)
  uint8_t *updated, *panel_updated;  // per feature: is_updated(s_j); per panel: all of them are
  S *g, *dgamma, *diag, *du_gamma, *padded_scale;  // backward
  S* scratch;
  int64_t scratch_size;
  size_t bytes;

  Workspace(Function function, int64_t N, int64_t D, int threads, void* base) {
    Arena arena(base);
    const int64_t count = panels(D);
    padded = count * P;
    sigma = arena.take<S>(padded);
    inv = arena.take<S>(padded);
    row_inv = arena.take<S>(padded);
    partial = arena.take<S>(count * padded);
    t = arena.take<S>(padded);
    gamma = arena.take<S>(padded);
    diagonal = arena.take<S>(padded);
    energies = arena.take<double>(2 * count);
    scratch_size = 2 * P * P;
    if (function != Function::compute_scale) {
      y = arena.take<S>(N * padded);
      s = arena.take<S>(padded);
      updated = arena.take<uint8_t>(padded);
      panel_updated = arena.take<uint8_t>(count);
    }
    if (function == Function::train_backward) {
      for (S** vector : {&g, &dgamma, &diag, &du_gamma, &padded_scale}) *vector = arena.take<S>(padded);
      scratch_size = P * P + rows_per_chunk * P;
    }
    scratch = arena.take<S>(scratch_size * threads);
    bytes = arena.bytes();
  }
};

// ---- Steps that several functions share; each is called inside a parallel region, by all its threads ----

// Multiply-adds below which a second thread costs more than it brings.
constexpr int64_t kSerialWork = 200'000;

int threads_for(int64_t work, int threads) { return work < kSerialWork ? 1 : std::max(1, threads); }

int64_t tile_work(int64_t N, int64_t D) { return (N / 2 + 6) * D * D; }

template <class S>
void centre_panel(const Strided& x, int64_t N, int64_t D, int64_t p, const Workspace<S>& ws) {
  S* s = ws.s + p * P;
  const bool all_updated = kernels<S>().centre(panel_of(x, p), N, width(D, p), ws.y + p * N * P, s);
  ws.panel_updated[p] = all_updated;
  for (int j = 0; j < P; ++j) ws.updated[p * P + j] = is_updated(s[j]);
}

// The reciprocals that (5) needs of one panel.
template <class S>
void invert_panel(const S* running_std, int64_t D, int64_t p, double w, const Workspace<S>& ws) {
  for (int64_t i = p * P; i < (p + 1) * P; ++i) {
    ws.sigma[i] = i < D ? S(running_std[i] / w) : S(0);
    ws.inv[i] = reciprocal(ws.sigma[i]);
    ws.row_inv[i] = S(ws.inv[i] / w);
  }
}

// Tiles (i, j), i <= j, row by row of the upper triangle.
struct TileIndex {
  int64_t i, j;
};
TileIndex tile_at(int64_t index, int64_t count) {
  int64_t i = 0;
  while (index >= count - i) index -= count - i++;
  return {i, i + index};
}

template <class S>
Tile<S> make_tile(TileIndex at, S* C, int64_t D, const Workspace<S>& ws, int thread) {
  Tile<S> tile{};
  tile.C = C;
  tile.D = D;
  tile.i0 = at.i * P;
  tile.j0 = at.j * P;
  tile.hi = width(D, at.i);
  tile.wj = width(D, at.j);
  tile.inv_i = ws.row_inv + tile.i0;
  tile.inv_j = ws.inv + tile.j0;
  // Each of the two sums has its own place, so that they are added in one order whichever thread made them.
  tile.row_sums = ws.partial + at.j * ws.padded + tile.i0;
  tile.col_sums = at.i == at.j ? nullptr : ws.partial + at.i * ws.padded + tile.j0;
  tile.diagonal = ws.diagonal + tile.i0;
  tile.scratch = ws.scratch + thread * ws.scratch_size;
  return tile;
}

// The lower half of C is written and never read by a step. Where C is larger than a core's cache it is written past it,
// which saves reading it in first: 10 % of a step at D = 768 from cold caches, 12 % at D = 1024.
template <class S>
bool streamed(int64_t D, const S* C) {
  return size_t(D * D) * sizeof(S) > (size_t(1) << 20) && size_t(D) * sizeof(S) % 64 == 0 &&
         reinterpret_cast<uintptr_t>(C) % 64 == 0;
}

// (6)-(8) on one panel.
template <class S>
void shrink_panel(int64_t D, int64_t p, double w, const Options& options, const Workspace<S>& ws) {
  double E = 0, E_prime = 0;
  S sums[P] = {};
  for (int64_t q = 0; q < panels(D); ++q)
    for (int i = 0; i < P; ++i) sums[i] += ws.partial[q * ws.padded + p * P + i];
  for (int i = 0; i < width(D, p); ++i) {
    const int64_t at = p * P + i;
    ws.gamma[at] = sums[i] / S(D);
    // A beta rounded to float32 would show in the power: by |log u| times its rounding.
    ws.t[at] = options.beta == 0.5
                   ? shrinkage(ws.gamma[at], ws.sigma[at], S(options.eps), S(0.5))
                   : S(shrinkage<double>(ws.gamma[at], ws.sigma[at], options.eps, options.beta));
    const double C_ii = ws.diagonal[at] / w, t = ws.t[at];
    E += C_ii;
    E_prime += C_ii * t * t;
  }
  ws.energies[2 * p] = E;
  ws.energies[2 * p + 1] = E_prime;
}

struct Energies {
  double E = 0, E_prime = 0;
};
template <class S>
Energies total_energies(int64_t D, const Workspace<S>& ws) {
  Energies total;
  for (int64_t p = 0; p < panels(D); ++p) {
    total.E += ws.energies[2 * p];
    total.E_prime += ws.energies[2 * p + 1];
  }
  return total;
}

// (9)
template <class S>
void write_scale(int64_t D, int64_t p, const Energies& total, double eps, const Workspace<S>& ws, S* scale) {
  const S r = S(energy_ratio(total.E, total.E_prime, eps));
  for (int i = 0; i < width(D, p); ++i) scale[i] = total.E == 0 ? S(1) : ws.t[p * P + i] * r;
}

// ---- The functions, for one state type ----

double weight_of(const State& state, const Options& options) {
  return options.bias_correction ? correction_weight(options.momentum, double(*state.num_batches_tracked)) : 1.0;
}

template <class S>
void train_forward_as(const Strided& x, int64_t N, int64_t D, const State& state, S* scale, S* saved_scale, void* out,
                      const Options& options, int threads, void* memory) {
  const Workspace<S> ws(Function::train_forward, N, D, threads, memory);
  const int64_t count = panels(D), tiles = count * (count + 1) / 2;
  S* const C = static_cast<S*>(state.running_cov);
  S* const running_std = static_cast<S*>(state.running_std);
  const S m = S(options.momentum), keep = S(1 - options.momentum);
  const bool stream = streamed(D, C);
  if (state.num_batches_tracked != nullptr) ++*state.num_batches_tracked;
  const double w = weight_of(state, options);

#pragma omp parallel num_threads(threads_for(tile_work(N, D), threads))
  {
#pragma omp for schedule(dynamic)
    for (int64_t p = 0; p < count; ++p) {
      centre_panel(x, N, D, p, ws);
      for (int64_t i = p * P; i < p * P + width(D, p); ++i)
        if (ws.updated[i]) running_std[i] = keep * running_std[i] + m * ws.s[i];
      invert_panel(running_std, D, p, w, ws);
    }
#pragma omp for schedule(static)
    for (int64_t index = 0; index < tiles; ++index) {
      const TileIndex at = tile_at(index, count);
      Tile<S> tile = make_tile(at, C, D, ws, omp_get_thread_num());
      tile.y_i = ws.y + at.i * N * P;
      tile.y_j = ws.y + at.j * N * P;
      tile.N = N;
      tile.keep = keep;
      tile.gain = S(options.momentum / double(N));
      if (!ws.panel_updated[at.i] || !ws.panel_updated[at.j]) {
        tile.updated_i = ws.updated + tile.i0;
        tile.updated_j = ws.updated + tile.j0;
      }
      tile.stream = stream;
      kernels<S>().update(tile);
    }
#pragma omp for schedule(static)
    for (int64_t p = 0; p < count; ++p) shrink_panel(D, p, w, options, ws);
    const Energies total = total_energies(D, ws);
#pragma omp for schedule(dynamic)
    for (int64_t p = 0; p < count; ++p) {
      write_scale(D, p, total, options.eps, ws, saved_scale + p * P);
      std::copy_n(saved_scale + p * P, width(D, p), scale + p * P);
      S padded[P] = {};
      std::copy_n(saved_scale + p * P, width(D, p), padded);
      kernels<S>().apply(panel_of(x, p), N, width(D, p), padded, panel_of(out, x.dtype, p), D);
    }
  }
}

// (5)-(8) from the statistics as they are, into the workspace.
template <class S>
void inspect_statistics(int64_t D, const State& state, double w, const Options& options, const Workspace<S>& ws) {
  const int64_t count = panels(D), tiles = count * (count + 1) / 2;
#pragma omp for schedule(static)
  for (int64_t p = 0; p < count; ++p) invert_panel(static_cast<const S*>(state.running_std), D, p, w, ws);
#pragma omp for schedule(dynamic)
  for (int64_t index = 0; index < tiles; ++index)
    kernels<S>().inspect(
        make_tile(tile_at(index, count), static_cast<S*>(state.running_cov), D, ws, omp_get_thread_num()));
#pragma omp for schedule(static)
  for (int64_t p = 0; p < count; ++p) shrink_panel(D, p, w, options, ws);
}

template <class S>
void compute_scale_as(int64_t D, const State& state, S* scale, const Options& options, int threads, void* memory) {
  const Workspace<S> ws(Function::compute_scale, 0, D, threads, memory);
  const double w = weight_of(state, options);
#pragma omp parallel num_threads(threads_for(tile_work(0, D), threads))
  {
    inspect_statistics(D, state, w, options, ws);
    const Energies total = total_energies(D, ws);
#pragma omp for schedule(static)
    for (int64_t p = 0; p < panels(D); ++p) write_scale(D, p, total, options.eps, ws, scale + p * P);
  }
}

template <class S>
void apply_scale_as(const Strided& x, int64_t N, int64_t D, const S* scale, void* out, int threads) {
  const int64_t count = panels(D);
#pragma omp parallel for schedule(static) num_threads(threads_for(N * D, threads))
  for (int64_t p = 0; p < count; ++p) {
    S padded[P] = {};
    std::copy_n(scale + p * P, width(D, p), padded);
    kernels<S>().apply(panel_of(x, p), N, width(D, p), padded, panel_of(out, x.dtype, p), D);
  }
}

template <class S>
void train_backward_as(const Strided& dout, const Strided& x, int64_t N, int64_t D, const State& state, const S* scale,
                       void* dx, const Options& options, int threads, void* memory) {
  const Workspace<S> ws(Function::train_backward, N, D, threads, memory);
  const int64_t count = panels(D);
  const double w = weight_of(state, options);
#pragma omp parallel num_threads(threads_for(2 * tile_work(N, D), threads))
  {
    inspect_statistics(D, state, w, options, ws);
#pragma omp for schedule(dynamic)
    for (int64_t p = 0; p < count; ++p) {
      centre_panel(x, N, D, p, ws);
      kernels<S>().dot(panel_of(dout, p), panel_of(x, p), N, width(D, p), ws.g + p * P);
    }
    // A few numbers per feature, in every thread alike up to the barrier: dr needs all of them.
    const Energies total = total_energies(D, ws);
    double dr = 0;
    for (int64_t i = 0; i < D; ++i) dr += double(ws.g[i]) * double(ws.t[i]);
    const EnergyGradient all = energy_gradient(total.E, total.E_prime, dr, options.eps);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < ws.padded; ++i) {
      FeatureGradient of{};
      if (i < D)
        of = feature_gradient(all, ws.g[i], ws.diagonal[i] / w, ws.sigma[i], ws.gamma[i], ws.t[i], options.eps,
                              options.beta);
      ws.dgamma[i] = S(of.dgamma);
      ws.du_gamma[i] = S(of.du_gamma);
      ws.diag[i] = S(of.diagonal);
      ws.padded_scale[i] = i < D ? scale[i] : S(0);
    }
#pragma omp for schedule(dynamic)
    for (int64_t p = 0; p < count; ++p) {
      GradientPanel<S> panel{};
      panel.C = static_cast<const S*>(state.running_cov);
      panel.D = D;
      panel.N = N;
      panel.j0 = p * P;
      panel.wj = width(D, p);
      panel.y = ws.y;
      panel.row_inv = ws.row_inv;
      panel.inv = ws.inv;
      panel.dgamma = ws.dgamma;
      panel.diag = ws.diag;
      panel.du_gamma = ws.du_gamma;
      panel.s = ws.s;
      panel.updated = ws.updated;
      panel.scale = ws.padded_scale;
      panel.pair_gain = S(2.0 / double(D));
      panel.gain = S(options.momentum / (w * double(N)));
      panel.dout = panel_of(dout, p);
      panel.dx = panel_of(dx, x.dtype, p);
      panel.scratch = ws.scratch + omp_get_thread_num() * ws.scratch_size;
      kernels<S>().gradient(panel);
    }
  }
}

// ---- Statistics across ranks ----

template <class S>
void column_sums_as(const Strided& x, int64_t N, int64_t D, double* sums, int threads) {
  sums[0] = double(N);
#pragma omp parallel for schedule(static) num_threads(threads_for(N * D, threads))
  for (int64_t p = 0; p < panels(D); ++p)
    kernels<S>().column_sums(panel_of(x, p), N, width(D, p), sums + 1 + p * P, sums + 1 + D + p * P);
}

template <class S>
void centred_gram_as(const Strided& x, int64_t N, int64_t D, const double* sums, S* gram, int threads, void* memory) {
  const Workspace<S> ws(Function::train_forward, N, D, threads, memory);
  const int64_t count = panels(D), tiles = count * (count + 1) / 2;
#pragma omp parallel num_threads(threads_for(tile_work(N, D), threads))
  {
#pragma omp for schedule(static)
    for (int64_t p = 0; p < count; ++p) {
      double high[P] = {}, low[P] = {};
      for (int j = 0; j < width(D, p); ++j) {
        high[j] = sums[1 + p * P + j] / sums[0];
        if (sizeof(S) == 8) low[j] = sums[1 + D + p * P + j] / sums[0];
      }
      kernels<S>().centre_about(panel_of(x, p), N, width(D, p), high, low, ws.y + p * N * P);
    }
#pragma omp for schedule(static)
    for (int64_t index = 0; index < tiles; ++index) {
      const TileIndex at = tile_at(index, count);
      Tile<S> tile = make_tile(at, static_cast<S*>(nullptr), D, ws, omp_get_thread_num());
      tile.y_i = ws.y + at.i * N * P;
      tile.y_j = ws.y + at.j * N * P;
      tile.N = N;
      kernels<S>().gram(tile, gram);
    }
  }
}

template <class S>
RowOfTiles<S> row_of_tiles(int64_t p, S* C, S* packed, int64_t D) {
  RowOfTiles<S> tiles{};
  tiles.C = C;
  tiles.packed = packed;
  tiles.D = D;
  tiles.i0 = p * P;
  tiles.hi = width(D, p);
  return tiles;
}

template <class S>
void next_state_as(int64_t D, double rows, const State& state, const S* scale, S* gram, S* scale_and_std,
                   const Options& options, int threads, void* memory) {
  const Workspace<S> ws(Function::train_forward, 0, D, threads, memory);
  const int64_t count = panels(D);
  const bool varies = rows >= 2;
  const S m = S(options.momentum), keep = S(1 - options.momentum);
  const S* const running_std = static_cast<const S*>(state.running_std);
  S *const next_scale = scale_and_std, *const next_std = scale_and_std + D;
  const double w =
      options.bias_correction ? correction_weight(options.momentum, double(*state.num_batches_tracked + varies)) : 1.0;
#pragma omp parallel num_threads(threads_for(tile_work(0, D), threads))
  {
#pragma omp for schedule(static)
    for (int64_t p = 0; p < count; ++p) {
      bool all_updated = true;
      for (int64_t i = p * P; i < p * P + width(D, p); ++i) {
        const S s = deviation<S>(double(gram[i * D - i * (i - 1) / 2]), rows);
        ws.updated[i] = varies && is_updated(s);
        all_updated &= ws.updated[i];
        next_std[i] = ws.updated[i] ? keep * running_std[i] + m * s : running_std[i];
      }
      ws.panel_updated[p] = all_updated;
      invert_panel(next_std, D, p, w, ws);
    }
    bool all_updated = true;
    for (int64_t p = 0; p < count; ++p) all_updated &= ws.panel_updated[p];
#pragma omp for schedule(dynamic)
    for (int64_t p = 0; p < count; ++p) {
      RowOfTiles<S> tiles = row_of_tiles(p, static_cast<S*>(state.running_cov), gram, D);
      tiles.keep = keep;
      tiles.gain = S(options.momentum / rows);
      tiles.updated = all_updated ? nullptr : ws.updated;
      tiles.row_inv = ws.row_inv;
      tiles.inv = ws.inv;
      tiles.partial = ws.partial;
      tiles.padded = ws.padded;
      tiles.diagonal = ws.diagonal;
      tiles.scratch = ws.scratch + omp_get_thread_num() * ws.scratch_size;
      kernels<S>().next(tiles);
    }
#pragma omp for schedule(static)
    for (int64_t p = 0; p < count; ++p) shrink_panel(D, p, w, options, ws);
    const Energies total = total_energies(D, ws);
#pragma omp for schedule(static)
    for (int64_t p = 0; p < count; ++p) {
      if (varies || scale == nullptr)
        write_scale(D, p, total, options.eps, ws, next_scale + p * P);
      else
        std::copy_n(scale + p * P, width(D, p), next_scale + p * P);
    }
  }
}

template <class S>
void write_state_as(int64_t D, S* triangle, const S* scale_and_std, const State& state, S* scale, int threads) {
  S* const C = static_cast<S*>(state.running_cov);
#pragma omp parallel for schedule(dynamic) num_threads(threads_for(tile_work(0, D), threads))
  for (int64_t p = 0; p < panels(D); ++p) {
    S scratch[P * P];
    RowOfTiles<S> tiles = row_of_tiles(p, C, triangle, D);
    tiles.stream = streamed(D, C);
    tiles.scratch = scratch;
    kernels<S>().store(tiles);
  }
  if (scale != nullptr) std::copy_n(scale_and_std, D, scale);
  std::copy_n(scale_and_std + D, D, static_cast<S*>(state.running_std));
  if (state.num_batches_tracked != nullptr) ++*state.num_batches_tracked;
}

}  // namespace

size_t workspace_bytes(Function function, DType dtype, int64_t N, int64_t D, int threads) {
  return dtype == DType::float64 ? Workspace<double>(function, N, D, threads, nullptr).bytes
                                 : Workspace<float>(function, N, D, threads, nullptr).bytes;
}

void train_forward(const Strided& x, int64_t N, int64_t D, const State& state, void* scale, void* saved_scale, void* out,
                   const Options& options, int threads, void* workspace) {
  if (x.dtype == DType::float64)
    train_forward_as(x, N, D, state, static_cast<double*>(scale), static_cast<double*>(saved_scale), out, options,
                     threads, workspace);
  else
    train_forward_as(x, N, D, state, static_cast<float*>(scale), static_cast<float*>(saved_scale), out, options, threads,
                     workspace);
}

void compute_scale(DType state_dtype, int64_t D, const State& state, void* scale, const Options& options, int threads,
                   void* workspace) {
  if (state_dtype == DType::float64)
    compute_scale_as(D, state, static_cast<double*>(scale), options, threads, workspace);
  else
    compute_scale_as(D, state, static_cast<float*>(scale), options, threads, workspace);
}

void apply_scale(const Strided& x, int64_t N, int64_t D, const void* scale, void* out, int threads) {
  if (x.dtype == DType::float64)
    apply_scale_as(x, N, D, static_cast<const double*>(scale), out, threads);
  else
    apply_scale_as(x, N, D, static_cast<const float*>(scale), out, threads);
}

void train_backward(const Strided& dout, const Strided& x, int64_t N, int64_t D, const State& state, const void* scale,
                    void* dx, const Options& options, int threads, void* workspace) {
  if (x.dtype == DType::float64)
    train_backward_as(dout, x, N, D, state, static_cast<const double*>(scale), dx, options, threads, workspace);
  else
    train_backward_as(dout, x, N, D, state, static_cast<const float*>(scale), dx, options, threads, workspace);
}

void column_sums(const Strided& x, int64_t N, int64_t D, double* sums, int threads) {
  if (x.dtype == DType::float64)
    column_sums_as<double>(x, N, D, sums, threads);
  else
    column_sums_as<float>(x, N, D, sums, threads);
}

void centred_gram(const Strided& x, int64_t N, int64_t D, const double* sums, void* gram, int threads,
                  void* workspace) {
  if (x.dtype == DType::float64)
    centred_gram_as(x, N, D, sums, static_cast<double*>(gram), threads, workspace);
  else
    centred_gram_as(x, N, D, sums, static_cast<float*>(gram), threads, workspace);
}

void next_state(DType state_dtype, int64_t D, const double* sums, const State& state, const void* scale, void* gram,
                void* scale_and_std, const Options& options, int threads, void* workspace) {
  if (state_dtype == DType::float64)
    next_state_as(D, sums[0], state, static_cast<const double*>(scale), static_cast<double*>(gram),
                  static_cast<double*>(scale_and_std), options, threads, workspace);
  else
    next_state_as(D, sums[0], state, static_cast<const float*>(scale), static_cast<float*>(gram),
                  static_cast<float*>(scale_and_std), options, threads, workspace);
}

void write_state(DType state_dtype, int64_t D, const double* sums, void* triangle, const void* scale_and_std,
                 const State& state, void* scale, int threads) {
  if (!(sums[0] >= 2)) return;
  if (state_dtype == DType::float64)
    write_state_as(D, static_cast<double*>(triangle), static_cast<const double*>(scale_and_std), state,
                   static_cast<double*>(scale), threads);
  else
    write_state_as(D, static_cast<float*>(triangle), static_cast<const float*>(scale_and_std), state,
                   static_cast<float*>(scale), threads);
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (Set set : {Set::baseline, Set::avx2, Set::avx512})
    if (runs_here(set)) names.push_back(set_names[int(set)]);
  return names;
}

std::string instruction_set() { return set_names[int(current_set)]; }

void set_instruction_set(const std::string& name) {
  std::string known;
  for (Set set : {Set::baseline, Set::avx2, Set::avx512}) {
    if (!runs_here(set)) continue;
    if (name == set_names[int(set)]) {
      current_set = set;
      return;
    }
    known += known.empty() ? set_names[int(set)] : std::string(", ") + set_names[int(set)];
  }
  throw std::invalid_argument("the instruction set must be one of " + known + " on this processor, got '" + name + "'");
}

}  // namespace isobn::cpu
