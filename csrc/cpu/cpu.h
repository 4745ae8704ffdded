// The CPU backend: the four functions of isobn_kernels/reference.py on raw pointers. No torch, no Python.
//
// `scale` has the dtype of the state. `workspace` has workspace_bytes(...) bytes, any alignment.
#pragma once

#include <string>
#include <vector>

#include "../types.h"

namespace isobn::cpu {

size_t workspace_bytes(Function function, DType dtype, int64_t N, int64_t D, int threads);

// N >= 2. Updates the state and `scale`; writes `saved_scale` (D,) and `out`, contiguous (N, D).
void train_forward(const Strided& x, int64_t N, int64_t D, const State& state, void* scale, void* saved_scale, void* out,
                   const Options& options, int threads, void* workspace);

void compute_scale(DType state_dtype, int64_t D, const State& state, void* scale, const Options& options, int threads,
                   void* workspace);

void apply_scale(const Strided& x, int64_t N, int64_t D, const void* scale, void* out, int threads);

// N >= 2; `state` as the forward left it.
void train_backward(const Strided& dout, const Strided& x, int64_t N, int64_t D, const State& state, const void* scale,
                    void* dx, const Options& options, int threads, void* workspace);

// Statistics across ranks. A rank may be without rows.
//
// `sums` is what the ranks add up first: their rows, and the sums of the D columns; for float64 those of the high halves
// and then those of the low ones. `gram` comes next: the Gram matrix of x minus the mean that `sums` tells, its upper
// triangle row by row.
void column_sums(const Strided& x, int64_t N, int64_t D, double* sums, int threads);

// Workspace of a train_forward.
void centred_gram(const Strided& x, int64_t N, int64_t D, const double* sums, void* gram, int threads, void* workspace);

// (4)-(9) for the `gram` of all ranks, which becomes the triangle of the new covariance. `scale_and_std` (2, D) becomes
// the new scale and the new deviations. `state` and `scale`, which may be null, are read; the results equal them where
// there are fewer than two rows. Each product and sum of the covariance is rounded once: its bits are those of every
// backend. Workspace of a train_forward without rows.
void next_state(DType state_dtype, int64_t D, const double* sums, const State& state, const void* scale, void* gram,
                void* scale_and_std, const Options& options, int threads, void* workspace);

// Makes that the state, and counts the batch; nothing is written where there are fewer than two rows.
void write_state(DType state_dtype, int64_t D, const double* sums, void* triangle, const void* scale_and_std,
                 const State& state, void* scale, int threads);

// Names of the instruction sets that this processor can run, and the one in use.
std::vector<std::string> instruction_sets();
std::string instruction_set();
void set_instruction_set(const std::string& name);  // throws std::invalid_argument

}  // namespace isobn::cpu
