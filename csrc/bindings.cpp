// isobn_kernels._C: the compiled backends, given addresses (Tensor.data_ptr()), sizes and strides. It includes no torch
// header, so that it builds without torch and one build serves every version of it.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>

#include "cpu/cpu.h"

namespace py = pybind11;
using namespace isobn::cpu;

namespace {

using Address = uintptr_t;

void* pointer(Address address) { return reinterpret_cast<void*>(address); }

Strided strided(Address data, int dtype, int64_t row_stride, int64_t col_stride) {
  return {pointer(data), DType(dtype), row_stride, col_stride};
}

State state(Address running_cov, Address running_std, Address num_batches_tracked) {
  return {pointer(running_cov), pointer(running_std), static_cast<int64_t*>(pointer(num_batches_tracked))};
}

std::map<std::string, std::string> build_info() {
  return {
      {"compiler", "g++-compatible " __VERSION__},
      {"openmp", std::to_string(_OPENMP)},
      {"pybind11", PYBIND11_TOSTRING(PYBIND11_VERSION_MAJOR) "." PYBIND11_TOSTRING(PYBIND11_VERSION_MINOR)},
  };
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled backends of isobn_kernels; private.";
  const auto nogil = py::call_guard<py::gil_scoped_release>();

  module.def("workspace_bytes", [](int function, int dtype, int64_t N, int64_t D, int threads) {
    return workspace_bytes(Function(function), DType(dtype), N, D, threads);
  });

  module.def(
      "train_forward",
      [](Address x, int dtype, int64_t row_stride, int64_t col_stride, int64_t N, int64_t D, Address running_cov,
         Address running_std, Address num_batches_tracked, Address scale, Address saved_scale, Address out,
         double momentum, double eps, double beta, bool bias_correction, int threads, Address workspace) {
        train_forward(strided(x, dtype, row_stride, col_stride), N, D,
                      state(running_cov, running_std, num_batches_tracked), pointer(scale), pointer(saved_scale),
                      pointer(out), {momentum, eps, beta, bias_correction}, threads, pointer(workspace));
      },
      nogil);

  module.def(
      "compute_scale",
      [](int dtype, int64_t D, Address running_cov, Address running_std, Address num_batches_tracked, Address scale,
         double momentum, double eps, double beta, bool bias_correction, int threads, Address workspace) {
        compute_scale(DType(dtype), D, state(running_cov, running_std, num_batches_tracked), pointer(scale),
                      {momentum, eps, beta, bias_correction}, threads, pointer(workspace));
      },
      nogil);

  module.def(
      "apply_scale",
      [](Address x, int dtype, int64_t row_stride, int64_t col_stride, int64_t N, int64_t D, Address scale, Address out,
         int threads) {
        apply_scale(strided(x, dtype, row_stride, col_stride), N, D, pointer(scale), pointer(out), threads);
      },
      nogil);

  module.def(
      "train_backward",
      [](Address dout, int64_t dout_row_stride, int64_t dout_col_stride, Address x, int dtype, int64_t row_stride,
         int64_t col_stride, int64_t N, int64_t D, Address running_cov, Address running_std,
         Address num_batches_tracked, Address scale, Address dx, double momentum, double eps, double beta,
         bool bias_correction, int threads, Address workspace) {
        train_backward(strided(dout, dtype, dout_row_stride, dout_col_stride),
                       strided(x, dtype, row_stride, col_stride), N, D,
                       state(running_cov, running_std, num_batches_tracked), pointer(scale), pointer(dx),
                       {momentum, eps, beta, bias_correction}, threads, pointer(workspace));
      },
      nogil);

  module.def("instruction_sets", &instruction_sets, "Instruction sets that this processor can run.");
  module.def("instruction_set", &instruction_set, "The instruction set in use.");
  module.def("set_instruction_set", &set_instruction_set);
  module.def("build_info", &build_info);
}
