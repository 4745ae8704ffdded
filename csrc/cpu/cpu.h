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

// Names of the instruction sets that this processor can run, and the one in use.
std::vector<std::string> instruction_sets();
std::string instruction_set();
void set_instruction_set(const std::string& name);  // throws std::invalid_argument

}  // namespace isobn::cpu
